"""Trainings with DRIP, read back from their folders: the model, its log, and what it does with its validation images.

Winnow's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import winnow

from .. import models
from .._reduce import is_reduced
from .._weights import read_weights
from ..data import Images, open_images
from ..data.batches import batches
from ..methods.drip import DRIP
from ..tasks._reducer import reduce_by
from ..train.progress import read_log
from ..train.recipe import Recipe, load_recipe

MOST = 500
"""Validation images that are looked at."""


@dataclass(frozen=True)
class Trained:
    """One run's folder, read back."""

    name: str
    recipe: Recipe
    method: DRIP
    loaded: models.LoadedModel
    lines: list[dict[str, Any]]

    @property
    def rate(self) -> float:
        """Of its first stage."""
        return self.method.rate_at(self.method.sites()[0])

    @cached_property
    def seen(self) -> Seen:
        """What it does with its validation images."""
        return look(self, validation(self))


@dataclass(frozen=True)
class Seen:
    """What a trained model did with some images."""

    owners: np.ndarray
    """[n, P] segment of each patch."""
    shares: np.ndarray
    """[n] expected boundary rate of each image: the mean probability of its patches, the last being certain."""
    grid: tuple[int, int]


def read(folder: Path) -> Trained | None:
    """A run's model with its trained weights; None where it was not trained with DRIP."""
    recipe = load_recipe(folder / "recipe.yaml")
    loaded = _start(recipe)
    method = winnow.reducer_of(loaded.model).method if is_reduced(loaded.model) else None
    if not isinstance(method, DRIP):
        return None
    loaded.model.load_state_dict(read_weights(folder / "best.safetensors"))
    return Trained(folder.name, recipe, method, loaded, read_log(folder / "log.jsonl"))


def untrained(run: Trained) -> Trained:
    """The run as it began: the model it started from, the predictor as it was built."""
    part = run.recipe.model
    return replace(run, loaded=_start(run.recipe, weights=part.weights, pretrained=part.pretrained))


def _start(recipe: Recipe, **source: Any) -> models.LoadedModel:
    part, size = recipe.model, recipe.augment.size
    loaded = models.load_model(
        part.name, num_classes=part.num_classes, options=part.options, size=size, seed=recipe.seed, new_head=True, bare=True,
        **source,
    )  # fmt: skip
    reduce_by(loaded.model, recipe)
    return loaded


@torch.inference_mode()
def look(run: Trained, images: Images) -> Seen:
    """Run a trained model on images in evaluation."""
    owners, shares, grid = [], [], None
    site = run.method.sites()[0]
    for batch in batches(images, run.loaded.transform, 50):
        with winnow.watch(run.loaded.model) as seen:
            run.loaded.model(batch.images)
        owners.append(seen.ledger.owner.numpy())
        p = seen.scores[site]
        shares.append((p[:, :-1].sum(1) + 1) / p.shape[1])
        grid = seen.grid
    assert grid is not None
    return Seen(np.concatenate(owners), torch.cat(shares).numpy(), grid)


def validation(run: Trained) -> Images:
    """The first of its validation images."""
    source = run.recipe.data.val or run.recipe.data.train
    return open_images(source.path, split=source.split, limit=min(MOST, source.limit or MOST))
