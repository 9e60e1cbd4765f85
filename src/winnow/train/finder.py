"""Find a learning rate: train a few steps at rates that grow, and look at where the loss falls most steeply.

Smith, "Cyclical Learning Rates for Training Neural Networks", 2017; the suggestion is fastai's steepest point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from .recipe import Recipe
from .step import Stepper, accelerator_of, place_of
from .task import Place, Task, task_of

BETA = 0.9
"""Smoothing of the losses."""
WORSE = 4.0
"""The search ends where the smoothed loss is so many times the best one."""


@dataclass(frozen=True)
class Found:
    """Rates tried, their smoothed losses, and the rate at the steepest fall."""

    rates: list[float]
    losses: list[float]
    suggested: float


def find_rate(
    recipe: Recipe,
    *,
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 100,
    device: str | None = None,
    say: Callable[[int], object] = lambda step: None,
) -> Found:
    """Rates from `low` to `high`, one step each; ValueError where the loss never falls."""
    if not 0 < low < high or steps < 10:
        raise ValueError(f"low={low}, high={high}, steps={steps}: give 0 < low < high and at least 10 steps")
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    with accelerator_of(device, recipe) as accelerator:
        task = task_of(recipe)
        stepper = Stepper(recipe, task, accelerator, lambda step: low * (high / low) ** (step / (steps - 1)))
        for step, batch in enumerate(islice(_endless(task, place_of(accelerator)), steps)):
            outcome = stepper.advance(step, steps, batch)
            loss = outcome.values()[0]["loss"]
            mean = BETA * mean + (1 - BETA) * loss
            smooth = mean / (1 - BETA ** (step + 1))
            if not math.isfinite(loss) or smooth > WORSE * min(losses, default=smooth):
                break
            rates.append(outcome.lr)
            losses.append(smooth)
            say(step + 1)
    return Found(rates, losses, steepest(rates, losses))


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the loss falls fastest per decade, before its minimum; ValueError where it never falls."""
    lowest = int(np.argmin(losses)) + 1 if len(losses) else 0
    if lowest < 3:
        raise ValueError(f"the loss never falls over the {len(rates)} rates tried: begin lower, or look at the data")
    slope = np.gradient(np.asarray(losses[:lowest]), np.log10(rates[:lowest]))
    return float(rates[int(np.argmin(slope))])


def _endless(task: Task, place: Place) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from task.batches(epoch, 0, place)
        epoch += 1
