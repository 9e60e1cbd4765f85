"""Count the multiply-adds (MACs) of a forward pass: every operator is counted, on a zero-cost list, or an error.

Formulas: torch.utils.flop_counter (1 MAC = 2 FLOP); convention "fvcore" (Meta, 2021) only re-reads old tables.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from math import prod
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ._evaluating import Inputs, call, evaluating, first_tensor, mha_fastpath, no_new_hooks
from ._zero_cost import is_zero_cost

aten = torch.ops.aten


def count_macs(model: nn.Module, inputs: Inputs, *, free: Collection[str] = ()) -> float:
    """MACs per image of one forward pass in evaluation mode.

    Counted: matrix products, convolutions, attention, pairwise distances, the reducer's own included. Not counted:
    operators without products over a shared axis (`_zero_cost.py`) and those named in `free`, e.g. {"aten::_fft_r2c"}.
    ValueError names any other operator.
    """
    return float(sum(macs_by_operator(model, inputs, free=free).values()))


def macs_by_module(model: nn.Module, inputs: Inputs, *, free: Collection[str] = ()) -> dict[str, float]:
    """MACs per image by module name ("" is the whole model), inner modules included; modules at 0 are left out.

    A container that is never called itself gets the sum of its parts; work done directly on a module's weights
    belongs to the module that does it (`out_proj` of nn.MultiheadAttention to the attention).
    """
    counts = _count(model, inputs, free)
    named = dict(model.named_modules())
    macs: dict[str, float] = {}
    for name in sorted(named, key=lambda name: -name.count(".") if name else 1):
        own = counts.get(name or "Global")
        if own is None:
            prefix = f"{name}."
            parts = [part for part in macs if part.startswith(prefix) and "." not in part[len(prefix) :]]
            macs[name] = sum(macs[part] for part in parts)
        else:
            macs[name] = sum(own.values())
    return {name: macs[name] for name in named if macs[name] > 0}


def macs_by_operator(model: nn.Module, inputs: Inputs, *, free: Collection[str] = ()) -> dict[str, float]:
    """MACs per image by operator, e.g. {"aten::addmm": ...}."""
    return dict(_count(model, inputs, free).get("Global", {}))


def fvcore_macs(model: nn.Module, inputs: Inputs) -> tuple[float, dict[str, int]]:
    """MACs per image as fvcore's default handlers count them, and how often each operator was left out.

    The fused attention of nn.MultiheadAttention is on, as in the tables that were made so: it counts as nothing.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise ImportError('the "fvcore" convention needs fvcore: pip install winnow-vision[seeds]') from error
    batch = first_tensor(inputs).shape[0]
    if isinstance(inputs, dict):
        raise TypeError("fvcore traces positional arguments only: give a tensor or a tuple")
    with evaluating(model), mha_fastpath(True), no_new_hooks(model), _silent("fvcore", "torch.jit"):
        analysis = FlopCountAnalysis(model, inputs if isinstance(inputs, torch.Tensor) else tuple(inputs))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return analysis.total() / batch, dict(analysis.unsupported_ops())


class _silent:
    """These loggers say nothing below ERROR meanwhile."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        for logger, level in zip(self.loggers, self.levels):
            logger.setLevel(level)


class _Where:
    """Names of the modules being called; the counter's own tracker fails where a parameter is passed in without grad."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.parents, self.hooks = model, ["Global"], list[Any]()

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            if name:
                self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.parents.append(name)))
                self.hooks.append(module.register_forward_hook(lambda *_: self.leave(), always_call=True))

    def leave(self) -> None:
        self.parents.pop()

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


class _Audit(TorchDispatchMode):
    """Notes every operator that is neither counted nor free. Sits outside the counter, which decomposes for it."""

    supports_higher_order_operators = True

    def __init__(self, counted: Collection[Any], free: Collection[str]) -> None:
        super().__init__()
        self.counted, self.free, self.unknown = counted, free, dict[str, int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name() if isinstance(func, HigherOrderOperator) else func._schema.name
        packet = func if isinstance(func, HigherOrderOperator) else func._overloadpacket
        if packet not in self.counted and name not in self.free and not is_zero_cost(func):
            self.unknown[name] = self.unknown.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _count(model: nn.Module, inputs: Inputs, free: Collection[str]) -> dict[str, dict[str, float]]:
    """MACs per image by the counter's module name and operator; "Global" is all."""
    batch = first_tensor(inputs).shape[0]
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _Where(model)
    audit = _Audit(counter.flop_registry, {free} if isinstance(free, str) else free)
    with evaluating(model), mha_fastpath(False), audit, counter:
        call(model, inputs)
    if audit.unknown:
        ops = ", ".join(f"{name} ({times} times)" for name, times in sorted(audit.unknown.items()))
        wish = ", ".join(f'"{name}"' for name in sorted(audit.unknown))
        raise ValueError(
            f"no MAC formula for {ops}. If its multiply-adds do not matter, say so: free={{{wish}}}; "
            "otherwise register one with torch.utils.flop_counter.register_flop_formula"
        )
    return {
        module: {_name(packet): flop / 2 / batch for packet, flop in ops.items()}
        for module, ops in counter.get_flop_counts().items()
    }


def _name(packet: Any) -> str:
    return getattr(packet, "_qualified_op_name", None) or str(packet)


def _vector(self_shape, *shapes, out_shape=None, **kwargs) -> int:
    """FLOP of mv, dot and vdot."""
    return 2 * prod(self_shape)


def _addmv(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(a_shape)


def _addmm(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """FLOP of addmm, baddbmm and addbmm: [..., m, k] x [..., k, n]."""
    return 2 * prod(a_shape) * b_shape[-1]


def _mm(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(a_shape) * b_shape[-1]


def _distance(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(out_shape) * a_shape[-1]


FORMULAS: dict[Any, Any] = {
    aten.mv: _vector, aten.dot: _vector, aten.vdot: _vector, aten.addmv: _addmv, aten.addmv_: _addmv,
    aten.addmm_: _addmm, aten._addmm_activation: _addmm, aten.baddbmm_: _addmm, aten.addbmm: _addmm,
    aten.addbmm_: _addmm, aten._int_mm: _mm, aten._cdist_forward: _distance, aten._euclidean_dist: _distance,
}  # fmt: skip
"""Matrix products that torch's own registry lacks (it would count them as nothing)."""
