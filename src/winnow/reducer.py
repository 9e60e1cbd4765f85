"""The contract in words and types: Method (settings, a value), Reducer (the module it builds), Facts, Signals.

Winnow's own; settings-as-values is torchao's taste, one dataclass per method kvpress's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import wraps
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .tokens import Tokens


@dataclass(frozen=True)
class Facts:
    """What this value of a method promises; the library asks these, never a method's name."""

    static: bool = True
    """The token count follows from shapes and settings alone."""
    combine: str = "none"
    """"none" drops, "mean" is the size-weighted mean, "other" is anything else (EViT's fused token)."""
    sizes: bool = False
    """Token sizes enter later attention as log-size."""
    needs: frozenset[str] = frozenset()
    """Of "keys", "values", "cls_attention", "received", "noise", "training_noise" (in training only), "image";
    at "tower" also "queries", "cls", "projected", "training_projected", "question", and for a token of its own "token" (it
    reads patches) or "token_read" (patches read it, too); at "llm" "text_attention" (docs/vlm.md)."""
    where: str = "block"
    """"input" resizes the image, "between" acts between blocks, "block" after attention inside a block; in vision-language
    models also "tower", after the encoder, and "llm", between blocks of the language model (docs/vlm.md)."""
    ahead: int = 0
    """At "tower" and "llm", signals are of the block that made the tokens (0) or of the one that reads them next (1)."""
    renumber: bool = False
    """At "llm", positions are counted afresh after each site, where the model numbers them in one row."""
    learned: bool = False
    training_only: bool = False
    ragged: bool = False
    """In training images keep different numbers of tokens in as many places as shapes give; it marks the padding."""
    unmasked: bool = False
    """Its padding passes for tokens, so no host need skip it: `NormThreshold.seed002()` only."""
    budgeted: bool = False
    """How many tokens it keeps is said from outside, with `winnow.budget`."""
    first: bool = False
    """Its own token stands in front of all others in the tower, not behind them."""


@dataclass(frozen=True)
class Signals:
    """What the host's attention knows about the patch tokens; only what `Facts.needs` asks for is filled."""

    q: Tensor | None = None
    """[B, H, N, D]"""
    k: Tensor | None = None
    """[B, H, N, D]"""
    v: Tensor | None = None
    """[B, H, N, D]"""
    cls_row: Tensor | None = None
    """[B, H, N] attention the class token pays to each patch token (softmax over all keys)."""
    received: Tensor | None = None
    """[B, N] attention each patch token receives, mean over heads and queries."""
    noise: Tensor | None = None
    """[B, N] uniform in [0, 1), from the image's own content."""
    features: Tensor | None = None
    """[B, N, C] what the projector read, where tokens are "projected"; at "tower" only, as the next three."""
    cls: Tensor | None = None
    """[B, C] the class token's own features."""
    cls_q: Tensor | None = None
    """[B, H, D] its query."""
    cls_k: Tensor | None = None
    """[B, H, D] its key."""
    budget: int | Tensor | None = None
    """Tokens to keep, or [B] of them, where `Facts.budgeted`."""
    token: Tensor | None = None
    """[B, C] what became of the reducer's own token in the layer that is read."""
    question: tuple[Tensor, Tensor] | None = None
    """[B, L, D] the language model's embeddings of the words asked, and [B, L] False where a row is filled up."""
    text_row: Tensor | None = None
    """[B, H, N] attention the asking rows of the prompt pay to each image token; at "llm" only."""
    seen: Tensor | None = None
    """[B, P] what `Reducer.look` found in the image."""
    watched: bool = False
    """Somebody wants `Tokens.score`."""


@dataclass(frozen=True)
class Setting:
    """What a method is applied to, as far as a method may ask."""

    depth: int
    width: int
    heads: int
    prefix: int
    cls: bool
    grid: tuple[int, int] | None
    """Patches (h, w) on the model's own input; None where the model does not say."""
    patch: tuple[int, int] | None = None
    """Patch size in pixels."""

    @property
    def patches(self) -> int | None:
        """P on the model's own input."""
        return self.grid[0] * self.grid[1] if self.grid else None


class Spelled:
    """A frozen dataclass that prints as it is typed, without its defaults; numbers of numpy and torch become Python's."""

    def __init_subclass__(cls, **words: Any) -> None:
        super().__init_subclass__(**words)
        if (own := cls.__dict__.get("__post_init__")) is not None:

            @wraps(own)
            def checked(self: Any) -> None:
                Spelled.__post_init__(self)  # before the method looks at them, so that none need know other kinds
                own(self)

            cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))

    def __repr__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(repr(value))
            elif value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _plain(value: Any) -> Any:
    """The same as Python's own number, or tuple of such; whatever else as it is."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


class Method(Spelled, ABC):
    """Settings of one published method: a frozen, hashable dataclass that prints, compares and saves."""

    @property
    @abstractmethod
    def facts(self) -> Facts: ...

    @abstractmethod
    def sites(self, depth: int) -> tuple[int, ...]:
        """Layers at which the reducer acts: inside block i ("block"), or before block i ("between")."""

    @abstractmethod
    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """Patch tokens after the site at `layer` when `n` enter it (at most, for adaptive methods)."""

    @abstractmethod
    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        """The module that carries this method out."""

    @property
    def even(self) -> Method | None:
        """The same settings with evenly spaced boundaries, whatever the image shows; None where there are none."""
        return None

    @property
    def trained(self) -> Method:
        """These settings as far as training sees them: trained weights belong to every method that shares them."""
        return self

    def leaving(self, amount: Any) -> Method:
        """The same method with that amount left after its last site; TypeError where it has no such setting."""
        if "keep" not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            raise TypeError(
                f"{self} has no setting of how many tokens stay; write its own amounts out, one method for each"
            )
        return dataclasses.replace(self, keep=amount)  # type: ignore[type-var]

    def check(self, setting: Setting) -> None:
        """ValueError if these settings cannot work on such a model."""
        outside = [layer for layer in self.sites(setting.depth) if not 0 <= layer < setting.depth]
        if outside:
            raise ValueError(
                f"{self} names layer {outside[0]}, the model has blocks 0 to {setting.depth - 1}: "
                f"list layers within them, e.g. layers={_spread(setting.depth)}"
            )

    def counts(self, setting: Setting) -> tuple[int, ...]:
        """depth+1 patch-token counts on the model's own input: entering block 0, then after each block."""
        if setting.patches is None:
            raise ValueError("the counts need the model's own grid, which it does not say")
        sites, n, counts = self.sites(setting.depth), setting.patches, []
        between = self.facts.where == "between"
        for layer in range(setting.depth):
            if between and layer in sites:
                n = self.count(n, layer, setting.patches)
            counts.append(n)
            if not between and layer in sites:
                n = self.count(n, layer, setting.patches)
        return (*counts, n)


class Reducer(nn.Module):
    """The module a method builds; its parameters are the learned part, its run state lives elsewhere."""

    method: Method
    seat: Any = None
    """Where it sits in a model; None for a bare reducer."""
    progress: float = 1.0
    """Share of training done, set by the training loop."""
    seed: int = 0
    """Mixed into the noise."""
    step: int = 0
    """Training step, mixed into the noise while training."""
    budget: int | float | Tensor | None = None
    """What `winnow.budget` says now."""

    def __init__(self, method: Method, patches: int | None = None, prefix: int = 0) -> None:
        super().__init__()
        self.method, self.patches, self.prefix = method, patches, prefix

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        """Tokens [B, N, C] to tokens [B, M, C]; adaptive methods return N tokens with `ledger.valid` set."""
        raise NotImplementedError

    def count(self, n: int, layer: int) -> int:
        """Patch tokens after the site at `layer`."""
        return self.method.count(n, layer, self.patches)

    def idle(self, n: int, layer: int) -> bool:
        """Nothing is reduced at this site now, where n tokens enter, so no signals are made for it."""
        return self.method.facts.training_only and not self.training

    def loss(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward, weighted, summed over the sites; {} where there are none."""
        return {name: torch.stack(found).sum(0) for name, found in self._noted("losses").items()}

    def metrics(self) -> dict[str, Tensor]:
        """Figures of the last forward, mean over the sites; {} where there are none."""
        return {name: torch.stack(found).mean(0) for name, found in self._noted("metrics").items()}

    def _noted(self, what: str) -> dict[str, list[Tensor]]:
        by_name: dict[str, list[Tensor]] = {}
        for site in getattr(self.seat.run, what).values() if self.seat is not None else ():
            for name, value in site.items():
                by_name.setdefault(name, []).append(value)
        return by_name

    def amounts(self, n: int, images: int, draw: Tensor | None) -> int | Tensor:
        """Of n tokens so many to keep, or int64 [images] of them; `draw` [images] is uniform in [0, 1), in training."""
        raise NotImplementedError

    def meet(self, width: int) -> None:
        """The language model has so many channels; said once, where `Facts.needs` has "question"."""
        raise NotImplementedError

    def look(self, image: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
        """[B, P] what this reducer must know of the image [B, 3, H, W] itself, where `Facts.needs` has "image"."""
        raise NotImplementedError

    def quantiles(self) -> dict[int, float]:
        """Sites whose limit is a quantile of the scores there, and the quantile: `winnow.calibrate` sets them."""
        return {}

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """MACs per image this reducer itself spends at `layer` on n tokens (0 where it multiplies no matrices)."""
        return 0.0

    def asking(self, n: int, text: int) -> float:
        """MACs per image of what it makes of `text` words that are asked, for n tokens."""
        return 0.0

    def extra_repr(self) -> str:
        return repr(self.method)


def _spread(depth: int) -> tuple[int, ...]:
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
