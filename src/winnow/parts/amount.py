"""How many tokens stay: Keep, Remove, Exactly, and Below for thresholds; one vocabulary for every method.

Winnow's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..reducer import Spelled
from .settings import check_number


@dataclass(frozen=True, repr=False)
class Keep(Spelled):
    """Share of the tokens that enter the site, rounded up; `of="input"`: share of all patches."""

    share: float
    of: str = "site"

    def __post_init__(self) -> None:
        check_number("Keep", "", self.share, 1e-9, 1)
        if self.of not in ("site", "input"):
            raise ValueError(f'Keep(of={self.of!r}): of must be "site" or "input"')

    def count(self, n: int, patches: int | None = None) -> int:
        """Tokens left of n, between 1 and n."""
        base = n if self.of == "site" or patches is None else patches
        return max(1, min(n, math.ceil(self.share * base - 1e-9)))  # 0.07 * 100 is a little over 7

    def check(self, n: int) -> None:
        """Any share is possible."""


@dataclass(frozen=True, repr=False)
class Remove(Spelled):
    """So many tokens go at each site."""

    tokens: int

    def __post_init__(self) -> None:
        check_number("Remove", "", self.tokens, whole=True)

    def count(self, n: int, patches: int | None = None) -> int:
        """Tokens left of n, between 1 and n."""
        return max(1, n - self.tokens)

    def check(self, n: int) -> None:
        """ValueError if n tokens cannot give up so many."""
        if self.tokens >= n:
            raise ValueError(f"{self} is impossible where {n} tokens enter: at most Remove({n - 1})")


@dataclass(frozen=True, repr=False)
class Exactly(Spelled):
    """So many tokens stay."""

    tokens: int

    def __post_init__(self) -> None:
        check_number("Exactly", "", self.tokens, 1, whole=True)

    def count(self, n: int, patches: int | None = None) -> int:
        """Tokens left of n."""
        return min(n, self.tokens)

    def check(self, n: int) -> None:
        """ValueError if fewer than that enter."""
        if self.tokens > n:
            raise ValueError(f"{self} is impossible where {n} tokens enter: at most Exactly({n})")


@dataclass(frozen=True, repr=False)
class Below(Spelled):
    """Tokens whose value is not above the limit are dropped: absolute, relative to the image's mean, or a quantile."""

    limit: float
    of: str = "value"

    def __post_init__(self) -> None:
        if self.of not in ("value", "mean", "quantile"):
            raise ValueError(f'Below(of={self.of!r}): of must be "value", "mean" or "quantile"')
        check_number("Below", "", self.limit, 0, 1 if self.of == "quantile" else math.inf)


Amount = Keep | Remove | Exactly


def at_site(value: object, layers: Sequence[int], layer: int):
    """The amount at `layer`: a scalar holds everywhere, a tuple has one per listed site."""
    return value[list(layers).index(layer)] if isinstance(value, tuple) else value


def check_amounts(owner: str, name: str, value: object, kinds: type | tuple[type, ...], sites: Sequence[int]) -> None:
    """ValueError / TypeError unless `value` is one of `kinds`, or a tuple of them, one per site."""
    several = value if isinstance(value, tuple) else (value,)
    wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    for one in several:
        if not isinstance(one, kinds):
            raise TypeError(
                f"{owner}({name}={value!r}): {wanted} is needed, e.g. {name}=Keep(0.7)".replace(
                    "Keep(0.7)", "Below(1.0)" if kinds is Below else "Keep(0.7)"
                )
            )
    if isinstance(value, tuple) and len(value) != len(sites):
        raise ValueError(
            f"{owner}: {len(value)} values of {name} for {len(sites)} sites {tuple(sites)}; give one per site"
        )


def check_layers(owner: str, name: str, layers: object) -> tuple[int, ...]:
    """Layers as a sorted tuple of distinct whole numbers; ValueError otherwise."""
    several = (layers,) if isinstance(layers, int) and not isinstance(layers, bool) else layers
    if not isinstance(several, list | tuple) or not several:
        raise ValueError(f"{owner}({name}={layers!r}): a tuple of block numbers is needed, e.g. {name}=(3, 6, 9)")
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in several) or list(several) != sorted(
        set(several)
    ):
        raise ValueError(f"{owner}({name}={layers!r}): block numbers must be distinct, ascending and not negative")
    return tuple(several)
