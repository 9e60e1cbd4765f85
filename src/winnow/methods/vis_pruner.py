"""VisPruner: keep the image features the class token attends to, and of the others those that are unlike each other.

Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..parts.amount import Amount, Keep
from ..parts.combine import drop
from ..parts.diverse import distinct, likeness
from ..parts.score import attention, attention_facts, check_attention
from ..parts.settings import check_number
from ..reducer import Facts, Reducer, Setting, Signals
from ..tokens import Tokens
from ._at_tower import NINTH, AtTower
from .evit import attention_macs


class VisPrunerReducer(Reducer):
    """Important ones by attention, the rest thinned out pair by pair; features are those before the projector."""

    method: VisPruner

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        m = self.count(tokens.n, layer)
        if m == tokens.n:
            return tokens
        score = attention(signals, self.method.attention)
        important = int(m * self.method.important)
        ranked = score.argsort(dim=1, descending=True, stable=True)
        rest = distinct(likeness(tokens.x), ranked[:, important:], m - important)
        kept = torch.cat([ranked[:, :important], rest], 1).sort(1).values
        return drop(tokens, kept, score=score if signals.watched else None)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """The attention read and the similarities."""
        if self.count(n, layer) == n:
            return 0.0
        return attention_macs(self.method.attention, n, setting) + n * n * setting.width


@dataclass(frozen=True, repr=False)
class VisPruner(AtTower):
    """`important`: share of the kept tokens that attention chooses, rounded down."""

    keep: Amount = Keep(NINTH)
    important: float = 0.5
    attention: str = "cls"
    reducer = VisPrunerReducer

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("VisPruner", "important", self.important, 0, 1)
        check_attention("VisPruner", self.attention)

    @property
    def facts(self) -> Facts:
        return attention_facts(self.attention, where="tower")
