"""Compare how long two ways to run take: interleaved pairs in one process, beside a run of plain against itself.

Winnow's own; the A/A null run and paired ratios are the usual practice of online experiments.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from .record import Latency

Run: TypeAlias = Callable[[], Any]
Device: TypeAlias = torch.device | str
MIN_PAIRS = 9


def compare_latency(
    plain: Run,
    reduced: Run,
    *,
    batch: int,
    pairs: int = 15,
    warmup: int = 3,
    device: Device = "cpu",
    reducer_seconds: float | None = None,
    seed: int = 0,
) -> Latency:
    """Run `plain` and `reduced` in alternation; ratio = median over pairs of plain / reduced, 95 % bootstrap interval.

    Each real pair has a null pair (plain, plain) beside it, so that drift of the machine meets both; the order within
    a pair and of the two pairs alternates. `reducer_seconds` per batch gives `reducer_share`. ValueError under 9 pairs.
    """
    if pairs < MIN_PAIRS:
        raise ValueError(f"pairs={pairs}: an interval needs at least {MIN_PAIRS} pairs")
    with torch.no_grad(), _no_garbage_collection():
        for _ in range(warmup):
            plain(), reduced()
        real, null = _rounds(plain, reduced, pairs, device)
    noise = np.random.default_rng(seed)
    ratio, low, high = median_interval(real[:, 0] / real[:, 1], noise)
    null_ratio, null_low, null_high = median_interval(null[:, 0] / null[:, 1], noise)
    took = float(np.median(real[:, 1]))
    return Latency(
        batch=batch, pairs=pairs, ratio=ratio, low=low, high=high, null=null_ratio, null_low=null_low,
        null_high=null_high, plain_ms=float(np.median(real[:, 0])) * 1e3, reduced_ms=took * 1e3,
        reducer_share=None if reducer_seconds is None else reducer_seconds / took,
        threads=torch.get_num_threads() if torch.device(device).type == "cpu" else None,
    )  # fmt: skip


def median_interval(values: np.ndarray, noise: np.random.Generator, draws: int = 4000) -> tuple[float, float, float]:
    """Median of `values` [n] with its 95 % bootstrap interval (percentiles): (median, low, high)."""
    drawn = noise.choice(values, size=(draws, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def verdict(latency: Latency) -> str:
    """What the interval allows to say, e.g. "1.42x faster (1.38-1.47)"; no speed-up is named if it covers 1."""
    low, ratio, high = latency.low, latency.ratio, latency.high
    if low <= 1 <= high:
        text = f"no measurable difference ({_span(low, high)})"
    elif ratio > 1:
        text = f"{ratio:.2f}x faster ({_span(low, high)})"
    else:
        text = f"{1 / ratio:.2f}x slower ({_span(1 / high, 1 / low)})"
    if latency.null_low <= 1 <= latency.null_high:
        return text
    return f"{text}; noisy: plain against itself {latency.null:.3f} ({_span(latency.null_low, latency.null_high)})"


def share(model: nn.Module, module: nn.Module, run: Run, device: Device = "cpu", *, runs: int = 5) -> float:
    """Share of the wall time of run() spent inside calls of `module`, a part of `model`; median over a few runs.

    On CUDA both ends of every call wait for the device, so this is a share of a run without overlap.
    ValueError if `module` is no part of `model` or if run() never calls it.
    """
    if not any(part is module for part in model.modules()):
        raise ValueError(f"{type(module).__name__} is no part of this {type(model).__name__}")
    shares = []
    with torch.no_grad():
        run()
        for _ in range(runs):
            with _stopwatch(module, device) as inside:
                total = seconds(run, device)
            if not inside:
                raise ValueError(f"run() never called this {type(module).__name__}")
            shares.append(sum(inside) / total)
    return float(np.median(shares))


@contextmanager
def _stopwatch(module: nn.Module, device: Device) -> Iterator[list[float]]:
    """Seconds of each outermost call of `module`; the hooks are gone afterwards."""
    starts: list[float] = []
    inside: list[float] = []

    def enter(*_: Any) -> None:
        _wait(device)
        starts.append(perf_counter())

    def leave(*_: Any) -> None:
        _wait(device)
        took = perf_counter() - starts.pop()
        if not starts:
            inside.append(took)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield inside
    finally:
        for hook in hooks:
            hook.remove()


def _rounds(plain: Run, reduced: Run, pairs: int, device: Device) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the real and the null pairs, [pairs, 2] each."""
    real, null = np.zeros((pairs, 2)), np.zeros((pairs, 2))
    for i in range(pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        both = [(real, (plain, reduced)), (null, (plain, plain))]
        for times, runs in both if i // 2 % 2 == 0 else reversed(both):
            for side in order:
                times[i, side] = seconds(runs[side], device)
    return real, null


def seconds(run: Run, device: Device) -> float:
    """Wall time of run(), the device waited for."""
    _wait(device)
    start = perf_counter()
    run()
    _wait(device)
    return perf_counter() - start


def _wait(device: Device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _span(low: float, high: float) -> str:
    """An interval with enough digits that a bound never reads 1.00 unless it is."""
    digits = 2 if min(abs(low - 1), abs(high - 1)) >= 0.005 else 3
    return f"{low:.{digits}f}-{high:.{digits}f}"
