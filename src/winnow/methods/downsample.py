"""Downsample: show the model a smaller image; the baseline that beats many published methods.

VTC-Bench and UniPruneBench (2025) found it so; resized bicubically with antialiasing, positions resampled by the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.settings import check_number
from ..reducer import Facts, Method, Reducer, Setting
from ..tokens import Ledger


@dataclass(frozen=True, repr=False)
class Downsample(Method):
    """The shorter side of the input becomes `size` pixels, a multiple of the patch size."""

    size: int = 160

    def __post_init__(self) -> None:
        check_number("Downsample", "size", self.size, 1, whole=True)

    @property
    def facts(self) -> Facts:
        return Facts(where="input", combine="other")

    def sites(self, depth: int) -> tuple[int, ...]:
        return ()

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """No site removes tokens: fewer enter."""
        return n

    def grid(self, grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
        """Patches (h, w) of the smaller image for a model grid and a patch size in pixels; never more than before."""
        height, width = grid[0] * patch[0], grid[1] * patch[1]
        scale = self.size / min(height, width)
        h, w = round(height * scale / patch[0]), round(width * scale / patch[1])
        return min(grid[0], max(1, h)), min(grid[1], max(1, w))

    def check(self, setting: Setting) -> None:
        if setting.grid is None or setting.patch is None:
            raise ValueError(f"{self} needs a model that says its patch size")
        step, own = setting.patch[0], min(setting.grid[0] * setting.patch[0], setting.grid[1] * setting.patch[1])
        if self.size > own:
            raise ValueError(f"{self}: the model's own input is {own} pixels; give at most that")
        if self.size % step:
            low = max(step, self.size // step * step)
            raise ValueError(f"{self}: size must be a multiple of the patch size {step}, e.g. {low} or {low + step}")

    def counts(self, setting: Setting) -> tuple[int, ...]:
        assert setting.grid is not None and setting.patch is not None
        h, w = self.grid(setting.grid, setting.patch)
        return (h * w,) * (setting.depth + 1)

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return DownsampleReducer(self, patches, prefix)


class DownsampleReducer(Reducer):
    """Acts on the image: the adapter calls it before the patches are cut, and `ledger` after."""

    def forward(self, images: Tensor, patch: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Images [B, 3, H, W] at the smaller size; `patch` in pixels."""
        assert isinstance(self.method, Downsample)
        if images.shape[0] == 0:  # len() would make the batch a constant where a model is exported
            raise ValueError(f"{self.method}: hosts resample positions for one image at least, and this batch is empty")
        h, w = self.method.grid((images.shape[-2] // patch[0], images.shape[-1] // patch[1]), patch)
        size = (h * patch[0], w * patch[1])
        if size == tuple(images.shape[-2:]):
            return images
        small = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        return small.to(images.dtype)

    def ledger(self, batch: int, grid: tuple[int, int], small: tuple[int, int], device: torch.device) -> Ledger:
        """Each patch of `grid` belongs to the cell of `small` that covers its centre."""
        row = (torch.arange(grid[0], device=device) * 2 + 1) * small[0] // (2 * grid[0])
        column = (torch.arange(grid[1], device=device) * 2 + 1) * small[1] // (2 * grid[1])
        owner = (row[:, None] * small[1] + column).flatten()
        return Ledger(owner.expand(batch, -1), small[0] * small[1])
