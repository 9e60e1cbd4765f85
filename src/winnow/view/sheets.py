"""Pictures of what methods did to photographs: run a few images, draw each method's ledgers layer by layer.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import winnow

from ..measure import unpack
from ..measure.record import Row
from ..reducer import Method
from .overlay import draw, spaced
from .report import Sheet

Layers = list[tuple[str, np.ndarray, int]]


def photograph(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [B, H, W, 3]: normalised images [B, 3, H, W] as the model saw them."""
    shape = (1, -1, 1, 1)
    pixels = images.cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def layers_of(model: nn.Module, method: Method, images: Tensor, most: int | None = 3) -> list[Layers]:
    """Per image: (layer label, owner [h, w], real tokens) wherever the tokens changed, at most `most` of them."""
    with winnow.reduced(model, method):
        if winnow.reducer_of(model).quantiles():
            winnow.calibrate(model, [images])
        with winnow.watch(model) as run:
            model(images)
    found: list[Layers] = [[] for _ in images]
    before = None
    for layer, tokens in sorted(run.tokens.items()):
        ledger = tokens.ledger
        if before is None or not torch.equal(ledger.owner, before):
            before, counts = ledger.owner, ledger.counts().tolist()
            owners = ledger.owner.cpu().numpy()
            owners = owners.reshape(-1, *tokens.grid) if tokens.grid else owners
            for image, owner in enumerate(owners):
                label = "entering block 0" if layer < 0 else f"after block {layer}"
                found[image].append((label, owner, int(counts[image])))
    fresh = [layers[1:] if len(layers) > 1 else layers for layers in found]  # the untouched start shows nothing
    return [spaced(layers, most) if most else layers for layers in fresh]


def sheets(
    model: nn.Module, images: Any, loaded: Any, methods: Sequence[Method], chosen: Sequence[int], device: Any = "cpu"
) -> list[Sheet]:
    """One sheet per chosen image: the photograph and what each method kept or merged."""
    pixels = torch.stack([loaded.transform(images[i][0]) for i in chosen])
    photos = photograph(pixels, loaded.mean, loaded.std)
    shown: list[list[tuple[str, str, float, Any]]] = [[] for _ in chosen]
    for method in methods:
        for place, layers in enumerate(layers_of(model, method, pixels.to(device))):
            for label, owner, tokens in layers:
                grid = (int(owner.shape[0]), int(owner.shape[1])) if owner.ndim == 2 else _square(owner.size)
                shown[place].append((repr(method), label, tokens, draw(photos[place], owner.reshape(-1), grid)))
    labels = images.labels
    names = images.classes
    out = []
    for place, i in enumerate(chosen):
        label = "" if labels is None else names[labels[i]] if names else f"class {labels[i]}"
        out.append(Sheet(images.key(i), images.credit(i), label, shown[place], photos[place]))
    return out


def telling(rows: Sequence[Row], n: int, how_many: int) -> list[int]:
    """Images worth a look: those the plain model gets right and most reduced ones get wrong; else evenly spaced."""
    hits = {row.method: unpack(row.accuracy.hits, n) for row in rows if row.accuracy and row.accuracy.hits}
    plain = hits.pop(None, None)
    if plain is None or not hits:
        return spaced(range(n), min(how_many, n))
    lost = np.where(plain, sum((~hit).astype(int) for hit in hits.values()), -1)
    return [int(i) for i in np.argsort(-lost, kind="stable")[:how_many]]


def _square(patches: int) -> tuple[int, int]:
    """The most square grid of so many patches."""
    h = max(side for side in range(1, int(patches**0.5) + 1) if patches % side == 0)
    return h, patches // h
