"""PruMerge: keep the image features the class token attends to, add what resembles them, sum the rest into one more.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import rows
from ..parts.amount import Amount, check_amounts
from ..parts.choose import top
from ..parts.combine import places, take
from ..parts.score import ATTENTION, check_attention
from ..reducer import Facts, Method, Reducer, Setting, Signals
from ..tokens import Tokens
from .grid import bayer

NEAREST = 32
"""Tokens added to each kept one (paper, section 3.3)."""
FENCE = 1.5
"""A score is an outlier so many interquartile ranges above the third quartile (paper, section 3.2)."""
FILL = 3
"""PruMerge+ adds so many evenly spread tokens for each outlier (paper, section 3.4)."""


@dataclass(frozen=True, repr=False)
class PruMerge(Method):
    """`keep=None`: as many tokens as scores are outliers, image by image; `plus` adds evenly spread ones.

    keep: tokens in all, the one that sums up the rest included. compat="reference" counts as the authors' code does: one
    share for the whole batch, and PruMerge+ fills every s-th place of the raster, which fails above a third.
    """

    keep: Amount | None = None
    plus: bool = False
    attention: str = "cls"
    compat: str | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_amounts("PruMerge", "keep", self.keep, Amount.__args__, (0,))  # type: ignore[attr-defined]
        check_attention("PruMerge", self.attention)
        if self.compat not in (None, "reference"):
            raise ValueError(f'PruMerge(compat={self.compat!r}): compat must be None or "reference"')
        if self.compat and self.keep is not None:
            raise ValueError('PruMerge: compat="reference" is about the adaptive count; leave keep out')

    @property
    def facts(self) -> Facts:
        cls = self.attention == "cls"
        needs = {"keys", ATTENTION[self.attention], *(["queries"] if cls else [])}
        # features often come out of the last block of a tower without class token, where no block reads them next
        return Facts(
            static=self.keep is not None,
            combine="other",
            needs=frozenset(needs),
            where="tower",
            ahead=int(cls),
        )

    @property
    def known_failures(self) -> Mapping[str, str]:
        """Checks of the contract that the authors' count cannot pass, and why."""
        coupled = "the share of outliers is counted over the whole batch"
        return {"reducer_ignores_batch_mates": coupled} if self.compat else {}

    def sites(self, depth: int) -> tuple[int, ...]:
        return (0,)

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """What `keep` says; n, where the image says."""
        return n if self.keep is None else self.keep.count(n, patches)

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return PruMergeReducer(self, patches, prefix)


class PruMergeReducer(Reducer):
    """Attention and likeness are of all heads as one, as in the paper; what is added is weighted by its attention."""

    method: PruMerge

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        n, m = tokens.n, self.count(tokens.n, layer)
        if self.method.facts.static and m == n:
            return tokens
        valid = tokens.ledger.valid
        real = torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device) if valid is None else valid
        score = self._score(signals)
        kept = self._fixed(tokens, score, m) if self.method.facts.static else self._adaptive(tokens, score, real)
        assert signals.k is not None
        more = {"score": score} if signals.watched else {}
        return _merge(tokens, kept, real, score, _wide(signals.k), m if self.method.facts.static else None, more)

    def _score(self, signals: Signals) -> Tensor:
        """[B, N] float32"""
        if self.method.attention == "received":
            assert signals.received is not None
            return signals.received.float()
        assert signals.cls_q is not None and signals.cls_k is not None and signals.k is not None
        keys = torch.cat([signals.cls_k.flatten(1)[:, None], _wide(signals.k)], 1)
        return rows(signals.cls_q.flatten(1)[:, None, None], keys[:, None], None)[:, 0, 0, 1:]

    def _fixed(self, tokens: Tokens, score: Tensor, m: int) -> Tensor:
        """[B, N] bool: m-1 tokens, half of them evenly spread for PruMerge+."""
        kept = torch.zeros_like(score, dtype=torch.bool)
        outliers = m // 2 if self.method.plus else m - 1
        kept = kept.scatter(1, top(score, outliers), True)
        if self.method.plus:
            free = _spread(tokens).masked_fill(kept, -torch.inf)
            kept = kept.scatter(1, top(free, m - 1 - outliers), True)
        return kept

    def _adaptive(self, tokens: Tokens, score: Tensor, real: Tensor) -> Tensor:
        """[B, N] bool: the outliers, at least one, and for PruMerge+ FILL times as many, evenly spread."""
        if self.method.compat:
            return self._reference(score) & real
        known = score.masked_fill(~real, torch.nan)
        q1, q3 = known.nanquantile(torch.tensor([0.25, 0.75], device=score.device), dim=1, keepdim=True)
        best = score.masked_fill(~real, -torch.inf).argmax(1, keepdim=True)
        kept = ((score > q3 + FENCE * (q3 - q1)) & real).scatter(1, best, True)
        if self.method.plus:
            rank = (-_spread(tokens).masked_fill(~real, -torch.inf)).argsort(dim=1).argsort(dim=1)
            kept = (kept | (rank < FILL * kept.sum(1, keepdim=True))) & real
        return kept

    def _reference(self, score: Tensor) -> Tensor:
        n = score.shape[1]
        q1, q3 = score.flatten().quantile(torch.tensor([0.25, 0.75], device=score.device))
        share = int((score > q3 + FENCE * (q3 - q1)).sum()) / score.numel()
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, top(score, int(n * share)), True)
        if self.method.plus:
            stride = int(int(1 / share) / FILL) if share else 0
            if not stride:
                raise ValueError(
                    f'{share:.3f} of the scores are outliers: compat="reference" has no stride for that share'
                )
            kept[:, torch.arange(0, n - 1, stride, device=score.device)] = True
        return kept

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """Scores, likeness of the kept to all, and the weighted sums; an adaptive count is taken as n."""
        m = self.count(n, layer)
        if self.method.facts.static and m == n:
            return 0.0
        scoring = (n + 1) * setting.width * (1 if self.method.attention == "cls" else n + 1)
        return scoring + 2.0 * m * n * setting.width


def _merge(
    tokens: Tokens, kept: Tensor, real: Tensor, score: Tensor, keys: Tensor, m: int | None, more: dict
) -> Tokens:
    """Each kept token plus its nearest, and the rest as one; m places, or n and padding where the image decides."""
    x, n = tokens.x, tokens.n
    weight = score.masked_fill(~real, 0.0)
    width = int(kept.sum(1).max()) if m is None else m - 1
    index = (~kept).int().argsort(dim=1, stable=True)[:, :width]
    grown = take(x, index) + _nearest(keys, index, weight, real).to(x.dtype) @ x
    rest = real & ~kept
    extra = (weight * rest)[:, None].to(x.dtype) @ x

    here = torch.arange(n, device=x.device).expand_as(kept)
    host = rest.int().argmax(1, keepdim=True)  # the one for the rest stands where the first of them stood
    home = torch.where(kept, here, host)
    if m is not None:
        move = places(home)
        out = x.new_zeros(len(x), m, x.shape[2])
    else:
        move, out = home.masked_fill(~real, -1), x
        extra = torch.where(rest.any(1)[:, None, None], extra, take(x, host))
    out = _put(out, move.gather(1, host) if m is not None else host, extra)
    out = _put(out, move.gather(1, index) if m is not None else index, grown, kept.gather(1, index))
    valid = None if m is not None else kept | (rest & (here == host))
    emitted = score.masked_fill(~kept, -1.0).argsort(dim=1, descending=True)[:, :width]
    order = torch.cat([move.gather(1, emitted), move.gather(1, host)], 1)
    return tokens.moved(out, move, n if m is None else m, valid, order=order, **more)


def _put(x: Tensor, at: Tensor, rows: Tensor, where: Tensor | None = None) -> Tensor:
    """x [B, N, C] with `rows` [B, M, C] at places `at` [B, M], those not `where` left as they are."""
    if where is not None:
        rows = torch.where(where[..., None], rows, take(x, at))
    return x.scatter(1, at[..., None].expand_as(rows), rows)


def _nearest(keys: Tensor, index: Tensor, weight: Tensor, real: Tensor) -> Tensor:
    """[B, M, N] weight of each token in what is added to tokens `index` [B, M]: its own where it is among the nearest."""
    unit = F.normalize(keys.float(), dim=-1)
    alike = (take(unit, index) @ unit.transpose(1, 2)).masked_fill(~real[:, None], -torch.inf)
    alike = alike.scatter(2, index[..., None], -torch.inf)
    near = alike.topk(min(NEAREST, keys.shape[1] - 1), dim=2).indices
    own = weight[:, None].expand_as(alike)
    return torch.zeros_like(own).scatter(2, near, own.gather(2, near))


def _wide(k: Tensor) -> Tensor:
    """[B, N, H*D] of keys [B, H, N, D]."""
    return k.transpose(1, 2).flatten(2)


def _spread(tokens: Tokens) -> Tensor:
    """[B, N] the highest m of it are evenly spread, for every m."""
    h, w = tokens.grid or (1, tokens.ledger.owner.shape[1])
    return -bayer(h, w).to(tokens.x.device, torch.float32)[tokens.ledger.first().clamp_max(h * w - 1)]
