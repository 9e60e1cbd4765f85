"""Run somebody's model for a measurement and put everything back: evaluation mode, no gradients, fast-path switch.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: [B, ...], positional arguments, or keyword arguments; the first tensor gives B."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own training flag back, also after an error."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def mha_fastpath(on: bool) -> Iterator[None]:
    """The fused, uncountable path of nn.MultiheadAttention switched on or off, and back as it was."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def no_new_hooks(model: nn.Module) -> Iterator[None]:
    """Forward hooks that others add meanwhile are gone afterwards (fvcore leaves its own behind on an error)."""
    tables = [table for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, keys in zip(tables, before):
            for key in set(table) - keys:
                del table[key]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for `inputs`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def output_of(out: Any) -> Tensor:
    """What a model's output says of each image [B, ...]: logits or pooled features by name, else its first tensor."""
    while not isinstance(out, Tensor):
        named = (getattr(out, name, None) for name in ("logits", "image_embeds", "pooler_output"))
        first = next(iter(out.values())) if hasattr(out, "values") else out[0]
        out = next((value for value in named if value is not None), first)
    return out


def first_tensor(inputs: Inputs) -> Tensor:
    """The tensor [B, ...] that says how many images there are; TypeError where none does."""
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs] if isinstance(inputs, Tensor) else inputs
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None or found.ndim == 0 or found.shape[0] == 0:
        raise TypeError("inputs must be a tensor [B, ...], or a tuple or dict whose first tensor is [B, ...], B >= 1")
    return found
