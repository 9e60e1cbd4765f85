"""Image classification: the top-1 class of every image, with the tokens that were executed.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import winnow

from ..data.batches import Batch


@dataclass(frozen=True)
class Answers:
    """What a model said about every image."""

    top: np.ndarray
    """[n] class with the highest logit."""
    counts: Tensor
    """[n, depth+1] real patch tokens: entering block 0, then after each block; empty for a plain model."""
    executed: list[int]
    """depth+1 tokens executed on the first batch, padding included."""
    owners: np.ndarray
    """[n, P] int16 token that holds each patch at the end, -1 where dropped; empty for a plain model."""
    grid: tuple[int, int] | None = None


@torch.inference_mode()
def classify(model: nn.Module, batches: Iterable[Batch], watched: bool = True) -> Answers:
    """Run the model over all batches; FloatingPointError where its output is not finite."""
    top: list[Tensor] = []
    counts: list[Tensor] = []
    executed: list[int] = []
    owners: list[Tensor] = []
    grid = None
    model.eval()
    for batch in batches:
        if watched:
            with winnow.watch(model) as run:
                logits = model(batch.images)
            counts.append(run.valid_counts.cpu())
            owners.append(run.ledger.owner.to(torch.int16).cpu())
            executed, grid = executed or run.counts, run.grid
        else:
            logits = model(batch.images)
        if not bool(logits.isfinite().all()):
            raise FloatingPointError(
                f"the model gives NaN or infinity on images {batch.indices[0]} to {batch.indices[-1]}"
            )
        top.append(logits.argmax(-1).cpu())
    if not top:
        raise ValueError("there are no images")
    if not watched:
        return Answers(torch.cat(top).numpy(), torch.empty(0, 0), [], np.empty((0, 0)))
    return Answers(torch.cat(top).numpy(), torch.cat(counts), executed, torch.cat(owners).numpy(), grid)
