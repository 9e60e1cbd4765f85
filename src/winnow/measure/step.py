"""Measure one training step, plain and reduced in turn on the same weights: time, memory and executed multiply-adds.

Winnow's own; the backward pass costs twice the forward, so the ratio of forward MACs is what time can reach at best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import reducer_of, restore, watch
from ..tasks.classify import Classify
from ..twin import twin
from .closed_form import closed_macs, plain_macs
from .latency import compare_latency
from .memory import peak_memory
from .record import Step


def training_step(model: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """One AdamW step of the cross entropy and the reducer's losses, at a rate of 0 so that nothing changes.

    Gradients and the optimiser's state are there before it is first timed.
    """
    task = Classify(model)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

    def step() -> None:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=False)
            task(images, targets)["loss"].backward()
            optimizer.step()

    return step


def measure_step(model: nn.Module, images: Tensor, classes: int, pairs: int = 9) -> Step:
    """The step of a reduced model beside the plain model's; memory in MiB above weights, gradients and optimiser.

    images: [B, 3, H, W]; classes: width of the model's output. The model keeps its training flags and its gradients.
    """
    device, flags = images.device, [(part, part.training) for part in model.modules()]
    targets = torch.arange(len(images), device=device) % classes
    plain = restore(twin(model))
    try:
        model.train(), plain.train()
        with torch.no_grad(), watch(model) as run:
            model(images)
        executed = closed_macs(model, torch.tensor([run.counts]))
        steps = [training_step(one, images, targets) for one in (plain, model)]
        time = compare_latency(*steps, batch=len(images), pairs=pairs, warmup=1, device=device.type)
        memory = [peak_memory(step, device.type) for step in steps]
    finally:
        model.zero_grad(set_to_none=True)
        for part, training in flags:
            part.training = training
    return Step(
        latency=time, tokens=run.counts, progress=reducer_of(model).progress, plain_mib=memory[0], mib=memory[1],
        plain_macs=plain_macs(plain), macs=None if executed is None else float(executed[0]),
    )  # fmt: skip
