"""drip_seed001: document 001's network as published, faults included: for its figures and outputs, not for use.

Document 001 (DRIP), 2025, commit 34e1bf2, written from its description. Use `drip_vit_*` or `winnow.DRIP` instead.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from ..parts.choose import relaxed
from ..parts.loss import lower_bound, prior
from .drip_vit import CFG

CFG = {**CFG, "num_classes": 768}
default_cfgs = generate_default_cfgs({f"drip_seed001_base_patch{patch}_224.untrained": CFG for patch in (32, 16)})


class Block(nn.Module):
    """Pre-norm block on [L, B, C]; norm1 runs three times, so that query is not key and no kernel is fused."""

    def __init__(self, width: int, heads: int, ratio: float, drop: float, attn_drop: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, dropout=attn_drop)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, width), nn.Dropout(drop)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm1(x), self.norm1(x))[0]
        return x + self.mlp(self.norm2(x))


class Predictor(nn.Module):
    """[B, L] log-odds of a boundary from [L, B, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.boundary_predictor = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.boundary_predictor(x).squeeze(-1).T


class Seed001(nn.Module):
    """Class token apart, patches pooled into the batch's largest number of segments, norm used twice, all rows averaged.

    Faults kept: patches after the last boundary are lost, missing segments are rows of zeros that attend and are averaged,
    boundaries are drawn at inference too (from the global generator).
    """

    def __init__(
        self, img_size: int = 224, patch_size: int = 32, in_chans: int = 3, embed_dim: int = 768, num_heads: int = 12,
        mlp_ratio: float = 4.0, pre: int = 2, short: int = 10, num_classes: int = 768, rate: float = 0.1,
        temperature: float = 0.5, drop_rate: float = 0.0, attn_drop_rate: float = 0.1, predicted: bool = True,
        lower: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        n = (img_size // patch_size) ** 2
        self.rate, self.temperature, self.predicted, self.lower = rate, temperature, predicted, lower
        self.num_classes, self.num_features = num_classes, embed_dim
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + n, embed_dim), std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)
        blocks = [Block(embed_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate) for _ in range(pre + short)]
        self.pre_blocks, self.shorten_blocks = nn.ModuleList(blocks[:pre]), nn.ModuleList(blocks[pre:])
        self.boundary_predictor = Predictor(embed_dim)
        self.null_group = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.norm, self.head = nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """[B, num_classes]"""
        return self.parts(image)["logits"]

    def parts(self, image: Tensor, noise: Tensor | None = None, boundary: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, boundary_loss, boundaries (mean count) and ratio; `noise` [B, L] uniform in [0, 1), or boundaries."""
        x = self.patch_embed.proj(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.pos_drop(x).transpose(0, 1)
        for block in self.pre_blocks:
            x = block(x)
        soft, hard = self.boundaries(x[1:], noise) if boundary is None else (boundary, boundary)
        x = self.norm(torch.cat([x[:1], downsample(x[1:], hard)]))
        for block in self.shorten_blocks:
            x = block(x)
        logits = self.head(self.norm(x.transpose(0, 1)).mean(1))
        n = torch.full_like(hard[:, 0], hard.shape[1])
        loss = lower_bound(soft.mean(1), self.rate) if self.lower else prior(hard.sum(1), n, self.rate)
        return {"logits": logits, "boundary_loss": loss, "boundaries": hard.sum(1).mean(), "ratio": hard.mean()}

    def boundaries(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Soft and hard boundaries [B, L]; every int(1/rate)-th patch where they are not predicted, as its FLOP script."""
        if not self.predicted:
            hard = x.new_zeros(x.shape[1], x.shape[0])
            hard[:, :: int(1 / self.rate)] = 1
            return hard, hard
        noise = torch.rand(x.shape[1], x.shape[0], device=x.device) if noise is None else noise
        return relaxed(self.boundary_predictor(x), noise, self.temperature)


def downsample(x: Tensor, boundary: Tensor) -> Tensor:
    """[S, B, C] means of the segments of x [L, B, C]; boundary [B, L] ends one; S is the largest count of the batch.

    Dynamic Token Pooling's, as a dense matrix product; patches after the S-th boundary are lost, missing rows are 0.
    """
    at = boundary.cumsum(1) - boundary
    groups = torch.arange(int(boundary.detach().sum(1).max()), device=x.device)
    member = (at.detach().round().unsqueeze(-1) == groups).to(x.dtype) * (1 + at - at.detach()).unsqueeze(-1)
    return torch.einsum("lbd,bls->sbd", x, member / (member.sum(1, keepdim=True) + 1e-9))


def _build(patch: int, pretrained: bool, **words: Any) -> Seed001:
    name = f"drip_seed001_base_patch{patch}_224"
    return build_model_with_cfg(Seed001, name, pretrained, patch_size=patch, **words)


@register_model
def drip_seed001_base_patch32_224(pretrained: bool = False, **words: Any) -> Seed001:
    """Document 001's DRIP on ViT-B/32."""
    return _build(32, pretrained, **words)


@register_model
def drip_seed001_base_patch16_224(pretrained: bool = False, **words: Any) -> Seed001:
    """Document 001's DRIP on ViT-B/16."""
    return _build(16, pretrained, **words)
