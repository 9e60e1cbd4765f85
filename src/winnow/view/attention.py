"""Attention of the class token as pictures: by block and head of one image, or how it moves while a model is trained.

Winnow's own; one query row per block is computed, never a whole attention matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import winnow

from .._reduce import is_reduced, seat_of
from ..reducer import Facts, Method, Reducer, Signals
from ..tokens import Tokens
from ..twin import twin
from . import files
from .curves import INK


@dataclass(frozen=True, repr=False)
class _Look(Method):
    """Keeps every token and the class token's attention at every block."""

    @property
    def facts(self) -> Facts:
        return Facts(needs=frozenset({"cls_attention"}))

    def sites(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        return n

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return _Looking(self, patches, prefix)


class _Looking(Reducer):
    def __init__(self, method: Method, patches: int | None, prefix: int) -> None:
        super().__init__(method, patches, prefix)
        self.rows: list[Tensor] = []

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        assert signals.cls_row is not None
        self.rows.append(signals.cls_row)
        return tokens


@torch.no_grad()
def attention_maps(model: nn.Module, pixels: Tensor) -> np.ndarray:
    """[B, depth, H, h, w] attention the class token pays to each patch of pixels [B, 3, height, width], in evaluation.

    A reduced model is looked at without its reducer; both stay as they are. ValueError without class token.
    """
    plain = twin(model)
    if is_reduced(plain):
        winnow.restore(plain)
    winnow.reduce(plain.eval(), _Look())
    plain(pixels)
    rows: Any = winnow.reducer_of(plain).rows
    grid = seat_of(plain).run.grid
    if grid is None:
        raise ValueError(f"{type(model).__name__} does not say how its patches lie: no map can be drawn")
    return torch.stack(rows, 1).unflatten(-1, grid).float().cpu().numpy()


def heat(photo: Any, maps: Any, rows: Sequence[str], columns: Sequence[str], title: str = "") -> Any:
    """A matplotlib Figure: the photograph [H, W, 3], then its maps [R, C, h, w] as a table of heat maps.

    Each row has its own scale, from 0 to its highest value, which is written beside it.
    """
    from matplotlib.figure import Figure

    maps = np.asarray(maps)
    if maps.shape[:2] != (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns are named, the maps are {maps.shape[:2]}")
    size = 1.05
    sheet = Figure((size * (len(columns) + 1.7), size * len(rows) + 0.6), layout="constrained", facecolor="white")
    axes = sheet.subplots(len(rows), len(columns) + 1, squeeze=False)
    for r, row in enumerate(axes):
        for axis in row:
            axis.set_axis_off()
        top = float(maps[r].max())
        row[0].text(
            1, 0.25 if r == 0 else 0.5, f"{rows[r]}\nto {top:.2g}", ha="right", va="center", fontsize=8, color=INK
        )
        for c, axis in enumerate(row[1:]):
            axis.imshow(maps[r, c], cmap="magma", vmin=0, vmax=top, interpolation="nearest")
            if r == 0:
                axis.set_title(columns[c], fontsize=8, color=INK)
    corner = axes[0][0].inset_axes([0.3, 0.5, 0.7, 0.7])
    corner.imshow(photo)
    corner.set_axis_off()
    if title:
        sheet.suptitle(title, fontsize=9.5, color=INK)
    return sheet


def save_heat(path: str | Path, *args: Any, **words: Any) -> Path:
    """Save the figure of `heat` as PNG or SVG by suffix."""
    form = files.kind(path)
    return files.write(path, files.encode(heat(*args, **words), form))
