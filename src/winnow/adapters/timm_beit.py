"""timm's Beit: BEiT and BEiT v2, relative position biases per block, shared, or none.

Bao et al., 2021; Peng et al., 2022. The bias between two tokens is that between the first patches they hold. While all
images hold all patches it is the host's own; afterwards it differs by image and is gathered for 64 queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.beit import Attention, Beit, Block, RelativePositionBias
from torch import Tensor, nn

from .._host import BlockView, Host, Patch, refuse_beside
from .._run import Slot
from ..attention import Pairs
from ..reducer import Setting
from . import pooling, timm_vit
from .timm_blocks import linear_macs

OWN = ("forward", "forward_features", "forward_head", "forward_intermediates")


class View(BlockView):
    """Beit's Block: relative position bias, gains gamma_1 and gamma_2."""

    placed = True

    def call(
        self,
        block: Any,
        forward: Callable[..., Tensor],
        x: Tensor,
        shared_rel_pos_bias: Any = None,
        *args: Any,
        **words: Any,
    ) -> Tensor:
        refuse_beside(*args, **words)
        return forward(x, shared_rel_pos_bias)

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        attn, y = block.attn, block.norm1(x)
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if bias is not None and attn.qkv_bias_separate:
            parts = (attn.qkv(y) + bias).chunk(3, -1)
        else:
            parts = F.linear(y, attn.qkv.weight, bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v, None

    def place(
        self, block: Any, q: Tensor, k: Tensor, at: Tensor | None, beside: Tensor | None
    ) -> tuple[Tensor, Tensor, Pairs | None]:
        attn, shared = block.attn, beside
        if attn.relative_position_bias_table is None and shared is None:
            return q, k, None
        own = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()
        full = shared if own is None else own if shared is None else own + shared
        assert full is not None
        if at is None:
            return q, k, Pairs(partial(_slice, full), shared=True)
        places = F.pad(at + 1, (1, 0))  # the class token has place 0
        return q, k, Pairs(partial(_gather, full[0].flatten(1), full.shape[-1], places), shared=False)

    def options(self, block: Any) -> dict[str, Any]:
        attn = block.attn
        return {"dropout": attn.attn_drop.p if attn.training else 0.0, "path": "auto" if attn.fused_attn else "math"}

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        x = block.attn.proj_drop(block.attn.proj(o.transpose(1, 2).flatten(2)))
        return block.drop_path1(x if block.gamma_1 is None else block.gamma_1 * x)

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        x = block.mlp(block.norm2(x))
        return block.drop_path2(x if block.gamma_2 is None else block.gamma_2 * x)

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        width = block.attn.proj.in_features
        return linear_macs(block.attn) * n_attn + 2 * width * n_attn * n_attn + linear_macs(block.mlp) * n_mlp


def _slice(full: Tensor, start: int, stop: int) -> Tensor:
    return full[:, :, start:stop]


def _gather(flat: Tensor, side: int, places: Tensor, start: int, stop: int) -> Tensor:
    """[B, H, stop-start, N] biases of flat [H, side*side] between tokens at `places` [B, N]."""
    pair = places[:, start:stop, None] * side + places[:, None]
    return flat.index_select(1, pair.flatten()).unflatten(1, pair.shape).transpose(0, 1)


def fits(model: nn.Module) -> bool:
    """A Beit."""
    return isinstance(model, Beit)


def host(model: Any) -> Host:
    """The model's parts; TypeError where a part is not what this adapter knows."""
    changed = [name for name in OWN if getattr(type(model), name) is not getattr(Beit, name)]
    if changed:
        raise TypeError(f"{type(model).__name__} changes {changed[0]} of timm's Beit")
    for block in model.blocks:
        if (type(block).forward, type(block.attn).forward) != (Block.forward, Attention.forward):
            raise TypeError(f"{type(block).__name__} is a kind of block Winnow does not know")
        if "forward" in block.__dict__:
            raise TypeError(f"the forward of a {type(block).__name__} was replaced by something else: undo that first")
    if model.rel_pos_bias is not None and type(model.rel_pos_bias).forward is not RelativePositionBias.forward:
        raise TypeError(f"{type(model.rel_pos_bias).__name__} is a position bias Winnow does not know")
    embed = model.patch_embed
    return Host(
        family="timm Beit",
        setting=Setting(
            depth=len(model.blocks),
            width=model.embed_dim,
            heads=model.blocks[0].attn.num_heads,
            prefix=1,
            cls=True,
            grid=embed.grid_size,
            patch=timm_vit.patch_size(embed),
        ),
        blocks=tuple(model.blocks),
        views=(View(),) * len(model.blocks),
        patches=(
            Patch(embed, "forward", timm_vit.enter),
            Patch(model, "forward_head", _head),
            Patch(model, "forward_intermediates", timm_vit.intermediates),
        ),
        outside_macs=partial(timm_vit.outside_macs, model) if type(embed).forward is PatchEmbed.forward else None,
    )


def _head(slot: Slot, x: Tensor, pre_logits: bool = False) -> Tensor:
    model: Any = slot.module
    if model.global_pool == "avg":
        x = pooling.averaged(slot, x)
    return type(model).forward_head(model, x, pre_logits)
