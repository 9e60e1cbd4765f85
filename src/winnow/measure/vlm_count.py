"""Count the MACs of a vision-language model stage by stage on the meta device: no weights, no memory, any size.

Winnow's own, beside the closed form in vlm.py; stage by stage because a whole forward asks tensors for their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._vlm_shapes import Decoder, Tower, shapes_of
from .closed_form import check_counted
from .macs import count_macs, macs_by_module
from .vlm import VlmMacs, vlm_macs


def count_vlm_macs(config: Any, keep: int | Sequence[int] | None, text: int, **words: Any) -> VlmMacs:
    """What `vlm_macs` says in closed form, counted: tower, projector, every block of the language model, head.

    Each part is the host's own module, given as many tokens as would reach it. `keep` and `words` as in `vlm_macs`.
    ValueError where count and closed form are more than 2 % apart.
    """
    from transformers import AutoModelForImageTextToText

    said = vlm_macs(config, keep, text, **words)
    tower, llm = shapes_of(config, words.get("grid"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).eval()
    decode = _language(model.model.language_model, model.lm_head, llm)
    vision, projector = _image(model.model, config, tower, said.image_tokens[0])
    found = replace(
        said,
        vision=vision,
        projector=projector,
        prefill=decode([(n + text, 0) for n in said.image_tokens]),
        decode=decode([(1, n + text) for n in said.image_tokens]),
    )
    for stage in ("vision", "projector", "prefill", "decode"):
        check_counted(getattr(found, stage), getattr(said, stage) or None, stage)
    return found


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


class _Call(nn.Module):
    """A module for the counter, which runs a function on the tensor it is given."""

    def __init__(self, inner: nn.Module, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


def _image(core: Any, config: Any, tower: Tower, kept: int) -> tuple[float, float]:
    """MACs of the tower and of the projector."""
    if tower.merge > 1:
        return _merging(core, config, tower)
    side = config.vision_config.image_size
    vision = count_macs(core.vision_tower, _meta(1, config.vision_config.num_channels, side, side))
    return vision, count_macs(core.multi_modal_projector, _meta(1, kept, tower.width)) if kept else 0.0


def _merging(core: Any, config: Any, tower: Tower) -> tuple[float, float]:
    """A tower whose projector is its last part; its windows follow from the grid, which is a real tensor."""
    vision = config.vision_config
    grid = torch.tensor([[1, *tower.grid]])
    places = _meta(tower.patches, 2)
    whole = _Call(core.visual, lambda x: core.visual(x[0], grid_thw=grid, position_ids=places))
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    found = macs_by_module(whole, _meta(1, tower.patches, channels))
    return found[""] - found["inner.merger"], found["inner.merger"]


def _language(llm: Any, head: nn.Module, shapes: Decoder) -> Callable[[list[tuple[int, int]]], float]:
    """A function: MACs of the blocks and the head, for (new tokens, tokens in the cache) of each block."""
    from transformers import DynamicCache

    made: dict[tuple[int, int], float] = {}  # blocks differ in nothing but their number

    def block(queries: int, held: int) -> float:
        def run(x: Tensor) -> Any:
            cache = DynamicCache()
            if held:
                kv = x.new_empty(1, shapes.kv_heads, held, shapes.head_size)
                cache.update(kv, kv, 0)
            places = _meta(1, queries, shapes.head_size)
            return llm.layers[0](x, attention_mask=None, position_embeddings=(places, places), past_key_values=cache)

        if (queries, held) not in made:
            made[queries, held] = count_macs(_Call(llm.layers[0], run), _meta(1, queries, shapes.width))
        return made[queries, held]

    logits = count_macs(head, _meta(1, 1, shapes.width))
    return lambda sizes: sum(block(*size) for size in sizes) + logits
