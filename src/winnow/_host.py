"""A model as an adapter describes it: its blocks, how each is taken apart, what is replaced, what it can serve.

Winnow's own; the design's decision 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .reducer import Facts, Reducer, Setting
from .ways import Way

if TYPE_CHECKING:
    from ._run import Seat


class BlockView:
    """How one kind of block is taken apart; borrows the block's own sub-modules, copies no forward."""

    placed: bool = False
    """Attention depends on where tokens stand (rotary or relative positions): `place` is asked."""

    def call(self, block: Any, forward: Callable[..., Tensor], x: Tensor, *args: Any, **words: Any) -> Tensor:
        """How the host calls its block: `forward(x, beside)` with what `place` needs; refuses all it cannot obey."""
        refuse_beside(*args, **words)
        return forward(x)

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """q, k, v [B, H, N, D] and whatever `out` needs besides."""
        raise NotImplementedError

    def place(self, block: Any, q: Tensor, k: Tensor, at: Tensor | None, beside: Any) -> tuple[Tensor, Tensor, Any]:
        """q, k and a bias per pair (`Pairs` or None) for patch tokens that stand at patches `at` [B, N] (None: all)."""
        return q, k, None

    def options(self, block: Any) -> dict[str, Any]:
        """Keyword arguments of `attend`: dropout, scale, path."""
        raise NotImplementedError

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        """What attention adds to the stream, from its output [B, H, N, D]."""
        raise NotImplementedError

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        """What the MLP adds to the stream; None where attention and MLP run in parallel and `out` added both."""
        raise NotImplementedError

    def add(self, block: Any, x: Tensor, y: Tensor, second: bool) -> Tensor:
        """The stream after attention's part y is added, or (second) the MLP's."""
        return x + y

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        """MACs of the block: attention on n_attn tokens, MLP on n_mlp (prefix included)."""
        raise NotImplementedError


def refuse_beside(*args: Any, **words: Any) -> None:
    """ValueError if a reduced block is given more than its tokens."""
    unknown = [
        "a tensor" if isinstance(arg, Tensor) else repr(arg) for arg in args if arg is not None and arg is not False
    ]
    unknown += [name for name, value in words.items() if value is not None and value is not False]
    if unknown:
        raise ValueError(f"a reduced block takes only its tokens; it was also given {', '.join(unknown)[:80]}")


@dataclass(frozen=True)
class Patch:
    """One method of the host that is replaced while reduced: `function(slot, *args)` instead of `module.name(*args)`."""

    module: nn.Module
    name: str
    function: Callable[..., Any]
    signed: bool = False
    """The host asks for this method's signature, so the replacement shows the original's."""


OFFERS = frozenset("keys values cls_attention received noise training_noise image sizes padding".split())
"""What a family offers that hides nothing: signals, and attention that takes token sizes and padding."""


@dataclass(frozen=True)
class Host:
    """A model as an adapter sees it."""

    family: str
    setting: Setting
    blocks: tuple[nn.Module, ...]
    views: tuple[BlockView, ...]
    patches: tuple[Patch, ...]
    """What else to replace: the entry (calls `Seat.begin`) and heads that read all tokens."""
    accepts: frozenset[str] = frozenset({"block", "between"})
    """Values of `Facts.where` this family can serve."""
    offers: frozenset[str] = OFFERS
    """Signals it can give, and whether its attention takes token sizes and padding."""
    outside_macs: Callable[[Tensor, Tensor], Tensor] | None = None
    """MACs of stem and head for P patches and n tokens (prefix included) at the end; None where unknown."""
    elsewhere: Mapping[str, Callable[[Facts], Host]] = field(default_factory=dict)
    """By `Facts.where`: the host for methods that act in another part of the model."""
    seat: Callable[[Host, Reducer, Way], Seat] | None = None
    """The kind of seat, where it is not the usual one."""

    whole: Callable[[Facts], Host] | None = None
    """The host on which a method acts inside a tower and each patch gets its token back before the whole grid is needed."""

    def serving(self, facts: Facts, expand: bool = False) -> Host:
        """This host, or the one for the part of the model a method acts in; TypeError if it cannot be served there."""
        if expand:
            if self.whole is None:
                raise TypeError(f"expand=True is for towers of vision-language models; {self.family}: leave it out")
            return self.whole(facts)
        make = self.elsewhere.get(facts.where)
        return self if make is None else make(facts)
