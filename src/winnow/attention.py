"""attend(): softmax attention with token sizes and padding; the only place where the kernel is chosen.

Proportional attention is ToMe's (Bolya et al., 2023): a token of size s counts as s keys, that is, log s on its logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import Ledger

CHUNK = 64
"""Queries scored at once for received attention: [B, H, 64, N] is held, never [B, H, N, N]."""


def log_sizes(ledger: Ledger, prefix: int, sizes: bool) -> Tensor | None:
    """[B, K+N] float32 added to every logit of a key: log-size (0 if sizes do not count), -inf on padding; None if all 0."""
    if ledger.valid is None and (not sizes or ledger.n == ledger.owner.shape[1]):
        return None
    size = ledger.size() if sizes or ledger.valid is None else ledger.valid
    if ledger.valid is not None:
        size = size * ledger.valid
    bias = size.float().log()
    return F.pad(bias, (prefix, 0))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    path: str = "auto",
) -> Tensor:
    """[B, H, N, D] attention of q, k, v [B, H, N, D] with `bias` [B, N] on the keys.

    path: "mask" is the reference, "channel" carries the log-sizes in one more channel of q and k so that kernels
    without masks stay usable (no -inf then), "math" holds the whole matrix, "auto" chooses.
    """
    if path == "math":
        return _math(q, k, v, bias, scale, dropout)
    if bias is None:  # the host's own call
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    if path == "channel":
        return _channel(q, k, v, bias, scale, dropout)
    # "auto": on CPU the mask costs 4 % and the channel 22 % of an attention (docs/log.md); elsewhere unmeasured
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.to(q.dtype)[:, None, None], dropout_p=dropout, scale=scale
    )


def _channel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None, dropout: float) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    extra = (bias / scale).to(k.dtype)[:, None, :, None].expand(*k.shape[:3], 1)
    grow = -(q.shape[-1] + 1) % 8  # flash kernels want a multiple of 8
    q = F.pad(torch.cat([q, q.new_ones(*q.shape[:3], 1)], -1), (0, grow))
    k = F.pad(torch.cat([k, extra], -1), (0, grow))
    wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, wide, dropout_p=dropout, scale=scale)[..., : v.shape[-1]]


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    logits = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias.to(q.dtype)[:, None, None]
    return F.dropout(logits.softmax(-1), dropout, training=dropout > 0) @ v


def rows(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """[B, H, Q, N] softmax rows, in float32, of a few queries q [B, H, Q, D] over all keys k [B, H, N, D]."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)).float()
    return (logits if bias is None else logits + bias[:, None, None]).softmax(-1)


def received(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """[B, N] attention each key receives, mean over heads and real queries; N*N*D MACs per head, chunked over queries."""
    real = torch.ones_like(k[:, 0, :, 0], dtype=torch.float32) if bias is None else (bias > float("-inf")).float()
    out = k.new_zeros(k.shape[0], k.shape[2], dtype=torch.float32)
    for start in range(0, q.shape[2], CHUNK):
        some = rows(q[:, :, start : start + CHUNK], k, bias, scale).mean(1)
        out = out + (some * real[:, start : start + CHUNK, None]).sum(1)
    return out / real.sum(1, keepdim=True)
