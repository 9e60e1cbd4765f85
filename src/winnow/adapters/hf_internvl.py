"""Hugging Face InternVL and SmolVLM: square tiles whose patches are shuffled together before the projector.

Chen et al., InternVL, 2024; Marafioti et al., SmolVLM, 2025; transformers 5. Image features are reduced tile by tile as
they come out of the projector.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.internvl import modeling_internvl as internvl
from transformers.models.smolvlm import modeling_smolvlm as smolvlm

from .. import _vlm
from .._host import Host

NAMES = {
    internvl.InternVLForConditionalGeneration.forward: "Hugging Face InternVL",
    smolvlm.SmolVLMForConditionalGeneration.forward: "Hugging Face SmolVLM",
}


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward in NAMES


def host(model: Any) -> Host:
    """The model's parts."""
    core = model.model
    return _vlm.host(
        _vlm.Vlm(
            family=NAMES[type(model).forward],
            model=model,
            core=core,
            llm=core.text_model if hasattr(core, "text_model") else core.language_model,
            grids=_Tiles(model.config),
            in_place=True,
            inside="the shuffle that puts neighbouring patches together needs the whole grid",
        )
    )


class _Tiles:
    """Features per tile."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, pixel_values: Any, *args: Any, **words: Any) -> int:
        config, patch = self.config, self.config.vision_config.patch_size
        h, w = patch if isinstance(patch, list | tuple) else (patch, patch)
        shrink = getattr(config, "scale_factor", None) or 1 / config.downsample_ratio
        return int(pixel_values.shape[-2] // h / shrink) * int(pixel_values.shape[-1] // w / shrink)
