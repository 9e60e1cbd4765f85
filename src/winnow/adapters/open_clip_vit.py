"""open_clip's vision towers, alone or inside their CLIP model: open_clip's own ViT, and timm models behind TimmModel.

Ilharco et al., OpenCLIP, 2021; open_clip 3, transformer.py and timm_model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock, Transformer
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from .._host import BlockView, Host, Patch, refuse_beside
from .._run import Slot
from ..reducer import Setting
from . import pooling
from .torch_encoder import Multihead

OWN = ("forward", "_embeds", "_pool", "_global_pool", "forward_intermediates")


class Residual(BlockView):
    """ResidualAttentionBlock: nn.MultiheadAttention, either layout, LayerScale."""

    attention = Multihead()

    def call(self, block: Any, forward: Callable[..., Tensor], x: Tensor, *args: Any, **words: Any) -> Tensor:
        refuse_beside(*args, **words)
        return forward(x) if block.attn.batch_first else forward(x.transpose(0, 1)).transpose(0, 1)

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.attention.qkv(block.attn, block.ln_1(x))

    def options(self, block: Any) -> dict[str, Any]:
        return self.attention.options(block.attn)

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        return block.ls_1(self.attention.out(block.attn, o))

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return block.ls_2(block.mlp(block.ln_2(x)))

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        width = block.attn.out_proj.in_features
        mlp = block.mlp.c_fc.weight.numel() + block.mlp.c_proj.weight.numel()
        return 4 * width**2 * n_attn + 2 * width * n_attn * n_attn + mlp * n_mlp


class Custom(Residual):
    """CustomResidualAttentionBlock: q/k norm, scaled heads, inner and outer norms."""

    def call(self, block: Any, forward: Callable[..., Tensor], x: Tensor, *args: Any, **words: Any) -> Tensor:
        refuse_beside(*args, **words)
        return forward(x)

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        attn = block.attn
        parts = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
        return attn.ln_q(q), attn.ln_k(k), v, None

    def options(self, block: Any) -> dict[str, Any]:
        return {"dropout": block.attn.attn_drop.p if block.attn.training else 0.0}

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        attn = block.attn
        o = o if attn.head_scale is None else o * attn.head_scale
        x = attn.out_drop(attn.out_proj(attn.ln_inner(o.transpose(1, 2).flatten(2))))
        return block.ls_1(block.ln_attn(x))


VIEWS: dict[Any, BlockView] = {
    ResidualAttentionBlock.forward: Residual(),
    CustomResidualAttentionBlock.forward: Custom(),
}


def fits(model: nn.Module) -> bool:
    """A tower of open_clip, or a model that has one as `visual`."""
    return isinstance(_tower(model), OpenClipViT | TimmModel)


def _tower(model: nn.Module) -> Any:
    return model if isinstance(model, OpenClipViT | TimmModel) else getattr(model, "visual", None)


def host(model: Any) -> Host:
    """The tower's parts; TypeError / ValueError where a part is not what this adapter knows."""
    tower = _tower(model)
    if isinstance(tower, TimmModel):
        return _timm(tower)
    changed = [name for name in OWN if getattr(type(tower), name) is not getattr(OpenClipViT, name)]
    if changed or type(tower.transformer).forward is not Transformer.forward:
        raise TypeError(
            f"{type(tower).__name__} changes {(changed or ['transformer'])[0]} of open_clip's VisionTransformer"
        )
    for block in tower.transformer.resblocks:
        _check(block)
    if not isinstance(tower.patch_dropout, nn.Identity):
        raise ValueError("the tower drops patches itself (patch_dropout > 0): create it without")
    blocks = tuple(tower.transformer.resblocks)
    return Host(
        family="open_clip VisionTransformer",
        setting=Setting(
            depth=len(blocks),
            width=tower.conv1.out_channels,
            heads=blocks[0].attn.num_heads,
            prefix=1,
            cls=True,
            grid=tuple(tower.grid_size),
            patch=tuple(tower.patch_size),
        ),
        blocks=blocks,
        views=tuple(VIEWS[type(block).forward] for block in blocks),
        patches=(
            Patch(tower, "_embeds", _enter),
            Patch(tower, "_global_pool", _global_pool),
            Patch(tower, "forward_intermediates", _intermediates),
            *(Patch(pooler.attn, "forward", pooling.attention_pool) for pooler in _poolers(tower)),
        ),
        accepts=frozenset({"block", "between", "input"}),
        outside_macs=partial(_outside_macs, tower),
    )


def _check(block: Any) -> None:
    """TypeError unless the block is one of open_clip's own, self-attention only."""
    if type(block).forward not in VIEWS or "forward" in block.__dict__ or hasattr(block, "ln_1_kv"):
        raise TypeError(f"{type(block).__name__} (or its replaced forward) is a kind of block Winnow does not know")
    if isinstance(block, ResidualAttentionBlock):
        if type(block).attention is not ResidualAttentionBlock.attention:
            raise TypeError(f"{type(block).__name__} changes attention of ResidualAttentionBlock")
        Multihead().check(block.attn)
    elif type(block.attn).forward is not Attention.forward or block.attn.logit_scale is not None:
        raise TypeError("scaled cosine attention (or a changed one) is not known to Winnow")


def _poolers(tower: Any) -> list[Any]:
    """Attention poolers that read the tokens; the second of a cascade reads the first one's queries."""
    found = [] if tower.attn_pool is None else [tower.attn_pool]
    if found and tower.attn_pool_contrastive is not None and tower.attn_pool_type == "parallel":
        found.append(tower.attn_pool_contrastive)
    return found


def _timm(tower: Any) -> Host:
    from . import host_of

    if type(tower).forward is not TimmModel.forward or hasattr(tower.head, "pool"):
        raise TypeError(f"{type(tower).__name__} pools a map outside its trunk: reduce {type(tower).__name__}.trunk")
    inner = host_of(tower.trunk)
    head = float(sum(m.weight.numel() for m in tower.head.modules() if isinstance(m, nn.Linear)))
    macs = inner.outside_macs
    return replace(inner, outside_macs=None if macs is None else partial(_with_head, macs, head))


def _with_head(macs: Callable[[Tensor, Tensor], Tensor], head: float, patches: Tensor, n: Tensor) -> Tensor:
    return macs(patches, n) + head


def _enter(slot: Slot, x: Tensor) -> Tensor:
    tower, seat = slot.module, slot.seat  # type: Any, Any
    seat.begin(x, (x.shape[-2] // tower.patch_size[0], x.shape[-1] // tower.patch_size[1]))
    if seat.facts.where == "input":
        x = seat.reducer(x, tuple(tower.patch_size))
        seat.run.small = small = (x.shape[-2] // tower.patch_size[0], x.shape[-1] // tower.patch_size[1])
        positions = resample_abs_pos_embed(
            tower.positional_embedding[None], small, tower.grid_size, num_prefix_tokens=1
        )[0]
        return type(tower)._embeds(pooling.Seen(tower, positional_embedding=positions), x)
    return type(tower)._embeds(tower, x)


def _global_pool(slot: Slot, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled and tokens, as open_clip does; the mean leaves out padding and weighs by size where tokens were merged."""
    tower: Any = slot.module
    pooled, tokens = type(tower)._global_pool(tower, x)
    if tower.attn_pool is None and tower.pool_type == "avg":
        pooled = pooling.averaged(slot, x)[:, 1:].mean(dim=1)
    return pooled, tokens


def _intermediates(slot: Slot, x: Tensor, indices: Any = None, *args: Any, **words: Any) -> Any:
    """open_clip's forward_intermediates, every map spread back on the patch grid."""
    from open_clip.utils import feature_take_indices

    tower: Any = slot.module
    out, nchw = pooling.flat_maps(tower, x, indices, args, words)
    layers, _ = feature_take_indices(len(tower.transformer.resblocks), indices)
    return {**out, "image_intermediates": pooling.spread_maps(slot, out["image_intermediates"], layers, nchw)}


def _outside_macs(tower: Any, patches: Tensor, n: Tensor) -> Tensor:
    """Patch embedding, attention poolers and projection of one image."""
    macs = tower.conv1.weight.numel() * patches
    poolers = [one for one in (tower.attn_pool, getattr(tower, "attn_pool_contrastive", None)) if one is not None]
    if tower.proj is not None:
        pooled = tower.pool_type != "none" or len(poolers) == 2
        rows = 1 if pooled else poolers[0].query.shape[0] if poolers else n
        macs = macs + tower.proj.numel() * rows
    for pooler in poolers:
        attn, queries = pooler.attn, pooler.query.shape[0]
        keys = n if any(pooler is one for one in _poolers(tower)) else 0.0 * n + tower.attn_pool.query.shape[0]
        macs = macs + 2 * attn.embed_dim**2 * queries + attn.embed_dim * (attn.kdim + attn.vdim) * keys
        macs = macs + 2 * attn.embed_dim * queries * keys
    return macs
