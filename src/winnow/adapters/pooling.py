"""What families share beside blocks: heads with token sizes and without padding, modules seen with other settings.

Winnow's own; the hosts' own modules do the work, they are only given what they could not know.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .._run import Slot
from ..attention import log_sizes
from ..tokens import Ledger


class Seen:
    """A module seen with other settings, so that its own method can be borrowed for an input of another size."""

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        self.__dict__.update(settings, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def final(slot: Slot, x: Tensor) -> Ledger:
    """The ledger at the end of the forward that made the tokens x [B, K+N, C]; ValueError if it was another."""
    ledger = slot.seat.run.ledger
    if x.shape[1] - slot.seat.setting.prefix != ledger.n:
        raise ValueError(
            f"the head was given {x.shape[1]} tokens, the last forward left {ledger.n}: pool its own features"
        )
    return ledger


def shares(slot: Slot, x: Tensor) -> Tensor | None:
    """[B, K+N] log-weight of each token in a mean: its size if the method merges into means; None if all are equal."""
    return log_sizes(final(slot, x), slot.seat.setting.prefix, slot.seat.facts.combine == "mean")


def mean(x: Tensor, weight: Tensor) -> Tensor:
    """[B, C] mean of x [B, N, C] with log-weights [B, N]."""
    return (weight.softmax(1).unsqueeze(1).to(x.dtype) @ x).squeeze(1)


def averaged(slot: Slot, x: Tensor) -> Tensor:
    """[B, K+1, C] the prefix and the weighted mean of the patch tokens, of which the host's own mean makes the same.

    x [B, K+N, C] itself where all tokens weigh the same.
    """
    weight, prefix = shares(slot, x), slot.seat.setting.prefix
    if weight is None:
        return x
    return torch.cat([x[:, :prefix], mean(x[:, prefix:], weight[:, prefix:]).unsqueeze(1)], 1)


def attention_pool(slot: Slot, query: Tensor, key: Tensor, value: Tensor, **words: Any) -> Any:
    """nn.MultiheadAttention over all tokens, with log-sizes and without padding."""
    attention: Any = slot.module
    bias = log_sizes(final(slot, key), slot.seat.setting.prefix, slot.seat.facts.sizes)
    if bias is not None:
        words["key_padding_mask"] = bias.to(query.dtype)
    return type(attention).forward(attention, query, key, value, **words)


def flat_maps(model: Any, x: Tensor, indices: Any, args: tuple, words: dict[str, Any]) -> tuple[Any, bool]:
    """The host's own forward_intermediates with maps [B, N, C], and whether [B, C, h, w] was asked for."""
    forward = type(model).forward_intermediates
    full = inspect.signature(forward).bind(model, x, indices, *args, **words)
    full.apply_defaults()
    nchw = full.arguments["output_fmt"] == "NCHW"
    full.arguments["output_fmt"] = "NLC"
    return forward(*full.args, **full.kwargs), nchw


def spread_maps(slot: Slot, maps: list[Tensor], layers: list[int], nchw: bool) -> list[Tensor]:
    """Patch tokens [B, N, C] after each of `layers`, back on the patch grid (0 where a patch was dropped)."""
    run, out = slot.seat.run, []
    for layer, tokens in zip(sorted(layers), maps, strict=True):
        dense = run.tokens[layer].ledger.dense(tokens)
        if nchw:
            assert run.grid is not None
            dense = dense.transpose(1, 2).unflatten(2, run.grid).contiguous()
        out.append(dense)
    return out
