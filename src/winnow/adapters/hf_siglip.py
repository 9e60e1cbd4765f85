"""Hugging Face SigLIP: SiglipVisionModel with or without its attention pooling, with a classifier, or inside SiglipModel.

Zhai et al., 2023; transformers 5, modeling_siglip.py. The pooling head is given token sizes and no padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.siglip import modeling_siglip as siglip

from .._host import Host, Patch
from . import hf_blocks, pooling
from .hf_clip import VIEW
from .timm_blocks import linear_macs

OUTER = {
    siglip.SiglipVisionModel.forward: "",
    siglip.SiglipModel.forward: "vision_model",
    siglip.SiglipForImageClassification.forward: "vision_model",
}
"""Where the tower is, by the forward of the whole."""


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward in OUTER


def host(model: Any) -> Host:
    """The model's parts; TypeError where a layer or the head is not transformers' own."""
    tower: Any = model.get_submodule(OUTER[type(model).forward])
    for layer in tower.encoder.layers:
        hf_blocks.known(layer, "self_attn", ((siglip.SiglipEncoderLayer, siglip.SiglipAttention),))
    head = tower.head if tower.use_head else None
    if head is not None and type(head).forward is not siglip.SiglipMultiheadAttentionPoolingHead.forward:
        raise TypeError(f"{type(head).__name__} as the head reads all tokens in a way Winnow does not know")
    embed = tower.embeddings
    side = embed.image_size // embed.patch_size
    return hf_blocks.tower_host(
        "Hugging Face SigLIP",
        tower,
        tower.encoder.layers,
        VIEW,
        patch=embed.patch_size,
        grid=(side, side),
        prefix=0,
        conv=embed.patch_embedding,
        also=() if head is None else (Patch(head.attention, "forward", pooling.attention_pool),),
        averages=type(model).forward is siglip.SiglipForImageClassification.forward,
        outside=partial(_outside, head, getattr(model, "classifier", None)),
    )


def _outside(head: Any, classifier: nn.Module | None, patches: Tensor, n: Tensor) -> Tensor:
    """Attention pooling of n tokens and classifier."""
    macs = 0.0 * n + linear_macs(classifier)
    if head is None:
        return macs
    width = head.attention.embed_dim
    return macs + 2 * width**2 * (n + 1) + 2 * width * n + linear_macs(head.mlp)
