"""The contract in words and types: Method (settings, a value), Reducer (the module it builds), Facts, Signals.

Winnow's own; settings-as-values is torchao's taste, one dataclass per method kvpress's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

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
    """Of "keys", "values", "cls_attention", "received", "noise"."""
    where: str = "block"
    """"input" resizes the image, "between" acts between blocks, "block" after attention inside a block."""
    learned: bool = False
    training_only: bool = False
    unmasked: bool = False
    """Its padding passes for tokens, so no host need skip it: `NormThreshold.seed002()` only."""


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
    """A frozen dataclass that prints as it is typed, without its defaults."""

    def __repr__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(repr(value))
            elif value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


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

    def check(self, setting: Setting) -> None:
        """ValueError if these settings cannot work on such a model."""
        outside = [layer for layer in self.sites(setting.depth) if not 0 <= layer < setting.depth]
        if outside:
            raise ValueError(
                f"{self} names layer {outside[0]}, the model has blocks 0 to {setting.depth - 1}: "
                f"list layers within them, e.g. layers={_spread(setting.depth)}"
            )

    def schedule(self, setting: Setting) -> tuple[int, ...]:
        """depth+1 patch-token counts on the model's own input: entering block 0, then after each block."""
        if setting.patches is None:
            raise ValueError("the schedule needs the model's own grid, which it does not say")
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
    progress: float = 1.0
    """Share of training done, set by the training loop."""
    seed: int = 0
    """Mixed into the noise."""
    step: int = 0
    """Training step, mixed into the noise while training."""

    def __init__(self, method: Method, patches: int | None = None, prefix: int = 0) -> None:
        super().__init__()
        self.method, self.patches, self.prefix = method, patches, prefix

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        """Tokens [B, N, C] to tokens [B, M, C]; adaptive methods return N tokens with `ledger.valid` set."""
        raise NotImplementedError

    def count(self, n: int, layer: int) -> int:
        """Patch tokens after the site at `layer`."""
        return self.method.count(n, layer, self.patches)

    def loss(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward."""
        return {}

    def quantiles(self) -> dict[int, float]:
        """Sites whose limit is a quantile of the scores there, and the quantile: `winnow.calibrate` sets them."""
        return {}

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """MACs per image this reducer itself spends at `layer` on n tokens (0 where it multiplies no matrices)."""
        return 0.0

    def extra_repr(self) -> str:
        return repr(self.method)


def _spread(depth: int) -> tuple[int, ...]:
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
