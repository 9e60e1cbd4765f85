"""Measure one training step, plain and reduced in turn on the same weights: time, memory and executed multiply-adds.

Winnow's own; the backward pass costs twice the forward, so the ratio of forward MACs is what time can reach at best.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .. import reducer_of, restore, watch
from ..tasks.classify import Classify
from ..twin import twin
from .closed_form import closed_macs, plain_macs
from .latency import Run, compare_latency, seconds
from .macs import count_macs
from .memory import peak_memory
from .record import Step

RUNS = 5
"""Of each part of a step; the median counts."""


def training_step(task: nn.Module, *inputs: Tensor) -> tuple[Run, torch.optim.Optimizer]:
    """One AdamW step of the task's loss, at a rate of 0 so that nothing changes; fused, as `winnow train` has it.

    Gradients and the optimiser's state are there before it is first timed.
    """
    weights = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=False)
            task(*inputs)["loss"].backward()
            optimizer.step()

    return step, optimizer


def measure_step(model: nn.Module, images: Tensor, classes: int, pairs: int = 9) -> Step:
    """The step of a reduced classifier beside the plain model's; MiB above weights, gradients and optimiser.

    images: [B, 3, H, W]; classes: width of the model's output. The model keeps its training flags and its gradients.
    """
    targets = torch.arange(len(images), device=images.device) % classes

    def measure(plain: nn.Module) -> Step:
        steps = [training_step(Classify(one), images, targets)[0] for one in (plain, model)]
        return _compared(steps, model, plain, images, lambda: model(images), pairs)

    return _beside(model, measure)


def measure_pair_step(model: nn.Module, images: Tensor, texts: Tensor, pairs: int = 9) -> Step:
    """The same of both towers with the contrastive loss: images [B, 3, H, W], texts int64 [B, context].

    The text tower's MACs are on both sides, so the promised ratio is the pair's.
    """
    from ..tasks.contrast import Contrast

    def measure(plain: nn.Module) -> Step:
        tasks = [Contrast(one).train() for one in (plain, model)]
        made = [training_step(task, images, texts) for task in tasks]
        said = text_macs(plain, texts)
        found = _compared(
            [step for step, _ in made], model, plain, images, lambda: model.encode_image(images), pairs, said
        )  # type: ignore[operator]
        each = [_parts(task.model, images, texts, optimizer) for task, (_, optimizer) in zip(tasks, made)]
        return found.model_copy(update={"parts_ms": {name: (each[0][name], each[1][name]) for name in each[0]}})

    return _beside(model, measure)


def text_macs(clip: nn.Module, texts: Tensor) -> float:
    """MACs per caption of a CLIP's text tower: texts int64 [B, context]."""
    return count_macs(_Texts(clip), texts)


class _Texts(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, texts: Tensor) -> Tensor:
        return self.clip.encode_text(texts)  # type: ignore[operator]


def _beside(model: nn.Module, measure: Callable[[nn.Module], Step]) -> Step:
    """What `measure` finds with the plain twin beside the model; flags and gradients are as before afterwards."""
    flags = [(part, part.training) for part in model.modules()]
    plain = restore(twin(model))
    try:
        model.train(), plain.train()
        return measure(plain)
    finally:
        model.zero_grad(set_to_none=True)
        for part, training in flags:
            part.training = training


def _compared(
    steps: list[Run], model: nn.Module, plain: nn.Module, images: Tensor, look: Run, pairs: int, besides: float = 0.0
) -> Step:
    """Plain and reduced in turn; `besides`: MACs per image that neither saves."""
    with torch.no_grad(), watch(model) as run:
        look()
    executed, whole = closed_macs(model, torch.tensor([run.counts])), plain_macs(plain)
    device = images.device.type
    time = compare_latency(*steps, batch=len(images), pairs=pairs, warmup=1, device=device)
    memory = [peak_memory(step, device) for step in steps]
    return Step(
        latency=time, tokens=run.counts, progress=reducer_of(model).progress, plain_mib=memory[0], mib=memory[1],
        plain_macs=None if whole is None else whole + besides,
        macs=None if executed is None else float(executed[0]) + besides,
    )  # fmt: skip


def _parts(clip: nn.Module, images: Tensor, texts: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Milliseconds of each tower, forward and backward, and of the optimiser."""

    def through(encode: Callable[[Tensor], Tensor], given: Tensor) -> Run:
        def run() -> None:
            with torch.enable_grad():
                encode(given).sum().backward()

        return run

    runs: dict[str, Run] = {
        "image tower": through(clip.encode_image, images),  # type: ignore[arg-type]
        "text tower": through(clip.encode_text, texts),  # type: ignore[arg-type]
        "optimiser": optimizer.step,
    }
    device = images.device.type
    return {name: 1e3 * float(np.median([seconds(run, device) for _ in range(RUNS)])) for name, run in runs.items()}
