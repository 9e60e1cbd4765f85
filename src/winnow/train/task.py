"""What the loop asks of a task, so that one loop trains all of them.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..measure import record
from .recipe import Recipe


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and on what device."""

    rank: int
    world: int
    device: torch.device
    total: Callable[[Tensor], Tensor]
    """The sum of a tensor over all processes."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    metrics: dict[str, float]
    counts: list[float] | None = None
    """depth+1 patch tokens, mean over the images, padding apart; None for a plain model."""
    hits: np.ndarray | None = None
    """bool [n] top-1 right, where that means something."""
    executed: list[float] = field(default_factory=list)
    """depth+1 patch tokens executed, padding included."""


class Task(Protocol):
    """Model, data and scores of one training run; `tasks/NAME.py` has `training(recipe) -> Task`.

    Where the host has a folder format of its own, `export(folder, state)` writes the trained weights as one.
    """

    module: nn.Module
    """forward(*inputs) -> {"loss": ...}; every other tensor without dimensions in it is averaged into the log."""
    model: nn.Module
    """The network inside `module` whose weights are the result; may carry a reducer."""
    spec: str
    weights: str | None
    """Name and weights hash of the model it started from."""
    data: record.Data
    """The validation data, for the result row."""
    best: str
    """The metric that chooses the best epoch, larger is better."""
    notes: Sequence[str]
    """What to say before the first step, one line each."""
    separable: bool
    """A batch's loss is the mean over its parts; otherwise `module` itself takes the batch in parts."""

    def steps(self) -> int:
        """Steps per epoch."""
        ...

    def batches(self, epoch: int, start: int, place: Place) -> Iterator[Any]:
        """This process's share of every global batch of the epoch, from step `start` on."""
        ...

    def inputs(self, batch: Any, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """What `module` takes, on the device; `step` keys whatever mixes samples."""
        ...

    def evaluate(self, module: nn.Module, place: Place) -> Scores:
        """Scores of `module` (a wrapped or averaged copy of `self.module`) on the whole validation data."""
        ...


def task_of(recipe: Recipe) -> Task:
    """The task a recipe names, with its model built and its data opened."""
    return import_module(f"..tasks.{recipe.task}", __package__).training(recipe)
