"""Methods with an amount per listed block: the shared arithmetic of EViT, TopK, Random and Grid.

Winnow's own.
"""

from __future__ import annotations

from ..parts.amount import Amount, Keep, at_site, check_amounts, check_layers
from ..parts.choose import top
from ..parts.combine import drop
from ..reducer import Method, Reducer, Setting, Signals
from ..tokens import Tokens

WHERE = {"block": "block", "input": "between", "tower": "tower"}
"""`Facts.where` of a baseline, by its `at`."""


class AtLayers(Method):
    """A method with fields `keep` (one amount, or one per site) and `layers`."""

    keep: Amount | tuple[Amount, ...]
    layers: tuple[int, ...]
    reducer: type[Reducer]

    def __post_init__(self) -> None:
        owner = type(self).__name__
        object.__setattr__(self, "layers", check_layers(owner, "layers", self.layers))
        check_amounts(owner, "keep", self.keep, Amount.__args__, self.sites())  # type: ignore[attr-defined]

    def sites(self, depth: int = 0) -> tuple[int, ...]:
        return self.layers

    def kept(self, n: int, layer: int, patches: int | None) -> int:
        """Tokens that survive as themselves at `layer`."""
        return at_site(self.keep, self.sites(), layer).count(n, patches)

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        return self.kept(n, layer, patches) if layer in self.sites() else n

    def leaving(self, amount: Amount) -> Method:
        """A share falls by the same part at every site."""
        sites = len(self.sites())
        return super().leaving(Keep(round(amount.share ** (1 / sites), 4)) if isinstance(amount, Keep) else amount)

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if setting.patches is not None:
            at_site(self.keep, self.sites(), self.sites()[0]).check(setting.patches)

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return self.reducer(self, patches, prefix)


class AtPlaces(AtLayers):
    """The same for baselines, which may also act once: on the patches as they enter block 0 (`at="input"`), or on the
    image features of a vision-language model (`at="tower"`)."""

    at: str

    def __post_init__(self) -> None:
        owner, default = type(self).__name__, type(self).layers
        if self.at not in WHERE:
            raise ValueError(f'{owner}(at={self.at!r}): at must be "block", "input" or "tower"')
        if self.at != "block" and self.layers != default:
            raise ValueError(f'{owner}: at="{self.at}" acts once; layers={self.layers} goes with at="block"')
        super().__post_init__()

    @property
    def where(self) -> str:
        """What `Facts.where` says."""
        return WHERE[self.at]

    def sites(self, depth: int = 0) -> tuple[int, ...]:
        return self.layers if self.at == "block" else (0,)


class KeepTop(Reducer):
    """Keeps the highest of `score` and drops the rest."""

    def score(self, tokens: Tokens, signals: Signals, layer: int):
        """[B, N]"""
        raise NotImplementedError

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        m = self.count(tokens.n, layer)
        if m == tokens.n:
            return tokens
        score = self.score(tokens, signals, layer)
        return drop(tokens, top(score, m), score=score if signals.watched else None)
