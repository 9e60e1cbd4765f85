"""PyramidDrop: inside the language model, drop a further part of the image tokens at each of a few layers.

Xing et al., "PyramidDrop: Accelerating Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..parts.amount import Amount, Keep, check_layers
from ..reducer import Facts, Method, Reducer
from .fastv import KeepAttended


@dataclass(frozen=True, repr=False)
class PyramidDrop(Method):
    """Before each listed block, the tokens that block itself would attend to most stay; positions are counted afresh."""

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Shares of the image tokens at the entrance, one per layer, rounded down as in the paper."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers("PyramidDrop", "layers", self.layers))
        object.__setattr__(self, "keep", self.keep if isinstance(self.keep, tuple) else (self.keep,))
        if self.layers[0] < 1:
            raise ValueError('PyramidDrop(layers=...): from block 1 on; in front of block 0 use Random(at="tower")')
        if len(self.keep) != len(self.layers):
            raise ValueError(
                f"PyramidDrop: {len(self.keep)} values of keep for {len(self.layers)} layers; give one each"
            )
        number = all(isinstance(share, int | float) and not isinstance(share, bool) for share in self.keep)
        falling = number and all(a >= b for a, b in zip((1.0, *self.keep), self.keep))
        if not falling or self.keep[-1] <= 0:
            raise ValueError(
                f"PyramidDrop(keep={self.keep}): falling shares of all image tokens are needed, e.g. (0.5, 0.25)"
            )

    @property
    def facts(self) -> Facts:
        return Facts(where="llm", needs=frozenset({"text_attention"}), ahead=1, renumber=True)

    def leaving(self, amount: Amount) -> Method:
        """The share falls by the same part at every layer, as in the paper."""
        if not isinstance(amount, Keep):
            raise TypeError(f"PyramidDrop takes shares of the image tokens, not {amount}")
        sites = len(self.layers)
        return replace(self, keep=tuple(round(amount.share ** ((at + 1) / sites), 4) for at in range(sites)))

    def sites(self, depth: int) -> tuple[int, ...]:
        return self.layers

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """int(keep * patches), at least 1: rounded down, unlike Keep, and of the tokens at the entrance."""
        if layer not in self.layers:
            return n
        share = self.keep[self.layers.index(layer)]
        return max(1, min(n, int(share * (n if patches is None else patches))))

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return KeepAttended(self, patches, prefix)
