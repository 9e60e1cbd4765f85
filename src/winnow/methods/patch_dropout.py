"""PatchDropout: while training, each image enters with a random part of its patches.

Liu et al., "PatchDropout: Economizing Vision Transformers Using Patch Dropout", WACV 2023; timm and open_clip do the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..parts.choose import top
from ..parts.combine import drop
from ..parts.settings import check_number
from ..reducer import Facts, Method, Reducer, Signals
from ..tokens import Tokens


@dataclass(frozen=True, repr=False)
class PatchDropout(Method):
    """Drops a share `rate` of the patches before block 0, in training only; another draw at every step."""

    rate: float = 0.5

    def __post_init__(self) -> None:
        check_number("PatchDropout", "rate", self.rate, 0, 1, below=True)

    @property
    def facts(self) -> Facts:
        return Facts(needs=frozenset({"noise"}), where="between", training_only=True)

    def sites(self, depth: int) -> tuple[int, ...]:
        return (0,)

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """int(n * (1 - rate)), at least 1: rounded down as in timm and open_clip, unlike Keep."""
        return max(1, int(n * (1 - self.rate)))

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return PatchDropoutReducer(self, patches, prefix)


class PatchDropoutReducer(Reducer):
    """Keeps the patches with the highest noise; raise `step` at every training step for another draw."""

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        m = self.count(tokens.n, layer)
        if self.idle(tokens.n, layer) or m == tokens.n:
            return tokens
        assert signals.noise is not None
        return drop(tokens, top(signals.noise, m), score=signals.noise if signals.watched else None)
