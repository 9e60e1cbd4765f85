"""hybrid_vit: three convolutions, then a ViT whose tokens are the pixels of their map; for images of 32 pixels.

Curriculum Token Drop (document 003), 2025: 64, 128 and 384 channels, 8x8 = 64 tokens, 8 blocks; all sizes are arguments.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from timm.layers import HybridEmbed
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

CFG = {
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "mean": (0.5071, 0.4867, 0.4408),
    "std": (0.2675, 0.2565, 0.2761),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "first_conv": "patch_embed.backbone.0",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({"hybrid_vit.untrained": CFG, "hybrid_vit_small.untrained": CFG})


def convolutions(channels: tuple[int, ...], strides: tuple[int, ...], **words: Any) -> nn.Sequential:
    """3x3 convolutions without bias from each of `channels` to the next, batch norm and ReLU after each."""
    layers: list[nn.Module] = []
    for (before, after), stride in zip(pairwise(channels), strides, strict=True):
        layers.append(nn.Conv2d(before, after, 3, stride, 1, bias=False, **words))
        layers += [nn.BatchNorm2d(after, **words), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _build(name: str, pretrained: bool, sizes: dict[str, Any], **words: Any) -> VisionTransformer:
    words = {"img_size": 32, "in_chans": 3, "drop_rate": 0.1, "drop_path_rate": 0.1, **sizes, **words}
    stem, strides, drop = words.pop("stem"), words.pop("strides"), words.pop("drop_rate")
    if len(strides) != len(stem) + 1:
        raise ValueError(
            f"{name}(stem={stem}, strides={strides}): one stride per convolution is needed, and the last convolution, "
            "to embed_dim channels, is not listed in stem"
        )
    place = {key: words[key] for key in ("device", "dtype") if key in words}
    backbone = convolutions((words["in_chans"], *stem, words["embed_dim"]), strides, **place)
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        patch_size=1,
        qkv_bias=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        embed_layer=partial(HybridEmbed, backbone=backbone, proj=False),
        **{"pos_drop_rate": drop, "proj_drop_rate": drop, "attn_drop_rate": drop, **words},
    )


@register_model
def hybrid_vit(pretrained: bool = False, **words: Any) -> VisionTransformer:
    """Document 003's network, 15 million parameters: 64 tokens of width 384 from 32 pixels, 8 blocks, 6 heads.

    embed_dim, depth, num_heads, stem (channels of the convolutions before the last), strides; drop_rate is the
    document's one `drop`: after the positions, on attention weights, after projection and MLP, not before the head.
    """
    sizes = {"embed_dim": 384, "depth": 8, "num_heads": 6, "stem": (64, 128), "strides": (1, 2, 2)}
    return _build("hybrid_vit", pretrained, sizes, **words)


@register_model
def hybrid_vit_small(pretrained: bool = False, **words: Any) -> VisionTransformer:
    """The same for two CPU cores, 0.9 million parameters: width 128, 4 blocks, 4 heads, stem of 32 and 64 channels."""
    sizes = {"embed_dim": 128, "depth": 4, "num_heads": 4, "stem": (32, 64), "strides": (1, 2, 2)}
    return _build("hybrid_vit_small", pretrained, sizes, **words)
