"""DRIP's page: its architecture, the rate in training, boundary rates per image, objects, rate losses, boundary pictures.

Documents 000 and 001 (DRIP), 2025. `winnow report drip --out docs`: a minute for what needs no training; each run in `runs/`
that was trained with DRIP (`winnow train scenes_drip`, `winnow train drip_tiny16`, ...) adds its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import winnow

from .._parse import parse
from .._reduce import seat_of
from ..data import Images, open_images
from ..data.scenes import patch_objects
from ..measure import record
from ..methods.drip import DRIP
from ..view import files
from ..view.overlay import picture
from ..view.sheets import photograph
from . import _drip_figures as figures
from . import _drip_objects as objects
from ._drip_runs import Trained, read, untrained, validation

Say = Callable[[str], object]
RUNS = Path("runs")
SHOWN = ("chelsea-0", "coffee-0", "astronaut-0", "rocket-0")
"""Photographs of the pictures: whole, with scikit-image."""
CELL = 224


@dataclass(frozen=True)
class Wish:
    """Which photographs the pictures are made of."""

    data: str = "photographs"


def write(wish: Wish, results: Path, out: Path, say: Say = lambda words: None) -> list[Path]:
    """OUT/drip.md and its figures, from nothing, from the runs there are, and from their rows."""
    runs = [run for folder in sorted(RUNS.glob("*/best.safetensors")) if (run := read(folder.parent)) is not None]
    made = [*_both(figures.architecture(), out / "drip-architecture")]
    parts = [HEAD.format(command="winnow report drip --out docs")]
    for heading, make in (("rate", _rates), ("histogram", _histogram), ("objects", _objects), ("pictures", _pictures)):
        say(heading)
        text, paths = make(runs, out, wish) if runs else ("", [])
        parts += [text] if text else []
        made += paths
    parts.append(_outcomes(results.parent / "train.jsonl"))
    parts.append(_steps(results.parent / "measure.jsonl"))
    return [files.write(out / "drip.md", "\n".join(part for part in parts if part).encode()), *made]


def _both(chart: Any, path: Path) -> list[Path]:
    return [files.write(path.with_suffix(f".{form}"), files.encode(chart, form)) for form in ("svg", "png")]


def _rates(runs: list[Trained], out: Path, wish: Wish) -> tuple[str, list[Path]]:
    """Boundary ratio by step, against each run's rate."""
    curves = {}
    for run in runs:
        steps = [line for line in run.lines if line["event"] == "step" and "boundary_ratio" in line]
        curves[run.name] = (run.rate, [line["step"] for line in steps], [line["boundary_ratio"] for line in steps])
    lines = [
        f"| {name} | {rate} | {np.mean(found[-max(1, len(found) // 4) :]):.3f} |"
        for name, (rate, _, found) in curves.items() if found
    ]  # fmt: skip
    made = _both(figures.rates(curves), out / "drip-rate")
    table = "| run | rate | boundary ratio, last quarter |\n|:--|--:|--:|\n" + "\n".join(lines)
    return f"## The rate is held in training\n\n{table}\n\n![Boundary ratio by step](drip-rate.svg)\n", made


def _histogram(runs: list[Trained], out: Path, wish: Wish) -> tuple[str, list[Path]]:
    """Expected boundary rate per image, with the rate and the lower bound."""
    found = {run.name: (run.rate, run.seen.shares) for run in runs}
    made = _both(figures.histogram(found), out / "drip-shares")
    return SHARES, made


def _objects(runs: list[Trained], out: Path, wish: Wish) -> tuple[str, list[Path]]:
    """On images with object masks: do segments end where objects do, more than even or random ones?"""
    found = {}
    for run in runs:
        if not _masked(run):
            continue
        images = validation(run)
        seen, before = run.seen, untrained(run).seen
        things = np.stack([patch_objects(images.mask(i), seen.grid) for i in range(len(images))])  # type: ignore[arg-type]
        kinds = {"learned": seen.owners, "untrained": before.owners, **objects.rivals(seen.owners)}
        found[run.name] = {kind: objects.intervals(owners, things) for kind, owners in kinds.items()}
    return (objects.section(found), []) if found else ("", [])


def _masked(run: Trained) -> bool:
    """Its validation images have object masks, and are seen as they are, not resized or cropped."""
    mask = validation(run).mask(0)
    return mask is not None and mask.shape == run.loaded.size


def _pictures(runs: list[Trained], out: Path, wish: Wish) -> tuple[str, list[Path]]:
    """Per grid: one picture at every rate side by side, and several pictures at the lowest rate."""
    photographs, parts, made = open_images(wish.data), [], []
    for grid in sorted({_grid(run) for run in runs}):
        own = sorted((run for run in runs if _grid(run) == grid), key=lambda run: -run.rate)
        # what learned on scenes says nothing about photographs
        images = validation(own[0]) if _masked(own[0]) else photographs
        chosen = [i for i in range(len(images)) if images.key(i) in SHOWN] or list(range(min(len(SHOWN), len(images))))
        for label, pairs in {
            "rates": [(run, chosen[0]) for run in own],
            "images": [(min(own, key=lambda run: run.rate), i) for i in chosen],
        }.items():
            strips, captions = zip(*(_strip(run, images, i) for run, i in pairs))
            path = out / f"drip-boundaries-{grid[0]}x{grid[1]}-{label}.png"
            made.append(files.write(path, figures.stacked(strips)))
            parts.append(f"![Boundaries]({path.name})\n\n" + "\n".join(f"- {caption}" for caption in captions) + "\n")
    head = "The picture, the patches that end a segment, and the segments in their mean colours.\n\n"
    return "## Boundaries in pictures\n\n" + head + "\n".join(parts), made


def _grid(run: Trained) -> tuple[int, int]:
    grid = seat_of(run.loaded.model).setting.grid
    assert grid is not None
    return grid


@torch.inference_mode()
def _strip(run: Trained, images: Images, i: int) -> tuple[np.ndarray, str]:
    """uint8 [H, W, 3] and its caption."""
    pixels: Tensor = run.loaded.transform(images[i][0])[None]
    with winnow.watch(run.loaded.model) as seen:
        run.loaded.model(pixels)
    owner = seen.ledger.owner[0].numpy()
    ends = np.diff(owner, append=owner.max() + 1) > 0
    shown = photograph(pixels, run.loaded.mean, run.loaded.std)[0]
    strip = picture(shown, [np.where(ends, np.arange(len(owner)), -1), owner], seen.grid, "auto", CELL)
    h, w = seen.grid
    what = f"`{run.name}` ({run.recipe.model.name}, `{run.method}`), {h}x{w}"
    return strip, f"{images.key(i)}, {what}: {ends.sum()} of {h * w}"


def _outcomes(rows: Path) -> str:
    """The table of what became of each training: the newest row of each recipe and method."""
    newest = {
        (row.train.recipe, row.method or row.model): row for row in (record.read(rows) if rows.exists() else [])
        if row.train is not None and row.train.best is not None
    }  # fmt: skip
    lines = []
    for (recipe, method), row in newest.items():
        assert row.train is not None and row.train.best is not None
        share = row.train.figures.get("boundary_ratio")
        ratio = "–" if share is None else f"{share:.3f}"
        minutes, seconds = divmod(round(row.train.runtime_s), 60)
        lines.append(f"| {recipe} | `{method}` | {row.train.best:.1%} | {ratio} | {minutes} min {seconds:02d} s |")
    return OUTCOMES.format(table="\n".join(lines)) if lines else ""


def _steps(rows: Path) -> str:
    """The table of training steps timed beside the plain model's: the newest row of each model and rate."""
    newest = {
        (row.model, row.method): row for row in (record.read(rows) if rows.exists() else [])
        if row.step is not None and row.task == "step" and isinstance(parse(row.method or "Random()"), DRIP)
    }  # fmt: skip
    lines = []
    for row in newest.values():
        step = row.step
        assert step is not None
        time, promised = step.latency, step.promised or float("nan")
        lines.append(
            f"| {row.model} | `{row.method}` | {step.tokens[0]} -> {step.tokens[-1]} | {promised:.2f} | {time.ratio:.2f} "
            f"({time.low:.2f} to {time.high:.2f}) | {time.ratio / promised:.2f} | {time.null:.2f} | "
            f"{step.mib / step.plain_mib:.2f} |"
        )
    return STEPS.format(table="\n".join(lines), batch=time.batch) if lines else ""


OUTCOMES = """## Trainings, and the rate losses compared

Best top-1 on the validation images, and the boundary ratio of the last epoch's steps, which the rate loss holds; without
`loss=` it is "prior". The time is that training's own; most shared the machine with other work.

| recipe | method | best top-1 | boundary ratio | time |
|:--|:--|--:|--:|--:|
{table}
"""

HEAD = """# DRIP

Made by `{command}`: the figures of documents 000 and 001, from runs in `runs/` and rows in `results/train.jsonl`.

![Architecture](drip-architecture.svg)

Boundaries come from the tokens after `after` blocks; a boundary ends a segment, the last patch always does; a segment
becomes the mean of its tokens by size. The class token stays apart. In training boundaries are drawn, and what does not
fit into `ceil(N * rate * capacity)` places is given up, least likely first; in evaluation the `ceil(N * rate)` most likely
stand.

GMAC against rate for patches of 32, 16 and 8 pixels: [seed001-flops.md](seed001-flops.md).
"""

SHARES = """## Boundary rate per image

One rate does not fit every image: the expected boundary rate of each validation image (mean probability of its patches), the
rate, and the bound that `loss="lower_bound"` holds it under, the rate less the standard deviation over the images.

![Histogram](drip-shares.svg)
"""

STEPS = """## What a training step costs

`winnow measure timm:vit_base_patch32_224 --method "DRIP(rate=0.25)" --step --batch {batch}` and its like: a training step,
plain and reduced in turn in one process. In training DRIP keeps places for 1.25 times its rate, filled or not. Times faster
(95 % interval), and its share of what the multiply-adds promise; plain against plain is the noise; memory above weights,
gradients and optimiser, plain = 1.

| model | method | tokens | MACs promise | times faster | share | plain against plain | memory |
|:--|:--|--:|--:|--:|--:|--:|--:|
{table}
"""
