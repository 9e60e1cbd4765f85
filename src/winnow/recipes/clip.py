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

from .._clip import load_clip
from ..data.batches import batches
from ..data.readers import open_images
from ..data.scenes import patch_objects
from ..measure import record
from ..measure.objects import objects_of
from ..methods import DRIP, Downsample, PatchDropout
from ..reducer import Method
from ..train.recipe import Recipe, load_recipe
from ..view import files
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
    "patch_dropout": PatchDropout(rate=0.5),
    "downsample": Downsample(size=64),
    "drip_4x_hnet": DRIP(rate=0.25, after=1, predictor="hnet"),
}
"""By 36 patches and 4 blocks: DRIP at 4x executes 36, 12, 12, 12 in training, 18 in the mean, as PatchDropout does; in
evaluation 63 over the blocks, Downsample 64."""
TOWERS, PHOTOGRAPHS = ("plain", "drip_2x", "drip_4x", "drip_10x"), ("plain", "drip_4x")
BATCH = 50


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
    def name(self) -> str:
        """Of its folder."""
        last = [text.partition("=")[2] for text in self.sets if text.startswith("freeze=")]
        return "-".join([self.recipe.removeprefix("clip_"), self.arm, *last, str(self.seed)])

    def made(self, wish: Wish) -> Recipe:
        """The recipe with this method and seed, at the wished sizes."""
        method = ARMS[self.arm]
        sets = [f"method={'null' if method is None else method}", f"seed={self.seed}", *self.sets]
        if self.recipe == CIFAR and wish.data is not None:
            sets += [f"{key}.path={wish.data}" for key in ("data.train", "data.val", "contrast.zeroshot")]
        recipe = load_recipe(self.recipe, sets)
        recipe.epochs = wish.epochs or recipe.epochs
        if wish.steps is not None:
            recipe.data.train.limit = wish.steps * recipe.batch
        return recipe


def runs(wish: Wish, results: Path) -> Iterator[Run]:
    """Every training of the experiment, those that others start from and those that show most first."""
    *arms, last = ARMS
    first, *others = SEEDS
    for arm in arms:
        yield Run(SCENES, arm, first)
    for arm in TOWERS:
        weights = folder(results, Run(SCENES, arm, first)) / "last.safetensors"
        for freeze in FREEZE:
            yield Run(TUNED, arm, first, (f"model.weights={weights}", f"freeze={freeze}"))
    if wish.data is not None:
        for arm in PHOTOGRAPHS:
            yield Run(CIFAR, arm, first)
    for seed in others:
        for arm in arms:
            yield Run(SCENES, arm, seed)
    for seed in SEEDS:
        yield Run(SCENES, last, seed)


def folder(results: Path, run: Run) -> Path:
    """Where a run's weights and log are."""
    return results.with_name(f"{results.stem}-runs") / run.name


def run(wish: Wish, results: Path, say: Say = lambda words: None) -> list[record.Row]:
    """Rows of every training and of its boundaries, made once: what the results file holds is not made again."""
    from ..train.loop import train
    from ..train.stop import Stopped

    for one in runs(wish, results):
        recipe, out = one.made(wish), folder(results, one)
        if not any(_same(row, recipe) for row in _rows(results)):
            say(f"{one.name}: {ARMS[one.arm] or 'plain'}")
            try:
                train(recipe, out, name=one.recipe, resume=(out / "checkpoints").is_dir(), results=results)
            except Stopped as stopped:
                raise KeyboardInterrupt(str(stopped)) from None
        if one.recipe == SCENES and isinstance(ARMS[one.arm], DRIP) and not _judged(results, one):
            record.append(results, boundaries(recipe, out / "last.safetensors"))
    return _rows(results)


def _judged(results: Path, one: Run) -> bool:
    method = repr(ARMS[one.arm])
    return any(row.task == "boundaries" and (row.method, row.seed) == (method, one.seed) for row in _rows(results))


@torch.inference_mode()
def boundaries(recipe: Recipe, weights: Path) -> record.Row:
    """Do a trained tower's segments follow the objects of the validation scenes, more than random or even ones?"""
    assert recipe.method is not None
    source, part = recipe.data.val, recipe.model
    images = open_images(source.path, split=source.split, limit=source.limit)
    clip = load_clip(part.name, weights=weights, size=recipe.augment.size, mean=recipe.data.mean, std=recipe.data.std,
                     options=part.options)  # fmt: skip
    winnow.load(clip.model, weights)
    owners, grid = [], (1, 1)
    for batch in batches(images, clip.transform, BATCH):
        with winnow.watch(clip.model) as seen:
            clip.model.encode_image(batch.images)  # type: ignore[operator]
        owners.append(seen.ledger.owner.numpy())
        grid = seen.grid or grid
    found = np.concatenate(owners)
    things = np.stack([patch_objects(images.mask(i), grid) for i in range(len(images))])  # type: ignore[arg-type]
    kinds = {"learned": found, **rivals(found)}
    objects = objects_of(found, things)
    objects = objects.model_copy(update={"boundaries": {kind: intervals(each, things) for kind, each in kinds.items()}})
    return record.Row(
        task="boundaries", model=clip.spec, weights=clip.weights_hash, method=recipe.method, objects=objects,
        data=record.Data(name=images.name, split=images.split, n=len(images), hash=images.hash), seed=recipe.seed,
        environment=record.environment(), commit=record.commit(), command=record.command(), time=record.now(),
    )  # fmt: skip


def write(wish: Wish, results: Path, out: Path, say: Say = lambda words: None) -> list[Path]:
    """Train what is missing and write the page and its figure."""
    return written(run(wish, results, say), out)


def written(rows: Sequence[record.Row], out: Path) -> list[Path]:
    """OUT/clip.md and OUT/clip.svg from rows."""
    chart = figure(rows)
    drawn = [] if chart is None else [
        files.write(out / f"clip{suffix}", files.encode(chart, suffix[1:])) for suffix in files.SUFFIXES
    ]  # fmt: skip
    return [files.write(out / "clip.md", page(rows).encode()), *drawn]
