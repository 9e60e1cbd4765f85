"""After the encoder: reduce what the projector is about to read, and put what is left into slots of the full width.

Winnow's own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._beside import TOKEN, asked
from ._reading import Seen, reading
from ._run import Slot
from .attention import received, rows
from .reducer import Signals
from .tokens import Ledger, Tokens

EMPTY = float("-inf")
"""A slot is empty where all its channels are this: an overflow gives infinities of both signs, or NaN."""


def look(slot: Slot, *args: Any, reads: bool, gives: bool, **words: Any) -> Any:
    """A block of the tower, whose attention (`reads`) or class token (`gives`) the method wants to know."""
    seat: Any = slot.seat
    now, block = seat.now, slot.module
    run = partial(type(block).forward, block)
    if reads:
        with reading(block, partial(setattr, now, "seen")):
            out = run(*args, **words)
    else:
        out = run(*args, **words)
    if gives:
        now.cls = (out[0] if isinstance(out, tuple) else out)[:, 0]
    return out


def project(slot: Slot, features: Tensor) -> Tensor:
    """The projector on the reduced features [I, N, C]; [I, N, D] with a row of `EMPTY` where nothing is left."""
    seat: Any = slot.seat
    projector = slot.module
    run = partial(type(projector).forward, projector)
    where, needs = seat.facts.where, seat.facts.needs
    after = "projected" in needs or ("training_projected" in needs and seat.reducer.training)
    if needs & TOKEN:
        features, seat.now.token = features[:, :-1].contiguous(), features[:, -1:]
    if where == "tower":
        tokens = reduce(seat, run(features), features) if after else reduce(seat, features)
    else:
        tokens = replace(seat.run.tokens[seat.vlm.made], x=features)
    y = tokens.x if after else run(tokens.x)
    return slots(y, tokens.ledger, seat.vlm.in_place)


def spread(slot: Slot, features: Tensor, made: int) -> Tensor:
    """The projector on every patch [I, P, C], each with the features of the token that holds it."""
    ledger = slot.seat.run.tokens[made].ledger
    return type(slot.module).forward(slot.module, ledger.dense(features))  # type: ignore[attr-defined]


def reduced_features(slot: Slot, *args: Any, **words: Any) -> Any:
    """`get_image_features` of a host whose tower merges patches: what comes out is reduced, images of one size together."""
    seat: Any = slot.seat
    core: Any = slot.module
    out: Any = type(core).get_image_features(core, *args, **words | {"return_dict": True})
    found, grids = out.pooler_output, seat.vlm.grids(*args, **words)
    rows = list(found)
    if isinstance(grids, int):  # tiles of one size, some hosts join those of a sample
        pieces, side = torch.cat(rows).split(grids), math.isqrt(grids)
        made = torch.cat(_sized(seat, list(pieces), [(side, side)] * len(pieces)))
        kept = list(made.split([len(row) for row in rows]))
    else:
        kept = _sized(seat, rows, grids)
    out.pooler_output = torch.stack(kept) if isinstance(found, Tensor) else kept
    return out


def _sized(seat: Any, features: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
    """Slots [P, D] of each image's features [P, D]; images of one grid go together, the run ends with all of them."""
    kept: dict[int, Tensor] = {}
    before: dict[int, Ledger] = {}
    after: dict[int, Ledger] = {}
    sizes = list(dict.fromkeys(grids))
    if len(sizes) > 1 and isinstance(seat.reducer.budget, Tensor):
        raise ValueError("images of several sizes in one call: give one budget for all, not one for each")
    for grid in sizes:
        members = [image for image, one in enumerate(grids) if one == grid]
        x = torch.stack([features[image] for image in members])
        seat.begin(x, grid)
        tokens = reduce(seat, x)
        kept |= dict(zip(members, slots(tokens.x, tokens.ledger, True)))
        for into, ledger in ((before, seat.run.tokens[-1].ledger), (after, tokens.ledger)):
            into |= {image: _row(ledger, place) for place, image in enumerate(members)}
    if len(sizes) > 1:
        run, images = seat.run, range(len(features))
        run.grid, run.scores = None, {}
        for layer, ledgers in ((-1, before), (0, after)):
            run.tokens[layer] = Tokens(x.new_empty(0), _joined([ledgers[image] for image in images]))
    return [kept[image] for image in range(len(features))]


def _row(ledger: Ledger, image: int) -> Ledger:
    valid = None if ledger.valid is None else ledger.valid[image : image + 1]
    return Ledger(ledger.owner[image : image + 1], ledger.n, valid)


def _joined(ledgers: list[Ledger]) -> Ledger:
    """One ledger of images with different numbers of patches and tokens, padded to the most of both."""
    patches, n = max(one.owner.shape[1] for one in ledgers), max(one.n for one in ledgers)
    owners = [F.pad(one.owner, (0, patches - one.owner.shape[1]), value=-1) for one in ledgers]
    valid = [one.owner.new_ones(1, one.n).bool() if one.valid is None else one.valid for one in ledgers]
    return Ledger(torch.cat(owners), n, torch.cat([F.pad(one, (0, n - one.shape[1])) for one in valid]))


def reduce(seat: Any, x: Tensor, features: Tensor | None = None) -> Tokens:
    """One call of the reducer on x [I, N, C]; `features` [I, N, C], where x is what the projector made of them."""
    run, n = seat.run, x.shape[1]
    grid = run.grid if run.grid and run.grid[0] * run.grid[1] == n else None
    tokens = Tokens(x, Ledger.start(len(x), n, x.device), grid)
    seat._store(tokens, -1)
    signals = replace(_signals(seat, len(x), n), features=features)
    seat.now.seen = seat.now.cls = seat.now.token = None
    out = seat.reducer(tokens, signals, 0)
    if out.n > n:
        raise ValueError(f"{seat.reducer.method} answers {n} image features with {out.n}: it must not make more")
    if out.score is not None and seat.watches:
        run.scores[0] = out.score.detach()
    seat._note(out, 0)
    seat._store(out, 0)
    return out


def _signals(seat: Any, images: int, n: int) -> Signals:
    facts, tower = seat.facts, seat.vlm.tower
    needs, training = facts.needs, seat.reducer.training
    prefix = tower.setting.prefix if tower else 0
    seen: Seen | None = seat.now.seen
    found: dict[str, Any] = {"watched": bool(seat.watches), "cls": seat.now.cls}
    if "noise" in needs or ("training_noise" in needs and training):
        found["noise"] = seat._noise(0, n)
    if facts.budgeted:
        found["budget"] = seat.budget(images, n)
    if seat.now.token is not None:
        found["token"] = seat.now.token[:, 0]
    if "question" in needs:
        found["question"] = asked(seat, images, n)
    if seen is not None:
        if seen.k.shape[2] != n + prefix:
            raise ValueError(f"the tower attends over {seen.k.shape[2]} tokens, the projector reads {n}")
        for need, name in (("queries", "q"), ("keys", "k"), ("values", "v")):
            if need in needs:
                found[name] = getattr(seen, name)[:, :, prefix:]
                if prefix and name != "v":
                    found[f"cls_{name}"] = getattr(seen, name)[:, :, 0]
        if "cls_attention" in needs:
            found["cls_row"] = rows(seen.q[:, :, :1], seen.k, None, seen.scale)[:, :, 0, prefix:]
        if "received" in needs:
            found["received"] = received(seen.q, seen.k, None, seen.scale)[:, prefix:]
    return Signals(**found)


def slots(y: Tensor, ledger: Ledger, in_place: bool) -> Tensor:
    """Tokens y [I, M, D] among P slots [I, P, D]: in front, or in place of the first patch each holds."""
    images, patches = ledger.owner.shape
    here = torch.arange(ledger.n, device=y.device).expand(images, -1)
    place = ledger.first() if in_place else here
    if ledger.valid is not None:
        place = (place if in_place else ledger.valid.cumsum(1) - 1).masked_fill(~ledger.valid, patches)
    rows_of = place + torch.arange(images, device=y.device).unsqueeze(1) * (patches + 1)
    empty = y.new_full((images * (patches + 1), y.shape[-1]), EMPTY)
    return empty.index_copy(0, rows_of.flatten(), y.flatten(0, 1)).unflatten(0, (images, -1))[:, :patches]
