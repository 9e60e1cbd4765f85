"""winnow compare for vision-language models: answers to questions about images, right or wrong, at what cost.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._vlm_model import load_vlm
from .._weights import state_hash
from ..compare_vlm import VlmComparison, at_budgets
from ..data.conversations import open_conversations
from ..measure import record
from ..reducer import Method
from ..tasks.answer import Prompts
from ..view import vlm
from ..view.report import Sheet
from ._progress import Progress

DATA = "scenes"


def compare_vlm(
    spec: str, methods: Sequence[Method], budgets: Sequence[float], data: str | None, split: str, limit: int | None, *,
    results: Path, fresh: bool, batch: int, sizes: Sequence[int], pairs: int, pictures: int, way: Any, device: torch.device,
) -> tuple[list[record.Row], list[Sheet]]:  # fmt: skip
    """Rows and pictures of a vision-language model; ValueError before any work where something cannot be."""
    methods = at_budgets(methods, budgets)
    samples = open_conversations(data or DATA, split or ("test" if (data or DATA) == DATA else ""), limit)
    processor, model = load_vlm(spec)
    with Progress() as progress:
        prompts = Prompts(processor, samples, batch, device, progress.images)
        comparison = VlmComparison(
            model=model.to(device), name=spec, weights=state_hash(model.state_dict()), labels=prompts.answers, way=way,
            batches=prompts, data=record.Data(name=samples.name, split=samples.split, n=len(samples), hash=samples.hash),
            results=results, sizes=[size for size in sizes if size], pairs=pairs, fresh=fresh, say=progress.say,
        )  # fmt: skip
        progress.total = len(samples)
        rows = comparison.run(methods)
        progress.say("pictures")
        return rows, vlm.sheets(model, prompts, methods, rows, pictures)
