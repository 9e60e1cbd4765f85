"""Overlays: which patches of a photograph a method kept, dropped or merged, drawn on the photograph.

Winnow's own; mean colours with outlines are how ToMe (Bolya et al., 2023) shows merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from winnow.view import files

Grid = tuple[int, int]
Layer = tuple[int | str, Any, float]
"""The block it stands after (-1: before all) or a label, its owner ([P] or [h, w] ints, -1 = dropped; or a ready picture,
uint8 [H, W, 3]), tokens there."""

DIM, LIFT = 0.24, 26.0  # a dropped pixel becomes LIFT + DIM x its luminance: dark, yet apart from a black kept one
NIGHT, VEIL = 64.0, 120.0
"""In an image whose median luminance is below NIGHT a dropped pixel becomes pale: VEIL + DIM x its luminance."""


def kept(image: Any, owner: Any, grid: Grid) -> np.ndarray:
    """The image [H, W, 3] uint8 with dropped patches grey, dark (pale in a dark image), all others untouched."""
    pixels = _pixels(image)
    token = _spread(_cells(owner, grid), pixels)
    return np.where((token < 0)[..., None], _dim(pixels), pixels)


def merged(image: Any, owner: Any, grid: Grid, detail: bool = False) -> np.ndarray:
    """The image [H, W, 3] uint8 with each token's patches in their mean colour, outlined; dropped ones grey.

    With `detail`, a token that holds a single patch shows that patch as photographed, so what is flat has been merged.
    """
    pixels = _pixels(image)
    cells = _cells(owner, grid)
    token = _spread(cells, pixels)
    place = token.ravel() + 1
    area = np.maximum(np.bincount(place), 1)
    mean = np.stack([np.bincount(place, pixels[..., c].ravel()) / area for c in range(3)], -1)
    out = np.where((token < 0)[..., None], _dim(pixels), mean[place].reshape(pixels.shape))
    if detail:
        single = (np.bincount(cells.ravel() + 1, minlength=area.size) == 1)[place].reshape(token.shape)
        out = np.where((single & (token >= 0))[..., None], pixels, out)
    line = _outline(token, max(1, round(min(token.shape) / 224)))
    ink = 255.0 if np.median(_luminance(pixels)) < 165 else 0.0
    return np.where(line[..., None], 0.4 * out + 0.6 * ink, out).round().astype(np.uint8)


def draw(image: Any, owner: Any, grid: Grid, style: str = "auto") -> np.ndarray:
    """The overlay of a style: "kept", "merged" or "auto".

    "auto" is merged with detail where any token holds several patches, else kept.
    """
    if style not in ("auto", "kept", "merged"):
        raise ValueError(f"style is 'auto', 'kept' or 'merged', not {style!r}")
    several = np.bincount(_cells(owner, grid).ravel() + 1)[1:].max(initial=0) > 1
    if style == "merged" or (style == "auto" and several):
        return merged(image, owner, grid, detail=style == "auto")
    return kept(image, owner, grid)


def picture(image: Any, owners: Sequence[Any], grid: Grid, style: str = "auto", cell: int | None = None) -> np.ndarray:
    """One strip, uint8 [H, W', 3]: the photograph, then one overlay per owner [P]; `cell` = height in pixels."""
    pixels = _pixels(image)
    if cell is not None:
        width = max(1, round(pixels.shape[1] * cell / pixels.shape[0]))
        pixels = np.asarray(Image.fromarray(pixels).resize((width, cell), Image.Resampling.LANCZOS))
    gap = np.full((pixels.shape[0], max(2, pixels.shape[1] // 40), 3), 255, np.uint8)
    parts = [pixels]
    for owner in owners:
        parts += [gap, draw(pixels, owner, grid, style)]
    return np.concatenate(parts, 1)


def figure(
    image: Any,
    columns: Sequence[tuple[str, Sequence[Layer]]],
    path: str | Path,
    title: str = "",
    grid: Grid | None = None,
    most: int = 5,
) -> Path:
    """Save a contact sheet (PNG or SVG): a row per method, the photograph first, then at most `most` layers.

    `columns` lists (method, [(layer label, owner, tokens), ...]). The last layer is always shown. An owner [h, w]
    brings its own grid; for an owner [P] without `grid`, the grid is the one whose shape is nearest to the image's.
    """
    form = files.kind(path)
    if not columns:
        raise ValueError("a contact sheet needs at least one method")
    pixels = _pixels(image)
    sheet = _sheet(pixels, [(name, spaced(layers, most)) for name, layers in columns], title, grid)
    return files.write(path, files.encode(sheet, form))


def after(layer: int) -> str:
    """Where the state after block `layer` is, in words; -1 = entering block 0."""
    return "entering block 0" if layer < 0 else f"after block {layer}"


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, always with the last."""
    if len(items) <= most:
        return list(items)
    at = np.linspace(len(items) - 1, 0, max(1, most)).round().astype(int)[::-1]
    return [items[i] for i in at]


def _sheet(pixels: np.ndarray, rows: list[tuple[str, list[Layer]]], title: str, grid: Grid | None) -> Any:
    from matplotlib.figure import Figure

    across = 1 + max(len(layers) for _, layers in rows)
    high, cell = pixels.shape[0] / pixels.shape[1], 1.55
    tall, head = cell * high + 0.55, 0.38 if title else 0.05
    wide = max(0.105 * len(title), *(0.078 * len(name) for name, _ in rows))  # inches, roughly
    width, height = max(across * (cell + 0.08) + 0.12, wide + 0.3), len(rows) * tall + head + 0.05
    sheet = Figure(figsize=(width, height), facecolor="white")

    def text(x: float, y: float, words: str, **how: Any) -> None:
        sheet.text(x / width, 1 - y / height, words, parse_math=False, **how)

    if title:
        text(0.1, 0.12, title, va="top", fontsize=11, weight="bold", color="#1c1f23")
    for i, (name, layers) in enumerate(rows):
        top = head + i * tall
        text(0.1, top + 0.06, name, va="top", fontsize=9, family="monospace", color="#1c1f23")
        shown = [_captioned(pixels, layer, grid) for layer in layers]
        for j, (words, one) in enumerate([("photograph", pixels), *shown]):
            left, under = 0.1 + j * (cell + 0.08), top + 0.26
            box = (left / width, 1 - (under + cell * high) / height, cell / width, cell * high / height)
            axes = sheet.add_axes(box)
            axes.imshow(one, interpolation="antialiased", aspect="auto")
            axes.set_axis_off()
            text(left, under + cell * high + 0.04, words, va="top", fontsize=7.5, color="#555b61")
    return sheet


def _captioned(pixels: np.ndarray, layer: Layer, grid: Grid | None) -> tuple[str, np.ndarray]:
    place, owner, tokens = layer
    label = after(place) if isinstance(place, int) else place
    one = np.asarray(owner)
    if one.ndim != 3:
        one = draw(pixels, one, grid_of(one, pixels.shape[:2], grid))
    count = f"{tokens:.1f}".removesuffix(".0")
    return f"{label} · {count} token" + "s" * (count != "1"), one


def grid_of(owner: np.ndarray, shape: tuple[int, int], grid: Grid | None = None) -> Grid:
    """The (h, w) an owner lies on: its own if 2-D, else `grid`, else the factors of P nearest to the image's shape."""
    if owner.ndim == 2:
        return owner.shape[0], owner.shape[1]
    if grid is not None and grid[0] * grid[1] == owner.size:
        return grid
    sides = [h for h in range(1, owner.size + 1) if owner.size % h == 0]
    h = min(sides, key=lambda h: abs(np.log((h * h / owner.size) / (shape[0] / shape[1]))))
    return h, owner.size // h


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image is a PIL image or uint8 [H, W, 3]; got {pixels.dtype} {[*pixels.shape]}")
    return pixels


def _cells(owner: Any, grid: Grid) -> np.ndarray:
    cells = np.asarray(owner)
    if not np.issubdtype(cells.dtype, np.integer):
        raise TypeError(f"owner holds token numbers (integers), not {cells.dtype}")
    if cells.size != grid[0] * grid[1]:
        raise ValueError(f"owner of {cells.size} patches does not fill a grid of {grid[0]} x {grid[1]}")
    if cells.size and cells.min() < -1:
        raise ValueError(f"owner has {cells.min()}; a dropped patch is -1")
    return cells.reshape(grid).astype(np.int64)


def _spread(cells: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """[h, w] -> [H, W]: pixel row y lies in patch row floor(y h / H), which needs no exact multiple."""
    (height, width), (h, w) = pixels.shape[:2], cells.shape
    if height < h or width < w:
        raise ValueError(f"an image of {height} x {width} pixels is too small for a grid of {h} x {w} patches")
    return cells[np.arange(height) * h // height][:, np.arange(width) * w // width]


def _luminance(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])


def _dim(pixels: np.ndarray) -> np.ndarray:
    luminance = _luminance(pixels)
    lift = VEIL if np.median(luminance) < NIGHT else LIFT
    grey = (lift + DIM * luminance).round().astype(np.uint8)
    return np.broadcast_to(grey[..., None], pixels.shape)


def _outline(token: np.ndarray, thick: int) -> np.ndarray:
    """[H, W] True on lines of `thick` pixels between neighbours with different owners."""
    line = np.zeros(token.shape, bool)
    for axis in (0, 1):
        lines, tokens = np.moveaxis(line, axis, 0), np.moveaxis(token, axis, 0)
        edge = np.zeros(tokens.shape, bool)
        edge[1:] = tokens[1:] != tokens[:-1]
        lines |= edge
        for step in range(1, thick):
            if step % 2:
                lines[: -((step + 1) // 2)] |= edge[(step + 1) // 2 :]
            else:
                lines[step // 2 :] |= edge[: -(step // 2)]
    return line
