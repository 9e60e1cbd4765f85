"""Vision towers inside Hugging Face's LLaVA-like models: which one, and which of its layers the projector reads.

transformers 5. Towers are those of hf_clip.py, hf_siglip.py and hf_vit.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._host import Host, Patch
from . import hf_clip, hf_siglip, hf_vit

TOWERS = (hf_clip, hf_siglip, hf_vit)


def last_place(embeddings: Any) -> Tensor:
    """[C] the position that these embeddings add to the last patch."""
    if hasattr(embeddings, "position_embedding"):
        return embeddings.position_embedding.weight[-1]
    return embeddings.position_embeddings[0, -1]


def selected(core: Any, config: Any) -> tuple[Host, Patch, int]:
    """The tower, where it is entered, and the block whose output is read; TypeError where these cannot be told."""
    tower = core.vision_tower
    adapter = next((one for one in TOWERS if one.fits(tower)), None)
    if adapter is None:
        raise TypeError(
            f"{type(tower).__name__} as the vision tower is unknown; CLIPVisionModel, SiglipVisionModel and ViTModel work"
        )
    host: Host = adapter.host(tower)
    layer, strategy, cls = config.vision_feature_layer, config.vision_feature_select_strategy, host.setting.cls
    if not isinstance(layer, int):
        raise TypeError(f"vision_feature_layer={layer}: features of several layers are joined; one layer works")
    if (strategy == "default") != cls:
        raise TypeError(
            f"vision_feature_select_strategy={strategy!r} with {'a' if cls else 'no'} class token: "
            f"{'it would stay among the patches' if cls else 'the first patch would go'}; "
            f"{('default' if cls else 'full')!r} works"
        )
    depth = host.setting.depth
    made = (layer + depth + 1 if layer < 0 else layer) - 1
    if not 0 <= made < depth:
        raise TypeError(f"vision_feature_layer={layer} is no output of a block; -2 is usual")
    return host, next(patch for patch in host.patches if patch.module is tower.embeddings), made
