"""DivPrune: keep the image tokens that are farthest from each other.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025; from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..parts.amount import Amount, Keep
from ..parts.combine import drop
from ..parts.diverse import farthest, likeness
from ..reducer import Facts, Reducer, Setting, Signals
from ..tokens import Tokens
from ._at_tower import NINTH, AtTower


class DivPruneReducer(Reducer):
    """Max-min distance of projected features, 1 - cosine; picks are greedy."""

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        m = self.count(tokens.n, layer)
        if m == tokens.n:
            return tokens
        return drop(tokens, farthest(1 - likeness(tokens.x), m).sort(1).values)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """The similarities."""
        return 0.0 if self.count(n, layer) == n else n * n * setting.width


@dataclass(frozen=True, repr=False)
class DivPrune(AtTower):
    """A subset as diverse as can be, whatever the question; the paper's 0.098 of 576 is `Exactly(56)`, as Keep rounds up."""

    keep: Amount = Keep(NINTH)
    reducer = DivPruneReducer

    @property
    def facts(self) -> Facts:
        return Facts(where="tower", needs=frozenset({"projected"}))
