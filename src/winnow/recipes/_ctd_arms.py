"""Rows of `winnow train` as arms: one method each, trained with several seeds, compared with the plain model.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import hypot, sqrt
from statistics import harmonic_mean, mean, stdev
from typing import Any

import numpy as np
import torch
import yaml

from .._parse import parse
from .._reduce import reduce
from ..measure import unpack
from ..measure.accuracy import Z95
from ..measure.closed_form import closed_macs, plain_macs
from ..measure.record import Row, Step, Training
from ..methods import CurriculumDrop
from ..models import load_model
from ..reducer import Method

OPTIONS = "model.options."


@dataclass(frozen=True)
class Arm:
    """One method, trained with one or several seeds and otherwise alike."""

    method: Method | None
    rows: tuple[Row, ...]
    steps: tuple[Step, ...] = ()
    """Its training steps timed in turn with the plain model's, one for each epoch's progress."""

    @property
    def name(self) -> str:
        """As typed."""
        return "plain" if self.method is None else f"`{self.method}`"

    @cached_property
    def runs(self) -> list[Training]:
        """What each seed's training was."""
        return [row.train for row in self.rows if row.train is not None]

    def each(self, what: Callable[[Training], float | None]) -> list[float]:
        """One figure of every seed that has it."""
        return [value for run in self.runs if (value := what(run)) is not None]

    @property
    def validation(self) -> list[float]:
        """Last validation top-1 of every seed."""
        return self.each(lambda run: run.last)

    @property
    def seconds(self) -> list[float]:
        """Training time of every seed."""
        return self.each(lambda run: run.runtime_s)

    @property
    def speed(self) -> tuple[float, float, float] | None:
        """Plain time / its time over a whole training with a 95 % interval, from steps timed in turn; None without.

        Times of separate trainings are not compared: they say as much of the machine's other work as of the method.
        """
        if not self.steps:
            return None
        each = [(step.latency.ratio, step.latency.low, step.latency.high) for step in self.steps]
        middle, low, high = (harmonic_mean(values) for values in zip(*each))
        return middle, low, high

    @property
    def tokens(self) -> list[float]:
        """Patch tokens after each block, mean over training and seeds; [] where nothing was reduced."""
        found = [run.tokens for run in self.runs if run.tokens]
        return np.mean(found, 0).tolist() if found else []

    @property
    def executed(self) -> list[float]:
        """Patch tokens of each block: those it leaves, or where the method acts between blocks, those it gets."""
        inside = self.method is None or self.method.facts.where == "block"
        return self.tokens[1:] if inside else self.tokens[:-1]

    @property
    def drop(self) -> float:
        """Share of the patches that the blocks did not execute, mean over training."""
        # some methods drop before block 0: all patches are there at validation only
        patches = [row.counts[0] for row in self.rows if row.counts] + self.tokens[:1]
        return 1 - mean(self.executed) / max(patches) if self.tokens else 0.0

    @cached_property
    def macs(self) -> float | None:
        """MACs per image of a forward in training, by closed form of the tokens executed, mean over training and seeds."""
        row, settings = self.rows[0], self.runs[0].settings
        options = {key: yaml.safe_load(str(value)) for key, value in settings.items() if key.startswith(OPTIONS)}
        model = load_model(
            row.model, num_classes=settings.get("model.num_classes"), size=settings.get("augment.size"),  # type: ignore[arg-type]
            options={key.removeprefix(OPTIONS): value for key, value in options.items()},
        ).model  # fmt: skip
        if self.method is None:
            return plain_macs(model)
        found = closed_macs(reduce(model.train(), self.method), torch.tensor([self.tokens]))
        return None if found is None else float(found)

    @cached_property
    def hits(self) -> np.ndarray | None:
        """[n] share of the seeds that were right on each validation image."""
        found = [
            unpack(row.accuracy.hits, row.data.n)
            for row in self.rows
            if row.accuracy and row.accuracy.hits and row.data
        ]
        return np.mean(found, 0) if len(found) == len(self.rows) else None


def difference(ours: Arm, theirs: Arm) -> tuple[float, float, float] | None:
    """Validation top-1 of ours minus theirs with a 95 % interval: images are paired, seeds are not.

    The two sources of chance, which images and which seeds, are added as variances; one seed shows nothing of the latter.
    """
    a, b = ours.hits, theirs.hits
    if a is None or b is None or len(a) != len(b):
        return None
    images = float(np.std(a - b, ddof=1)) / sqrt(len(a))
    seeds = sqrt(sum(stdev(arm.validation) ** 2 / len(arm.validation) for arm in (ours, theirs) if len(arm.rows) > 1))
    middle, half = float((a - b).mean()), Z95 * hypot(images, seeds)
    return middle, middle - half, middle + half


def arms_of(rows: Sequence[Row]) -> list[list[Arm]]:
    """Arms by experiment, rows of one experiment differing in method and seed only; the last row of a seed counts."""
    found: dict[tuple, dict[str | None, dict[int, Row]]] = {}
    steps: dict[tuple, dict[float, Step]] = {}
    for row in rows:
        if row.step is not None:
            where = row.model, row.method, row.step.latency.batch
            steps.setdefault(where, {})[row.step.progress] = row.step
        if row.train is None:
            continue
        rest = {key: value for key, value in row.train.settings.items() if key not in ("method", "seed")}
        data = None if row.data is None else (row.data.name, row.data.split, row.data.n)
        key = row.model, data, row.train.epochs, row.train.steps, row.train.batch, tuple(sorted(map(str, rest.items())))
        found.setdefault(key, {}).setdefault(row.method, {})[row.seed] = row
    return [
        sorted(
            (
                Arm(
                    None if method is None else parse(method),
                    tuple(seeds.values()),
                    tuple(steps.get((key[0], method, key[4]), {}).values()),
                )
                for method, seeds in by.items()
            ),
            key=lambda arm: arm.method is not None,
        )
        for key, by in found.items()
    ]


def ablations(arms: Sequence[Arm], field: str) -> list[list[Arm]]:
    """Groups of arms that differ in one field of CurriculumDrop only, the plain arm first."""
    found: dict[Method, list[Arm]] = {}
    for arm in arms:
        if isinstance(arm.method, CurriculumDrop):
            found.setdefault(replace(arm.method, **_reset(field)), []).append(arm)
    plain = [arm for arm in arms if arm.method is None]
    key = {"gamma": lambda arm: arm.method.gamma}.get(field, lambda arm: 0)
    return [plain + sorted(group, key=key) for group in found.values() if len(group) > 1]


def _reset(field: str) -> dict[str, Any]:
    return {field: getattr(CurriculumDrop, field)}
