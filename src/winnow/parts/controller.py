"""Which patches to keep under a budget: logits per patch from what they show and what the budget is, and a hard choice.

Document 004's VisionTokenController; each head below is one of its ways to join patch and budget.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .budget import check_budget, tokens_of
from .choose import gumbel, masked_gumbel_softmax_topk, n_times_gumbel_softmax
from .combine import take
from .diverse import likeness, unlike


class PatchHead(nn.Module):
    """Two layers on each patch, which the budget scales and shifts inside; a linear layer on both could not rank anew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.budget, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, 1)

    def forward(self, patches: Tensor, budget: Tensor) -> Tensor:
        """[B, N, C] and [B, C] -> [B, N]"""
        scale, shift = self.budget(_unit(budget))[:, None].chunk(2, -1)
        return self.out(F.gelu(self.patch(_unit(patches)) * (1 + scale) + shift))[..., 0]

    def macs(self, n: int) -> float:
        """On n patches."""
        return n * (self.patch.weight.numel() + self.out.weight.numel()) + self.budget.weight.numel()


class DotHead(nn.Module):
    """How alike the budget token and each patch are, after a linear layer each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.budget = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, patches: Tensor, budget: Tensor) -> Tensor:
        """[B, N, C] and [B, C] -> [B, N]"""
        asked = self.budget(_unit(budget)) * budget.shape[-1] ** -0.5
        return (self.patch(_unit(patches)) @ asked[..., None])[..., 0]

    def macs(self, n: int) -> float:
        """On n patches."""
        return n * self.patch.weight.numel() + self.budget.weight.numel() + n * self.patch.out_features


class IndexHead(nn.Module):
    """One linear layer from the budget token alone to every place of one grid: what document 004's author built."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.places = nn.Linear(width, patches)

    def forward(self, patches: Tensor, budget: Tensor, at: Tensor | None = None) -> Tensor:
        """[B, N, C] and [B, C] -> [B, N]; `at` [B, N]: the places of the patches, where some are gone."""
        logits = self.places(_unit(budget))
        if at is None and logits.shape[1] != patches.shape[1]:
            raise ValueError(
                f'head="index" was made for {logits.shape[1]} patches and cannot rank {patches.shape[1]}: '
                'use head="patch" or "dot"'
            )
        return logits if at is None else logits.gather(1, at)

    def macs(self, n: int) -> float:
        """On any number of patches."""
        return self.places.weight.numel()


HEADS = ("patch", "dot", "index")
SELECTS = ("topk", "sequential", "diverse")
FAINT = 0.1
"""How much the logits of an untrained head count where diversity chooses as well."""


class VisionTokenController(nn.Module):
    """Keeps K patches, and the class token in front of them (`use_cls`).

    vision_dim: C; num_patches: N (head="index" alone needs it); tau: temperature of the straight-through gradient.
    """

    def __init__(
        self, vision_dim: int, num_patches: int, tau: float = 5.0, use_cls: bool = True, *,
        head: str = "patch", select: str = "topk",
    ) -> None:  # fmt: skip
        super().__init__()
        self.tau, self.use_cls, self.select = tau, use_cls, select
        made: dict[str, Any] = {"patch": PatchHead, "dot": DotHead}
        self.logit_head = IndexHead(vision_dim, num_patches) if head == "index" else made[head](vision_dim)
        self.strength = nn.Parameter(torch.tensor(FAINT)) if select == "diverse" else None

    def logits(self, patches: Tensor, budget: Tensor, at: Tensor | None = None) -> Tensor:
        """[B, N] in float32 at least, of patches [B, N, C] and what is known of the budget [B, C]."""
        found = self.logit_head(patches, budget, at) if isinstance(self.logit_head, IndexHead) else (
            self.logit_head(patches, budget))  # fmt: skip
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        # bounded, or what was learned outweighs every likeness: exp(1) is what one object may weigh more than another
        return found if self.strength is None else (found * self.strength).tanh()

    def keep(
        self, logits: Tensor, k: int | Tensor, noise: Tensor | None = None, patches: Tensor | None = None
    ) -> Tensor:
        """[B, N], 1 for the k (or k[b]) best of logits [B, N], else 0; in training the best after Gumbel noise, which is
        made of `noise` uniform in [0, 1) ([B, N]; [K, B, N] for select="sequential"), with the soft choice's gradient.
        Where no noise is given, training draws it.

        patches [B, N, C]: what select="diverse" compares.
        """
        drawn = gumbel(torch.rand_like(logits) if noise is None else noise.to(logits.dtype)) if self.training else None
        if self.select == "diverse":
            return self._unlike(logits, k, drawn, patches)
        if drawn is None:
            return masked_gumbel_softmax_topk(logits, torch.zeros_like(logits), k, hard=True, training=False)
        if self.select == "sequential":
            rounds = int(torch.as_tensor(k).max())
            drawn = drawn.expand(rounds, *logits.shape) if drawn.ndim == logits.ndim else drawn
            return n_times_gumbel_softmax(logits, k, self.tau, training=True, noise=drawn)
        return masked_gumbel_softmax_topk(logits, torch.zeros_like(logits), k, self.tau, True, True, drawn)

    def _unlike(self, logits: Tensor, k: int | Tensor, drawn: Tensor | None, patches: Tensor | None) -> Tensor:
        assert patches is not None, "what is compared is given where diversity chooses"
        logits = logits if drawn is None else logits + drawn
        chosen = unlike(logits, likeness(patches), k).to(logits.dtype)
        soft = (logits / self.tau).softmax(-1)
        return chosen if drawn is None else chosen + (soft - soft.detach())

    def forward(
        self, vision_output: Tensor, token_budget: Any, budget_embedding: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """[B, N+2, C] with the budget token last, or [B, N+1, C] and `budget_embedding` [B, C] -> selected, mask.

        token_budget: tokens (int) or share (float), or a tensor [B] of either. selected [B, 1+K, C] (without class token
        [B, K, C]): rows of images that keep fewer end in zeros; mask [B, N]: 1 where kept.
        """
        last = vision_output.shape[1] - (budget_embedding is None)
        patches = vision_output[:, 1:last]
        budget = vision_output[:, -1] if budget_embedding is None else budget_embedding
        k = tokens_of(check_budget(token_budget), patches.shape[1])
        mask = self.keep(self.logits(patches, budget), k, noise, patches)
        most = int(torch.as_tensor(k).max())
        index = (mask.detach() < 0.5).int().argsort(dim=1, stable=True)[:, :most]
        selected = take(patches, index) * mask.gather(1, index).to(patches.dtype)[..., None]
        return torch.cat([vision_output[:, :1], selected], 1) if self.use_cls else selected, mask


def _unit(x: Tensor) -> Tensor:
    # hosts' streams differ a hundredfold in scale, and a few channels of CLIP's are far larger than all others
    return F.layer_norm(x, x.shape[-1:])
