"""vit_scenes: the small ViT that ships with Winnow, trained on the built-in scenes by recipes/scenes_vit.py.

Winnow's own; timm's VisionTransformer, 12 blocks of width 96 on 96 pixels, 8 colours to choose from.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer

ARCHITECTURE = {"img_size": 96, "patch_size": 8, "embed_dim": 96, "depth": 12, "num_heads": 3}
COLOURS = 8
MEAN = STD = 0.5

default_cfgs = generate_default_cfgs(
    {
        "vit_scenes.winnow": {
            "file": str(files(__package__) / "vit_scenes.safetensors"),
            "num_classes": COLOURS,
            "input_size": (3, 96, 96),
            "mean": (MEAN,) * 3,
            "std": (STD,) * 3,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_scenes(pretrained: bool = False, **words: Any) -> VisionTransformer:
    """ViT of 1.4 million parameters for the built-in scenes; pretrained weights ship in the package."""
    return build_model_with_cfg(VisionTransformer, "vit_scenes", pretrained, **{**ARCHITECTURE, **words})
