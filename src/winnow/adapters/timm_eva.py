"""timm's Eva: EVA, EVA-02, DINOv3, PE and ViTs with rotary positions (also one set per block).

Fang et al., EVA-02, 2023; Siméoni et al., DINOv3, 2025. A token's rotary row is that of the first patch it holds:
its own for a survivor; for a merged token the first in raster order, which the ledger knows without being told more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, PatchEmbed, apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from .._host import BlockView, Host, Patch, refuse_beside
from .._run import Slot
from ..reducer import Setting
from . import timm_vit
from .timm_blocks import linear_macs

OWN = ("forward", "forward_features", "forward_head", "pool", "forward_intermediates", "_pos_embed")


class PreNorm(BlockView):
    """EvaBlock: q and k rotated, gate, norm before the projection, gains gamma_1 and gamma_2."""

    placed = True

    def call(
        self, block: Any, forward: Callable[..., Tensor], x: Tensor, rope: Any = None, *args: Any, **words: Any
    ) -> Tensor:
        refuse_beside(*args, **words)
        return forward(x, rope)

    def norm_in(self, block: Any, x: Tensor) -> Tensor:
        return block.norm1(x)

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        attn, y = block.attn, self.norm_in(block, x)
        gate = attn.gate(y).sigmoid() if attn.gate is not None else None
        if attn.qkv is None:
            parts = [proj(y) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)]
        elif getattr(attn, "q_bias", None) is None:
            parts = list(attn.qkv(y).chunk(3, -1))
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            apart = attn.qkv_bias_separate
            parts = list((attn.qkv(y) + bias if apart else F.linear(y, attn.qkv.weight, bias)).chunk(3, -1))
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in parts)
        q, k = attn.q_norm(q), attn.k_norm(k)
        groups = getattr(attn, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v, gate

    def place(
        self, block: Any, q: Tensor, k: Tensor, at: Tensor | None, beside: Tensor | None
    ) -> tuple[Tensor, Tensor, None]:
        """Rows of the rotary table [P, 2D] or [H, P, 2D] for each token; the prefix is not rotated."""
        rope = beside
        if rope is None:
            return q, k, None
        if at is not None:
            rope = rope[at].unsqueeze(1) if rope.ndim == 2 else rope[:, at].transpose(0, 1)
        first, half = block.attn.num_prefix_tokens, block.attn.rotate_half

        def turn(t: Tensor) -> Tensor:
            turned = apply_rot_embed_cat(t[:, :, first:], rope, half=half)
            return torch.cat([t[:, :, :first], turned], 2).type_as(t)

        return turn(q), turn(k), None

    def options(self, block: Any) -> dict[str, Any]:
        attn = block.attn
        return {"dropout": attn.attn_drop.p if attn.training else 0.0, "path": "auto" if attn.fused_attn else "math"}

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        x = block.attn.norm(o.transpose(1, 2).flatten(2))
        x = block.attn.proj_drop(block.attn.proj(x if extra is None else x * extra))
        return block.drop_path1(x if block.gamma_1 is None else block.gamma_1 * x)

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        x = block.mlp(block.norm2(x))
        return block.drop_path2(x if block.gamma_2 is None else block.gamma_2 * x)

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        attn = block.attn
        return (
            linear_macs(attn) * n_attn + 2 * attn.num_heads * attn.head_dim * n_attn**2 + linear_macs(block.mlp) * n_mlp
        )


class PostNorm(PreNorm):
    """EvaBlockPostNorm: the norm comes after attention and MLP."""

    def norm_in(self, block: Any, x: Tensor) -> Tensor:
        return x

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        x = block.attn.norm(o.transpose(1, 2).flatten(2))
        x = block.attn.proj_drop(block.attn.proj(x if extra is None else x * extra))
        return block.drop_path1(block.norm1(x))

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return block.drop_path2(block.norm2(block.mlp(x)))


VIEWS: dict[Any, BlockView] = {EvaBlock.forward: PreNorm(), EvaBlockPostNorm.forward: PostNorm()}
ATTENTIONS = (EvaAttention.forward, AttentionRope.forward)


def fits(model: nn.Module) -> bool:
    """An Eva."""
    return isinstance(model, Eva)


def host(model: Any) -> Host:
    """The model's parts; TypeError / ValueError where a part is not what this adapter knows."""
    changed = [name for name in OWN if getattr(type(model), name) is not getattr(Eva, name)]
    if changed:
        raise TypeError(f"{type(model).__name__} changes {changed[0]} of timm's Eva")
    odd = [b for b in model.blocks if "forward" in b.__dict__ or type(b).forward not in VIEWS]
    odd += [b.attn for b in model.blocks if not odd and type(b.attn).forward not in ATTENTIONS]
    if odd:
        raise TypeError(f"{type(odd[0]).__name__} (or its replaced forward) is a kind of block Winnow does not know")
    if model.patch_drop is not None:
        raise ValueError("the model drops patches itself (patch_drop_rate > 0): create it without")
    pool, embed = model.attn_pool, model.patch_embed
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise TypeError(
            f"{type(pool).__name__} as the head mixes all tokens by place: use global_pool='avg' or 'token'"
        )
    plain = type(embed).forward is PatchEmbed.forward
    resizes = plain and not model.rope_mixed and not getattr(model.rope, "_use_cached_embed", False)
    return Host(
        family="timm Eva",
        setting=Setting(
            depth=len(model.blocks),
            width=model.embed_dim,
            heads=model.blocks[0].attn.num_heads,
            prefix=model.num_prefix_tokens,
            cls=model.cls_token is not None,
            grid=embed.grid_size,
            patch=timm_vit.patch_size(embed),
        ),
        blocks=tuple(model.blocks),
        views=tuple(VIEWS[type(block).forward] for block in model.blocks),
        patches=(
            Patch(embed, "forward", timm_vit.enter),
            Patch(model, "pool", _pool),
            Patch(model, "_pos_embed", timm_vit.pos_embed),
            Patch(model, "forward_intermediates", timm_vit.intermediates),
        ),
        accepts=frozenset({"block", "between", "input"} if resizes else {"block", "between"}),
        outside_macs=partial(timm_vit.outside_macs, model, include_prefix=True) if plain else None,
    )


def _pool(slot: Slot, x: Tensor, pool_type: str | None = None) -> Tensor:
    model: Any = slot.module
    return timm_vit.pool(slot, x, pool_type, include_prefix=model.attn_pool is not None)
