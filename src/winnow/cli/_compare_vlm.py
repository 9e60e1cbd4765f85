"""winnow compare for vision-language models: answers to questions about images, right or wrong, at what cost.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import winnow

from .._parse import parse
from .._vlm_model import bare_vlm
from .._weights import state_hash
from ..baselines import takes
from ..compare_vlm import VlmComparison, at_budgets
from ..data.conversations import Conversations, open_conversations
from ..data.scenes import patch_objects
from ..measure import record
from ..measure._vlm_families import towers_of
from ..measure._vlm_shapes import Tower
from ..reducer import Method
from ..tasks.answer import Prompts
from ..view import vlm
from ..view.report import Sheet
from ._compare_model import seen
from ._progress import Progress

DATA = "scenes"
METHODS = ("PruMerge()", "VisionZip()", "DivPrune()", "VisPruner()", "FastV()", "ToMe(r=8)")
"""What is compared where no method is named."""


def compare_vlm(
    spec: str, methods: Sequence[Method] | None, budgets: Sequence[float], data: str | None, split: str,
    limit: int | None, *, results: Path, fresh: bool, batch: int, sizes: Sequence[int], pairs: int, pictures: int,
    way: Any, device: torch.device,
) -> tuple[list[record.Row], list[Sheet]]:  # fmt: skip
    """Rows and pictures of a vision-language model; ValueError before any work where something cannot be.

    methods: None for those of METHODS that the model can be reduced with.
    """
    samples = open_conversations(data or DATA, split or ("test" if (data or DATA) == DATA else ""), limit)
    processor, model, trained = bare_vlm(spec)
    if methods is None:
        methods = [method for method in map(parse, METHODS) if takes(model, method)]
    tower = _tower(model.config, Prompts(processor, samples, batch))
    methods = at_budgets(methods, budgets, None if tower is None else tower.tokens)
    if trained is not None:
        trained.check(methods)
    reduce = winnow.reduce if trained is None else trained.reduce
    own = {} if trained is None else {f"reducer.{name}": value for name, value in trained.state.items()}
    with Progress() as progress:
        prompts = Prompts(processor, samples, batch, device, progress.images)
        comparison = VlmComparison(
            model=model.to(device), name=spec, weights=state_hash(model.state_dict() | own), labels=prompts.answers, way=way,
            batches=prompts, data=record.Data(name=samples.name, split=samples.split, n=len(samples), hash=samples.hash),
            results=results, sizes=[size for size in sizes if size], pairs=pairs, fresh=fresh, say=progress.say,
            objects=None if tower is None else _objects(samples, processor.image_processor), reduce=reduce,
        )  # fmt: skip
        progress.total = len(samples)
        rows = comparison.run(methods)
        progress.say("pictures")
        return rows, vlm.sheets(model, prompts, methods, rows, pictures, reduce)


def _tower(config: Any, prompts: Prompts) -> Tower | None:
    """Where the model sees one image of one size, patch by patch, as the first question shows."""
    (towers,) = towers_of(config, prompts.batch_of([prompts.samples[0]]).inputs)
    return towers[0] if [one.tiles for one in towers] == [1] and not towers[0].whole else None


def _objects(samples: Conversations, maker: Any) -> Callable[[tuple[int, int]], np.ndarray] | None:
    """The patches of the object each question is about, masks having gone through the processor; None without masks."""
    if any(sample.mask is None for sample in samples.samples):
        return None

    def pixels(image: Any) -> torch.Tensor:
        return maker(images=image, return_tensors="pt")["pixel_values"][0]

    @cache
    def patches(grid: tuple[int, int]) -> np.ndarray:
        masks = (sample.mask() for sample in samples.samples if sample.mask)
        return np.stack([patch_objects(seen(mask, pixels, maker.image_mean, maker.image_std), grid) for mask in masks])

    return patches
