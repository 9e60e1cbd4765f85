"""Pictures of the image tokens a vision-language model was left with: in the tower, after it, inside the language model.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

import winnow

from .._question import tell
from ..measure.record import Row
from ..reducer import Method
from .overlay import after, draw, grid_of
from .report import Sheet
from .sheets import photograph, telling

Layers = list[tuple[int, np.ndarray, int]]
TOWER = 1000
"""Number of the place after the tower; blocks of the language model are counted on from there, the tower's from 0."""


def words(place: int) -> str:
    """Where a place is."""
    return after(place) if place < TOWER else "after the tower" if place == TOWER else f"from block {place - TOWER - 1}"


def layers_of(run: Any, method: Method) -> list[Layers]:
    """Per image, tile or (inside the language model) prompt: place, owner [P] and tokens wherever these changed."""
    found: list[Layers] = []
    before = run.tokens[-1].ledger.owner
    for layer, tokens in sorted(run.tokens.items()):
        owner = tokens.ledger.owner
        found = found or [[] for _ in owner]
        if layer >= 0 and owner.shape == before.shape and torch.equal(owner, before):
            continue
        if layer >= 0 or len(run.tokens) == 1:
            place = {"tower": TOWER, "llm": TOWER + layer + 2}.get(method.facts.where, layer)
            for into, row, count in zip(found, owner.cpu().numpy(), tokens.ledger.counts().tolist(), strict=True):
                into.append((place, row, count))
        before = owner
    return found


def of(layers: list[Layers], place: int, pictures: int, shape: tuple[int, int]) -> Layers:
    """What belongs to one picture: a ledger of its own, or its equal share of the prompt's; on a grid of its shape."""
    if len(layers) == pictures:
        return [(label, owner.reshape(grid_of(owner, shape)), count) for label, owner, count in layers[place]]
    if len(layers) != 1 or layers[0][0][1].size % pictures:
        return []
    found: Layers = []
    for label, owner, _ in layers[0]:
        part = np.split(owner, pictures)[place]
        found.append((label, part.reshape(grid_of(part, shape)), len(np.unique(part[part >= 0]))))
    return found


def seen(processor: Any, inputs: dict[str, Any], pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each image or tile as the model saw it; the photographs where it saw patches in a row."""
    pixels, image = inputs["pixel_values"], processor.image_processor
    if pixels.ndim < 4:
        return [np.asarray(picture) for picture in pictures]
    tiles = pixels.flatten(0, pixels.ndim - 4)
    return list(photograph(tiles, image.image_mean, image.image_std))


def sheets(
    model: Any, prompts: Any, methods: Sequence[Method], rows: Sequence[Row], how_many: int,
    reduce: Callable = winnow.reduce,
) -> list[Sheet]:  # fmt: skip
    """Sheets of the most telling questions by these rows: the image, what each method left of it, who got it wrong."""
    chosen, lost = telling(rows, len(prompts.samples), how_many)
    out = []
    for i, who in zip(chosen, lost):
        sample = prompts.samples[i]
        inputs, (asked, *_) = prompts.batch_of([sample])
        photo = seen(prompts.processor, inputs, sample.pictures())[0]
        shown: list[tuple[str, int, float, Any]] = []
        for method in methods:
            for place, owner, tokens in _left(model, method, prompts, inputs, asked, photo.shape[:2], reduce):
                shown.append((repr(method), place, tokens, draw(photo, owner.reshape(-1), owner.shape)))
        places = {place: words(place) for _, place, _, _ in shown}
        out.append(Sheet(f"{sample.key.partition(':')[0]}: {asked}", "", prompts.answers[i], shown, photo, who, places))
    return out


@torch.inference_mode()
def _left(
    model: Any,
    method: Method,
    prompts: Any,
    inputs: dict[str, Any],
    asked: str,
    shape: tuple[int, int],
    reduce: Callable,
) -> Layers:
    reduce(model, method)
    try:
        with winnow.watch(model) as run:
            tell(model, [asked])
            model(**inputs, logits_to_keep=1)
    finally:
        winnow.restore(model)
    layers = layers_of(run, method)
    return of(layers, 0, len(layers), shape)
