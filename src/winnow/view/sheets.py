"""Pictures of what methods did to photographs: run a few images, draw each method's ledgers layer by layer.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import winnow

from .._run import Watch
from ..measure import unpack
from ..measure.record import Row
from ..reducer import Method
from .overlay import draw, spaced
from .report import Sheet

Layers = list[tuple[int, np.ndarray, int]]


def photograph(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [B, H, W, 3]: normalised images [B, 3, H, W] as the model saw them."""
    shape = (1, -1, 1, 1)
    pixels = images.cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def watched(model: nn.Module, method: Method, images: Tensor, reduce: Callable = winnow.reduce) -> Watch:
    """What the method does to images [B, 3, H, W], calibrated on them where it must be; the model is left as it came."""
    reduce(model, method)
    try:
        if winnow.reducer_of(model).quantiles():
            winnow.calibrate(model, [images])
        with winnow.watch(model) as run:
            model(images)
    finally:
        winnow.restore(model)
    return run


def layers_of(model: nn.Module, method: Method, images: Tensor, reduce: Callable = winnow.reduce) -> list[Layers]:
    """Per image: (block, owner [h, w], real tokens) after every block that changed the tokens; -1 = entering block 0."""
    run = watched(model, method, images, reduce)
    found: list[Layers] = [[] for _ in images]
    before = None
    for layer, tokens in sorted(run.tokens.items()):
        ledger = tokens.ledger
        if before is None or not torch.equal(ledger.owner, before):
            before, counts = ledger.owner, ledger.counts().tolist()
            owners = ledger.owner.cpu().numpy()
            owners = owners.reshape(-1, *tokens.grid) if tokens.grid else owners
            for image, owner in enumerate(owners):
                found[image].append((layer, owner, int(counts[image])))
    return [layers[1:] if len(layers) > 1 else layers for layers in found]  # the untouched start shows nothing


def sheets(
    model: nn.Module,
    images: Any,
    loaded: Any,
    methods: Sequence[Method],
    rows: Sequence[Row],
    how_many: int,
    device: Any = "cpu",
    reduce: Callable = winnow.reduce,
) -> list[Sheet]:
    """Sheets of the most telling images by these rows: the picture, what each method kept or merged, who lost it."""
    chosen, lost = telling(rows, len(images), how_many)
    if not chosen:
        return []
    pixels = torch.stack([loaded.transform(images[i][0]) for i in chosen])
    photos = photograph(pixels, loaded.mean, loaded.std)
    shown: list[list[tuple[str, int, float, Any]]] = [[] for _ in chosen]
    for method in methods:
        for place, layers in enumerate(layers_of(model, method, pixels.to(device), reduce)):
            for layer, owner, tokens in layers:
                grid = (int(owner.shape[0]), int(owner.shape[1])) if owner.ndim == 2 else _square(owner.size)
                shown[place].append((repr(method), layer, tokens, draw(photos[place], owner.reshape(-1), grid)))
    labels = images.labels
    names = images.classes
    out = []
    for place, i in enumerate(chosen):
        label = "" if labels is None else names[labels[i]] if names else f"class {labels[i]}"
        out.append(Sheet(images.key(i), images.credit(i), label, shown[place], photos[place], lost[place]))
    return out


def telling(rows: Sequence[Row], n: int, how_many: int) -> tuple[list[int], list[str]]:
    """Images worth a look and who lost them, in words: those the plain model gets right, worst drops first.

    Methods count, baselines only where there are no methods. Evenly spaced images and no words where rows cannot say.
    """
    scored = [row for row in rows if row.accuracy and row.accuracy.hits and row.role != "plain"]
    scored = [row for row in scored if row.role == "method"] or scored
    plain = next((row for row in rows if row.role == "plain" and row.accuracy and row.accuracy.hits), None)
    if plain is None or not scored:
        chosen = spaced(range(n), min(how_many, n)) if how_many else []
        return chosen, [""] * len(chosen)
    missed = sum(1 - unpack(row.accuracy.hits, n).astype(int) for row in scored)  # type: ignore[union-attr, misc]
    lost = np.where(unpack(plain.accuracy.hits, n), missed, -1)  # type: ignore[union-attr]
    chosen = [int(i) for i in np.argsort(-lost, kind="stable")[:how_many]]
    return chosen, [_lost(int(lost[i]), len(scored), scored[0].role) for i in chosen]


def _lost(count: int, of: int, role: str) -> str:
    if count < 0:
        return "the plain model is wrong too"
    return f"lost by {count or 'none'} of {of} {role}{'s' * (of > 1)}"


def _square(patches: int) -> tuple[int, int]:
    """The most square grid of so many patches."""
    h = max(side for side in range(1, int(patches**0.5) + 1) if patches % side == 0)
    return h, patches // h
