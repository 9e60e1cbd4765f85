"""The shapes of a vision-language model, its images and its language model, and the MACs that follow.

Winnow's own. What a configuration or a processor's output says about them is read in _vlm_families.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..reducer import Setting


@dataclass(frozen=True)
class Decoder:
    """A LLaMA-like language model: gated MLP, grouped keys and values."""

    depth: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        """Channels of the keys."""
        return self.kv_heads * self.head_size

    @property
    def setting(self) -> Setting:
        """What a method inside the language model is applied to."""
        return Setting(self.depth, self.width, self.heads, 0, False, None)

    @property
    def head(self) -> float:
        """MACs of one token's logits."""
        return self.width * self.vocabulary

    def block(self, queries: int, keys: int) -> float:
        """MACs of one block; attention without the saving of causal kernels."""
        inner = self.heads * self.head_size
        return (
            self.entry(queries)
            + queries * inner * self.width
            + 2 * queries * keys * inner
            + 3 * queries * self.width * self.mlp
        )

    def entry(self, n: int) -> float:
        """MACs of queries, keys and values."""
        return n * self.width * (self.heads * self.head_size + 2 * self.kv_width)

    def row(self, keys: int) -> float:
        """MACs of one query's attention logits."""
        return keys * self.heads * self.head_size


@dataclass(frozen=True)
class Tower:
    """A vision tower and the projector behind it, for an image of a certain size."""

    depth: int
    width: int
    heads: int
    mlp: int
    mlp_matrices: int
    prefix: int
    grid: tuple[int, int]
    """Patches that see one another: of the image, or of each tile that it is cut into."""
    patch: tuple[int, int]
    """In pixels."""
    stem: float
    """MACs per patch of the patch embedding."""
    made: int
    """Block whose output the projector reads."""
    widths: tuple[int, ...]
    """Of the projector's layers, from its input to its output."""
    tiles: int = 1
    """Grids that the image is cut into; several images of one size count as tiles too."""
    merge: int = 1
    """Patches that the projector makes one token of."""
    mergers: int = 1
    """Projectors that run: others make the features that later blocks add."""
    marks: int = 0
    """Image tokens that stand for no patch, at the ends of rows."""
    cut: int = 0
    """Projected patches that are cut off with the padding of tiles."""
    whole: bool = False
    """What stands behind the tower needs the whole grid."""
    window: int = 0
    """Patches along the side of a window; 0 where every block attends over everything."""
    full: tuple[int, ...] = ()
    """Blocks without windows."""
    pooler: float = 0.0
    """MACs of a pooling head or layer, which runs and is not read."""
    pooled: float = 0.0
    """MACs of it for each token that it reads."""

    @property
    def patches(self) -> int:
        """P of one grid."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Image tokens of a plain model."""
        return self.tiles * self.each + self.marks - self.cut

    @property
    def merged(self) -> tuple[int, int]:
        """The grid of what the projector makes of one."""
        side = int(self.merge**0.5)
        return -(-self.grid[0] // side), -(-self.grid[1] // side)

    @property
    def each(self) -> int:
        """Tokens that the projector makes of one grid."""
        return self.merged[0] * self.merged[1]

    def left(self, kept: int) -> int:
        """Image tokens where a method leaves `kept` of each grid's; where padding is cut off, about so many."""
        return self.marks + round(kept * (self.tokens - self.marks) / self.each)

    @property
    def setting(self) -> Setting:
        """What a method inside the tower is applied to."""
        return Setting(self.depth, self.width, self.heads, self.prefix, bool(self.prefix), self.grid, self.patch)

    @property
    def after(self) -> Setting:
        """What a method at the tower is applied to."""
        apart = self.merge == 1
        width = self.width if apart else self.widths[-1]
        return Setting(1, width, self.heads if apart else 1, 0, bool(self.prefix) and apart, self.merged)

    def macs(self, patches: tuple[int, ...], cut: int | None = None, between: bool = False) -> float:
        """MACs of the tower on a grid, `patches` entering each block and leaving the last: attention sees those that enter.

        cut: patches of the image, where it was made smaller. between: patches leave in front of a block, not inside it.
        """
        total = (cut or self.patches) * self.stem + self.pooler + self.pooled * (patches[-1] + self.prefix)
        for layer, (enter, leave) in enumerate(pairwise(patches)):
            n, m = enter + self.prefix, (enter if between else leave) + self.prefix
            pairs = n * n if not self.window or layer in self.full else _windowed(self.grid, self.window)
            total += 4 * n * self.width**2 + 2 * pairs * self.width + self.mlp_matrices * m * self.width * self.mlp
        return total

    def beside(self, read: bool) -> float:
        """MACs of one more token, up to the block that is read; or, where the others read it, through all of them."""
        n = self.patches + self.prefix
        own = 4 * self.width**2 + self.mlp_matrices * self.width * self.mlp
        if read:
            return self.depth * (own + 2 * (2 * n + 1) * self.width)
        return (self.made + 1) * (own + 2 * (n + 1) * self.width)

    def project(self, n: int) -> float:
        """MACs of the projector on n patches."""
        return self.mergers * (n * self.each // self.patches) * sum(a * b for a, b in pairwise(self.widths))


def _windowed(grid: tuple[int, int], window: int) -> int:
    """Pairs of patches within windows; those at the edge are smaller."""
    whole = [n // window * window**2 + (n % window) ** 2 for n in grid]
    return whole[0] * whole[1]
