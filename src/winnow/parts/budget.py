"""A token budget as a vector, as whole numbers of tokens, and as one more token of a vision encoder.

Document 004's parts, after AdaLLaVA's latency encoding (Xu et al., "Learning to Inference Adaptively for MLLMs", ICCV 2025).
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Budget: TypeAlias = int | float | Tensor
"""int: tokens; float in (0, 1]: share; tensor [B]: one per image, by its dtype."""
FLOOR = 10_000.0
"""Frequencies go from 1 down to almost one over this."""
SPREAD = 0.02
"""Standard deviation of a fresh position, as in the towers themselves."""


def check_budget(budget: object) -> Budget:
    """The budget, if it is one; TypeError / ValueError says what would work."""
    if isinstance(budget, Tensor):
        return _check_tensor(budget) if budget.ndim else check_budget(_check_tensor(budget[None]).item())
    if isinstance(budget, bool) or not isinstance(budget, Integral | Real):
        raise TypeError(f"a budget is a number of tokens (128), a share (0.25) or a tensor of either, not {budget!r}")
    if isinstance(budget, Integral):
        if int(budget) < 0:
            raise ValueError(f"a budget of {budget} tokens: a whole number from 0 on (0 keeps one token)")
        return int(budget)
    if not 0 < float(budget) <= 1:
        raise ValueError(f"a budget of {budget!r}: a share is above 0 and at most 1; a number of tokens is an int")
    return float(budget)


def _check_tensor(budget: Tensor) -> Tensor:
    if budget.ndim != 1 or budget.dtype == torch.bool or budget.is_complex() or not len(budget):
        raise TypeError(f"budgets {budget.dtype} {[*budget.shape]}: whole numbers or shares, one per image: [B]")
    if budget.is_floating_point():
        if budget.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"shares in {budget.dtype} cannot name every number of tokens: float32, or whole numbers")
        if not bool(((budget > 0) & (budget <= 1)).all()):
            raise ValueError("budgets: shares are above 0 and at most 1; numbers of tokens are whole numbers")
    elif bool((budget < 0).any()):
        raise ValueError("budgets: numbers of tokens are whole numbers from 0 on (0 keeps one token)")
    return budget.detach()


def tokens_of(budget: Budget, n: int) -> Any:
    """Tokens that a budget leaves of n, from 1 to n: an int, or int64 [B] for a tensor; shares are rounded, not cut."""
    if isinstance(budget, Tensor):
        whole = (budget.double() * n + 0.5).floor().long() if budget.is_floating_point() else budget.long()
        return whole.clamp(1, n)
    return max(1, min(n, math.floor(budget * n + 0.5) if isinstance(budget, float) else budget))


def sinusoid(budget: Tensor, num_freqs: int) -> Tensor:
    """[B, 2F] sines, then cosines, of 2 pi times shares [B] at F frequencies; float32."""
    steps = torch.arange(num_freqs, device=budget.device, dtype=torch.float32) / num_freqs
    angle = 2 * math.pi * budget.float()[:, None] * FLOOR**-steps
    return torch.cat([angle.sin(), angle.cos()], 1)


class BudgetEmbedding(nn.Module):
    """Shares in [0, 1], [B] or [B, 1], to vectors [B, dim_out]."""

    def __init__(self, dim_out: int, num_freqs: int = 128, hidden_dim: int = 256) -> None:
        super().__init__()
        self.num_freqs = num_freqs
        self.norm = nn.LayerNorm(2 * num_freqs)
        self.hidden, self.out = nn.Linear(2 * num_freqs, hidden_dim), nn.Linear(hidden_dim, dim_out)

    def forward(self, budget: Tensor) -> Tensor:
        """[B] or [B, 1] -> [B, dim_out]; ValueError for another shape."""
        if budget.ndim not in (1, 2) or budget.shape[1:].numel() != 1:
            raise ValueError(f"a budget is [B] or [B, 1], not {[*budget.shape]}")
        waves = sinusoid(budget.flatten(), self.num_freqs).to(self.out.weight.dtype)
        return self.out(F.gelu(self.hidden(self.norm(waves))))

    def macs(self) -> float:
        """Of one budget."""
        return self.hidden.weight.numel() + self.out.weight.numel()


class VisionEncoderWithBudgetToken(nn.Module):
    """A vision tower that reads [class, patches, budget]: document 004's option A by itself.

    tower: a Hugging Face vision model with class token; embedding: BudgetEmbedding; hidden: C.
    layer: the hidden state that is returned; -2, as LLaVA's projector was trained on.
    """

    def __init__(self, tower: Any, embedding: nn.Module, hidden: int, layer: int = -2) -> None:
        super().__init__()
        self.tower, self.budget_embedding, self.layer = tower, embedding, layer
        self.budget_pos_embed = nn.Parameter(SPREAD * torch.randn(1, 1, hidden))

    def forward(self, images: Tensor, budget: Tensor) -> Tensor:
        """Images [B, 3, H, W] and shares [B] -> [B, N+2, C], the budget token last; ValueError without a class token."""
        side: int = self.tower.config.patch_size
        n = (images.shape[-2] // side) * (images.shape[-1] // side)
        token = self.budget_embedding(budget)[:, None] + self.budget_pos_embed
        hook = self.tower.embeddings.register_forward_hook(lambda _, __, x: torch.cat([x, token.to(x.dtype)], 1))
        try:
            found = self.tower(images, output_hidden_states=True)
        finally:
            hook.remove()
        made = found.hidden_states[0].shape[1] - 1
        if made != n + 1:
            raise ValueError(
                f"{type(self.tower).__name__} makes {made} tokens of {n} patches: a class token and nothing else is needed, "
                'as CLIP\'s towers have; AdaptiveKeep(fuse="encoder") takes others'
            )
        return found.hidden_states[self.layer]
