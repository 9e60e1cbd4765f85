"""Which tokens stay so that those that stay are unlike each other.

Max-min distance: DivPrune (Alvar et al., 2025); determinants: CDPruner, pairs: VisPruner (both Zhang et al., 2025).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 8
"""VisPruner drops so many tokens before it compares again."""
OWN = 0.01
"""Share of each token that no other has, so that more tokens than channels are still told apart by their logits."""
TINY = 1e-10
"""A gain below this is none: the tokens picked span all others."""


def likeness(x: Tensor) -> Tensor:
    """[B, N, N] cosine similarity of tokens [B, N, C], in float32."""
    unit = F.normalize(x.detach().float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def farthest(distance: Tensor, m: int) -> Tensor:
    """[B, M] tokens in the order picked, each the farthest from those before it; distance [B, N, N], N at least 2.

    The first is the one whose nearest other token is farthest.
    """
    batch, n, _ = distance.shape
    near = distance.topk(2, dim=1, largest=False).values[:, 1]
    free = torch.zeros_like(near)
    picked = []
    for step in range(m):  # each pick depends on all before it
        last = (near + free).argmax(1)
        picked.append(last)
        free = free.scatter(1, last[:, None], -torch.inf)
        row = distance.gather(1, last[:, None, None].expand(batch, 1, n))[:, 0]
        near = row if step == 0 else torch.minimum(near, row)
    return torch.stack(picked, 1)


def determinantal(kernel: Tensor, m: int) -> Tensor:
    """[B, M] tokens in the order picked, each adding most to the determinant of kernel [B, N, N] on those picked.

    Chen et al., "Fast Greedy MAP Inference for Determinantal Point Process", NeurIPS 2018.
    """
    batch, n, _ = kernel.shape
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    free = torch.zeros_like(gain)
    basis = kernel.new_zeros(batch, m, n)
    picked = []
    for step in range(m):  # each pick depends on all before it
        last = (gain + free).argmax(1, keepdim=True)
        picked.append(last)
        free = free.scatter(1, last, -torch.inf)
        row = kernel.gather(1, last[..., None].expand(batch, 1, n))[:, 0]
        here = basis[:, :step].gather(2, last[:, None].expand(batch, step, 1))
        own = gain.gather(1, last)
        fresh = (row - (here.transpose(1, 2) @ basis[:, :step])[:, 0]) / own.clamp_min(TINY).sqrt()
        basis[:, step] = fresh = torch.where(own > TINY, fresh, 0.0)
        gain = (gain - fresh**2).clamp_min(0)
    return torch.cat(picked, 1)


def unlike(logits: Tensor, alike: Tensor, k: int | Tensor) -> Tensor:
    """[B, N] bool: k (or k[b]) tokens, each adding most to the determinant of `alike` [B, N, N] weighed by exp(logits).

    Where no two are alike these are the k highest of logits [B, N]; -inf is taken last.
    """
    weight = ((logits.detach().float() - logits.detach().float().amax(1, keepdim=True)) / 2).exp()
    own = torch.eye(alike.shape[1], device=alike.device)
    kernel = weight[:, :, None] * ((1 - OWN) * alike + OWN * own) * weight[:, None]
    order = determinantal(kernel, int(torch.as_tensor(k).max()))
    place = torch.arange(order.shape[1], device=order.device)
    taken = place < (k if isinstance(k, int) else k.to(order.device)[:, None])
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, taken.expand_as(order))


def distinct(alike: Tensor, order: Tensor, m: int) -> Tensor:
    """[B, M] what is left of tokens `order` [B, R] once those at even places that resemble one at odd places most are gone.

    alike [B, N, N]. So many go at a time as `AT_ONCE` says; those that stay stand in front of the odd places next time.
    """
    batch = torch.arange(len(order), device=order.device)[:, None, None]
    while order.shape[1] > m:
        even, odd = order[:, ::2], order[:, 1::2]
        best = alike[batch, even[:, :, None], odd[:, None]].amax(2)
        gone = min(AT_ONCE, order.shape[1] - m, odd.shape[1])
        left = best.argsort(dim=1, descending=True, stable=True)[:, gone:]
        order = torch.cat([even.gather(1, left), odd], 1)
    return order
