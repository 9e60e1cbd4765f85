"""Say how sure an accuracy is: interval, exact paired test, and the hits of a run as a short text.

Wilson (1927), score interval; McNemar (1947), exact binomial form.
"""

from __future__ import annotations

from math import exp, lgamma, log, sqrt
from typing import Any

import numpy as np

from .record import Accuracy, Paired

Z95 = 1.959963984540054


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, `correct` of `n`: (low, high) in [0, 1]."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"wilson({correct}, {n}): needs 0 <= correct <= n and n >= 1")
    share, z2 = correct / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == n else middle + half)


def mcnemar(ours: Any, theirs: Any) -> tuple[int, int, float]:
    """(wins, losses, two-sided p) of two bool arrays [n] on the same images; a win = ours right and theirs wrong."""
    a, b = _bits(ours), _bits(theirs)
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same images: {len(a)} and {len(b)}")
    wins, losses = int((a & ~b).sum()), int((~a & b).sum())
    return wins, losses, _two_sided(min(wins, losses), wins + losses)


def _two_sided(k: int, n: int) -> float:
    """min(1, 2 P(X <= k)) for X ~ Binomial(n, 1/2): the largest term, then ratios of neighbours downwards."""
    if 2 * k >= n:
        return 1.0
    largest = exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2))
    i = np.arange(k, 0, -1, dtype=np.float64)
    return float(min(1.0, 2 * largest * (1 + np.cumprod(i / (n - i + 1)).sum())))


def pack(hits: Any) -> str:
    """A bool array [n] as hexadecimal text, first image in the highest bit, zeros after the last."""
    return np.packbits(_bits(hits)).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
    """The bool array [n] that `pack` wrote; ValueError if the text is not `n` images long."""
    raw = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    bits = np.unpackbits(raw).astype(bool)
    if len(raw) != -(-n // 8) or bits[n:].any():
        raise ValueError(f"{len(text)} hexadecimal digits do not hold the hits of {n} images")
    return bits[:n]


def accuracy_of(
    hits: Any, *, agrees: Any = None, plain: Any = None, baseline: tuple[str, Any] | None = None
) -> Accuracy:
    """The result row's accuracy from bool arrays [n] over the same images.

    hits: top-1 right; agrees: same top-1 as the plain model; plain: the plain model's hits; baseline: spelling and hits
    of the equal-cost baseline.
    """
    right = _bits(hits)
    low, high = wilson(int(right.sum()), len(right))
    return Accuracy(
        value=float(right.mean()),
        low=low,
        high=high,
        agreement=None if agrees is None else float(_bits(agrees).mean()),
        hits=pack(right),
        vs_plain=None if plain is None else _paired("plain", right, plain),
        vs_baseline=None if baseline is None else _paired(baseline[0], right, baseline[1]),
    )


def _paired(against: str, ours: np.ndarray, theirs: Any) -> Paired:
    wins, losses, p = mcnemar(ours, theirs)
    return Paired(against=against, wins=wins, losses=losses, p=p)


def macro_f1(confusion: Any) -> float:
    """Mean F1 over the classes that occur, from counts [C, C] (row: label, column: answer)."""
    table = np.asarray(confusion, dtype=np.float64)
    right, wanted, given = np.diag(table), table.sum(1), table.sum(0)
    there = (wanted + given) > 0
    return float((2 * right[there] / (wanted + given)[there]).mean())


def _bits(values: Any) -> np.ndarray:
    bits = np.asarray(values)
    if bits.dtype != np.bool_ or bits.ndim != 1:
        raise TypeError(f"needs a bool array [n], one per image; got {bits.dtype} {[*bits.shape]}")
    return bits
