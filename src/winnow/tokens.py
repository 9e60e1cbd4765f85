"""Tokens and Ledger: what a reducer is given, and which token stands for which patch.

Winnow's own; the idea of carrying sizes and sources with the tokens is ToMe's (Bolya et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ledger:
    """Which token holds which patch: integers only; sizes, masks, pictures and costs are derived from it."""

    owner: Tensor
    """[B, P] token that holds each patch, -1 once dropped."""
    n: int
    """Tokens in the tensor now (padding included)."""
    valid: Tensor | None = None
    """[B, N] False on padding; None where every token is real."""

    @classmethod
    def start(cls, batch: int, patches: int, device: torch.device | str | None = None) -> Ledger:
        """The ledger before any reduction: token p holds patch p."""
        return cls(torch.arange(patches, device=device).expand(batch, patches), patches)

    def size(self) -> Tensor:
        """[B, N] patches held by each token (int64); 0 on padding."""
        held = self.owner.new_zeros(self.owner.shape[0], self.n + 1)
        ones = torch.ones_like(self.owner)
        return held.scatter_add(1, self.owner.remainder(self.n + 1), ones)[:, : self.n]

    def first(self) -> Tensor:
        """[B, N] lowest patch held by each token; P where a token holds none."""
        patches = self.owner.shape[1]
        index = torch.arange(patches, device=self.owner.device).expand_as(self.owner)
        first = self.owner.new_full((self.owner.shape[0], self.n + 1), patches)
        return first.scatter_reduce(1, self.owner.remainder(self.n + 1), index, "amin")[:, : self.n]

    def step(self, move: Tensor, n: int, valid: Tensor | None = None) -> Ledger:
        """The ledger after each token [B, N] went to place `move` (-1: dropped) among `n`: one gather."""
        dropped = move.new_full((move.shape[0], 1), -1)
        there = torch.cat([move, dropped], 1).gather(1, self.owner.remainder(self.n + 1))
        return Ledger(there, n, valid)

    def dense(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Spread a value per token, [B, N] or [B, N, C], back on the patches: [B, P] or [B, P, C]."""
        flat = x.unsqueeze(-1) if x.ndim == 2 else x
        if flat.shape[:2] != (self.owner.shape[0], self.n):
            raise ValueError(
                f"dense() needs one value per token, [{self.owner.shape[0]}, {self.n}, ...]; got {[*x.shape]}"
            )
        nothing = flat.new_full((flat.shape[0], 1, flat.shape[-1]), fill)
        index = self.owner.remainder(self.n + 1).unsqueeze(-1).expand(-1, -1, flat.shape[-1])
        out = torch.cat([flat, nothing], 1).gather(1, index)
        return out.squeeze(-1) if x.ndim == 2 else out

    def counts(self) -> Tensor:
        """[B] real tokens per image, padding apart."""
        if self.valid is None:
            return torch.full_like(self.owner[:, 0], self.n)
        return self.valid.sum(1)


@dataclass(frozen=True)
class Tokens:
    """The patch tokens at one site (prefix tokens never come here) and where they came from."""

    x: Tensor
    """[B, N, C] features."""
    ledger: Ledger
    grid: tuple[int, int] | None = None
    """(h, w) of the P patches of this input; None where the host does not say."""
    order: Tensor | None = None
    """[B, N] tokens listed in the order the method's paper emits them; None where that is the raster order."""
    score: Tensor | None = None
    """[B, N] what the method chose by, for pictures; belongs to the tokens that came in."""
    losses: dict[str, Tensor] | None = None
    """Auxiliary losses of this site, already weighted; the seat keeps them for `Reducer.loss()`."""
    metrics: dict[str, Tensor] | None = None
    """Figures of this site for `Reducer.metrics()`."""

    @property
    def n(self) -> int:
        """Tokens in the tensor now."""
        return self.ledger.n

    def moved(self, x: Tensor, move: Tensor, n: int, valid: Tensor | None = None, **more) -> Tokens:
        """These tokens after a step: features `x`, tokens gone to `move` [B, N] among `n`."""
        fresh = {"order": None, "score": None, "losses": None, "metrics": None} | more
        return replace(self, x=x, ledger=self.ledger.step(move, n, valid), **fresh)
