"""Noise that depends on a sample and a salt alone: not on its neighbours, the device or how many processes there are.

Winnow's own; the design's decision 10.
"""

from __future__ import annotations

import torch
from torch import Tensor


def content_key(x: Tensor) -> Tensor:
    """[B] int64 hash of each sample's own numbers (at most 4,096 of them, evenly spread)."""
    flat = x.detach().flatten(1)
    flat = flat[:, :: max(1, flat.shape[1] // 4096)].float().contiguous()
    bits = flat.view(torch.int32).long()
    odd = torch.arange(bits.shape[1], device=x.device) * 0x5851F42D4C957F2D + 0x14057B7EF767814F
    return (bits * (odd | 1)).sum(1)


def uniform(key: Tensor, salt: int, n: int) -> Tensor:
    """[B, n] numbers in [0, 1) from int64 keys [B] by splitmix64 (Steele et al., 2014), the same on every device."""

    def xorshift(z: Tensor, by: int) -> Tensor:
        return z ^ ((z >> by) & ((1 << (64 - by)) - 1))

    step = torch.arange(1, n + 1, device=key.device) + (salt % (1 << 40)) * 4096
    z = key.unsqueeze(1) + step * -0x61C8864680B583EB
    z = xorshift(z, 30) * -0x40A7B892E31B1A47
    z = xorshift(z, 27) * -0x6B2FB644ECCEEE15
    return ((xorshift(z, 31) >> 40) & 0xFFFFFF).float() / (1 << 24)
