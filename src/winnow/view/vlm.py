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
from ..measure._vlm_families import towers_of
from ..measure.record import Row
from ..reducer import Method
from .overlay import Grid, after, draw, grid_of
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


def places(config: Any, inputs: dict[str, Any]) -> list[tuple[int | None, Grid]]:
    """For each picture that the model saw, its first token among the prompt's image tokens, and the grid they are on.

    None where the host packs its tokens among others: the tiles of LLaVA-NeXT and LLaVA-OneVision, the whole image apart.
    """
    (towers,) = towers_of(config, inputs)
    found: list[tuple[int | None, Grid]] = []
    start = 0
    for tower in towers:
        for tile in range(tower.tiles):
            packed = bool(tower.marks) and tile > 0
            found.append((None if packed else start + tile * tower.each, tower.merged))
        start += tower.tokens
    return found


def of(layers: list[Layers], picture: int, where: list[tuple[int | None, Grid]], shape: tuple[int, int]) -> Layers:
    """What belongs to one of the pictures at `where`: a ledger of its own, or its part of the prompt's; none if packed."""
    start, grid = where[picture]
    own = len(layers) == len(where)
    if not own and (len(layers) != 1 or start is None):
        return []
    found: Layers = []
    first = 0 if own or start is None else start
    for label, owner, count in layers[picture if own else 0]:
        part = owner[first : first + grid[0] * grid[1]]  # images of several sizes share one width
        kept = count if own else len(np.unique(part[part >= 0]))
        found.append((label, part.reshape(grid_of(part, shape, grid)), kept))
    return found


def seen(processor: Any, inputs: dict[str, Any], pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each image or tile as the model saw it; the photographs where it saw patches in a row."""
    pixels, image = inputs["pixel_values"], processor.image_processor
    if pixels.ndim < 4:
        return [np.asarray(picture) for picture in pictures]
    tiles = pixels.flatten(0, pixels.ndim - 4)
    real = (tiles != 0).flatten(1).any(1)  # images of fewer tiles are filled up with zeros
    return list(photograph(tiles[real], image.image_mean, image.image_std))


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
    return of(layers_of(run, method), 0, places(model.config, inputs), shape)
