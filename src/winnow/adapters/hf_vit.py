"""Hugging Face ViT: ViTModel and ViTForImageClassification.

Dosovitskiy et al., 2021; transformers 5, modeling_vit.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers.models.vit import modeling_vit as vit

from .._host import Host
from . import hf_blocks

VIEW = hf_blocks.Layer("layernorm_before", "layernorm_after", "attention", out_proj="attention.o_proj", drop="dropout")
OUTER = {vit.ViTModel.forward: "", vit.ViTForImageClassification.forward: "vit"}
"""Where the tower is, by the forward of the whole."""


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward in OUTER


def host(model: Any) -> Host:
    """The model's parts; TypeError where a layer is not transformers' own."""
    tower: Any = model.get_submodule(OUTER[type(model).forward])
    for layer in tower.layers:
        hf_blocks.known(layer, "attention", ((vit.ViTLayer, vit.ViTAttention),))
    embed = tower.embeddings.patch_embeddings
    size, patch = tuple(embed.image_size), tuple(embed.patch_size)
    dense = [part for part in (tower.pooler, getattr(model, "classifier", None)) if part is not None]
    return hf_blocks.tower_host(
        "Hugging Face ViT",
        tower,
        tower.layers,
        VIEW,
        patch=patch,
        grid=(size[0] // patch[0], size[1] // patch[1]),
        prefix=1,
        conv=embed.projection,
        outside=partial(hf_blocks.linear_outside, tuple(dense)),
    )
