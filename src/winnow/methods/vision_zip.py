"""VisionZip: keep the image features the class token attends to, and itself; merge the others into a few contextual ones.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.amount import Amount, Keep
from ..parts.choose import top
from ..parts.combine import places, total
from ..parts.score import ATTENTION, attention, check_attention
from ..parts.settings import check_number
from ..reducer import Facts, Reducer, Setting, Signals
from ..tokens import Tokens
from ._at_tower import NINTH, AtTower
from .evit import attention_macs
from .tome import match

CONTEXTUAL = 10 / 64
"""Share of contextual tokens in the paper's budgets: 10 of 64, 20 of 128, 30 of 192."""


class VisionZipReducer(Reducer):
    """A contextual token is its target's features plus the mean of those most like it: a sum, as in the paper."""

    method: VisionZip

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        n, m = tokens.n, self.count(tokens.n, layer)
        if m == n:
            return tokens
        contextual, cls, score = *self._parts(m), attention(signals, self.method.attention)
        assert signals.k is not None
        group, joins, emitted = _groups(score, signals.k.mean(1), m - contextual - cls, contextual)
        move = places(group)
        joined = torch.zeros_like(joins, dtype=torch.float32).scatter_add(1, group, joins.float()).gather(1, group)
        x = total(tokens.x, torch.where(joins, 1 / joined.clamp_min(1), 1.0), move, m - cls)
        order = move.gather(1, emitted)
        if cls:
            assert signals.cls is not None
            x = torch.cat([signals.cls[:, None].to(x.dtype), x], 1)
            move, order = move + 1, torch.nn.functional.pad(order + 1, (1, 0))
        return tokens.moved(x, move, m, order=order, score=score if signals.watched else None)

    def _parts(self, m: int) -> tuple[int, int]:
        """How many of m tokens are contextual, and whether the class token is another."""
        contextual = self.method.contextual
        contextual = min(m, max(1, round(CONTEXTUAL * m)) if contextual is None else contextual)
        return contextual, int(self.method.attention == "cls" and m > contextual)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """The attention read, and the likeness of keys, averaged over heads, to the targets."""
        m = self.count(n, layer)
        if m == n:
            return 0.0
        contextual, cls = self._parts(m)
        rest = n - (m - contextual - cls)
        likeness = (rest - contextual) * contextual * (setting.width // setting.heads)
        return attention_macs(self.method.attention, n, setting) + likeness


def _groups(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N] the token each joins (itself, or a target), whether it joins another, and those that none other absorbs.

    score [B, N], keys [B, N, D]; targets are evenly spaced among the tokens that are not dominant.
    """
    b, n = score.shape
    chosen = top(score, dominant)
    rest = torch.zeros_like(score).scatter(1, chosen, 1.0).argsort(dim=1, stable=True)[:, : n - dominant]
    step = max(1, (n - dominant) // contextual)
    target = torch.zeros(n - dominant, dtype=torch.bool, device=score.device)
    target[torch.arange(0, n - dominant, step, device=score.device)[:contextual]] = True
    targets, joining = rest[:, target], rest[:, ~target]
    _, partner = match(keys.detach().float(), joining, targets)
    group = torch.arange(n, device=score.device).expand(b, n).scatter(1, joining, targets.gather(1, partner))
    joins = torch.zeros_like(score, dtype=torch.bool).scatter(1, joining, True)
    return group, joins, torch.cat([chosen, targets], 1)


@dataclass(frozen=True, repr=False)
class VisionZip(AtTower):
    """`keep` counts all: the class token, those it attends to, and `contextual` merged ones (None: 10 in 64).

    With attention="received" there is no class token among them.
    """

    keep: Amount = Keep(NINTH)
    contextual: int | None = None
    attention: str = "cls"
    reducer = VisionZipReducer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None:
            check_number("VisionZip", "contextual", self.contextual, 1, whole=True)
        check_attention("VisionZip", self.attention)

    @property
    def facts(self) -> Facts:
        needs = {"keys", ATTENTION[self.attention], *(["cls"] if self.attention == "cls" else [])}
        return Facts(where="tower", combine="other", needs=frozenset(needs))

    @property
    def known_failures(self) -> Mapping[str, str]:
        """Checks of the contract that the class token, which is no patch, cannot pass."""
        reason = "the class token stands in front and holds no patch"
        return (
            dict.fromkeys(("ledger_is_sound", "survivors_in_raster_order"), reason) if self.attention == "cls" else {}
        )

    def check(self, setting: Setting) -> None:
        super().check(setting)
        m = self.count(setting.patches, 0) if setting.patches else None
        if self.contextual is not None and m is not None and self.contextual > m:
            raise ValueError(f"{self}: {self.contextual} contextual tokens of {m} in all; at most {m}")
