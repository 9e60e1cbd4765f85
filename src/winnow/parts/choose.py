"""Which tokens stay.

Winnow's own; every choice is a list of indices in raster order, so survivors never change places.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top(score: Tensor, m: int) -> Tensor:
    """[B, M] indices of the m highest of score [B, N], ascending."""
    return score.topk(m, dim=1).indices.sort(dim=1).values


def above(score: Tensor, limit: Tensor, valid: Tensor | None) -> Tensor:
    """[B, N] bool: score strictly above limit [B, 1] and real; the highest token of an image always stays."""
    if valid is not None:
        score = score.masked_fill(~valid, float("-inf"))
    keep = (score > limit) & (score > float("-inf"))
    best = keep.new_zeros(keep.shape).scatter(1, score.argmax(1, keepdim=True), True)
    return keep | (best & ~keep.any(1, keepdim=True))


def most_likely(score: Tensor, m: int, among: Tensor) -> Tensor:
    """[B, N] bool: at most m of the tokens in `among` [B, N], those with the highest score; NaN is the lowest."""
    ranked = score.masked_fill(~among | score.isnan(), float("-inf")).topk(m, dim=1).indices
    return among & among.new_zeros(among.shape).scatter(1, ranked, True)


def evenly(n: int, m: int, device: torch.device) -> Tensor:
    """[N] bool: the last tokens of m runs that are as equally long as can be."""
    ends = torch.tensor([-(-(i + 1) * n // m) - 1 for i in range(m)], device=device)
    return torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, ends, True)


def relaxed(logit: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws with P(1) = sigmoid(logit): soft [B, N] (relaxed Bernoulli) and hard, 0 or 1 with the soft one's gradient.

    Maddison et al., "The Concrete Distribution", ICLR 2017, with uniform noise [B, N] in [0, 1).
    """
    tiny = torch.finfo(torch.float32).eps
    edge = math.log((1 - tiny) / tiny)
    soft = ((noise.clamp(tiny, 1 - tiny).logit() + logit.clamp(-edge, edge)) / temperature).sigmoid()
    return soft, (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def gumbel(noise: Tensor) -> Tensor:
    """Gumbel noise of uniform noise in [0, 1)."""
    tiny = torch.finfo(torch.float32).eps
    return -(-noise.clamp(tiny, 1 - tiny).log()).log()


def _drawn(logits: Tensor) -> Tensor:
    return -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()


def masked_gumbel_softmax_topk(
    logits: Tensor,
    masks: Tensor,
    k: int | Tensor,
    tau: float = 1.0,
    hard: bool = False,
    training: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """AdaLLaVA's relaxed choice of k of logits [..., N], none of those where masks [..., N] is not 0.

    hard: 1 for the chosen, else 0, in training with the gradient of the softmax over all. In training `noise` [..., N]
    (Gumbel) is added, drawn as AdaLLaVA draws it where none is given; without training neither it nor tau counts.
    k: one number, or one per row [...].
    """
    if isinstance(k, int) and k > logits.shape[-1]:
        raise ValueError(f"{k} of {logits.shape[-1]} cannot be chosen")
    taken = masks.bool()
    z = logits.masked_fill(taken, float("-inf"))
    if training:
        z = (z + (_drawn(logits) if noise is None else noise)) / tau
    soft = z.softmax(-1)
    if not hard:
        return soft
    rank = z.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    chosen = (rank < (k if isinstance(k, int) else k.unsqueeze(-1))).to(soft.dtype)
    # the difference first: then what is chosen is 1 to the bit
    return chosen + (soft - soft.detach()) if training else chosen


def masked_gumbel_softmax(
    logits: Tensor,
    masks: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    training: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """The same for one of them."""
    return masked_gumbel_softmax_topk(logits, masks, 1, tau, hard, training, noise)


def n_times_gumbel_softmax(
    logits: Tensor,
    n: int | Tensor,
    tau: float = 1.0,
    hard: bool = True,
    training: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """n of logits [..., N], one after another; noise [n, ..., N] is fresh in each round. n: one number, or one per row.

    hard: AdaLLaVA's argument, which changes nothing there either.
    """
    counts = torch.as_tensor(n, device=logits.device)
    rounds = int(counts.max())
    if rounds > logits.shape[-1]:
        raise ValueError(f"{rounds} of {logits.shape[-1]} cannot be chosen")
    found = torch.zeros_like(logits)
    for at in range(rounds):
        going, drawn = (at < counts).unsqueeze(-1), None if noise is None else noise[at]
        one = masked_gumbel_softmax(logits, found.detach() * going, tau, True, training, drawn)
        found = found + one * going
    return found


def n_times_gumbel_softmax_head_version(
    logits: Tensor,
    n: int,
    r: int,
    tau: float = 1.0,
    training: bool = True,
    noise: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """n times r heads and r MLP groups of one layer: logits [L, 2h], heads first; noise ([n, L * 2h], [n, 2h]).

    Each round picks a cell and so a layer, then of that layer's heads and of its groups r that it has not yet.
    """
    found, half = torch.zeros_like(logits), logits.shape[1] // 2
    for at in range(n):
        cells, sides = (None, None) if noise is None else (noise[0][at], noise[1][at])
        cell = masked_gumbel_softmax(logits.flatten(), found.detach().flatten(), tau, True, training, cells)
        layer = cell.view_as(logits).sum(1)
        row, has = layer @ logits, layer.detach() @ found.detach()
        parts = [
            masked_gumbel_softmax_topk(
                row[side], has[side], r, tau, True, training, None if sides is None else sides[side]
            )
            for side in (slice(half), slice(half, None))
        ]
        found = found + layer[:, None] * torch.cat(parts)
    return found
