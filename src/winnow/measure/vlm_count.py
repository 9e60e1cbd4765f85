"""Count the MACs of a vision-language model stage by stage on the meta device: no weights, no memory, any size.

Winnow's own, beside the closed form in vlm.py; stage by stage because a whole forward asks tensors for their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._vlm_families import shapes_of
from ._vlm_shapes import Decoder, Tower
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
    core = model.model
    decode = _language(getattr(core, "text_model", None) or core.language_model, model.lm_head, llm)
    given = tower.tiles * tower.patches if keep is None or tower.whole else said.image_tokens[0]
    vision, projector = _image(core, tower, given)
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


def _image(core: Any, tower: Tower, read: int) -> tuple[float, float]:
    """MACs of the tower and of the projector, which reads so many patches."""
    if hasattr(core, "visual"):
        return _merging(core, tower)
    tiles = _meta(tower.tiles, 3, *(cells * pixels for cells, pixels in zip(tower.grid, tower.patch)))
    joined = _meta(1, read // tower.merge, tower.widths[0])
    if hasattr(core, "connector"):  # SmolVLM's tower asks for the values of its mask
        vision, projector = core.vision_model, core.connector.modality_projection
        embed = vision.embeddings.patch_embedding
        tower_ = _Call(vision, lambda x: vision.encoder(embed(x).flatten(2).transpose(1, 2)))
    else:
        tower_, projector = core.vision_tower, core.multi_modal_projector
        if getattr(projector, "joins", False):
            joined = _meta(1, read, tower.width)
    return tower.tiles * count_macs(tower_, tiles), count_macs(projector, joined) if read else 0.0


def _merging(core: Any, tower: Tower) -> tuple[float, float]:
    """A tower whose projectors are its last parts; its windows follow from the grid, which is a real tensor."""
    vision, n = core.visual.config, tower.patches
    given = {"grid_thw": torch.tensor([[1, *tower.grid]]), "position_ids": _meta(n, 2)}
    if hasattr(vision, "num_position_embeddings"):
        given |= {"interp_indices": _meta(n, 4).long(), "interp_weights": _meta(n, 4)}
    whole = _Call(core.visual, lambda x: core.visual(x[0], **given))
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    found = macs_by_module(whole, _meta(1, n, channels))
    mergers = [
        name for name in found if name == "inner.merger" or name.rpartition(".")[0] == "inner.deepstack_merger_list"
    ]
    projector = sum(found[name] for name in mergers)
    return found[""] - projector, projector


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
