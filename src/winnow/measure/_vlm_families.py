"""What a vision-language model's configuration says about its shapes, and a processor's output about the images.

Hugging Face configurations of transformers 5, told apart by their fields: LLaVA (CLIP, SigLIP or ViT towers), LLaVA-NeXT,
LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, SmolVLM and InternVL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ._vlm_shapes import Decoder, Tower

Size = tuple[int, int]
DENSE = 1.1
"""LLaVA-OneVision interpolates images whose sides are more than so many times the longest that it was taught."""


def shapes_of(config: Any, grid: Size | None = None) -> tuple[Tower, Decoder]:
    """Tower, for an image of `grid` (h, w) patches, and language model; TypeError where the model is not known.

    grid: needed where images of any size are taken as they are (Qwen, LLaVA-NeXT, LLaVA-OneVision); where they are cut
    into tiles (SmolVLM, InternVL), a multiple of the tile's, one tile if not given. ValueError where it cannot be.
    """
    return tower_of(config, grid), decoder_of(config)


def tower_of(config: Any, grid: Size | None = None) -> Tower:
    """The tower alone."""
    vision, text = (getattr(config, name, None) for name in ("vision_config", "text_config"))
    if vision is None or text is None:
        raise TypeError(f"{type(config).__name__} lacks a vision or a text part; LLaVA and Qwen2.5-VL have both")
    if hasattr(vision, "fullatt_block_indexes") or hasattr(vision, "deepstack_visual_indexes"):
        return _merging(vision, grid)
    if hasattr(config, "scale_factor") or hasattr(config, "downsample_ratio"):
        return _shuffling(config, vision, text, grid)
    if hasattr(config, "image_grid_pinpoints"):
        if grid is None:
            raise ValueError(
                "grid=None: give (h, w) in patches, e.g. (48, 48); images of any size are cut into tiles here"
            )
        return _packing(config, vision, text, (grid[0] * vision.patch_size, grid[1] * vision.patch_size))
    if hasattr(config, "vision_feature_select_strategy"):
        return _plain(config, vision, text, grid)
    raise TypeError(
        f"{type(config).__name__}: the closed form knows LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, SmolVLM "
        "and InternVL"
    )


def decoder_of(config: Any) -> Decoder:
    """The language model alone; TypeError where its shapes do not tell its MACs."""
    text = config.get_text_config()
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        raise TypeError(f"{type(text).__name__}: experts are chosen token by token, so shapes do not tell the MACs")
    heads = text.num_attention_heads
    return Decoder(
        depth=text.num_hidden_layers, width=text.hidden_size, mlp=text.intermediate_size, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads, vocabulary=text.vocab_size,
    )  # fmt: skip


def towers_of(config: Any, inputs: Mapping[str, Any]) -> list[tuple[Tower, ...]]:
    """The images of each sample of a batch, from what the processor made of them; where all are alike, as tiles of one.

    ValueError where placeholders and images do not fit each other.
    """
    placed = (inputs["input_ids"] == config.image_token_id).sum(1).tolist()
    images = _images(config, inputs)
    if images is None:
        one = tower_of(config)
        rest = next((n for n in placed if n % one.tokens), 0)
        if rest:
            raise ValueError(f"{rest} placeholders are no whole number of images of {one.tokens}")
        return [(replace(one, tiles=n // one.tokens),) if n else () for n in placed]
    found = []
    for n in placed:
        mine: list[Tower] = []
        while (taken := sum(one.tokens for one in mine)) < n and (more := next(images, None)):
            mine.append(more)
        if taken != n:
            raise ValueError(f"a prompt of {n} placeholders, its images have {taken} features")
        found.append(tuple(mine))
    return found


def _images(config: Any, inputs: Mapping[str, Any]) -> Iterator[Tower] | None:
    """One after the other, where they have several sizes; None where all are alike."""
    if "image_grid_thw" in inputs:
        return (tower_of(config, (t * h, w)) for t, h, w in inputs["image_grid_thw"].tolist())
    if "image_sizes" not in inputs:
        return None
    sizes = inputs["image_sizes"].tolist()
    several = inputs.get("batch_num_images", [1] * len(sizes))  # of a prompt; one alone is cut into tiles
    alone = [int(n) == 1 for n in several for _ in range(int(n))]
    vision, text = config.vision_config, config.text_config
    return (
        _packing(config, vision, text, tuple(size) if cut else None) for size, cut in zip(sizes, alone, strict=True)
    )


def _plain(config: Any, vision: Any, text: Any, grid: Size | None) -> Tower:
    """LLaVA: every block sees everything, the projector takes tokens one by one, or 2 x 2 of them (_llava_projected.py)."""
    side = vision.image_size // vision.patch_size
    if grid not in (None, (side, side)):
        raise ValueError(f"grid={grid}: this model's images have {side} x {side} patches, leave grid out")
    layer, depth = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int):
        raise TypeError(f"vision_feature_layer={layer}: features of several layers are joined; one layer works")
    width, prefix = vision.hidden_size, int(config.vision_feature_select_strategy == "default")
    pooler, pooled = float(width * (getattr(vision, "pooler_output_size", None) or 0)), 0.0  # ViT's: of the class token
    if getattr(vision, "vision_use_head", False):  # SigLIP's: a query of its own, an MLP
        pooler, pooled = 2.0 * width * (width + vision.intermediate_size), 2.0 * width * (width + 1)
    kind, wanted = getattr(config, "projector", "mlp"), text.hidden_size
    joined = 4 if kind == "downsample" else 1
    return Tower(
        depth=depth, width=width, heads=vision.num_attention_heads, mlp=vision.intermediate_size, mlp_matrices=2,
        prefix=prefix, grid=(side, side), stem=vision.num_channels * vision.patch_size**2 * width,
        made=(layer + depth + 1 if layer < 0 else layer) - 1, merge=joined, whole=joined > 1,
        widths=(width, wanted) if kind == "linear" else (joined * width, wanted, wanted),
        pooler=pooler, pooled=pooled, patch=(vision.patch_size, vision.patch_size),
    )  # fmt: skip


def _packing(config: Any, vision: Any, text: Any, size: Size | None) -> Tower:
    """LLaVA-NeXT, LLaVA-OneVision: the whole image, and tiles of it whose padding is cut off, a mark behind every row.

    size: (h, w) in pixels; None where the image stays whole.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    one = replace(_plain(config, vision, text, None), whole=True)
    if size is None:
        return replace(one, marks=1)
    side = one.grid[0]
    high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
    rows, columns = unpad_image(torch.empty(1, high * side, wide * side, device="meta"), size).shape[1:]
    aspect = getattr(config, "vision_aspect_ratio", None)
    dense = math.sqrt(rows * columns / (int(aspect.removeprefix("anyres_max_")) * side**2)) if aspect else 0.0
    if dense > DENSE:
        rows, columns = int(rows // dense), int(columns // dense)
    tiles = high * wide
    return replace(one, tiles=1 + tiles, marks=rows, cut=tiles * one.patches - rows * columns)


def _shuffling(config: Any, vision: Any, text: Any, grid: Size | None) -> Tower:
    """SmolVLM, InternVL: tiles, the whole image the last where there are several; a square of patches makes a token."""
    (high, wide), patch = _pair(vision.image_size), _pair(vision.patch_size)
    own = high // patch[0], wide // patch[1]
    if any(one % side or one < side for one, side in zip(grid or own, own)):
        raise ValueError(f"grid={grid}: give (h, w) in patches, multiples of a tile's {own[0]} x {own[1]}")
    tiles = 1 if grid is None else (grid[0] // own[0]) * (grid[1] // own[1])
    cls = hasattr(config, "downsample_ratio")  # InternVL
    side = round(1 / config.downsample_ratio) if cls else config.scale_factor
    joined, wanted = vision.hidden_size * side**2, text.hidden_size
    return Tower(
        depth=vision.num_hidden_layers, width=vision.hidden_size, heads=vision.num_attention_heads,
        mlp=vision.intermediate_size, mlp_matrices=2, prefix=int(cls), grid=own, patch=patch,
        stem=vision.num_channels * patch[0] * patch[1] * vision.hidden_size, made=vision.num_hidden_layers - 1,
        widths=(joined, wanted, wanted) if cls else (joined, wanted), tiles=tiles + (tiles > 1), merge=side**2, whole=True,
    )  # fmt: skip


def _merging(vision: Any, grid: Size | None) -> Tower:
    """Qwen: the projector makes one token of each square of patches; Qwen2.5-VL has windows in most blocks.

    Qwen3-VL has a projector for some inner blocks too.
    """
    side = vision.spatial_merge_size
    if grid is None or any(one % side or one < side for one in grid):
        raise ValueError(f"grid={grid}: give (h, w) in patches, multiples of {side}; images have many sizes here")
    merged, full = vision.hidden_size * side**2, getattr(vision, "fullatt_block_indexes", None)
    return Tower(
        depth=vision.depth, width=vision.hidden_size, heads=vision.num_heads, mlp=vision.intermediate_size,
        mlp_matrices=2 if full is None else 3, prefix=0, grid=grid, made=vision.depth - 1, patch=_pair(vision.patch_size),
        widths=(merged, merged, vision.out_hidden_size), merge=side**2, whole=True,
        mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
        stem=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * vision.hidden_size,
        window=0 if full is None else vision.window_size // vision.patch_size, full=tuple(full or ()),
    )  # fmt: skip


def _pair(size: Any) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
