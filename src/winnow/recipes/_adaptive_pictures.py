"""Figures of recipes/adaptive.py: accuracy against multiply-adds, and which patches controllers keep.

Winnow's own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import winnow

from .._save import trained_reducer
from .._vlm_model import ask
from ..data.scenes import SPLITS, scene
from ..measure import record
from ..view import files
from ..view.overlay import picture
from ._adaptive_times import Times

SHOWN, CELL = (3, 11), 160
"""Scenes of the pictures, and the height of one in pixels."""


def figure(found: Mapping[str, Mapping[float, record.Row]], plain: record.Row, times: Times) -> Any:
    """Accuracy against multiply-adds, and against measured time where it is known; learned methods whole, others dashed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    chart = Figure(figsize=(14 if times else 9, 5), layout="constrained")
    panels = chart.subplots(1, 2 if times else 1, sharey=True, squeeze=False)[0]
    costs: list[Callable[[record.Row], float | None]] = [_gmacs, partial(_time, times)]
    colours = [colormaps["tab10"](at / 10) for at in range(10)]
    learned, others = zip(colours, cycle("o")), zip(cycle(colours), (mark for mark in "svD^" for _ in colours))
    for name, rows in found.items():
        ordered = [*(rows[budget] for budget in sorted(rows)), plain]
        ours = "(" not in name
        colour, mark = next(learned if ours else others)
        for axes, cost in zip(panels, costs):
            points = [(cost(row), 100 * (row.accuracy.value or 0)) for row in ordered if row.accuracy]
            known = [point for point in points if point[0] is not None]
            if len(known) == 1:  # the plain model alone
                continue
            axes.plot(*zip(*known), color=colour, marker=mark, ms=4, lw=2 if ours else 1, ls="-" if ours else "--",
                      label=f"AdaptiveKeep, {name}" if ours else name)  # fmt: skip
    panels[0].set(xlabel="GMACs up to the first token", ylabel="right answers in %")
    if times:
        panels[1].set(xlabel="time to the first token, plain = 1")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in panels:
        axes.grid(alpha=0.3)
    return chart


def _gmacs(row: record.Row) -> float | None:
    return row.macs.per_image / 1e9 if row.macs else None


def _time(times: Times, row: record.Row) -> float | None:
    """As a share of the plain model's."""
    if row.role == "plain":
        return 1.0
    time = times.get((row.weights, row.method))
    return None if time is None else 1 / time.ratio


@torch.inference_mode()
def pictures(loaded: tuple[Any, Any], runs: Mapping[str, Path], out: Path) -> list[Path]:
    """OUT/adaptive-kept-*.png: of two scenes, what each controller keeps by budget, and by question where it is asked."""
    processor, model = loaded
    made = []
    for name, path in runs.items():
        trained = trained_reducer(path)
        if trained is None or trained.method is None:
            continue
        trained.reduce(model, trained.method)
        try:
            strips = [_strip(processor, model, number, trained.method.facts.needs) for number in SHOWN]
        finally:
            winnow.restore(model)
        wide = max(strip.shape[1] for strip in strips)
        strips = [np.pad(strip, ((0, 6), (0, wide - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
        kind = "".join(letter if letter.isalnum() else "-" for letter in name).replace("--", "-")
        made.append(files.write(out / f"adaptive-kept-{kind}.png", _png(np.concatenate(strips))))
    return made


def _strip(processor: Any, model: Any, number: int, needs: frozenset[str]) -> np.ndarray:
    """One scene: budgets of 1/2, 1/8 and 1/16 with one question; or 1/16 with four."""
    shown = scene(SPLITS["test"][0], number)
    asks = [question for question, _ in shown.questions]
    wishes = (
        [(0.0625, one) for one in asks[:4]] if "question" in needs else [(b, asks[0]) for b in (0.5, 0.125, 0.0625)]
    )
    owners, grid = [], (1, 1)
    for budget, question in wishes:
        inputs = ask(processor, [[Image.fromarray(shown.image)]], [question])
        with winnow.budget(model, budget), winnow.watch(model) as run:
            model(**inputs, logits_to_keep=1)
        owners.append(run.ledger.owner[0].numpy())
        grid = run.grid or grid
    return picture(shown.image, owners, grid, cell=CELL)


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
