"""What a vision-language model's configuration says about its shapes, and the MACs that follow.

Hugging Face configurations of transformers 5: LLaVA (CLIP, SigLIP or ViT towers) and Qwen2.5-VL, told apart by their fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
    """A vision tower and the projector behind it."""

    depth: int
    width: int
    heads: int
    mlp: int
    mlp_matrices: int
    prefix: int
    grid: tuple[int, int]
    patch: tuple[int, int]
    """In pixels."""
    stem: float
    """MACs per patch of the patch embedding."""
    made: int
    """Block whose output the projector reads."""
    widths: tuple[int, ...]
    """Of the projector's layers, from its input to its output."""
    merge: int = 1
    """Patches that the projector makes one token of."""
    window: int = 0
    """Patches along the side of a window; 0 where every block attends over everything."""
    full: tuple[int, ...] = ()
    """Blocks without windows."""
    pooler: float = 0.0
    """MACs of a pooling head or layer, which runs and is not read."""

    @property
    def patches(self) -> int:
        """P"""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Image tokens of a plain model."""
        return self.patches // self.merge

    @property
    def setting(self) -> Setting | None:
        """What a method inside the tower is applied to; None where the projector needs the whole grid."""
        if self.merge > 1:
            return None
        return Setting(self.depth, self.width, self.heads, self.prefix, bool(self.prefix), self.grid, self.patch)

    @property
    def after(self) -> Setting:
        """What a method at the tower is applied to."""
        side = int(self.merge**0.5)
        return Setting(1, self.width, self.heads, 0, bool(self.prefix), (self.grid[0] // side, self.grid[1] // side))

    def macs(self, patches: tuple[int, ...], cut: int | None = None) -> float:
        """MACs of the tower, `patches` entering each block and leaving the last: attention sees those that enter.

        cut: patches of the image, where it was made smaller.
        """
        total = (cut or self.patches) * self.stem + self.pooler
        for layer, (enter, leave) in enumerate(pairwise(patches)):
            n, m = enter + self.prefix, leave + self.prefix
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
        return n // self.merge * sum(a * b for a, b in pairwise(self.widths))


def shapes_of(config: Any, grid: tuple[int, int] | None = None) -> tuple[Tower, Decoder]:
    """Tower and language model; TypeError where the configuration is not one whose model is known."""
    vision, text = (getattr(config, name, None) for name in ("vision_config", "text_config"))
    if vision is None or text is None:
        raise TypeError(f"{type(config).__name__} lacks a vision or a text part; LLaVA and Qwen2.5-VL have both")
    if hasattr(vision, "fullatt_block_indexes"):
        tower = _merging(vision, text, grid)
    elif hasattr(config, "vision_feature_select_strategy") and not hasattr(config, "image_grid_pinpoints"):
        tower = _plain(config, vision, text, grid)
    else:
        raise TypeError(
            f"{type(config).__name__}: the closed form knows LLaVA and Qwen2.5-VL, others are counted as they run"
        )
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        raise TypeError(f"{type(text).__name__}: experts are chosen token by token, so shapes do not tell the MACs")
    heads = text.num_attention_heads
    return tower, Decoder(
        depth=text.num_hidden_layers, width=text.hidden_size, mlp=text.intermediate_size, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads, vocabulary=text.vocab_size,
    )  # fmt: skip


def _plain(config: Any, vision: Any, text: Any, grid: tuple[int, int] | None) -> Tower:
    """LLaVA: every block sees everything, the projector takes tokens one by one."""
    side = vision.image_size // vision.patch_size
    if grid not in (None, (side, side)):
        raise ValueError(f"grid={grid}: this model's images have {side} x {side} patches, leave grid out")
    layer, depth = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int):
        raise TypeError(f"vision_feature_layer={layer}: features of several layers are joined; one layer works")
    width, prefix = vision.hidden_size, int(config.vision_feature_select_strategy == "default")
    n = side**2 + prefix
    pooler = float(width * (getattr(vision, "pooler_output_size", None) or 0))  # ViT's reads the class token
    if getattr(vision, "vision_use_head", False):
        pooler = 2 * (n + 1) * width**2 + 2 * n * width + 2 * width * vision.intermediate_size
    return Tower(
        depth=depth, width=width, heads=vision.num_attention_heads, mlp=vision.intermediate_size, mlp_matrices=2,
        prefix=prefix, grid=(side, side), stem=vision.num_channels * vision.patch_size**2 * width,
        made=(layer + depth + 1 if layer < 0 else layer) - 1, widths=(width, text.hidden_size, text.hidden_size),
        pooler=pooler, patch=(vision.patch_size, vision.patch_size),
    )  # fmt: skip


def _merging(vision: Any, text: Any, grid: tuple[int, int] | None) -> Tower:
    """Qwen2.5-VL: windows in most blocks, the projector makes one token of each square of patches."""
    side = vision.spatial_merge_size
    if grid is None or any(one % side or one < side for one in grid):
        raise ValueError(f"grid={grid}: give (h, w) in patches, multiples of {side}; images have many sizes here")
    merged = vision.hidden_size * side**2
    return Tower(
        depth=vision.depth, width=vision.hidden_size, heads=vision.num_heads, mlp=vision.intermediate_size, mlp_matrices=3,
        prefix=0, grid=grid, made=vision.depth - 1, patch=(vision.patch_size, vision.patch_size),
        widths=(merged, merged, text.hidden_size), merge=side**2,
        stem=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * vision.hidden_size,
        window=vision.window_size // vision.patch_size, full=tuple(vision.fullatt_block_indexes),
    )  # fmt: skip


def _windowed(grid: tuple[int, int], window: int) -> int:
    """Pairs of patches within windows; those at the edge are smaller."""
    whole = [n // window * window**2 + (n % window) ** 2 for n in grid]
    return whole[0] * whole[1]
