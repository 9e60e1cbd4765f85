"""Where a model spends: MACs, time and memory by layer and by operator, plain beside reduced.

torch.profiler, with a named range around each asked-for layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from ._evaluating import Inputs, call, evaluating, first_tensor
from .macs import macs_by_module, macs_by_operator
from .memory import MIB, allocations, peak, quiet_profiler

PREFIX = "winnow::"
CONVOLUTION = "aten::convolution"
ALIASES = dict.fromkeys(
    [f"aten::{name}" for name in ("conv1d", "conv2d", "conv3d", "_convolution", "mkldnn_convolution", "thnn_conv2d")]
    + ["aten::cudnn_convolution", "aten::_slow_conv2d_forward", "aten::_conv_depthwise2d"],
    CONVOLUTION,
)
"""The counter sees a convolution, the profiler the functions it falls through: one name for both."""


@dataclass(frozen=True)
class Cost:
    """What one layer or operator costs."""

    macs: float = 0.0
    """Per image."""
    ms: float = 0.0
    """Per forward: a layer with all inside it, an operator without what it calls; kernel time on CUDA."""
    mib: float = 0.0
    """A layer: peak above what was held when it began. An operator: allocated less released, per forward."""


@dataclass(frozen=True)
class Profile:
    """Costs by layer and by operator; the profiler itself slows a run, so compare shares, not milliseconds."""

    layers: dict[str, Cost]
    operators: dict[str, Cost]
    total: Cost
    device: str

    @property
    def bottleneck(self) -> tuple[str, str]:
        """(layer, operator) that cost most time."""
        layers, operators = self.layers, self.operators
        return max(layers, key=lambda name: layers[name].ms), max(operators, key=lambda name: operators[name].ms)


def profile_model(
    model: nn.Module,
    inputs: Inputs,
    layers: Mapping[str, nn.Module],
    *,
    repeats: int = 3,
    warmup: int = 1,
) -> Profile:
    """MACs, time and memory of a forward pass, for the given named modules of `model` and for each operator.

    ValueError if a layer is no part of the model or is never called by its forward.
    """  # fmt: skip
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in layers.items():
        if id(module) not in names:
            raise ValueError(f"layer {name!r} is no part of this {type(model).__name__}")
    device = first_tensor(inputs).device.type
    macs = macs_by_module(model, inputs)
    seen = _record(model, inputs, layers, device, repeats, warmup)
    spans = _spans(seen)
    if missing := [name for name in layers if PREFIX + name not in spans]:
        raise ValueError(f"forward never calls {', '.join(map(repr, missing))}: name modules that it calls")
    memory = allocations(seen, device)
    clock = _clock(device)

    def cost(name: str, counted: float) -> Cost:
        events = spans[name]
        ms = sum(getattr(event, f"{clock}_time_total") for event in events) / repeats / 1e3
        begin = seen.profiler.kineto_results.trace_start_ns()
        bounds = [(begin + e.time_range.start * 1e3, begin + e.time_range.end * 1e3) for e in events]
        return Cost(counted, ms, max(peak(memory, *bound) for bound in bounds) / MIB)

    costs = {name: cost(PREFIX + name, macs.get(names[id(module)], 0.0)) for name, module in layers.items()}
    operators = _operators(seen, macs_by_operator(model, inputs), clock, repeats)
    return Profile(costs, operators, cost(PREFIX, macs.get("", 0.0)), device)


def table(plain: Profile, reduced: Profile) -> list[dict[str, Any]]:
    """Rows kind, name, then macs, ms and mib of both sides (None where a side lacks it), dearest operators first."""
    rows = [_row("total", "", plain.total, reduced.total)]
    for kind in ("layers", "operators"):
        left, right = getattr(plain, kind), getattr(reduced, kind)
        names = list(dict.fromkeys([*left, *right]))
        if kind == "operators":
            names.sort(key=lambda name: -max(side[name].ms for side in (left, right) if name in side))
        rows += [_row(kind.removesuffix("s"), name, left.get(name), right.get(name)) for name in names]
    return rows


def _row(kind: str, name: str, plain: Cost | None, reduced: Cost | None) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind, "name": name}
    for quantity in ("macs", "ms", "mib"):
        row[f"plain_{quantity}"] = None if plain is None else getattr(plain, quantity)
        row[f"reduced_{quantity}"] = None if reduced is None else getattr(reduced, quantity)
    return row


def _record(
    model: nn.Module, inputs: Inputs, layers: Mapping[str, nn.Module], device: str, repeats: int, warmup: int
) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with evaluating(model):
        for _ in range(warmup):
            call(model, inputs)
        with _ranges(layers), quiet_profiler():
            with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
                for _ in range(repeats):
                    with record_function(PREFIX):
                        call(model, inputs)
                if device == "cuda":
                    torch.cuda.synchronize()
            return seen


@contextmanager
def _ranges(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """A profiler range around every call of the given modules; the hooks are gone afterwards, also after an error."""
    hooks: list[Any] = []
    open_: list[Any] = []

    def enter(name: str) -> None:
        open_.append(record_function(PREFIX + name))
        open_[-1].__enter__()

    def leave() -> None:
        open_.pop().__exit__(None, None, None)

    try:
        for name, module in layers.items():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(lambda *_: leave(), always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _spans(seen: torch.profiler.profile) -> dict[str, list[Any]]:
    spans: dict[str, list[Any]] = {}
    for event in seen.events() or []:
        if event.name.startswith(PREFIX) and event.device_type == torch.autograd.DeviceType.CPU:
            spans.setdefault(event.name, []).append(event)
    return spans


def _operators(seen: torch.profiler.profile, macs: dict[str, float], clock: str, repeats: int) -> dict[str, Cost]:
    ms: dict[str, float] = {}
    mib: dict[str, float] = {}
    for event in seen.events() or []:
        host = event.device_type == torch.autograd.DeviceType.CPU
        if not host or "::" not in event.name or event.name.startswith(PREFIX):
            continue
        name = ALIASES.get(event.name, event.name)
        ms[name] = ms.get(name, 0.0) + getattr(event, f"self_{clock}_time_total") / repeats / 1e3
        mib[name] = mib.get(name, 0.0) + getattr(event, f"self_{clock}_memory_usage") / repeats / MIB
    return {name: Cost(macs.get(name, 0.0), ms.get(name, 0.0), mib.get(name, 0.0)) for name in sorted({*ms, *macs})}


def _clock(device: str) -> str:
    """How torch.profiler spells the host's and the accelerator's side."""
    return "cpu" if device == "cpu" else "device"
