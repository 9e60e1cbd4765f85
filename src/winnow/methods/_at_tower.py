"""Methods that act once, on the image features of a vision-language model, and keep a known number of tokens.

Winnow's own.
"""

from __future__ import annotations

from ..parts.amount import Amount, check_amounts
from ..reducer import Method, Reducer, Setting

NINTH = 1 / 9
"""64 of LLaVA-1.5's 576 tokens, the smallest of the budgets that papers share; 2/9 and 1/3 are the others."""


class AtTower(Method):
    """A method with one amount, `keep`."""

    keep: Amount
    reducer: type[Reducer]

    def __post_init__(self) -> None:
        check_amounts(type(self).__name__, "keep", self.keep, Amount.__args__, (0,))  # type: ignore[attr-defined]
        if isinstance(self.keep, tuple):
            raise TypeError(f"{type(self).__name__} acts once: give one amount, e.g. keep=Exactly(64)")

    def sites(self, depth: int = 0) -> tuple[int, ...]:
        return (0,)

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        return self.keep.count(n, patches)

    def check(self, setting: Setting) -> None:
        if setting.patches is not None:
            self.keep.check(setting.patches)

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return self.reducer(self, patches, prefix)
