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

from .. import models
from .._parse import parse
from .._reduce import is_reduced, seat_of
from .._weights import read_weights
from ..data import Images, open_images
from ..data.batches import batches
from ..data.scenes import patch_objects
from ..measure import record
from ..measure.objects import objects_of
from ..methods.drip import DRIP
from ..train.progress import read_log
from ..train.recipe import Recipe, load_recipe
from ..view import files
from ..view.overlay import picture
from ..view.sheets import photograph
from . import _drip_figures as figures

Say = Callable[[str], object]
RUNS = Path("runs")
SHOWN = ("chelsea-0", "coffee-0", "astronaut-0", "rocket-0")
"""Photographs of the pictures: whole, with scikit-image."""
CELL, MOST, DRAWS, SEED = 224, 500, 100, 42


@dataclass(frozen=True)
class Wish:
    """Which photographs the pictures are made of."""

    data: str = "photographs"


@dataclass(frozen=True)
class Trained:
    """One run's folder, read back."""

    name: str
    recipe: Recipe
    method: DRIP
    loaded: models.LoadedModel
    lines: list[dict[str, Any]]

    @property
    def rate(self) -> float:
        """Of its first stage."""
        return self.method.rate_at(self.method.sites()[0])


@dataclass(frozen=True)
class Seen:
    """What a trained model did with some images."""

    owners: np.ndarray
    """[n, P] segment of each patch."""
    shares: np.ndarray
    """[n] expected boundary rate of each image: the mean probability of its patches, the last being certain."""
    grid: tuple[int, int]


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
    parts.append(_losses(results.parent / "train.jsonl"))
    return [files.write(out / "drip.md", "\n".join(part for part in parts if part).encode()), *made]


def read(folder: Path) -> Trained | None:
    """A run's model with its trained weights; None where it was not trained with DRIP."""
    recipe = load_recipe(folder / "recipe.yaml")
    part, size = recipe.model, recipe.augment.size
    loaded = models.load_model(part.name, num_classes=part.num_classes, options=part.options, size=size)
    if recipe.method:
        winnow.reduce(loaded.model, parse(recipe.method))
    method = winnow.reducer_of(loaded.model).method if is_reduced(loaded.model) else None
    if not isinstance(method, DRIP):
        return None
    loaded.model.load_state_dict(read_weights(folder / "best.safetensors"))
    return Trained(folder.name, recipe, method, loaded, read_log(folder / "log.jsonl"))


@torch.inference_mode()
def look(run: Trained, images: Images) -> Seen:
    """Run a trained model on images in evaluation."""
    owners, shares, grid = [], [], None
    site = run.method.sites()[0]
    for batch in batches(images, run.loaded.transform, 50):
        with winnow.watch(run.loaded.model) as seen:
            run.loaded.model(batch.images)
        owners.append(seen.ledger.owner.numpy())
        p = seen.scores[site]
        shares.append((p[:, :-1].sum(1) + 1) / p.shape[1])
        grid = seen.grid
    assert grid is not None
    return Seen(np.concatenate(owners), torch.cat(shares).numpy(), grid)


def _both(chart: Any, path: Path) -> list[Path]:
    return [files.write(path.with_suffix(f".{form}"), files.encode(chart, form)) for form in ("svg", "png")]


def _validation(run: Trained) -> Images:
    source = run.recipe.data.val or run.recipe.data.train
    return open_images(source.path, split=source.split, limit=min(MOST, source.limit or MOST))


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
    found = {run.name: (run.rate, look(run, _validation(run)).shares) for run in runs}
    made = _both(figures.histogram(found), out / "drip-shares")
    return SHARES, made


def _objects(runs: list[Trained], out: Path, wish: Wish) -> tuple[str, list[Path]]:
    """On images with object masks: do segments end where objects do, more than even or random ones?"""
    lines, above = [], {"even": 0, "random": 0}
    for run in runs:
        images = _validation(run)
        mask = images.mask(0)
        if mask is None or mask.shape != run.loaded.size:  # masks belong to images the model sees as they are
            continue
        seen = look(run, images)
        things = np.stack([patch_objects(images.mask(i), seen.grid) for i in range(len(images))])  # type: ignore[arg-type]
        found = {}
        for kind, owners in {"learned": seen.owners, **rivals(seen.owners)}.items():
            low, mid, high = found[kind] = interval(owners, things)
            purity = objects_of(owners, things).purity
            lines.append(f"| {run.name} | {kind} | {mid:.3f} ({low:.3f} to {high:.3f}) | {purity:.3f} |")
        for kind in above:
            above[kind] += found["learned"][0] > found[kind][2]
    if not lines:
        return "", []
    head = "| run | boundaries | boundary F1 (95 % interval over images) | purity |\n|:--|:--|:--|--:|\n"
    return OBJECTS.format(table=head + "\n".join(lines), runs=len(lines) // 3, **above), []


def rivals(owners: np.ndarray) -> dict[str, np.ndarray]:
    """Evenly spaced and random segments, as many per image as `owners` [n, P] has; the last patch ends one."""
    p = owners.shape[1]
    generator = np.random.default_rng(SEED)
    even, random = np.empty_like(owners), np.empty_like(owners)
    for image, k in enumerate(owners.max(1) + 1):
        even[image] = np.arange(p) * k // p
        ends = np.zeros(p, int)
        ends[generator.permutation(p - 1)[: k - 1]] = 1
        random[image] = np.cumsum(ends) - ends
    return {"even": even, "random": random}


def interval(owners: np.ndarray, things: np.ndarray) -> tuple[float, float, float]:
    """2.5 %, value and 97.5 % of the boundary F1 over resampled images."""
    generator = np.random.default_rng(SEED)
    draws = [generator.integers(0, len(owners), len(owners)) for _ in range(DRAWS)]
    found = [objects_of(owners[chosen], things[chosen]).boundary_f1 for chosen in draws]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), objects_of(owners, things).boundary_f1, float(high)


def _pictures(runs: list[Trained], out: Path, wish: Wish) -> tuple[str, list[Path]]:
    """Per grid: one photograph at every rate side by side, and several photographs at the lowest rate."""
    images = open_images(wish.data)
    chosen = [i for i in range(len(images)) if images.key(i) in SHOWN] or list(range(min(len(SHOWN), len(images))))
    parts, made = [], []
    for grid in sorted({_grid(run) for run in runs}):
        own = sorted((run for run in runs if _grid(run) == grid), key=lambda run: -run.rate)
        for label, pairs in {
            "rates": [(run, chosen[0]) for run in own],
            "photographs": [(own[-1], i) for i in chosen],
        }.items():
            strips, captions = zip(*(_strip(run, images, i) for run, i in pairs))
            path = out / f"drip-boundaries-{grid[0]}x{grid[1]}-{label}.png"
            made.append(files.write(path, figures.stacked(strips)))
            parts.append(f"![Boundaries]({path.name})\n\n" + "\n".join(f"- {caption}" for caption in captions) + "\n")
    head = "The photograph, the patches that end a segment, and the segments in their mean colours.\n\n"
    return "## Boundaries on photographs\n\n" + head + "\n".join(parts), made


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


def _losses(rows: Path) -> str:
    """The table of rate losses, from the rows of training runs."""
    lines = []
    for row in record.read(rows) if rows.exists() else []:
        if row.train is None or row.train.best is None or "boundary_ratio" not in row.train.figures:
            continue
        share = row.train.figures["boundary_ratio"]
        lines.append(f"| {row.train.recipe} | `{row.method or row.model}` | {row.train.best:.1%} | {share:.3f} |")
    head = "| recipe | method | best top-1 | boundary ratio, last epoch |\n|:--|:--|--:|--:|\n"
    return "## Rate losses compared\n\n" + head + "\n".join(lines) + "\n" if lines else ""


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

OBJECTS = """## Boundaries and objects

{table}

Boundary F1: changes of segment against changes of object along the raster; purity: share of patches in segments that hold
only objects or only background. Even and random segments are as many as the learned ones.
Learned boundaries meet the objects better than random ones in {random} of {runs} runs, and better than even ones in {even}
(intervals apart).
"""
