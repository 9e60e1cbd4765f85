"""Hugging Face LLaVA-NeXT and LLaVA-OneVision: images in tiles, packed row by row with a mark at every row's end.

Liu et al., LLaVA-NeXT, 2024; Li et al., "LLaVA-OneVision", 2024; transformers 5. Tokens are reduced tile by tile, and
the host packs the slots; a token whose first patch is cut off with the padding moves to the first one that stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next import modeling_llava_next as llava_next
from transformers.models.llava_onevision import modeling_llava_onevision as onevision

from .. import _vlm
from .._host import Host, Patch
from .._run import Slot
from .._tower import EMPTY
from . import hf_vision

NAMES = {
    llava_next.LlavaNextForConditionalGeneration.forward: "Hugging Face LLaVA-NeXT",
    onevision.LlavaOnevisionForConditionalGeneration.forward: "Hugging Face LLaVA-OneVision",
}


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward in NAMES


def host(model: Any) -> Host:
    """The model's parts; TypeError where the tower is not one Winnow knows."""
    core = model.model
    tower, begin, made = hf_vision.selected(core, model.config)
    video = (Patch(core, "get_video_features", _no_video),) if hasattr(core, "get_video_features") else ()
    return _vlm.host(
        _vlm.Vlm(
            family=NAMES[type(model).forward],
            model=model,
            core=core,
            llm=core.language_model,
            tower=tower,
            begin=begin,
            projector=core.multi_modal_projector,
            made=made,
            place=hf_vision.last_place,
            in_place=True,
            more=(Patch(core, "pack_image_features", _pack), *video),
            inside="cutting padding off its tiles and packing them row by row needs the whole grid",
        )
    )


def _no_video(slot: Slot, *args: Any, **words: Any) -> Any:
    raise ValueError("videos are pooled over the whole grid of every frame, which a reduced model has not: images work")


def _pack(slot: Slot, features: list[Tensor], *args: Any, **words: Any) -> Any:
    """The host's packing, after tokens that it would cut off moved to a patch of theirs that it keeps."""
    seat: Any = slot.seat
    core: Any = slot.module
    run = partial(type(core).pack_image_features, core)
    if seat.facts.where == "llm":
        return run(features, *args, **words)
    tiles = torch.cat(list(features))
    seen, ledger = _seen(run, features, *args, **words), seat.run.ledger
    count, patches = ledger.owner.shape
    place = torch.arange(patches, device=tiles.device).expand(count, -1).masked_fill(~seen, patches)
    slot_of = place.new_full((count, ledger.n + 1), patches)
    slot_of = slot_of.scatter_reduce(1, ledger.owner.remainder(ledger.n + 1), place, "amin")[:, : ledger.n]
    first = ledger.first()
    from_ = first.clamp_max(patches - 1).unsqueeze(-1).expand(-1, -1, tiles.shape[-1])
    to = slot_of.masked_fill(first == patches, patches).unsqueeze(-1).expand_as(from_)
    empty = tiles.new_full((count, patches + 1, tiles.shape[-1]), EMPTY)
    moved = empty.scatter(1, to, tiles.gather(1, from_))[:, :patches]
    return run(moved.split([len(one) for one in features]), *args, **words)


def _seen(run: Any, features: list[Tensor], *args: Any, **words: Any) -> Tensor:
    """[T, P] bool: the patches of each tile that the packing keeps, found by packing their numbers."""
    sizes, patches = [len(one) for one in features], features[0].shape[1]
    numbers = torch.arange(sum(sizes) * patches, dtype=torch.float64, device=features[0].device)
    marked = numbers.view(-1, patches, 1).split(sizes)
    newline = words.get("image_newline")
    words = words | {"image_newline": None if newline is None else numbers.new_full((1,), -1)}
    packed = torch.cat(run(marked, *args, **words)[0])[:, 0]
    if bool((packed != packed.round()).any()):
        raise ValueError("an image of so many tiles is interpolated after the projector: use FastV, or a smaller image")
    kept = packed[packed >= 0].long()
    return torch.zeros_like(numbers, dtype=torch.bool).index_fill(0, kept, True).view(-1, patches)
