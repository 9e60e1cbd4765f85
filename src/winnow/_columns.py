"""Columns: which of the caller's columns a shortened sequence holds, and what follows for masks and positions.

Winnow's own. The caller's sequence is never rewritten: everything shorter is an index into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .parts.combine import take


@dataclass(frozen=True)
class Columns:
    """A shortened sequence; rows that hold fewer columns are filled up on the side on which the caller padded."""

    index: Tensor
    """[B, M] caller's column."""
    real: Tensor | None
    """[B, M] False where a row is filled up or was padded; None where neither."""
    lost: Tensor
    """[B, M] columns taken out in front of each, the caller's padding apart."""
    total: Tensor
    """[B, 1] columns taken out."""
    seen: int
    """Columns of the caller these were taken from."""

    @classmethod
    def all(cls, batch: int, n: int, device: torch.device) -> Columns:
        """n columns, all of them."""
        index = torch.arange(n, device=device).expand(batch, n)
        return cls(index, None, torch.zeros_like(index), index.new_zeros(batch, 1), n)

    @classmethod
    def keeping(cls, keep: Tensor, real: Tensor | None = None) -> Columns:
        """The columns where keep [B, L] is True; padding at the ends, where `real` is False, makes room where it can."""
        gone, n, common, left = ~keep, keep.shape[1], 0, False
        if real is not None:
            leading, trailing = real.cumsum(1) == 0, real.flip(1).cumsum(1).flip(1) == 0
            padding = leading | trailing
            keep, gone = keep & ~padding, gone & ~padding
            # columns that pad every row stay, so that with nothing taken out the sequence is the caller's
            common, left = int(padding.all(0).sum()), bool((trailing & ~leading).any())
        width = int(keep.sum(1).max()) + common
        order = (~keep if left else keep).int().argsort(dim=1, stable=True)
        index = order[:, :width] if left else order[:, n - width :]
        held = keep.gather(1, index)
        whole = None if bool(held.all()) else held
        return cls(index, whole, gone.cumsum(1).gather(1, index), gone.sum(1, keepdim=True), n)

    def then(self, more: Columns) -> Columns:
        """These and, behind them, `more`, which was taken from the columns that follow."""
        real = None if self.real is None and more.real is None else torch.cat([self.certain(), more.certain()], 1)
        return Columns(
            torch.cat([self.index, more.index + self.seen], 1),
            real,
            torch.cat([self.lost, more.lost + self.total], 1),
            self.total + more.total,
            self.seen + more.seen,
        )

    def of(self, fewer: Columns) -> Columns:
        """What is left where `fewer` was taken from these."""
        full = self.real is None and fewer.real is None
        return Columns(
            self.index.gather(1, fewer.index),
            None if full else self.certain().gather(1, fewer.index) & fewer.certain(),
            self.lost.gather(1, fewer.index) + fewer.lost,
            self.total + fewer.total,
            self.seen,
        )

    def certain(self) -> Tensor:
        """[B, M] `real`, written out."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.real is None else self.real

    def values(self, x: Tensor) -> Tensor:
        """[..., B, M] of x [..., 1 or B, L], a value per column."""
        return x.expand(*x.shape[:-2], len(self.index), -1).gather(-1, self.index.expand(*x.shape[:-2], -1, -1))

    def places(self, x: Tensor) -> Tensor:
        """[..., B, M, D] of x [..., 1 or B, L, D], such as position embeddings."""
        lead = x.shape[:-3]
        x = x.expand(*lead, len(self.index), -1, -1)
        return x.gather(-2, self.index.unsqueeze(-1).expand(*lead, -1, -1, x.shape[-1]))

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The caller's [B, L] mask for these columns; None where nothing is hidden."""
        if mask is None:
            return None if self.real is None else self.real.long()
        if mask.shape[1] != self.seen:
            raise ValueError(
                f"attention_mask is {[*mask.shape]}, the sequence so far has {self.seen} columns: a reduced model needs "
                "one value per column, those already in the cache included"
            )
        held = self.values(mask)
        return held if self.real is None else held * self.real.to(mask.dtype)

    def labels(self, labels: Tensor, ignore: int = -100) -> Tensor:
        """[B, M] labels of these columns; `ignore` where filled up."""
        held = self.values(labels)
        return held if self.real is None else held.masked_fill(~self.real, ignore)


def renumbered(given: Tensor, new: Columns, before: Columns) -> Tensor:
    """[B, M] positions of columns `new` behind `before`: the caller's, less what was taken out in front of each."""
    return (new.values(given) - before.total - new.lost).clamp_min(0)


def between(mask: Any, rows: Columns, keys: Columns, flash: bool) -> Any:
    """The mask a decoder layer is given, for queries `rows` and keys `keys` of the sequence it was made for.

    mask: [B, 1, Q, K] bool or added to the logits, [B, K] for flash attention, or None: causal.
    """
    if flash or (mask is None and keys.real is None):
        return keys.mask(mask)
    if mask is None:
        query = rows.index + (keys.seen - rows.seen)
        short = keys.index[:, None, None, :] <= query[:, None, :, None]
    else:
        held = take(mask.expand(len(rows.index), -1, -1, -1)[:, 0], rows.index)
        short = held.gather(2, keys.index[:, None].expand(-1, held.shape[1], -1))[:, None]
    if keys.real is None:
        return short
    hidden = ~keys.real[:, None, None]
    return short & ~hidden if short.dtype == torch.bool else short.masked_fill(hidden, torch.finfo(short.dtype).min)
