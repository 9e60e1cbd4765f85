"""Pool: average neighbouring patches into m cells, whatever the image shows; the average-pooling baseline.

Adaptive average pooling, with rows of cells of unequal length so that any m is met exactly. Winnow's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.amount import Amount, Keep
from ..parts.combine import merge
from ..reducer import Facts, Reducer, Signals
from ..tokens import Tokens
from ._sites import AtPlaces

Cells = tuple[tuple[int, ...], tuple[int, int] | None]


def cells(n: int, m: int, grid: tuple[int, int] | None) -> Cells:
    """Cell of each of n tokens, 0 to m-1, and the grid the cells form; over the grid if there is one, else over runs."""
    h, w = grid or (1, n)
    bands = max(-(-m // w), min(h, m, round((m * h / w) ** 0.5)))
    lengths = [m // bands + (band < m % bands) for band in range(bands)]
    starts = [sum(lengths[:band]) for band in range(bands)]
    band_of = [row * bands // h for row in range(h)]
    cell = tuple(starts[b] + column * lengths[b] // w for b in band_of for column in range(w))
    return cell, (bands, m // bands) if m % bands == 0 and grid else None


class PoolReducer(Reducer):
    """Each cell becomes its size-weighted mean; cells depend on shapes alone."""

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        n, m = tokens.n, self.count(tokens.n, layer)
        if m == n:
            return tokens
        cell, _ = cells(n, m, self._grid(tokens, layer))
        index = torch.tensor(cell, device=tokens.x.device)
        return merge(tokens, _heads(index, m).expand(tokens.x.shape[0], n), m)

    def _grid(self, tokens: Tokens, layer: int) -> tuple[int, int] | None:
        """The grid that earlier sites left, if they left one."""
        n, grid = tokens.ledger.owner.shape[1], tokens.grid
        for site in self.method.sites(0):
            if site >= layer:
                break
            m = self.count(n, site)
            if m != n:
                (_, grid), n = cells(n, m, grid), m
        return grid if n == tokens.n else None


def _heads(cell: Tensor, m: int) -> Tensor:
    """[N] lowest token of each token's cell."""
    here = torch.arange(len(cell), device=cell.device)
    return here.new_zeros(m).scatter_reduce(0, cell, here, "amin", include_self=False)[cell]


@dataclass(frozen=True, repr=False)
class Pool(AtPlaces):
    """Average pooling to m cells at each site; `proportional` puts the cells' sizes on later attention."""

    keep: Amount | tuple[Amount, ...] = Keep(0.7)
    layers: tuple[int, ...] = (3, 6, 9)
    at: str = "block"
    proportional: bool = True
    reducer = PoolReducer

    @property
    def facts(self) -> Facts:
        return Facts(combine="mean", sizes=self.proportional and self.at != "tower", where=self.where)
