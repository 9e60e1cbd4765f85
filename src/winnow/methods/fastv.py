"""FastV: inside the language model, keep the image tokens the prompt's last token attends to.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024; written from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..parts.amount import Amount, Keep, check_amounts
from ..parts.choose import top
from ..parts.combine import drop
from ..reducer import Facts, Method, Reducer, Signals
from ..tokens import Tokens


class KeepAttended(Reducer):
    """Keeps the image tokens with the most attention, mean over heads; they stay in their places."""

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        assert signals.text_row is not None
        score: Tensor = signals.text_row.mean(1)
        patches = self.patches or tokens.ledger.owner.shape[1]  # how many a sample has is known only now
        m = self.method.count(tokens.n, layer, patches)
        return drop(tokens, top(score, m), score=score if signals.watched else None)


@dataclass(frozen=True, repr=False)
class FastV(Method):
    """Blocks 0 to layer-1 see all image tokens, the others those ranked highest in block layer-1; positions are kept."""

    layer: int = 2
    keep: Amount = Keep(0.5)

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(
                f"FastV(layer={self.layer!r}): a block number from 1 on is needed, as block layer-1 ranks the tokens; "
                'in front of block 0 use Random(at="tower")'
            )
        check_amounts("FastV", "keep", self.keep, Amount.__args__, (self.layer,))  # type: ignore[attr-defined]
        if isinstance(self.keep, tuple):
            raise TypeError("FastV acts at one layer: give one amount; PyramidDrop acts at several")

    @property
    def facts(self) -> Facts:
        return Facts(where="llm", needs=frozenset({"text_attention"}))

    def sites(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        return self.keep.count(n, patches) if layer == self.layer else n

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return KeepAttended(self, patches, prefix)
