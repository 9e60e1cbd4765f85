"""drip_vit: timm's ViT with DRIP inside: `pre` blocks on all patches, then `short` blocks on segments.

Document 000 and 001 (DTP-ViT, DRIP), 2025: 2 and 10 blocks; the network itself is timm's, reduced by `winnow.DRIP`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer

from .._reduce import reduce
from ..methods.drip import DRIP

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
"""Width and heads."""
CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
NAMES = [f"drip_vit_{size}_patch{patch}_224" for size in SIZES for patch in (32, 16, 8)]
default_cfgs = generate_default_cfgs({f"{name}.untrained": CFG for name in NAMES})


def _build(
    name: str,
    pretrained: bool = False,
    pre: int = 2,
    short: int = 10,
    rate: float | tuple[float, ...] = 0.1,
    pool: str = "avg",
    drop_rate: float = 0.0,
    **words: Any,
) -> VisionTransformer:
    """A reduced VisionTransformer; what else `DRIP` takes (predictor, loss, inference, ...) may be given by name."""
    _, _, size, patch, _ = name.split("_")
    width, heads = SIZES[size]
    own = {field.name for field in dataclasses.fields(DRIP)} - {"rate", "after"}
    method = DRIP(rate=rate, after=pre, **{key: words.pop(key) for key in own & words.keys()})
    sizes = {"patch_size": int(patch.removeprefix("patch")), "embed_dim": width, "num_heads": heads}
    dropped = {"pos_drop_rate": drop_rate, "proj_drop_rate": drop_rate}
    model = build_model_with_cfg(
        VisionTransformer, name, pretrained, depth=pre + short, global_pool=pool, **{**sizes, **dropped, **words}
    )
    return reduce(model, method)


def _register(name: str) -> None:
    def entry(pretrained: bool = False, **words: Any) -> VisionTransformer:
        return _build(name, pretrained, **words)

    entry.__name__, entry.__doc__ = name, f"{name}: see drip_vit.py."
    entry.__module__ = __name__
    globals()[name] = register_model(entry)


for _name in NAMES:
    _register(_name)
