"""Hugging Face DINOv2, with and without registers and classifier, and DINOv3 (rotary positions).

Oquab et al., 2023; Darcet et al., 2024; Siméoni et al., 2025; transformers 5. A token's rotary row is that of the first
patch it holds: its own for a survivor; for a merged token the first in raster order.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2 as v2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as v2r
from transformers.models.dinov3_vit import modeling_dinov3_vit as v3

from .._host import Host, Patch
from .._run import Slot
from . import hf_blocks


class Rotary(hf_blocks.Layer):
    """DINOv3's layer: cos and sin [P, D] for the patch tokens, none for the prefix."""

    placed = True

    def beside(self, words: dict[str, Any]) -> Any:
        return words.pop("position_embeddings")

    def place(
        self, block: Any, q: Tensor, k: Tensor, at: Tensor | None, beside: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, None]:
        cos, sin = beside if at is None else (part[at].unsqueeze(1) for part in beside)
        return *v3.apply_rotary_pos_emb(q, k, cos, sin), None


VIEW = hf_blocks.Layer(
    "norm1",
    "norm2",
    "attention",
    out_proj="attention.o_proj",
    scale1="layer_scale1",
    scale2="layer_scale2",
    drop="drop_path",
)
OLDER = replace(  # DINOv2 in transformers 5.12
    VIEW, attention="attention.attention", out_proj="attention.output.dense", names=("query", "key", "value")
)
ROTARY = Rotary(**asdict(VIEW))
KINDS = (
    (v2.Dinov2Layer, v2.Dinov2Attention),
    (v2r.Dinov2WithRegistersLayer, v2r.Dinov2WithRegistersAttention),
    (v3.DINOv3ViTLayer, v3.DINOv3ViTAttention),
)
OUTER = {
    v2.Dinov2Model.forward: "",
    v2.Dinov2ForImageClassification.forward: "dinov2",
    v2r.Dinov2WithRegistersModel.forward: "",
    v2r.Dinov2WithRegistersForImageClassification.forward: "dinov2_with_registers",
    v3.DINOv3ViTModel.forward: "",
}
"""Where the tower is, by the forward of the whole."""


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward in OUTER


def host(model: Any) -> Host:
    """The model's parts; TypeError where a layer is not transformers' own."""
    path = OUTER[type(model).forward]
    tower: Any = model.get_submodule(path)
    rotary = isinstance(tower, v3.DINOv3ViTModel)
    layers = (_encoder(tower) if rotary else tower.encoder).layer
    for layer in layers:
        hf_blocks.known(layer, "attention", KINDS)
    config = tower.config
    side, patch = (_pair(size) for size in (config.image_size, config.patch_size))
    embed = tower.embeddings.patch_embeddings
    return hf_blocks.tower_host(
        "Hugging Face DINOv3" if rotary else "Hugging Face DINOv2",
        tower,
        layers,
        ROTARY if rotary else VIEW if hasattr(layers[0].attention, "q_proj") else OLDER,
        patch=patch,
        grid=(side[0] // patch[0], side[1] // patch[1]),
        prefix=1 + getattr(config, "num_register_tokens", 0),
        conv=embed if rotary else embed.projection,
        also=(Patch(tower.rope_embeddings, "forward", _rows),) if rotary else (),
        averages=bool(path),
        outside=partial(hf_blocks.linear_outside, (model.classifier,)) if path else None,
    )


def _rows(slot: Slot, pixel_values: Tensor) -> Any:
    """Rotary rows of the image that was embedded: it may have been made smaller."""
    small, patch = slot.seat.run.small, slot.seat.setting.patch
    if small is not None and patch is not None:
        pixel_values = pixel_values[..., : small[0] * patch[0], : small[1] * patch[1]]
    return type(slot.module).forward(slot.module, pixel_values)


def _encoder(tower: Any) -> Any:
    return tower.model if hasattr(tower, "model") else tower


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)
