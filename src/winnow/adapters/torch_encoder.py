"""torch.nn.TransformerEncoder: batch_first either way, norm first or last, any activation; tokens without a grid.

Vaswani et al., 2017, as in torch. Its output are the tokens that are left, [B, M, C] or [M, B, C]: padding comes out as
zeros (torch's own convention), and `winnow.watch` says which patch each token holds. The fused fast path is never taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._host import OFFERS, BlockView, Host, Patch
from .._run import Slot
from ..reducer import Setting


class Multihead:
    """nn.MultiheadAttention on one sequence, its weights borrowed."""

    def qkv(self, attn: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        parts = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for part in parts)
        return q, k, v, None

    def options(self, attn: Any) -> dict[str, Any]:
        return {"dropout": attn.dropout if attn.training else 0.0}

    def out(self, attn: Any, o: Tensor) -> Tensor:
        return attn.out_proj(o.transpose(1, 2).flatten(2))

    def macs(self, attn: Any, n: int) -> float:
        return 4 * attn.embed_dim**2 * n + 2 * attn.embed_dim * n * n

    def check(self, attn: Any) -> None:
        """TypeError where it is more than self-attention over its own tokens."""
        if type(attn).forward is not nn.MultiheadAttention.forward or "forward" in attn.__dict__:
            raise TypeError(f"{type(attn).__name__} is a kind of attention Winnow does not know")
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
            raise TypeError(
                "nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn is not known to Winnow"
            )


class NormFirst(BlockView):
    """x + attention(norm1 x), x + mlp(norm2 x)."""

    attention = Multihead()

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.attention.qkv(block.self_attn, block.norm1(x))

    def options(self, block: Any) -> dict[str, Any]:
        return self.attention.options(block.self_attn)

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        return block.dropout1(self.attention.out(block.self_attn, o))

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return block._ff_block(block.norm2(x))

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        mlp = block.linear1.weight.numel() + block.linear2.weight.numel()
        return self.attention.macs(block.self_attn, n_attn) + mlp * n_mlp


class NormLast(NormFirst):
    """norm1(x + attention x), norm2(x + mlp x): a reduction inside the block acts on normalised tokens."""

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.attention.qkv(block.self_attn, x)

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return block._ff_block(x)

    def add(self, block: Any, x: Tensor, y: Tensor, second: bool) -> Tensor:
        return (block.norm2 if second else block.norm1)(x + y)


def fits(model: nn.Module) -> bool:
    """A TransformerEncoder."""
    return isinstance(model, nn.TransformerEncoder)


def host(model: Any) -> Host:
    """The encoder's parts; TypeError where a layer is not torch's own."""
    if type(model).forward is not nn.TransformerEncoder.forward:
        raise TypeError(f"{type(model).__name__} changes the forward of torch's TransformerEncoder")
    own = nn.TransformerEncoderLayer
    for layer in model.layers:
        changed = [
            n for n in ("forward", "_sa_block", "_ff_block") if getattr(type(layer), n, None) is not getattr(own, n)
        ]
        if changed or "forward" in layer.__dict__:
            raise TypeError(f"{type(layer).__name__} changes {(changed or ['forward'])[0]} of TransformerEncoderLayer")
        NormFirst.attention.check(layer.self_attn)
    first = model.layers[0].self_attn
    return Host(
        family="torch TransformerEncoder",
        setting=Setting(len(model.layers), first.embed_dim, first.num_heads, 0, False, None),
        blocks=tuple(model.layers),
        views=tuple(NormFirst() if layer.norm_first else NormLast() for layer in model.layers),
        patches=(Patch(model, "forward", _forward),),
        offers=OFFERS - {"image"},
        outside_macs=_nothing,
    )


def _nothing(patches: Tensor, n: Tensor) -> Tensor:
    """There is no stem and no head."""
    return 0.0 * patches


def _forward(
    slot: Slot,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    encoder: Any = slot.module
    if mask is not None or is_causal:
        raise ValueError("a reduced TransformerEncoder takes no `mask`: an entry per pair cannot follow the tokens")
    if src.is_nested or src.ndim != 3:
        raise ValueError(
            f"a reduced TransformerEncoder takes a plain batch of 3 dimensions, not {src.ndim} or nested ones"
        )
    valid = None if src_key_padding_mask is None else _valid(slot, src_key_padding_mask)
    flip = not encoder.layers[0].self_attn.batch_first
    x = src.transpose(0, 1) if flip else src
    slot.seat.begin(x, None, valid)
    out = type(encoder).forward(encoder, x)
    real = slot.seat.run.ledger.valid
    if real is not None:
        out = out.masked_fill(~real.unsqueeze(-1), 0.0)
    return out.transpose(0, 1) if flip else out


def _valid(slot: Slot, padding: Tensor) -> Tensor:
    if padding.dtype is not torch.bool:
        raise ValueError("src_key_padding_mask must be boolean (True: padding) for a reduced TransformerEncoder")
    if slot.seat.facts.static:
        raise ValueError(
            f"{slot.seat.reducer.method} would count padding as tokens: with src_key_padding_mask use a method "
            "that decides per image, such as NormThreshold"
        )
    return ~padding
