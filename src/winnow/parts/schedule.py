"""How a setting moves while training goes on: pure functions of the share of training done.

Polynomial: document 003 (Curriculum Token Drop), 2025; cosine: EViT (Liang et al., 2022).
"""

from __future__ import annotations

import math

SHAPES = ("polynomial", "linear", "cosine", "step")
"""Linear, cosine and step have the same mean over the way, one half; polynomial has 1 / (gamma + 1)."""


def way(progress: float, from_: float, to: float, epochs: int | None = None) -> float:
    """Share of the way from `from_` to `to`, 0 before and 1 after; all three are shares of training.

    epochs: training has so many, and the way moves once in each, by whole epochs counted from 0.
    """
    if epochs is None:
        now, first, last = progress, from_, to
    else:
        # progress is a step divided by all steps, so a whole epoch may be a rounding error short
        now, first, last = math.floor(progress * epochs + 1e-6), round(from_ * epochs), round(to * epochs)
    if now >= last:
        return 1.0
    return 0.0 if now < first else (now - first) / (last - first)


def bend(shape: str, t: float, gamma: float = 1.0) -> float:
    """The share of the change that is done after a share t of the way; 0 at 0 and 1 at 1."""
    if shape == "cosine":
        return (1 - math.cos(math.pi * t)) / 2
    if shape == "step":
        return float(t >= 0.5)
    return t if shape == "linear" else t**gamma


def plateau(share: float, plateaus: int) -> int:
    """The nearest of so many evenly spaced shares, the first 0 and the last 1, as its index."""
    return math.floor(share * (plateaus - 1) + 0.5)


def between(start: float, final: float, share: float) -> float:
    """`start` at share 0, `final` at share 1, both exactly."""
    return final if share >= 1 else start + share * (final - start)
