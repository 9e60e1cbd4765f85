"""Document 003's experiment in small: plain and Curriculum Token Drop trained alike, its ablations, the page made of it.

Curriculum Token Drop (document 003), 2025. `winnow report ctd --data CIFAR100 --out docs`: what the results file lacks is
trained, run by run (30 runs of 12 minutes on 2 cores; with --steps 44, 14 of 4 minutes and 20 of one), then the page is
written; `winnow report ctd ROWS` writes it of rows that are there. Expected: cost ratios; five epochs of a small network do
not rank close accuracies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .._reduce import reduced, reducer_of
from ..measure import record
from ..measure.step import measure_step
from ..methods import DRIP, CurriculumDrop, PatchDropout, ToMe
from ..models import load_model
from ..reducer import Method, Setting
from ..train.progress import read_log
from ..train.recipe import Recipe, flat, load_recipe
from ..train.task import Task
from ..view import files
from ..view.attention import attention_maps
from ..view.training import save_training
from ._ctd_page import page, table

Say = Callable[[str], object]
RECIPE = "cifar100_small"
GAMMAS = (0.5, 1.0, 1.5, 2.0, 3.0)
SALIENCIES = ("cls_attention", "gradient", "random")
SCHEDULES = ("cosine", "step")
"""Beside the polynomial; linear is its gamma of 1."""
SMALL = Setting(depth=4, width=128, heads=4, prefix=1, cls=True, grid=(8, 8))
MAIN, SEEDS = ("plain", "as_described", "as_run"), (42, 43, 44)
LESS, FEWER = 4, 2
"""Where --steps shortens the experiment, its ablations take so many times fewer steps, each with so many of the seeds."""
LOOKED_AT = 4
"""Validation images whose attention is kept after every epoch."""


@dataclass(frozen=True)
class Wish:
    """The experiment's sizes; the rest is as `recipes/cifar100_small.yaml` says."""

    data: str | None = None
    """A CIFAR-100 folder; the recipe's if not given. The last 5,000 training images are the validation images."""
    epochs: int = 5
    steps: int | None = None
    """Per epoch; all if not given."""


@dataclass(frozen=True)
class Run:
    """One training: a method and a seed."""

    name: str
    method: Method | None
    seed: int
    ablation: bool = False

    def recipe(self, wish: Wish) -> Recipe:
        """`cifar100_small` with this method and seed, at the wished sizes."""
        sets = [
            f"epochs={wish.epochs}",
            f"seed={self.seed}",
            f"method={'null' if self.method is None else self.method}",
        ]
        if wish.data is not None:
            sets += [f"data.{part}.path={wish.data}" for part in ("train", "val")]
        recipe = load_recipe(RECIPE, sets)
        if wish.steps is not None:
            steps = max(1, wish.steps // LESS) if self.ablation else wish.steps
            recipe.data.train.limit = steps * recipe.batch
            recipe.eval.every = wish.epochs if self.ablation else recipe.eval.every
        return recipe


def runs(wish: Wish) -> Iterator[Run]:
    """Every training of the experiment, those that matter most first."""
    methods = arms(wish)
    for seed in SEEDS:
        for name in MAIN:
            yield Run(name, methods[name], seed)
    for name, method in methods.items():
        if name not in MAIN:
            yield Run(name, method, SEEDS[0])
    for seed in SEEDS[:FEWER]:
        for name, method in ablations(CurriculumDrop.seed003_as_run(wish.epochs)):
            yield Run(name, method, seed, ablation=True)


def arms(wish: Wish) -> dict[str, Method | None]:
    """The main table: the plain model, the document's three presets, and others; PatchDropout at the tokens of its run."""
    curriculum = {
        name.removeprefix("seed003_"): getattr(CurriculumDrop, name)(wish.epochs) for name in CurriculumDrop.presets
    }
    patch_dropout = PatchDropout(rate=round(mean_drop(curriculum["as_run"], wish.epochs), 2))
    others = {"patch_dropout": patch_dropout, "tome": ToMe(r=8), "drip_2x": DRIP(rate=0.5), "drip_4x": DRIP(rate=0.25)}
    return {"plain": None, **curriculum, **others}


def ablations(run: CurriculumDrop) -> Iterator[tuple[str, Method | None]]:
    """Name and method: the plain model, then one setting changed at a time."""
    yield "small_plain", None
    for gamma in GAMMAS:
        yield f"gamma_{gamma:g}", replace(run, gamma=gamma)
    for saliency in SALIENCIES:
        yield f"saliency_{saliency}", replace(run, saliency=saliency)
    for schedule in SCHEDULES:
        yield f"schedule_{schedule}", replace(run, schedule=schedule)


def mean_drop(method: CurriculumDrop, epochs: int) -> float:
    """Share of the patches that the blocks of `hybrid_vit_small` do not execute, mean over so many epochs."""
    counts = [method.counts(SMALL, epoch / epochs)[1:] for epoch in range(epochs)]
    return 1 - float(np.mean(counts)) / (SMALL.patches or 1)


def timed(wish: Wish) -> tuple[Method, ...]:
    """Methods of the main table, and the saliency whose cost the document names."""
    gradient = replace(CurriculumDrop.seed003_as_run(wish.epochs), saliency="gradient")
    return (*(method for method in arms(wish).values() if method is not None), gradient)


def time(wish: Wish, results: Path, say: Say = lambda words: None) -> None:
    """Training steps in turn with the plain model's: a row for every epoch where what is dropped grows, else one.

    Half a minute a row, made once, before the trainings; they want a machine that does nothing else.
    """
    for method in timed(wish):
        recipe = Run("time", method, SEEDS[0]).recipe(wish)
        part, size = recipe.model, recipe.augment.size or 32
        made = [
            row.step for row in _rows(results) if row.method == repr(method) and row.model == part.name and row.step
        ]
        options = {"drop_rate": part.drop, "drop_path_rate": part.drop_path} | part.options
        model = load_model(part.name, num_classes=part.num_classes, options=options).model
        images = torch.randn(recipe.batch, 3, size, size, generator=torch.Generator().manual_seed(recipe.seed))
        for epoch in range(wish.epochs if isinstance(method, CurriculumDrop) else 1):
            progress = epoch / wish.epochs
            if any(step.progress == progress and step.latency.batch == recipe.batch for step in made):
                continue
            say(f"steps of {method}, epoch {epoch + 1}")
            with reduced(model, method):
                reducer_of(model).progress = progress
                step = measure_step(model, images, part.num_classes)
            record.append(results, record.Row(
                task="step", model=part.name, weights=None, method=repr(method), step=step, seed=recipe.seed,
                environment=record.environment(), commit=record.commit(), command=record.command(), time=record.now(),
            ))  # fmt: skip


def run(wish: Wish, results: Path, say: Say = lambda words: None) -> list[record.Row]:
    """Rows of every training, made once: what the results file holds is not made again.

    Beside the results: RESULTS-logs/NAME-SEED.jsonl, the epochs of a run, and .npz, what its class token attended to.
    """
    from ..train.loop import train

    record.ready(results)
    logs = logs_of(results)
    for one in runs(wish):
        recipe, label = one.recipe(wish), f"{one.name}-{one.seed}"
        if any(_same(row, recipe) for row in _rows(results)):
            continue
        say(f"{label}: {one.method or 'plain'}")
        out = results.with_name(f"{results.stem}-runs") / label
        watch = Watch()
        row = train(recipe, out, name="ctd", resume=(out / "checkpoints").is_dir(), after=watch)
        epochs = [line for line in read_log(out / "log.jsonl") if line["event"] == "epoch"]
        record.append(results, row)
        files.write(logs / f"{label}.jsonl", "".join(json.dumps(line) + "\n" for line in epochs).encode())
        files.write(logs / f"{label}.npz", watch.packed())
    return _rows(results)


class Watch:
    """Keeps what the class token attends to after every epoch, on a few validation images."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.maps: list[np.ndarray] = []
        self.photos = np.empty(0, np.uint8)

    def __call__(self, task: Task, epoch: int) -> None:
        images = [task.val_images[i][0] for i in range(LOOKED_AT)]  # type: ignore[attr-defined]
        pixels = torch.stack([task.transform(image) for image in images])  # type: ignore[attr-defined]
        device = next(task.model.parameters()).device
        self.epochs.append(epoch)
        self.maps.append(attention_maps(task.model, pixels.to(device)).astype(np.float16))
        self.photos = np.stack([np.asarray(image) for image in images])

    def packed(self) -> bytes:
        """An .npz file: epochs [T], attention [T, B, depth, H, h, w], photos [B, height, width, 3]."""
        out = io.BytesIO()
        np.savez_compressed(out, epochs=self.epochs, attention=np.array(self.maps), photos=self.photos)
        return out.getvalue()


def logs_of(results: Path) -> Path:
    """Where the epochs and maps of the runs in a results file are."""
    return results.with_name(f"{results.stem}-logs")


def _rows(results: Path) -> list[record.Row]:
    return record.read(results) if results.is_file() else []


def _same(row: record.Row, recipe: Recipe) -> bool:
    wanted = {key: str(value) for key, value in flat(recipe.model_dump(mode="json", exclude_defaults=True))}
    return row.train is not None and {key: str(value) for key, value in row.train.settings.items()} == wanted


def write(wish: Wish, results: Path, out: Path, say: Say = lambda words: None) -> list[Path]:
    """Time and train what is missing and write the page, the table and the curves."""
    time(wish, results, say)
    run(wish, results, say)
    return written(_rows(results), out, curves=logs_of(results))


def written(rows: Sequence[record.Row], out: Path, curves: Path | None = None) -> list[Path]:
    """OUT/ctd.md and OUT/results.csv from rows, and the curves of the main runs where there are logs."""
    made = [files.write(out / "ctd.md", page(rows).encode()), files.write(out / "results.csv", table(rows).encode())]
    found = {name: read_log(curves / f"{name}-{SEEDS[0]}.jsonl") for name in MAIN} if curves is not None else {}
    found = {name: lines for name, lines in found.items() if lines}
    return made + [save_training(found, out / f"curves{suffix}") for suffix in files.SUFFIXES if found]
