"""Documents 000 and 001's task 2 in small: CLIPs of scenes and CIFAR-100 with fewer tokens, their towers tuned on, the page.

DRIP (documents 000 and 001), 2025. `winnow report clip --data CIFAR100 --out docs`: what the results file lacks is trained,
run by run, on 2 cores; then the page is written; `winnow report clip ROWS` writes it of rows that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import winnow

from .._clip import Clip, load_clip
from ..data.batches import batches
from ..data.images import Images
from ..data.readers import open_images
from ..data.scenes import patch_objects
from ..measure import record
from ..measure.objects import objects_of
from ..methods import DRIP, Downsample, PatchDropout
from ..reducer import Method
from ..train.recipe import Recipe, load_recipe
from ..view import files
from ._clip_boundaries import PICTURE, drawn
from ._clip_page import figure, page
from ._drip_objects import intervals, rivals
from .ctd import _rows, _same

Say = Callable[[str], object]
SCENES, CIFAR, TUNED = "clip_scenes", "clip_cifar100", "scenes_from_clip"
SEEDS = (0, 1, 2)
FREEZE = ("probe", "none")
ARMS: dict[str, Method | None] = {
    "plain": None,
    "drip_2x": DRIP(rate=0.5, after=1),
    "drip_4x": DRIP(rate=0.25, after=1),
    "drip_10x": DRIP(after=1),
    "drip_4x_hnet": DRIP(rate=0.25, after=1, predictor="hnet"),
    "drip_10x_hnet": DRIP(after=1, predictor="hnet"),
    "patch_dropout": PatchDropout(rate=0.5),
    "downsample": Downsample(size=64),
}
"""By 36 patches and 4 blocks: DRIP at 4x executes 36, 12, 12, 12 in training, 18 in the mean, as PatchDropout does; in
evaluation 63 over the blocks, Downsample 64."""
TOWERS = ("plain", "drip_2x", "drip_4x", "drip_10x")
PHOTOGRAPHS = {arm: ARMS[arm] for arm in (*TOWERS, "patch_dropout")} | {"downsample": Downsample(size=20)}
"""By 64 patches: Downsample leaves 100 over the blocks, DRIP at 4x 112."""
BATCH, SHOWN = 50, 4
"""Images at a time; scenes whose segments are kept for the picture."""


@dataclass(frozen=True)
class Wish:
    """The experiment's sizes; the rest is as its recipes say."""

    data: str | None = None
    """A CIFAR-100 folder; the part on photographs is left out without."""
    epochs: int | None = None
    steps: int | None = None
    """Per epoch; all if not given."""


@dataclass(frozen=True)
class Run:
    """One training: a recipe, an arm's name, a seed, and what else is set."""

    recipe: str
    arm: str
    seed: int
    sets: tuple[str, ...] = ()

    @property
    def method(self) -> Method | None:
        """What its arm is on this recipe's images."""
        return (PHOTOGRAPHS if self.recipe == CIFAR else ARMS)[self.arm]

    @property
    def name(self) -> str:
        """Of its folder."""
        last = [text.partition("=")[2] for text in self.sets if text.startswith("freeze=")]
        return "-".join([self.recipe.removeprefix("clip_"), self.arm, *last, str(self.seed)])

    def made(self, wish: Wish) -> Recipe:
        """The recipe with this method and seed, at the wished sizes."""
        sets = [f"method={'null' if self.method is None else self.method}", f"seed={self.seed}", *self.sets]
        if self.recipe == CIFAR and wish.data is not None:
            sets += [f"{key}.path={wish.data}" for key in ("data.train", "data.val", "contrast.zeroshot")]
        recipe = load_recipe(self.recipe, sets)
        recipe.epochs = wish.epochs or recipe.epochs
        if wish.steps is not None:
            recipe.data.train.limit = wish.steps * recipe.batch
        return recipe


def runs(wish: Wish, results: Path) -> Iterator[Run]:
    """Every training of the experiment, those that others start from and those that show most first."""
    first, *others = SEEDS
    for arm in ARMS:
        yield Run(SCENES, arm, first)
    for arm in TOWERS:
        weights = folder(results, Run(SCENES, arm, first)) / "last.safetensors"
        for freeze in FREEZE:
            yield Run(TUNED, arm, first, (f"model.weights={weights}", f"freeze={freeze}"))
    for seed in others:
        for arm in ARMS:
            yield Run(SCENES, arm, seed)
    if wish.data is not None:
        for arm in PHOTOGRAPHS:
            yield Run(CIFAR, arm, first)


def folder(results: Path, run: Run) -> Path:
    """Where a run's weights and log are."""
    return results.with_name(f"{results.stem}-runs") / run.name


def run(wish: Wish, results: Path, say: Say = lambda words: None) -> list[record.Row]:
    """Rows of every training and of its boundaries, made once: what the results file holds is not made again.

    Boundaries of what is trained come first, then what is missing.
    """
    from ..train.loop import train

    done = _rows(results)
    there = {one: any(_same(row, one.made(wish)) for row in done) for one in runs(wish, results)}
    for one in sorted(there, key=lambda one: not there[one]):
        recipe, out = one.made(wish), folder(results, one)
        if not there[one]:
            say(f"{one.name}: {one.method or 'plain'}")
            train(recipe, out, name=one.recipe, resume=(out / "checkpoints").is_dir(), results=results)
        if one.recipe == SCENES and isinstance(one.method, DRIP) and not _judged(results, one):
            record.append(results, boundaries(recipe, out / "last.safetensors"))
    return _rows(results)


def _judged(results: Path, one: Run) -> bool:
    mine = repr(one.method), one.seed
    return any(row.task == "boundaries" and (row.method, row.seed) == mine for row in _rows(results))


@torch.inference_mode()
def boundaries(recipe: Recipe, weights: Path) -> record.Row:
    """Do a trained tower's segments follow the scenes' objects, more than before training, random or even ones?"""
    assert recipe.method is not None
    source = recipe.data.val
    images = open_images(source.path, split=source.split, limit=source.limit)
    clip, before = _built(recipe, weights), _built(recipe, None)
    (found, grid), (untrained, _) = segments(clip, images), segments(before, images)
    things = np.stack([patch_objects(images.mask(i), grid) for i in range(len(images))])  # type: ignore[arg-type]
    kinds = {"learned": found, "untrained": untrained, **rivals(found)}
    kept = {
        "boundaries": {kind: intervals(each, things) for kind, each in kinds.items()},
        "segments": found[:SHOWN].tolist(),
    }
    objects = objects_of(found, things).model_copy(update=kept)
    return record.Row(
        task="boundaries", model=clip.spec, weights=clip.weights_hash, method=recipe.method, objects=objects,
        data=record.Data(name=images.name, split=images.split, n=len(images), hash=images.hash), seed=recipe.seed,
        environment=record.environment(), commit=record.commit(), command=record.command(), time=record.now(),
    )  # fmt: skip


def _built(recipe: Recipe, weights: Path | None) -> Clip:
    """The reduced CLIP with these weights, or as its training began."""
    part = recipe.model
    clip = load_clip(part.name, weights=weights, seed=recipe.seed, size=recipe.augment.size, mean=recipe.data.mean,
                     std=recipe.data.std, options=part.options)  # fmt: skip
    if weights is not None:
        winnow.load(clip.model, weights)
        return clip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        winnow.reduce(clip.model, winnow.parse(recipe.method or ""))
    return clip


def segments(clip: Clip, images: Images) -> tuple[np.ndarray, tuple[int, int]]:
    """Segment of each patch [n, P] of a reduced CLIP, and its grid."""
    owners, grid = [], (1, 1)
    for batch in batches(images, clip.transform, BATCH):
        with winnow.watch(clip.model) as seen:
            clip.model.encode_image(batch.images)  # type: ignore[operator]
        owners.append(seen.ledger.owner.numpy())
        grid = seen.grid or grid
    return np.concatenate(owners), grid


def write(wish: Wish, results: Path, out: Path, say: Say = lambda words: None) -> list[Path]:
    """Train what is missing and write the page and its figure."""
    return written(run(wish, results, say), out)


def written(rows: Sequence[record.Row], out: Path) -> list[Path]:
    """OUT/clip.md, OUT/clip.svg and the picture of segments from rows."""
    chart, seen = figure(rows), drawn(rows)
    charts = [] if chart is None else [
        files.write(out / f"clip{suffix}", files.encode(chart, suffix[1:])) for suffix in files.SUFFIXES
    ]  # fmt: skip
    pictures = [] if seen is None else [files.write(out / PICTURE, seen)]
    return [files.write(out / "clip.md", page(rows).encode()), *charts, *pictures]
