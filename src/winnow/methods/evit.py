"""EViT: keep the tokens the class token attends to, fuse the others into one.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..parts.amount import Amount, Keep
from ..parts.choose import top
from ..parts.combine import drop, places, total
from ..parts.score import attention, attention_facts, check_attention
from ..reducer import Facts, Reducer, Setting, Signals
from ..tokens import Tokens
from ._sites import AtLayers


class EViTReducer(Reducer):
    """The fused token is the attention-weighted sum of the dropped ones; its weights are not normalised (paper's code)."""

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        assert isinstance(self.method, EViT)
        n, kept = tokens.n, self.method.kept(tokens.n, layer, self.patches)
        if kept == n:
            return tokens
        score = attention(signals, self.method.attention)
        more = {"score": score} if signals.watched else {}
        index = top(score, kept)
        if not self.method.fuse:
            return drop(tokens, index, **more)
        here = torch.arange(n, device=index.device).expand(score.shape)
        lost = torch.ones_like(score, dtype=torch.bool).scatter(1, index, False)
        host = lost.int().argmax(1, keepdim=True)  # the fused token stands where the first dropped one stood
        move = places(torch.where(lost, host, here))
        x = total(tokens.x, torch.where(lost, score, 1.0), move, kept + 1)
        return tokens.moved(x, move, kept + 1, **more)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        return attention_macs(self.method.attention, n, setting)  # type: ignore[attr-defined]


def attention_macs(kind: str, n: int, setting: Setting) -> float:
    """MACs of scoring n patch tokens: one query row for "cls", all query rows for "received"."""
    keys = n + setting.prefix
    return keys * setting.width * (1 if kind == "cls" else keys)


@dataclass(frozen=True, repr=False)
class EViT(AtLayers):
    """Drop and fuse by attention at a few blocks; `fuse` keeps one token for all that is dropped."""

    keep: Amount | tuple[Amount, ...] = Keep(0.7)
    layers: tuple[int, ...] = (3, 6, 9)
    fuse: bool = True
    attention: str = "cls"
    reducer = EViTReducer

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attention("EViT", self.attention)

    @property
    def facts(self) -> Facts:
        return attention_facts(self.attention, combine="other" if self.fuse else "none")

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """ceil(keep * n), plus the fused token where any is dropped."""
        kept = super().count(n, layer, patches)
        return kept if kept == n else kept + int(self.fuse)
