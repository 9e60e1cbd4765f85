"""LLaVA with another projector: one linear layer, or 2 x 2 patches joined before two layers; transformers learns of it here.

Liu et al., LLaVA, 2023 (linear); Lin et al., VILA-1.5, 2024 (joined). Its folders are opened by `winnow.load_vlm`.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration


@strict
class ProjectedConfig(LlavaConfig):
    """LLaVA's configuration, and which projector."""

    model_type = "winnow_llava"
    projector: str = "linear"


class Linear(nn.Module):
    """[I, N, C] -> [I, N, D], one layer."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, features: Tensor) -> Tensor:
        """Features [I, N, C] of whole images or of what is left of them."""
        return self.linear(features)


class Downsample(nn.Module):
    """[I, N, C] -> [I, N/4, D]: four patches side by side, a norm, two layers; odd grids get a row and a column of zeros."""

    joins = True
    """It takes patches, and makes their squares tokens itself."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.linear_1, self.act, self.linear_2 = nn.Linear(4 * width, out), nn.GELU(), nn.Linear(out, out)

    def forward(self, features: Tensor) -> Tensor:
        """Features [I, N, C] of a square grid; ValueError where tokens were taken out before."""
        images, n, width = features.shape
        side = math.isqrt(n)
        if side * side != n:
            raise ValueError(
                f"projector downsample joins 2 x 2 patches, and {n} features are no square grid: reduce in the language "
                "model, as FastV(layer=2) does, or what comes out of the projector, as DivPrune does"
            )
        half = -(-side // 2)
        x = F.pad(features.view(images, side, side, width), (0, 0, 0, 2 * half - side, 0, 2 * half - side))
        x = x.view(images, half, 2, half, 2, width).transpose(2, 3).reshape(images, half * half, 4 * width)
        return self.linear_2(self.act(self.linear_1(self.norm(x))))


KINDS = {"linear": Linear, "downsample": Downsample}


class ProjectedLlava(LlavaForConditionalGeneration):
    """LLaVA with the projector its configuration names."""

    config_class = ProjectedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        self.model.multi_modal_projector = KINDS[config.projector](*widths)


AutoConfig.register(ProjectedConfig.model_type, ProjectedConfig, exist_ok=True)
AutoModelForImageTextToText.register(ProjectedConfig, ProjectedLlava, exist_ok=True)
