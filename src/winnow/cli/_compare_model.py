"""winnow compare for classifiers: the same images, each method beside its equal-cost baselines.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..compare import Comparison
from ..data import Images, check_labels
from ..data.batches import cached
from ..data.scenes import patch_objects
from ..measure import record
from ..models import LoadedModel
from ..reducer import Method
from ..view.report import Sheet
from ..view.sheets import photograph, sheets
from ._progress import Progress


def compare_model(
    loaded: LoadedModel, methods: Sequence[Method], images: Images, *, reduce: Callable, results: Path, fresh: bool,
    batch: int, sizes: Sequence[int], pairs: int, pictures: int, way: Any, device: torch.device,
) -> tuple[list[record.Row], list[Sheet]]:  # fmt: skip
    """Rows and pictures of a classifier; ValueError before any work where something cannot be."""
    if loaded.num_classes is None:
        raise ValueError(f"{loaded.spec} gives features, not classes: compare needs a classifier")
    check_labels(images, loaded.num_classes)
    # with random weights top-1 means nothing: only agreement with the plain model is reported
    labels = None if images.labels is None or loaded.weights_hash is None else np.array(images.labels)
    with Progress() as progress:
        comparison = Comparison(
            model=loaded.model.to(device), name=loaded.spec, weights=loaded.weights_hash, labels=labels, way=way,
            batches=cached(images, loaded.transform, batch, workers=2, device=device, progress=progress.images),
            data=record.Data(name=images.name, split=images.split, n=len(images), hash=images.hash),
            results=results, sizes=[size for size in sizes if size], pairs=pairs, fresh=fresh,
            say=progress.say, objects=_objects(images, loaded), reduce=reduce,
        )  # fmt: skip
        progress.total = len(images)
        rows = comparison.run(methods)
        progress.say("pictures")
        return rows, sheets(comparison.model, images, loaded, methods, rows, pictures, device, reduce)


def _objects(images: Images, loaded: LoadedModel) -> Callable[[tuple[int, int]], np.ndarray] | None:
    """The object of each patch, masks having gone through the model's own resizing and cropping; None without masks."""
    if images.mask(0) is None:
        return None

    def patches(grid: tuple[int, int]) -> np.ndarray:
        masks = (images.mask(i) for i in range(len(images)))
        return np.stack([patch_objects(seen(mask, loaded.transform, loaded.mean, loaded.std), grid) for mask in masks])

    return cache(patches)


def seen(mask: np.ndarray | None, transform: Callable, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A mask as the model would see it; ids are spread over the grey values, so that resizing can be undone by rounding."""
    assert mask is not None
    step = 255 // max(1, int(mask.max()))
    pixels = transform(Image.fromarray(mask * np.uint8(step)).convert("RGB"))
    return np.rint(photograph(pixels[None], mean, std)[0, ..., 0] / step).astype(np.uint8)
