"""Equal-cost baselines: random, evenly spread, average pooling and a smaller image, at a method's own MACs.

VTC-Bench and UniPruneBench (2025): nothing is better than doing nothing clever until it is compared with that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import winnow

from .adapters import host_of
from .measure._vlm_families import decoder_of
from .measure._vlm_shapes import Tower
from .measure.closed_form import closed_form
from .measure.vlm import prompt_macs
from .methods import Downsample, Grid, Pool, Random
from .parts.amount import Exactly, Keep
from .reducer import Method, Setting

SLACK = 1.02
"""A baseline may cost at most this times the method."""
Prompt = tuple[tuple[Tower, ...], int]
"""The images of a prompt, and its other tokens."""
NEAR = 0.97
"""A baseline already run stands in for another one down to this times the method."""


def method_macs(model: nn.Module, method: Method) -> float | None:
    """MACs per image of an unreduced model if it were reduced with a static method; None where unknown."""
    host = host_of(model)
    setting = host.setting
    counts = torch.tensor([method.counts(setting)], dtype=torch.float64)
    reducer = method.build(setting.depth, setting.width, setting.heads, setting.patches, setting.prefix)
    found = closed_form(host, reducer, counts)
    return None if found is None else float(found[0])


def equal_cost(model: nn.Module, macs: float) -> Iterator[Method]:
    """Each baseline at the largest setting that costs at most SLACK * macs, where there is one."""
    host = host_of(model)
    layers = thirds(host.setting)
    cost = partial(method_macs, model)
    for family in (Random, Grid, Pool):
        shares = [share / 200 for share in range(1, 200)]
        fitting = _last_fitting(cost, [family(keep=Keep(share), layers=layers) for share in shares], macs)
        if fitting is not None:
            yield fitting
    patch = host.setting.patch
    if "input" in host.accepts and patch is not None and host.setting.grid is not None:
        sizes = [patch[0] * cells for cells in range(1, min(host.setting.grid))]
        fitting = _last_fitting(cost, [Downsample(size) for size in sizes], macs)
        if fitting is not None:
            yield fitting


def equal_cost_vlm(model: Any, macs: float, prompts: Sequence[Prompt]) -> Iterator[Method]:
    """The same for a vision-language model, in the mean over some prompts: at the tower, inside it, a smaller image.

    What acts at the tower saves nothing in it: where `macs` are fewer than the tower's, only the others are left. What the
    model cannot be reduced with is left out.
    """
    setting, llm = host_of(model).setting, decoder_of(model.config)
    texts: dict[tuple[Tower, ...], list[int]] = {}  # prompts with the same images count together, with their mean text
    for towers, text in prompts:
        texts.setdefault(towers, []).append(text)

    def cost(method: Method) -> float:
        total = 0.0
        for towers, several in texts.items():
            left = sum(tower.left(method.count(tower.each, 0, tower.each)) for tower in towers)
            kept = left if method.facts.where == "tower" else None
            mean = round(sum(several) / len(several))
            total += len(several) * prompt_macs(towers, llm, method, mean, kept=kept).total
        return total / len(prompts)

    shares = [Keep(share / 200) for share in range(1, 200)]
    amounts: list = shares if setting.patches is None else [Exactly(k) for k in range(1, setting.patches)]
    ladders: list[list[Method]] = []
    if setting.patch is not None and setting.grid is not None:
        ladders.append([Downsample(setting.patch[0] * cells) for cells in range(1, min(setting.grid))])
    for family in (Random, Grid, Pool):
        ladders.append([family(keep=amount, at="tower") for amount in amounts])
        ladders.append([family(keep=amount, layers=thirds(setting)) for amount in shares])
    for ladder in ladders:
        fitting = _last_fitting(cost, ladder, macs) if takes(model, ladder[0]) else None
        if fitting is not None:
            yield fitting


def takes(model: nn.Module, method: Method) -> bool:
    """Whether the model can be reduced with such a method."""
    try:
        winnow.restore(winnow.reduce(model, method))
    except (TypeError, ValueError):
        return False
    return True


def _last_fitting(cost: Callable[[Method], float | None], ladder: list[Method], macs: float) -> Method | None:
    """The dearest of a ladder of ever dearer methods that costs at most SLACK * macs, by bisection."""
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        found = cost(ladder[middle])
        if found is None:
            return None
        low, high = (middle + 1, high) if found <= SLACK * macs else (low, middle)
    return ladder[low - 1] if low else None


def thirds(setting: Setting) -> tuple[int, ...]:
    """The blocks at a quarter, half and three quarters of the depth: (3, 6, 9) of 12."""
    return tuple(sorted({setting.depth * part // 4 for part in (1, 2, 3)}))
