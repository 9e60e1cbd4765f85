"""The figures of DRIP's page: architecture, boundary ratio by step, boundary rates per image, strips under one another.

Winnow's own; the architecture is documents 000 and 001's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..view.curves import COLOURS, INK, MUTED

PALE = ("#cfe3f2", "#f7dfcc", "#cdeae0", "#f3e0ec", "#f9ecca")


def _sheet(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = sheet.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return sheet, axes


def architecture(grid: int = 7, rate: float = 0.1) -> Any:
    """Patches, blocks before, predictor and boundaries, segment means, blocks after, pooling and head."""
    sheet, axes = _sheet(10, 2.7)
    axes.set(xlim=(0, 100), ylim=(0.5, 26))
    axes.axis("off")
    n, ends = grid * grid, (5, 16, 25, 37, 48)
    stages = (
        (1, 13, "patches", f"{n} tokens\n(+ class token)"),
        (18, 12, "2 pre-layers", f"{n} tokens"),
        (34, 15, "boundary predictor", "C to 2C to 1, per token"),
        (53, 13, "segment means", f"{len(ends)} tokens"),
        (70, 12, "10 short layers", f"{len(ends)} tokens"),
        (86, 13, "pooling, head", "mean by size\n+ class token apart"),
    )
    for i, (left, width, title, below) in enumerate(stages):
        _box(axes, left, width, title, below, COLOURS[i % 3])
        if i:
            before = stages[i - 1]
            arrow = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.2}
            axes.annotate("", (left - 0.3, 22), (before[0] + before[1] + 0.3, 22), arrowprops=arrow)
    _raster(axes, n, ends)
    words = (
        f"training: drawn, P = sigmoid, straight-through; evaluation: the ceil({n} x {rate}) = {len(ends)} most likely"
    )
    axes.text(50, 2.2, words, ha="center", fontsize=9, color=INK)
    axes.text(
        50, 9.4, "raster order; a bar ends a segment, the last patch always does", ha="center", fontsize=9, color=INK
    )
    return sheet


def _box(axes: Any, left: float, width: float, title: str, below: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0.2,rounding_size=0.8"
    axes.add_patch(
        FancyBboxPatch((left, 19), width, 6, boxstyle=style, facecolor="white", edgecolor=colour, linewidth=1.6)
    )
    axes.text(left + width / 2, 22, title, ha="center", va="center", fontsize=9, color=INK, weight="bold")
    axes.text(left + width / 2, 17.6, below, ha="center", va="top", fontsize=8, color=MUTED)


def _raster(axes: Any, n: int, ends: Sequence[int]) -> None:
    """The patches in a row, coloured by segment, a bar where one ends."""
    from matplotlib.patches import Rectangle

    side, segment = 98 / n, 0
    for i in range(n):
        colour = PALE[segment % len(PALE)]
        axes.add_patch(Rectangle((1 + i * side, 4.6), side, 3.4, facecolor=colour, edgecolor="white", linewidth=0.8))
        if i in ends:
            axes.plot([1 + (i + 1) * side] * 2, [4.2, 8.4], color=INK, linewidth=2.2, solid_capstyle="butt")
            segment += 1


def rates(curves: Mapping[str, tuple[float, Sequence[float], Sequence[float]]]) -> Any:
    """Boundary ratio by step for each run (rate, steps, ratios); its rate dashed."""
    sheet, axes = _sheet(7, 4)
    for i, (name, (rate, steps, found)) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        axes.axhline(rate, color=colour, linestyle=(0, (4, 3)), linewidth=1)
        again = "--" if i >= len(COLOURS) else "-"
        axes.plot(steps, found, again, color=colour, linewidth=1.6, label=f"{name}, rate {rate:g}")
    axes.set(xlabel="step", ylabel="boundaries per patch", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1))
    return sheet


def histogram(found: Mapping[str, tuple[float, np.ndarray]]) -> Any:
    """Expected boundary rate per image for each run (rate, shares [n]); rate dashed, lower bound dotted."""
    sheet, axes = _sheet(7, 4)
    for i, (name, (rate, shares)) in enumerate(found.items()):
        colour = COLOURS[i % len(COLOURS)]
        axes.hist(
            shares, bins=30, color=colour, alpha=0.45, label=f"{name}: mean {shares.mean():.3f}, sd {shares.std():.3f}"
        )
        axes.axvline(rate, color=colour, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.axvline(rate - shares.std(), color=colour, linestyle=(0, (1, 2)), linewidth=1.6)
    axes.set(xlabel="expected boundary rate of an image\n(dashed: rate; dotted: lower bound)", ylabel="images")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1))
    return sheet


def stacked(strips: Sequence[np.ndarray], gap: int = 8) -> bytes:
    """PNG of strips [H, W, 3] uint8 of one width under one another."""
    white = np.full((gap, strips[0].shape[1], 3), 255, np.uint8)
    rows = [part for strip in strips for part in (strip, white)][:-1]
    out = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(out, "PNG")
    return out.getvalue()
