"""NormThreshold: drop the tokens whose L2 norm is not above a limit.

ECE1512 Project B, part B (document 002), 2024; as described, with padding masked and the batch where it belongs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.amount import Below, at_site, check_amounts, check_layers
from ..parts.choose import above
from ..parts.combine import mask
from ..parts.score import norm
from ..reducer import Facts, Method, Reducer, Signals
from ..tokens import Tokens


@dataclass(frozen=True, repr=False)
class NormThreshold(Method):
    """Before the listed blocks, tokens with a norm not above the limit go; how many depends on the image."""

    below: Below | tuple[Below, ...] = Below(0.9, of="mean")
    before: tuple[int, ...] = (3,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", check_layers("NormThreshold", "before", self.before))
        check_amounts("NormThreshold", "below", self.below, Below, self.before)

    @property
    def facts(self) -> Facts:
        return Facts(static=False, where="between")

    def sites(self, depth: int) -> tuple[int, ...]:
        return self.before

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """At most n: the images decide."""
        return n

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return NormThresholdReducer(self, patches, prefix)


class NormThresholdReducer(Reducer):
    """Holds one calibrated limit per site; NaN until `winnow.calibrate` where the limit is a quantile."""

    limits: Tensor

    def __init__(self, method: NormThreshold, patches: int | None, prefix: int) -> None:
        super().__init__(method, patches, prefix)
        if self.quantiles():
            self.register_buffer("limits", torch.full((len(method.before),), float("nan")))

    def below(self, layer: int) -> Below:
        """The limit of the site before block `layer`."""
        assert isinstance(self.method, NormThreshold)
        return at_site(self.method.below, self.method.before, layer)

    def quantiles(self) -> dict[int, float]:
        assert isinstance(self.method, NormThreshold)
        sites = {layer: self.below(layer) for layer in self.method.before}
        return {layer: below.limit for layer, below in sites.items() if below.of == "quantile"}

    def score(self, tokens: Tokens) -> Tensor:
        """[B, N] what is held against the limit."""
        return norm(tokens.x)

    def set_limit(self, layer: int, limit: float) -> None:
        """Store the calibrated limit of one site."""
        assert isinstance(self.method, NormThreshold)
        self.limits[self.method.before.index(layer)] = limit

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        score, valid = self.score(tokens), tokens.ledger.valid
        keep = above(score, self._limit(score, valid, layer), valid)
        return mask(tokens, keep, score=score if signals.watched else None)

    def _limit(self, score: Tensor, valid: Tensor | None, layer: int) -> Tensor:
        below = self.below(layer)
        if below.of == "value":
            return score.new_full((1, 1), below.limit)
        if below.of == "mean":
            real = torch.ones_like(score) if valid is None else valid.to(score.dtype)
            return below.limit * (score * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        assert isinstance(self.method, NormThreshold)
        limit = self.limits[self.method.before.index(layer)].float()
        if limit.isnan():
            raise ValueError(f"{self.method} has no limits yet: run winnow.calibrate(model, batches) first")
        return limit.expand(1, 1)
