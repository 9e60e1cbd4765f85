"""Hugging Face Qwen2.5-VL and Qwen3-VL: images of any size, patches merged in the tower, positions in rows and columns.

Bai et al., "Qwen2.5-VL Technical Report", 2025; Qwen3-VL, 2025; transformers 5. Image features are reduced as they come
out of the merger. Every token keeps its own position; Qwen3-VL's deepstack features follow the tokens that stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from .. import _vlm, _vlm_calls
from .._columns import Columns
from .._host import Host, Patch
from .._run import Slot

NAMES = {
    qwen2.Qwen2_5_VLForConditionalGeneration.forward: "Hugging Face Qwen2.5-VL",
    qwen3.Qwen3VLForConditionalGeneration.forward: "Hugging Face Qwen3-VL",
}


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward in NAMES


def host(model: Any) -> Host:
    """The model's parts."""
    core = model.model
    deep = len(getattr(core.visual, "deepstack_visual_indexes", ()))
    return _vlm.host(
        _vlm.Vlm(
            family=NAMES[type(model).forward],
            model=model,
            core=core,
            llm=core.language_model,
            grids=_Grids(core.visual.spatial_merge_size),
            in_place=True,
            mrope=True,
            more=(Patch(core, "compute_3d_position_ids", _positions),),
            follow=_deepstack if deep else None,
            inside="windows and the merging of neighbouring patches need the whole grid",
            first=max(1, deep),
            drops=deep > 0,
        )
    )


class _Grids:
    """Rows and columns of merged patches of each image."""

    def __init__(self, merge: int) -> None:
        self.merge = merge

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, **words: Any) -> list[tuple[int, int]]:
        return [(t * h // self.merge, w // self.merge) for t, h, w in image_grid_thw.tolist()]


def _positions(slot: Slot, *args: Any, **words: Any) -> Tensor | None:
    """The host counts on from the length of the cache, which is shorter than the caller's sequence."""
    core: Any = slot.module
    past: Any = words.get("past_key_values")
    found = type(core).compute_3d_position_ids(core, *args, **words)
    memory = getattr(past, _vlm_calls.MEMORY, {}).get(0)
    if memory is None or words.get("attention_mask") is not None or found is None:
        return found
    return found + (memory.seen - past.get_seq_length())


def _deepstack(words: dict[str, Any], left: Columns) -> dict[str, Any]:
    """Features added in the first blocks, of the columns that are left."""
    visual, added = words.get("visual_pos_masks"), words.get("deepstack_visual_embeds")
    if visual is None or added is None:
        return {}
    stays = torch.zeros_like(visual).scatter(1, left.index, left.certain())
    rows = stays[visual]
    return {
        "visual_pos_masks": left.values(visual) & left.certain(),
        "deepstack_visual_embeds": [one[rows] for one in added],
    }
