"""NormThreshold: drop the tokens whose L2 norm is not above a limit.

ECE1512 Project B, part B (document 002), 2024; as described, with padding masked and the batch where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..parts.amount import Below, at_site, check_amounts, check_layers
from ..parts.choose import above
from ..parts.combine import mask
from ..parts.score import norm
from ..reducer import Facts, Method, Reducer, Signals
from ..tokens import Tokens
from ..ways import compact


@dataclass(frozen=True, repr=False)
class Published(Below):
    """The limit of document 002, whose padding passes for tokens; only `NormThreshold.seed002()` makes one."""


@dataclass(frozen=True, repr=False)
class NormThreshold(Method):
    """Before the listed blocks, tokens with a norm not above the limit go; how many depends on the image."""

    below: Below | tuple[Below, ...] = Below(0.9, of="mean")
    before: tuple[int, ...] = (3,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", check_layers("NormThreshold", "before", self.before))
        check_amounts("NormThreshold", "below", self.below, Below, self.before)

    presets = ("seed002",)
    """Class methods that are spelled like methods: `NormThreshold.seed002()`."""

    @classmethod
    def seed002(cls, threshold: float = 13.0) -> NormThreshold:
        """Document 002's pruning with its faults, whatever the way to run; its whole model: `winnow report seed002`.

        Before blocks 0 and 1 the survivors are packed and padded with zeros to the batch maximum. Nothing skips the
        padding: it attends, is attended to and is averaged. An image may lose every token, and so may a whole batch.
        """
        return cls(below=Published(threshold), before=(0, 1))

    @property
    def published(self) -> bool:
        """This is document 002's own value."""
        return isinstance(self.below, Published)

    @property
    def known_failures(self) -> Mapping[str, str]:
        """Checks of the contract that document 002's own value cannot pass, and why."""
        return KNOWN if self.published and self == type(self).seed002() else {}

    def __repr__(self) -> str:
        if not isinstance(self.below, Published):
            return super().__repr__()
        other = "" if self == type(self).seed002() else f"threshold={self.below.limit!r}"
        return f"{type(self).__name__}.seed002({other})"

    @property
    def facts(self) -> Facts:
        return Facts(static=False, where="between", unmasked=self.published)

    def sites(self, depth: int) -> tuple[int, ...]:
        return self.before

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """At most n: the images decide."""
        return n

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        made = Seed002Reducer if self.published else NormThresholdReducer
        return made(self, patches, prefix)


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


class Seed002Reducer(NormThresholdReducer):
    """What document 002 does: its ledger calls padding real, so that nothing after it can tell."""

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        if tokens.n == 0:  # the whole batch was emptied before
            return tokens
        score = self.score(tokens)
        # what was padded at the site before holds no patch, and counts as not kept whatever its norm
        keep = (score > self.below(layer).limit) & (tokens.ledger.size() > 0)
        kept = compact(mask(tokens, keep, score=score if signals.watched else None), int(keep.sum(1).max()))
        real = kept.ledger.valid
        assert real is not None
        return replace(kept, x=kept.x * real.unsqueeze(-1), ledger=replace(kept.ledger, valid=None))


KNOWN = {
    "count_is_as_promised": "an image whose norms are all below the threshold keeps no token",
    "model_ignores_batch_mates": "padding attends and is averaged, and its amount depends on the batch",
}
"""At limits that leave some of the contract's tokens, `ledger_is_sound` and `survivors_in_raster_order` fail too."""
