"""timm's VisionTransformer: ViT, DeiT (also distilled), DeiT-3, DINOv2, SigLIP, CLIP towers, registers, any pooling.

Ross Wightman, pytorch-image-models 1.0; its sub-modules are borrowed, none of its forwards is copied.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import AttentionPoolLatent, HybridEmbed, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, global_pool_nlc
from torch import Tensor, nn

from .._host import Host, Patch
from .._run import Slot
from ..attention import log_sizes
from ..reducer import Setting
from . import pooling, timm_blocks

OWN = ("forward", "forward_features", "pool", "forward_intermediates")


def fits(model: nn.Module) -> bool:
    """A VisionTransformer whose forwards are timm's own."""
    return isinstance(model, VisionTransformer)


def host(model: Any) -> Host:
    """The model's parts; TypeError / ValueError where a part is not what this adapter knows."""
    changed = [name for name in OWN if getattr(type(model), name) is not getattr(VisionTransformer, name)]
    heads = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
    if changed or type(model).forward_head not in heads:
        raise TypeError(
            f"{type(model).__name__} changes {(changed or ['forward_head'])[0]} of timm's VisionTransformer"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("the model drops patches itself (patch_drop_rate > 0): create it without")
    pool = model.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise TypeError(
            f"{type(pool).__name__} as the head mixes all tokens by place: use global_pool='avg' or 'token'"
        )
    embed = model.patch_embed
    plain, known = type(embed).forward is PatchEmbed.forward, embedding_macs(embed) is not None
    return Host(
        family="timm VisionTransformer",
        setting=Setting(
            depth=len(model.blocks),
            width=model.embed_dim,
            heads=timm_blocks.heads(model.blocks[0]),
            prefix=model.num_prefix_tokens,
            cls=model.has_class_token,
            grid=embed.grid_size,
            patch=patch_size(embed),
        ),
        blocks=tuple(model.blocks),
        views=tuple(timm_blocks.view(block) for block in model.blocks),
        patches=(
            Patch(embed, "forward", enter),
            Patch(model, "pool", _pool),
            Patch(model, "_pos_embed", pos_embed),
            Patch(model, "forward_intermediates", intermediates),
        ),
        accepts=frozenset({"block", "between", "input"} if plain else {"block", "between"}),
        outside_macs=partial(outside_macs, model) if known else None,
    )


def patch_size(embed: Any) -> tuple[int, int] | None:
    """Pixels per token; of a hybrid embedding, its convolutions included."""
    if embed.grid_size is None or embed.img_size is None:
        return None
    return embed.img_size[0] // embed.grid_size[0], embed.img_size[1] // embed.grid_size[1]


def enter(slot: Slot, x: Tensor) -> Tensor:
    seat, embed = slot.seat, slot.module
    seat.begin(x, tuple(embed.dynamic_feat_size(x.shape[-2:])))  # type: ignore[operator]
    if seat.facts.where == "input":
        patch = seat.setting.patch
        assert patch is not None  # or Downsample.check had refused
        x = seat.reducer(x, patch)
        seat.run.small = (x.shape[-2] // patch[0], x.shape[-1] // patch[1])
        embed = pooling.Seen(embed, strict_img_size=False, flatten=False, output_fmt="NHWC")
        return PatchEmbed.forward(embed, x)
    return type(embed).forward(embed, x)


def pos_embed(slot: Slot, x: Tensor) -> Tensor:
    model: Any = slot.module
    if slot.seat.facts.where == "input":
        return type(model)._pos_embed(pooling.Seen(model, dynamic_img_size=True), x)
    return type(model)._pos_embed(model, x)


def _pool(slot: Slot, x: Tensor, pool_type: str | None = None) -> Tensor:
    model: Any = slot.module
    return pool(slot, x, pool_type, model.pool_include_prefix)


def pool(slot: Slot, x: Tensor, pool_type: str | None, include_prefix: bool) -> Tensor:
    """timm's pooling with padding left out and, for mean-merging methods, means weighted by size."""
    model: Any = slot.module
    ledger, facts, prefix = pooling.final(slot, x), slot.seat.facts, slot.seat.setting.prefix
    kind = "map" if model.attn_pool is not None else model.global_pool if pool_type is None else pool_type
    bias = log_sizes(ledger, prefix, facts.sizes if kind == "map" else facts.combine == "mean")
    if bias is None or kind in ("token", ""):
        return type(model).pool(model, x, pool_type)
    if not include_prefix:
        x, bias = x[:, prefix:], bias[:, prefix:]
    if kind == "map":
        return model.attn_pool(x, attn_mask=bias.to(x.dtype)[:, None, None])
    hidden = x.masked_fill(bias.isinf().unsqueeze(-1), float("-inf"))
    mean = pooling.mean(x, bias)
    if kind == "avg":
        return mean
    most = global_pool_nlc(hidden, "max", 0)
    return most if kind == "max" else 0.5 * (most + mean)


def intermediates(slot: Slot, x: Tensor, indices: Any = None, *args: Any, **words: Any) -> Any:
    """timm's forward_intermediates, every map spread back on the patch grid (0 where a patch was dropped)."""
    from timm.models._features import feature_take_indices

    model: Any = slot.module
    out, nchw = pooling.flat_maps(model, x, indices, args, words)
    layers, _ = feature_take_indices(len(model.blocks), indices)

    def each(found: list) -> list:
        if found and isinstance(found[0], tuple):
            maps = pooling.spread_maps(slot, [one[0] for one in found], layers, nchw)
            return [(one, beside[1]) for one, beside in zip(maps, found)]
        return pooling.spread_maps(slot, found, layers, nchw)

    if isinstance(out, dict):
        return {**out, "image_intermediates": each(out["image_intermediates"])}
    return each(out) if isinstance(out, list) else (out[0], each(out[1]))


def embedding_macs(embed: Any) -> float | None:
    """MACs per patch of the embedding: its projection, after any plain chain of convolutions; None where unknown."""
    if type(embed).forward is PatchEmbed.forward:
        return float(embed.proj.weight.numel())
    if type(embed) is not HybridEmbed or type(embed.backbone) is not nn.Sequential:
        return None
    macs, pixels = 0.0, 1
    for layer in (embed.proj, *reversed(embed.backbone)):
        if isinstance(layer, nn.Conv2d):
            macs += layer.weight.numel() * pixels
            pixels *= layer.stride[0] * layer.stride[1]  # every stride ahead makes more pixels of one patch
        elif any(True for _ in layer.children()):
            return None
    return macs


def outside_macs(model: Any, patches: Tensor, n: Tensor, include_prefix: bool | None = None) -> Tensor:
    """Patch embedding, attention pooling and classifier of one image."""
    macs = (embedding_macs(model.patch_embed) or 0.0) * patches
    pool = getattr(model, "attn_pool", None)
    if pool is not None:
        include = model.pool_include_prefix if include_prefix is None else include_prefix
        keys = n if include else n - model.num_prefix_tokens
        macs = macs + pool.kv.weight.numel() * keys + 2 * keys * pool.latent_len * pool.kv.in_features
        macs = macs + pool.latent_len * sum(
            timm_blocks.linear_macs(part) for part in (pool.q, pool.proj, pool.mlp) if part
        )
    heads = [model.head, getattr(model, "head_dist", None)]
    return macs + sum(timm_blocks.linear_macs(head) for head in heads if head is not None)
