"""attend(): softmax attention with token sizes and padding; the only place where the kernel is chosen.

Proportional attention is ToMe's (Bolya et al., 2023): a token of size s counts as s keys, that is, log s on its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .tokens import Ledger

CHUNK = 64
"""Queries scored at once for received attention: [B, H, 64, N] is held, never [B, H, N, N]."""


def log_sizes(ledger: Ledger, prefix: int, sizes: bool) -> Tensor | None:
    """[B, K+N] float32 added to every logit of a key: log-size (0 if sizes do not count), -inf on padding; None if all 0."""
    if ledger.valid is None and (not sizes or ledger.n == ledger.owner.shape[1]):
        return None
    size = ledger.size() if sizes else ledger.valid
    assert size is not None
    return F.pad(size.float().log(), (prefix, 0))


@dataclass(frozen=True)
class Pairs:
    """A bias per pair of tokens (relative positions), made a few query rows at a time."""

    rows: Callable[[int, int], Tensor]
    """[1 or B, H, stop-start, N] added to the logits of queries start..stop."""
    shared: bool
    """One bias for all images: it is as large as the host's own and is made at once."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    path: str = "auto",
    pairs: Pairs | None = None,
) -> Tensor:
    """[B, H, N, D] attention of q, k, v [B, H, N, D] with `bias` [B, N] on the keys and `pairs` on pairs of tokens.

    path: "mask" is the reference, "channel" carries the log-sizes in one more channel of q and k so that kernels
    without masks stay usable (no -inf then), "math" holds the whole matrix, "auto" chooses.
    """
    if pairs is not None:
        return _paired(q, k, v, bias, pairs, scale, dropout, path)
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


def _paired(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pairs: Pairs, scale: float | None, dropout: float, path: str
) -> Tensor:
    n = q.shape[2]
    some = partial(_some_queries, bias=bias, pairs=pairs, scale=scale, dropout=dropout, path=path)
    if pairs.shared and bias is None:
        return some(q, k, v, 0)
    chunks = [(q[:, :, start : start + CHUNK], start) for start in range(0, n, CHUNK)]
    if torch.is_grad_enabled():  # or every chunk's bias would be kept for the backward pass
        return torch.cat([checkpoint(some, part, k, v, start, use_reentrant=False) for part, start in chunks], 2)
    return torch.cat([some(part, k, v, start) for part, start in chunks], 2)


def _some_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    *,
    bias: Tensor | None,
    pairs: Pairs,
    scale: float | None,
    dropout: float,
    path: str,
) -> Tensor:
    mask = pairs.rows(start, start + q.shape[2])
    if bias is not None:
        mask = mask + bias.to(mask.dtype)[:, None, None]
    if path == "math":
        return _math(q, k, v, mask, scale, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), dropout_p=dropout, scale=scale)


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    logits = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + (bias if bias.ndim == 4 else bias[:, None, None]).to(q.dtype)
    return F.dropout(logits.softmax(-1), dropout, training=dropout > 0) @ v


def rows(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float | None = None,
    pairs: Pairs | None = None,
    start: int = 0,
) -> Tensor:
    """[B, H, Q, N] softmax rows, in float32, of the queries q [B, H, Q, D] from place `start` on, over all keys k."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)).float()
    if pairs is not None:
        logits = logits + pairs.rows(start, start + q.shape[2])
    return (logits if bias is None else logits + bias[:, None, None]).softmax(-1)


def received(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None = None, pairs: Pairs | None = None
) -> Tensor:
    """[B, N] attention each key receives, mean over heads and real queries; N*N*D MACs per head, chunked over queries."""
    real = torch.ones_like(k[:, 0, :, 0], dtype=torch.float32) if bias is None else (bias > float("-inf")).float()
    out = k.new_zeros(k.shape[0], k.shape[2], dtype=torch.float32)
    for start in range(0, q.shape[2], CHUNK):
        some = rows(q[:, :, start : start + CHUNK], k, bias, scale, pairs, start).mean(1)
        out = out + (some * real[:, start : start + CHUNK, None]).sum(1)
    return out / real.sum(1, keepdim=True)
