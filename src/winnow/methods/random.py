"""Random: drop tokens at random; the baseline every method must beat.

The key of the draw is the image's own content, so a result is reproducible and does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..parts.amount import Amount, Keep
from ..reducer import Facts, Reducer, Signals
from ..tokens import Tokens
from ._sites import AtPlaces, KeepTop


class RandomReducer(KeepTop):
    """Scores by noise."""

    def score(self, tokens: Tokens, signals: Signals, layer: int) -> Tensor:
        assert signals.noise is not None
        return signals.noise


@dataclass(frozen=True, repr=False)
class Random(AtPlaces):
    """A uniform draw without replacement at each site; another `seed` is another draw."""

    keep: Amount | tuple[Amount, ...] = Keep(0.7)
    layers: tuple[int, ...] = (3, 6, 9)
    at: str = "block"
    seed: int = 0
    reducer = RandomReducer

    @property
    def facts(self) -> Facts:
        return Facts(needs=frozenset({"noise"}), where=self.where)

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        reducer = super().build(depth, width, heads, patches, prefix)
        reducer.seed = self.seed
        return reducer
