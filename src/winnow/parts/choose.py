"""Which tokens stay.

Winnow's own; every choice is a list of indices in raster order, so survivors never change places.
"""

from __future__ import annotations

import math

import torch
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


def most_likely(score: Tensor, m: int, among: Tensor) -> Tensor:
    """[B, N] bool: at most m of the tokens in `among` [B, N], those with the highest score."""
    ranked = score.masked_fill(~among, float("-inf")).topk(m, dim=1).indices
    return among & among.new_zeros(among.shape).scatter(1, ranked, True)


def evenly(n: int, m: int, device: torch.device) -> Tensor:
    """[N] bool: the last tokens of m runs that are as equally long as can be."""
    ends = torch.tensor([-(-(i + 1) * n // m) - 1 for i in range(m)], device=device)
    return torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, ends, True)


def relaxed(logit: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws with P(1) = sigmoid(logit): soft [B, N] (relaxed Bernoulli) and hard, 0 or 1 with the soft one's gradient.

    Maddison et al., "The Concrete Distribution", ICLR 2017, with uniform noise [B, N] in [0, 1).
    """
    tiny = torch.finfo(torch.float32).eps
    edge = math.log((1 - tiny) / tiny)
    soft = ((noise.clamp(tiny, 1 - tiny).logit() + logit.clamp(-edge, edge)) / temperature).sigmoid()
    return soft, (soft > 0.5).to(soft.dtype) - soft.detach() + soft
