"""Hugging Face CLIP: CLIPVisionModel, alone, with projection, with a classifier, or inside CLIPModel.

Radford et al., 2021; transformers 5, modeling_clip.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers.models.clip import modeling_clip as clip

from .._host import Host
from . import hf_blocks

VIEW = hf_blocks.Layer("layer_norm1", "layer_norm2", "self_attn", out_proj="self_attn.out_proj")
OUTER = {
    clip.CLIPVisionModel.forward: "",
    clip.CLIPVisionModelWithProjection.forward: "vision_model",
    clip.CLIPModel.forward: "vision_model",
    clip.CLIPForImageClassification.forward: "vision_model",
}
"""Where the tower is, by the forward of the whole."""


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward in OUTER


def host(model: Any) -> Host:
    """The model's parts; TypeError where a layer is not transformers' own."""
    tower: Any = model.get_submodule(OUTER[type(model).forward])
    for layer in tower.encoder.layers:
        hf_blocks.known(layer, "self_attn", ((clip.CLIPEncoderLayer, clip.CLIPAttention),))
    embed = tower.embeddings
    side = embed.image_size // embed.patch_size
    dense = [getattr(model, name, None) for name in ("visual_projection", "classifier")]
    return hf_blocks.tower_host(
        "Hugging Face CLIP",
        tower,
        tower.encoder.layers,
        VIEW,
        patch=embed.patch_size,
        grid=(side, side),
        prefix=1,
        conv=embed.patch_embedding,
        averages=type(model).forward is clip.CLIPForImageClassification.forward,
        outside=partial(hf_blocks.linear_outside, tuple(part for part in dense if part is not None)),
    )
