"""Losses that hold the share of boundaries (or of kept tokens) near a rate.

Prior: Dynamic Token Pooling (Nawrot et al., 2023); lower bound and interval: DRIP (Peng and Kumar, 2025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def prior(count: Tensor, n: Tensor, rate: float) -> Tensor:
    """Minus the log-probability per token that Binomial(n, rate) gives to count [B] of n [B]; differentiable in count.

    The count must be hard (0 or 1 each, with a straight-through gradient): a rounded sum of soft ones has no gradient.
    """
    ways = torch.lgamma(n + 1) - torch.lgamma(count + 1) - torch.lgamma(n - count + 1)
    return -((ways + count * math.log(rate) + (n - count) * math.log1p(-rate)) / n).mean()


def lower_bound(share: Tensor, rate: float) -> Tensor:
    """How far shares [B] are above the rate less their standard deviation over the batch; nothing below."""
    return (share - (rate - share.std(correction=0))).relu().mean()


def interval(share: Tensor, low: float, high: float) -> Tensor:
    """How far shares [B] are outside low to high."""
    return ((share - high).relu() + (low - share).relu()).mean()
