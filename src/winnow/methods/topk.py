"""TopK: keep the tokens with the highest attention, drop the rest.

The Top-K baseline of Haurum et al., "Which Tokens to Use?", ICCVW 2023; EViT without the fused token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..parts.amount import Amount, Keep
from ..parts.score import attention, attention_facts, check_attention
from ..reducer import Facts, Setting, Signals
from ..tokens import Tokens
from ._sites import AtLayers, KeepTop
from .evit import attention_macs


class TopKReducer(KeepTop):
    """Scores by attention."""

    def score(self, tokens: Tokens, signals: Signals, layer: int) -> Tensor:
        return attention(signals, self.method.attention)  # type: ignore[attr-defined]

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        return attention_macs(self.method.attention, n, setting)  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False)
class TopK(AtLayers):
    """Prune by class-token (or received) attention at a few blocks."""

    keep: Amount | tuple[Amount, ...] = Keep(0.7)
    layers: tuple[int, ...] = (3, 6, 9)
    attention: str = "cls"
    reducer = TopKReducer

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attention("TopK", self.attention)

    @property
    def facts(self) -> Facts:
        return attention_facts(self.attention)
