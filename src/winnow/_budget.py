"""budget: how many tokens a budget-conditioned method keeps, from outside and for a while.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ._reduce import reducer_of
from .parts.budget import Budget, check_budget

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def budget(model: Model, amount: Budget) -> Iterator[Model]:
    """Inside, the model keeps `amount` of every image: int = tokens, float in (0, 1] = share, tensor [B] = one per image.

    Nests; 0 keeps one token, more than there are prunes nothing. TypeError / ValueError where the model's method has its
    amount in its settings, or where this is no budget.
    """
    reducer = reducer_of(model)
    if not reducer.method.facts.budgeted:
        raise ValueError(
            f"{reducer.method} keeps what its settings say; reduce the model with another amount, or with a method that "
            "takes a budget: AdaptiveKeep()"
        )
    before, reducer.budget = reducer.budget, check_budget(amount)
    try:
        yield model
    finally:
        reducer.budget = before
