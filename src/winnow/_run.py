"""What happens during a forward: the run's state by layer, and the one block forward of the library.

Winnow's own; the design's decisions 2 to 10 live here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._host import BlockView, Host
from ._noise import content_key, uniform
from .attention import attend, log_sizes, received, rows
from .reducer import Facts, Reducer, Signals
from .tokens import Ledger, Tokens
from .ways import Padded, Way, compact, gather_signal, pad, resolve, spread

DRAW = 63
"""Stands for a layer in the key of the noise that budgets are drawn from."""


class Run:
    """State of one forward, by layer; copying or pickling a model leaves it behind."""

    def __init__(self) -> None:
        self.tokens: dict[int, Tokens] = {}
        """After each block, without features; -1 = entering block 0."""
        self.scores: dict[int, Tensor] = {}
        self.live: dict[int, int] = {}
        """Real tokens after each block, where a static method runs masked or padded."""
        self.grid: tuple[int, int] | None = None
        self.valid: Tensor | None = None
        """[B, P] False where the input itself is padding."""
        self.small: tuple[int, int] | None = None
        self.key: Tensor | None = None
        self.seen: Tensor | None = None
        self.losses: dict[int, dict[str, Tensor]] = {}
        """Auxiliary losses by site; with their graph, so they live until the next forward and no longer."""
        self.metrics: dict[int, dict[str, Tensor]] = {}
        self.graded = torch.is_grad_enabled()
        self.way: Way = "static"

    @property
    def ledgers(self) -> dict[int, Ledger]:
        """Ledger after each block; -1 = entering block 0."""
        return {layer: tokens.ledger for layer, tokens in sorted(self.tokens.items())}

    def watched(self) -> dict[int, Ledger]:
        """The same; ValueError before any forward."""
        if not self.tokens:
            raise ValueError("no forward was watched yet: call the model inside `with winnow.watch(model) as run`")
        return self.ledgers

    @property
    def ledger(self) -> Ledger:
        """Ledger at the end."""
        return self.watched()[max(self.tokens)]

    @property
    def counts(self) -> list[int]:
        """depth+1 patch tokens executed: entering block 0, then after each block; [] before any forward."""
        return [ledger.n for ledger in self.ledgers.values()]

    @property
    def valid_counts(self) -> Tensor:
        """[B, depth+1] real patch tokens, padding apart."""
        return torch.stack([ledger.counts() for ledger in self.watched().values()], 1)

    def __deepcopy__(self, memo: dict) -> Run:
        return Run()

    def __reduce__(self):
        return Run, ()


class Watch:
    """The last forward inside a `with winnow.watch(...)`: counts, valid_counts, ledger, ledgers, scores."""

    def __init__(self) -> None:
        self._run = Run()

    def __getattr__(self, name: str) -> Any:
        if name == "_run":  # asked while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._run, name)


class Seat:
    """Where a reducer sits in a model: the host, the way, what was replaced, and the run of the last forward."""

    def __init__(self, host: Host, reducer: Reducer, way: Way) -> None:
        self.setting, self.reducer, self.way = host.setting, reducer, way
        self.facts: Facts = reducer.method.facts
        self.sites = frozenset(reducer.method.sites(host.setting.depth))
        self.run, self.watches = Run(), []  # type: tuple[Run, list[Watch]]
        self.patched: list[tuple[nn.Module, str]] = []
        self.told: dict[str, Any] = {}
        """What else `reduce` was told: blocks, expand."""
        self.host = host

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watches": []}  # nobody watches a copy, and no watch ends for it

    @property
    def known(self) -> bool:
        """Token counts follow from shapes alone now, so every token that leaves a site is real."""
        return self.facts.static and not (self.facts.ragged and self.reducer.training)

    def begin(self, x: Tensor, grid: tuple[int, int] | None, valid: Tensor | None = None) -> None:
        """A forward starts with input x [B, ...] whose patches form `grid`; `valid` [B, P] is False on padding."""
        self.run = run = Run()
        run.grid, run.valid = grid, valid
        run.way = resolve(self.way, self.facts, self.reducer.training)
        needs = self.facts.needs
        if "noise" in needs or ("training_noise" in needs and self.reducer.training):
            run.key = content_key(x)
        if "image" in needs:
            run.seen = self.reducer.look(x, grid)
        for watch in self.watches:
            watch._run = run

    def enter(self, x: Tensor) -> tuple[Tensor, Tokens]:
        """The stream [B, K+N, C] as it reaches block 0, and its tokens after what acts before block 0."""
        run, n = self.run, x.shape[1] - self.setting.prefix
        grid = run.grid
        if self.facts.where == "input" and grid is not None and run.small is not None:
            ledger = self.reducer.ledger(x.shape[0], grid, run.small, x.device)
        else:
            ledger = Ledger.start(x.shape[0], n, x.device)
        if run.valid is not None:
            ledger = replace(ledger, owner=ledger.owner.masked_fill(~run.valid, -1), valid=run.valid)
        grid = grid if grid and grid[0] * grid[1] == ledger.owner.shape[1] else None
        tokens = Tokens(x.new_empty(0), ledger, grid)
        run.live[-1] = n
        if self.facts.where == "between" and 0 in self.sites:
            return self.act(x, tokens, layer=0, after=-1)
        return x, self._store(tokens, -1)

    def act(self, x: Tensor, tokens: Tokens, layer: int, after: int, qkv=None, options=None) -> tuple[Tensor, Tokens]:
        """Reduce the stream x [B, K+N, C] at site `layer`; the outcome is the state after block `after`."""
        prefix, run = self.setting.prefix, self.run
        live = run.live[after if layer == 0 and after == -1 else after - 1]
        tokens = replace(tokens, x=x[:, prefix:])
        valid = tokens.ledger.valid
        static_elsewhere = self.facts.static and run.way != "static"
        if static_elsewhere:
            tokens = compact(tokens, live)
            if self.known:
                tokens = replace(tokens, ledger=replace(tokens.ledger, valid=None))
        idle = self.reducer.idle(tokens.n, layer)
        signals = Signals() if idle else self._signals(tokens, layer, qkv, options, valid if static_elsewhere else None)
        out = self.reducer(tokens, signals, layer)
        if out.score is not None and self.watches:
            run.scores[layer] = out.score.detach()
        self._note(out, layer)
        run.live[after] = out.n
        out = self._lay_out(out)
        if out is not tokens:
            x = torch.cat([x[:, :prefix], out.x], 1) if prefix else out.x
        return x, self._store(out, after)

    def carry(self, tokens: Tokens, after: int) -> None:
        """Block `after` ran and changed no tokens."""
        self.run.live[after] = self.run.live[after - 1]
        self.run.tokens[after] = tokens

    def places(self, tokens: Tokens) -> Tensor | None:
        """[B, N] the patch each token stands at, the first of those it holds; None where every patch is a token."""
        ledger, patches = tokens.ledger, tokens.ledger.owner.shape[1]
        if self.facts.where == "input" or (ledger.valid is None and ledger.n == patches):
            return None
        return ledger.first().clamp_max(patches - 1)

    def _lay_out(self, out: Tokens) -> Tokens:
        way = self.run.way
        if self.facts.static and way == "masked":
            return spread(out)
        if not isinstance(way, Padded):
            return out
        if out.ledger.valid is None:
            return pad(out, way.multiple) if self.facts.static else out
        most = max(out.ledger.valid.sum(1).tolist(), default=1)
        return compact(out, min(out.n, -(-most // way.multiple) * way.multiple))

    def _note(self, out: Tokens, layer: int) -> None:
        run = self.run
        if out.losses and run.graded and not torch.is_grad_enabled():
            raise ValueError(
                f"{self.reducer.method} has losses, and reentrant gradient checkpointing gives them no gradient: "
                "use torch.utils.checkpoint(..., use_reentrant=False)"
            )
        # a checkpointed block runs again in the backward pass, when its losses have long been read: the first stay
        run.losses.setdefault(layer, out.losses or {})
        run.metrics.setdefault(layer, {name: value.detach() for name, value in (out.metrics or {}).items()})

    def _signals(self, tokens: Tokens, layer: int, qkv, options, valid: Tensor | None) -> Signals:
        needs, prefix = self.facts.needs, self.setting.prefix
        found: dict[str, Any] = {"watched": bool(self.watches), "seen": self.run.seen}
        if self.run.key is not None:
            found["noise"] = self._noise(layer, tokens.n)
        if qkv is not None:
            q, k, v, bias = qkv
            scale, pairs = options.get("scale"), options.get("pairs")
            pick = lambda t, dim: gather_signal(t, valid, tokens.n, dim)  # noqa: E731
            if "keys" in needs:
                found["k"] = pick(k[:, :, prefix:], 2)
            if "values" in needs:
                found["v"] = pick(v[:, :, prefix:], 2)
            if "cls_attention" in needs:
                found["cls_row"] = pick(rows(q[:, :, :1], k, bias, scale, pairs)[:, :, 0, prefix:], 2)
            if "received" in needs:
                found["received"] = pick(received(q, k, bias, scale, pairs)[:, prefix:], 1)
        return Signals(**found)

    def budget(self, images: int, n: int) -> int | Tensor:
        """Of n tokens so many to keep, or int64 [images] of them; the same however often it is asked in one forward."""
        drawn = self.reducer.training and self.reducer.budget is None and self.run.key is not None
        return self.reducer.amounts(n, images, self._noise(DRAW, 1)[:, 0] if drawn else None)

    def _noise(self, layer: int, n: int) -> Tensor:
        key, reducer = self.run.key, self.reducer
        assert key is not None, "begin() makes the key"
        salt = reducer.seed * 1_000_003 + (reducer.step * 7_919 + 1 if reducer.training else 0)
        return uniform(key, layer + 64 * salt, n)

    def _store(self, tokens: Tokens, after: int) -> Tokens:
        # a view would keep all features alive, and so would a loss that many layers carry along
        kept = replace(tokens, x=tokens.x.new_empty(0), score=None, losses=None, metrics=None)
        self.run.tokens[after] = kept
        return kept


class Slot:
    """What a replaced method is bound to: the seat, the host's module and the place of a block."""

    def __init__(self, seat: Seat, module: nn.Module, index: int = -1, view: BlockView | None = None) -> None:
        self.seat, self.module, self.index, self.view = seat, module, index, view


def block_forward(slot: Slot, x: Tensor, *args: Any, **words: Any) -> Tensor:
    """A block of the host as the host calls it: the view takes the arguments apart, `_block` does the work."""
    assert slot.view is not None
    return slot.view.call(slot.module, partial(_block, slot), x, *args, **words)


def _block(slot: Slot, x: Tensor, beside: Any = None) -> Tensor:
    """The one block forward: ledger of layer-1, qkv, attention with sizes and padding, reducer, MLP, ledger of layer."""
    seat, layer, block, view = slot.seat, slot.index, slot.module, slot.view
    assert view is not None
    x, tokens = seat.enter(x) if layer == 0 else (x, seat.run.tokens[layer - 1])

    q, k, v, extra = view.qkv(block, x)
    bias = log_sizes(tokens.ledger, seat.setting.prefix, seat.facts.sizes)
    options = view.options(block)
    if view.placed:
        q, k, options["pairs"] = view.place(block, q, k, seat.places(tokens), beside)
    x = view.add(block, x, view.out(block, attend(q, k, v, bias, **options), extra), False)

    where = seat.facts.where
    if where == "block" and layer in seat.sites:
        x, tokens = seat.act(x, tokens, layer, layer, (q, k, v, bias), options)
    del q, k, v, extra, options  # or they would stay in memory through the MLP, which is where a block peaks
    added = view.mlp(block, x)
    x = x if added is None else view.add(block, x, added, True)
    if where == "between" and layer + 1 in seat.sites:
        x, tokens = seat.act(x, tokens, layer + 1, layer)
    elif not (where == "block" and layer in seat.sites):
        seat.carry(tokens, layer)
    return x
