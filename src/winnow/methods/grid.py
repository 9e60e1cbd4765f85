"""Grid: keep an evenly spread subset of the patches, whatever the image shows; the uniform-selection baseline.

Ordered dithering (Bayer, 1973): the first m cells of the threshold matrix are spread evenly for every m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.amount import Amount, Keep
from ..reducer import Facts, Signals
from ..tokens import Tokens
from ._sites import AtPlaces, KeepTop


def bayer(height: int, width: int) -> Tensor:
    """[h*w] rank of each cell in the Bayer matrix that covers the grid; every prefix of the ranks is evenly spread."""
    bits = max(height - 1, width - 1, 1).bit_length()
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rank = torch.zeros_like(row)
    for bit in range(bits):
        r, c = row >> bit & 1, column >> bit & 1
        rank = rank * 4 + (r ^ c) * 2 + r
    return rank.flatten()


class GridReducer(KeepTop):
    """Scores by the place of a token's first patch, the same for every image."""

    def score(self, tokens: Tokens, signals: Signals, layer: int) -> Tensor:
        h, w = tokens.grid or (1, tokens.ledger.owner.shape[1])
        return -bayer(h, w).to(tokens.x.device, torch.float32)[tokens.ledger.first()]


@dataclass(frozen=True, repr=False)
class Grid(AtPlaces):
    """Evenly spread patches stay: every second in each direction at a quarter."""

    keep: Amount | tuple[Amount, ...] = Keep(0.7)
    layers: tuple[int, ...] = (3, 6, 9)
    at: str = "block"
    reducer = GridReducer

    @property
    def facts(self) -> Facts:
        return Facts(where=self.where)
