"""The optimiser's parameter groups, the learning rate of every step, and the averaged weights.

AdamW: Loshchilov and Hutter, 2019; cosine with warm-up: the same, 2017; averaging: Polyak and Juditsky, 1992.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .recipe import OptimPart, SchedulePart

UNDECAYED = re.compile(r"pos_embed|position|(cls|class|dist|reg|mask|prefix)_?(token|embed)|logit_scale")
"""Parameters that stand for a place or a token; timm's rule adds norms and biases (one dimension or none)."""
PROJECTOR = re.compile(r"(?:^|\.)multi_modal_projector\.")
"""What `mm_projector_lr` is the rate of."""


def optimizer_of(module: nn.Module, part: OptimPart) -> torch.optim.Optimizer:
    """AdamW or SGD over what requires a gradient; ValueError where nothing does."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if not names:
        raise ValueError("nothing is left to train: all weights are frozen and the method has none")
    plain = [name for name in names if UNDECAYED.search(name)]
    groups = param_groups_weight_decay(module, part.weight_decay, no_weight_decay_list=plain)
    if part.mm_projector_lr is not None:
        own = {id(p) for name, p in module.named_parameters() if PROJECTOR.search(name)}
        groups = [half for group in groups for half in _apart(group, own, part.mm_projector_lr / part.lr)]
    groups = [group for group in groups if group["params"]]
    if part.name == "sgd":
        return torch.optim.SGD(groups, lr=part.lr, momentum=part.betas[0], nesterov=part.betas[0] > 0)
    return torch.optim.AdamW(groups, lr=part.lr, betas=part.betas, fused=True)


def _apart(group: dict[str, Any], own: set[int], scale: float) -> Iterator[dict[str, Any]]:
    """A group's parameters of whose ids `own` are, which learn at `scale` times the rate of a step; and the rest."""
    for mine, times in ((True, scale), (False, 1.0)):
        yield {**group, "params": [p for p in group["params"] if (id(p) in own) == mine], "scale": times}


def rate(step: int, total: int, per_epoch: int, lr: float, part: SchedulePart) -> float:
    """Learning rate of step `step` (from 0) of `total`: a function of the step alone, so there is nothing to save."""
    warm = part.warmup_steps or round(part.warmup_epochs * per_epoch)
    if step < warm:
        return lr * (step + 1) / (warm + 1)
    if part.kind == "constant":
        return lr
    done = (step - warm) / max(1, total - warm)
    return part.min_lr + (lr - part.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of `module` that follows it as an exponential mean; buffers are copied as they are."""
    copy = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return copy.requires_grad_(False).eval()
