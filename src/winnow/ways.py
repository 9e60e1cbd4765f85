"""Ways to run one decision: static (known counts), masked (nothing leaves the tensor), Padded (batch maximum).

Winnow's own: a way is a property of the run, not of the method, and all ways must agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .parts.combine import take
from .parts.settings import check_number
from .reducer import Facts, Spelled
from .tokens import Tokens


@dataclass(frozen=True, repr=False)
class Padded(Spelled):
    """Tokens are removed and padded to the batch maximum, rounded up to a multiple."""

    multiple: int

    def __post_init__(self) -> None:
        check_number("Padded", "", self.multiple, 1, whole=True)


Way = str | Padded


def check_way(way: object, facts: Facts, spelling: str) -> Way:
    """The way, if it exists and the method can run it; ValueError otherwise."""
    if isinstance(way, Padded) or way in ("auto", "masked"):
        return way  # type: ignore[return-value]
    if way == "packed":
        raise ValueError('way="packed" is not built yet; use way=Padded(16)')
    if way != "static":
        raise ValueError(f'way={way!r}: ways are "auto", "static", "masked" and Padded(16)')
    if not facts.static:
        raise ValueError(f'{spelling} decides per image how many tokens stay: use way="masked" or way=Padded(16)')
    return "static"


def resolve(way: Way, facts: Facts, training: bool) -> Way:
    """What "auto" means now: static where counts are known, masked while training, padded else."""
    if way != "auto":
        return way
    if facts.static:
        return "static"
    return "masked" if training else Padded(16)


def compact(tokens: Tokens, n: int) -> Tokens:
    """The real tokens first, in order, in n places; n must hold every image's tokens."""
    valid = tokens.ledger.valid
    if valid is None:
        return tokens
    place = valid.cumsum(1) - 1
    move = place.masked_fill(~valid, -1)
    here = torch.arange(tokens.n, device=valid.device).expand_as(valid)
    index = here.new_zeros(here.shape[0], n + 1).scatter(1, place.masked_fill(~valid, n), here)[:, :n]
    real = torch.arange(n, device=valid.device) < valid.sum(1, keepdim=True)
    ledger = tokens.ledger.step(move, n, real)
    return replace(tokens, x=take(tokens.x, index), ledger=ledger)


def gather_signal(signal: Tensor, valid: Tensor | None, n: int, dim: int) -> Tensor:
    """The same for a signal whose tokens lie along `dim`."""
    if valid is None:
        return signal
    index = (~valid).int().argsort(dim=1, stable=True)[:, :n]
    index = torch.nn.functional.pad(index, (0, n - index.shape[1]))  # padded to fewer than the reducer left places for
    shape = [1] * signal.ndim
    shape[0], shape[dim] = index.shape
    return signal.gather(dim, index.view(shape).expand(*signal.shape[:dim], n, *signal.shape[dim + 1 :]))


def pad(tokens: Tokens, multiple: int) -> Tokens:
    """Tokens [B, N, C] with known N padded with zeros to a multiple of `multiple`."""
    n = -(-tokens.n // multiple) * multiple
    if n == tokens.n:
        return tokens
    x = torch.nn.functional.pad(tokens.x, (0, 0, 0, n - tokens.n))
    valid = (torch.arange(n, device=x.device) < tokens.n).expand(x.shape[0], n)
    return replace(tokens, x=x, ledger=replace(tokens.ledger, n=n, valid=valid))


def spread(tokens: Tokens) -> Tokens:
    """Every token in the place of its first patch, all other places padding: what masking computes."""
    places, patches = tokens.ledger.first(), tokens.ledger.owner.shape[1]  # padding is at place `patches`: cut off
    index = places.unsqueeze(-1).expand_as(tokens.x)
    x = tokens.x.new_zeros(tokens.x.shape[0], patches + 1, tokens.x.shape[2]).scatter(1, index, tokens.x)[:, :patches]
    valid = x.new_zeros(x.shape[0], patches + 1, dtype=torch.bool).scatter(1, places, True)[:, :patches]
    return replace(tokens, x=x, ledger=tokens.ledger.step(places.masked_fill(places == patches, -1), patches, valid))
