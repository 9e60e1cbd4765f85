"""What a token is worth: class-token attention, received attention, norm.

Class attention: EViT (Liang et al., 2022); norm: document 002; received attention: for models without class token;
entropy and its spikes: Dynamic Token Pooling (Nawrot et al., 2023), on grey levels instead of the next character.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reducer import Facts, Signals
from ..tokens import Ledger

LEVELS = 256
"""Grey levels told apart, as many as in an 8-bit image."""

ATTENTION = {"cls": "cls_attention", "received": "received"}


def check_attention(owner: str, kind: str) -> None:
    """ValueError unless `kind` is a known attention score."""
    if kind not in ATTENTION:
        raise ValueError(f'{owner}(attention={kind!r}): attention must be "cls" or "received"')


def attention_facts(kind: str, **more) -> Facts:
    """Facts of a method that scores by attention of this kind."""
    return Facts(needs=frozenset({ATTENTION[kind]}), **more)


def attention(signals: Signals, kind: str) -> Tensor:
    """[B, N] attention a token gets: from the class token (mean over heads), or from all queries."""
    score = signals.cls_row if kind == "cls" else signals.received
    assert score is not None, "the core fills what Facts.needs asks for"
    return score.mean(1) if score.ndim == 3 else score


def norm(x: Tensor) -> Tensor:
    """[B, N] L2 norm of each token [B, N, C], in float32."""
    return x.detach().float().norm(dim=-1)


def surprise(row: Tensor) -> Tensor:
    """-a log a of an attention row: what each token adds to the row's entropy, 0 where it gets none; any shape."""
    return torch.special.entr(row.float())


def entropy(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, P] entropy in nats of the grey levels in each patch of images [B, 3, H, W], from its darkest to its lightest."""
    h, w = image.shape[-2] // grid[0], image.shape[-1] // grid[1]
    grey = image.detach().float().mean(1)[:, : grid[0] * h, : grid[1] * w]
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    level = ((grey - low) / (high - low).clamp_min(1e-12) * (LEVELS - 1)).round()
    level = level.nan_to_num(0.0).clamp(0, LEVELS - 1).long()  # of a broken image there is nothing to know
    level = level.unflatten(2, (grid[1], w)).unflatten(1, (grid[0], h)).transpose(2, 3).flatten(3).flatten(1, 2)
    share = torch.zeros(*level.shape[:2], LEVELS, device=image.device)
    share = share.scatter_add(2, level, torch.ones_like(level, dtype=share.dtype)) / level.shape[2]
    return torch.special.entr(share).sum(2)


def spikes(entropy: Tensor) -> Tensor:
    """[B, N] how far entropy [B, N] is above both values before it (above 0: a spike); the first is one, unbounded."""
    before = F.pad(entropy, (2, 0), value=float("-inf"))
    return (entropy - torch.maximum(before[:, 1:-1], before[:, :-2])).clamp_max(torch.finfo(torch.float16).max)


def per_token(values: Tensor, ledger: Ledger) -> Tensor:
    """[B, N] mean of the values [B, P] of the patches that each token holds; 0 on padding."""
    held = values.new_zeros(values.shape[0], ledger.n + 1)
    return held.scatter_reduce(1, ledger.owner.remainder(ledger.n + 1), values, "mean", include_self=False)[:, :-1]
