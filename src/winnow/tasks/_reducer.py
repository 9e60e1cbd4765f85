"""What every task does with a recipe's reducer: puts it into the model, fills it from a file, ties it into the loss.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._parse import parse
from .._reduce import is_reduced, reduce
from .._save import trained_reducer

if TYPE_CHECKING:
    from ..train.recipe import Recipe


def reduce_by(model: nn.Module, recipe: Recipe) -> None:
    """Put in the recipe's method, if it has one; its weights are drawn from the recipe's seed."""
    if recipe.method is None:
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        reduce(model, parse(recipe.method))


def reducer_weights(model: nn.Module, path: Path | None) -> None:
    """The reducer's weights from the file the run starts from, where it has them; its method may be another."""
    found = None if path is None else trained_reducer(path.expanduser())
    if found is None:
        return
    if not is_reduced(model):
        raise ValueError(f"{path} was trained with a reducer: give its method, e.g. --set 'method=DRIP(rate=0.25)'")
    found.fill(model)


def tied(parameters: Iterable[nn.Parameter]) -> Tensor | float:
    """0, with a gradient of 0 for every parameter that learns: for those a forward may not use, or DDP waits for them."""
    learning = (parameter for parameter in parameters if parameter.requires_grad)
    # of a shard what is here: sharded weights are whole only inside the forward that gathers them
    return 0.0 * sum((p.to_local() if hasattr(p, "to_local") else p).sum() for p in learning)
