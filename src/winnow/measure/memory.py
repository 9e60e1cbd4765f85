"""Measure the peak memory of a run, above what was held before it.

CUDA: the caching allocator's own peak. CPU: every allocation and release that torch.profiler saw, summed in order.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity

MIB = 2**20


def peak_memory(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Peak MiB allocated on `device` during run(), above what was held before; its output counts while it is alive.

    Only PyTorch's own allocations: scratch space inside libraries (oneDNN, cuDNN's own) is not seen on CPU.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with quiet_profiler(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return peak(allocations(seen, "cpu")) / MIB


def allocations(seen: torch.profiler.profile, device: str) -> list[tuple[int, int]]:
    """(time in ns, bytes; negative = released) of every allocation on "cpu" or "cuda", in order of time."""
    results = seen.profiler.kineto_results  # the public tables sum per operator and lose the order
    found = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type().name.lower() == device
    ]
    return sorted(found, key=lambda pair: pair[0])


def peak(events: list[tuple[int, int]], start: float = 0, end: float = float("inf")) -> int:
    """Most bytes held between start and end (ns) above what was held at start."""
    return max(accumulate((size for time, size in events if start <= time <= end), initial=0))


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """The profiler prints nothing: neither Kineto, which reads its log level at first use, nor the CPU allocator.

    The allocator warns from C++ of blocks made before, past Python's stderr: the descriptor itself is turned away.
    """
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = level or "6"
    sys.stderr.flush()
    shown, away = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(away, 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        for descriptor in (shown, away):
            os.close(descriptor)
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]
