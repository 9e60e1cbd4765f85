"""One optimiser step on one or many processes: forward, backward, clipping, averaged weights, what is logged of it.

Winnow's own, on Hugging Face Accelerate: DDP, FSDP and mixed precision are its business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._reduce import is_reduced, reducer_of, seat_of
from .optim import averaged, optimizer_of
from .recipe import Recipe
from .task import Place, Task

PLATEAUS = 16
"""A compiled model sees progress in so many plateaus: each new value is a new graph."""


@contextmanager
def accelerator_of(device: str | None, recipe: Recipe) -> Iterator[Accelerator]:
    """An Accelerator on `device` (None: the best there is), gone afterwards with its process group and its draws."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is not None and not available.get(device, False):
        there = ", ".join(name for name, works in available.items() if works)
        raise ValueError(f"--device {device} is not available here; available: {there}")
    cuda = device != "cpu" and available["cuda"]
    try:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=recipe.optim.precision)
        with (
            torch.random.fork_rng(devices=[accelerator.device.index or 0] if cuda else []),
            _steps_are_no_constants(recipe),
        ):
            check_sharding(accelerator.distributed_type, accelerator.is_fsdp2)
            yield accelerator
        accelerator.end_training()
    finally:
        AcceleratorState._reset_state(True)  # Accelerate keeps its state in the class; another run may want another


def check_sharding(kind: str, fsdp2: bool) -> None:
    """ValueError where Accelerate would shard weights in a way that this loop does not know."""
    if kind == "DEEPSPEED" or (kind == "FSDP" and not fsdp2):
        raise ValueError(
            "weights are sharded by FSDP2 alone: distributed_type: FSDP with fsdp_version: 2 does what DeepSpeed's ZeRO-3 "
            "does, and with fsdp_reshard_after_forward: false what ZeRO-2 does"
        )


def check_shards(module: nn.Module, recipe: Recipe) -> None:
    """ValueError where this training cannot have sharded weights."""
    if recipe.optim.ema is not None:
        raise ValueError("optim.ema needs whole weights on every process: use DDP, or leave it out under FSDP")
    scalars = [name for name, parameter in module.named_parameters() if not parameter.ndim]
    if scalars:
        raise ValueError(f"FSDP cannot shard {scalars[0]}, which has no dimensions (as CLIP's temperature): use DDP")


def _steps_are_no_constants(recipe: Recipe) -> AbstractContextManager[None]:
    """The number of the step, which noise is drawn from, must not be compiled in: each step would be a new graph."""
    if not recipe.compile:
        return nullcontext()
    from torch._dynamo import config

    return config.patch(allow_unspec_int_on_nn_module=True)


def place_of(accelerator: Accelerator) -> Place:
    """This process among the others."""
    total = lambda tensor: accelerator.reduce(tensor, "sum")  # noqa: E731
    return Place(accelerator.process_index, accelerator.num_processes, accelerator.device, total)


@dataclass
class Outcome:
    """What a step gave; read one step later, so that the accelerator is never waited for."""

    step: int
    names: list[str]
    host: Tensor
    """Values on the CPU, mean over processes: those of `names`, gradient norm, whether a stop is wished."""
    event: Any
    batch: Any
    lr: float
    tokens: list[int]

    def values(self) -> tuple[dict[str, float], bool]:
        """Values by name, and whether any process was asked to stop."""
        if self.event is not None:
            self.event.synchronize()
        *found, stop = self.host.tolist()
        return dict(zip([*self.names, "grad_norm"], found)), stop > 0


class Stepper:
    """A task's module, its optimiser and its averaged copy, wrapped for this process; `advance` does one step."""

    def __init__(self, recipe: Recipe, task: Task, accelerator: Accelerator, rate: Callable[[int], float]) -> None:
        world = accelerator.num_processes
        share, rest = divmod(recipe.batch, world * recipe.optim.accumulate)
        if rest or not share:
            raise ValueError(
                f"batch={recipe.batch} does not divide into {world} processes x accumulate={recipe.optim.accumulate}: "
                f"use a multiple of {world * recipe.optim.accumulate}"
            )
        self.recipe, self.task, self.accelerator, self.rate = recipe, task, accelerator, rate
        self.module = task.module.to(accelerator.device).train()
        if "FSDP" in accelerator.distributed_type:
            check_shards(self.module, recipe)
        self.ema = None
        if recipe.optim.ema is not None:
            self.ema = averaged(self.module, recipe.optim.ema)
        self.optimizer = optimizer_of(self.module, recipe.optim)
        self.wrapped, self.prepared = accelerator.prepare(self.module, self.optimizer)
        networks = [task.model] + ([self.ema.module.model] if self.ema is not None else [])
        self.reducers = [reducer_of(network) for network in networks if is_reduced(network)]

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated: the averaged weights where there are any."""
        return self.wrapped if self.ema is None else self.ema.module

    def pace(self, step: int, total: int) -> None:
        """Tell the reducers where training is."""
        plateaus = PLATEAUS if self.recipe.compile else total
        for reducer in self.reducers:
            reducer.seed, reducer.step = self.recipe.seed, step
            reducer.progress = math.floor(step * plateaus / total) / plateaus

    def advance(self, step: int, total: int, batch: Any, stop: bool = False) -> Outcome:
        """One step on this process's share of the global batch."""
        accelerator, optim = self.accelerator, self.recipe.optim
        # dropout and drop path follow from (seed, step, process), so a resumed run needs no generator's state
        torch.manual_seed(((self.recipe.seed * 1_000_003 + step) * 4_096 + accelerator.process_index) % 2**63)
        self.pace(step, total)
        lr = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        inputs = self.task.inputs(batch, step, accelerator.device)
        parts = list(zip(*(tensor.chunk(optim.accumulate if self.task.separable else 1) for tensor in inputs)))
        logged: list[dict[str, Tensor]] = []
        for i, part in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else accelerator.no_sync(self.wrapped):
                found = self.wrapped(*part)
                accelerator.backward(found["loss"] / len(parts))
            logged.append({name: value.detach().float() for name, value in found.items() if value.ndim == 0})
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), optim.clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # sharded weights have a sharded norm
        self.prepared.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.module)
        names = list(logged[0])
        means = [torch.stack([one[name] for one in logged]).mean() for name in names]
        wish = means[0].new_tensor(float(stop))
        host, event = self._fetch(torch.stack([*means, norm.detach().to(wish), wish]))
        return Outcome(step, names, host, event, batch, lr, self.tokens())

    def tokens(self) -> list[int]:
        """depth+1 patch tokens the last forward executed; empty for a plain model."""
        return seat_of(self.task.model).run.counts if self.reducers else []

    def _fetch(self, values: Tensor) -> tuple[Tensor, Any]:
        values = self.accelerator.reduce(values, "mean")
        host = values.to("cpu", non_blocking=values.is_cuda)  # into pinned memory, so it does not wait
        if not values.is_cuda:
            return host, None
        event = torch.cuda.Event()
        event.record()
        return host, event
