"""Which tokens stay.

Winnow's own; every choice is a list of indices in raster order, so survivors never change places.
"""

from __future__ import annotations

from torch import Tensor


def top(score: Tensor, m: int) -> Tensor:
    """[B, M] indices of the m highest of score [B, N], ascending."""
    return score.topk(m, dim=1).indices.sort(dim=1).values


def above(score: Tensor, limit: Tensor, valid: Tensor | None) -> Tensor:
    """[B, N] bool: score strictly above limit [B, 1] and real; the highest token of an image always stays."""
    if valid is not None:
        score = score.masked_fill(~valid, float("-inf"))
    keep = (score > limit) & (score > float("-inf"))
    best = keep.new_zeros(keep.shape).scatter(1, score.argmax(1, keepdim=True), True)
    return keep | (best & ~keep.any(1, keepdim=True))
