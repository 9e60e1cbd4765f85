"""Inside the language model: image tokens leave before a block, and what later blocks are given follows.

FastV (Chen et al., ECCV 2024) and PyramidDrop (Xing et al., CVPR 2025) act here; transformers 5 decoder layers.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._columns import Columns, between, renumbered
from ._reading import Enough, Seen, reading
from ._run import Slot
from .parts.combine import take
from .reducer import Signals
from .tokens import Ledger, Tokens


class Flow:
    """One forward of the language model: the columns its blocks hold, by the site they were left at."""

    def __init__(self, seat: Any, images: Tensor | None, words: dict[str, Any], memory: dict[int, Columns]) -> None:
        x, past = words["inputs_embeds"], words.get("past_key_values")
        self.seat, self.images, self.memory = seat, images, memory
        self.every = Columns.all(len(x), x.shape[1], x.device)
        self.before = Columns.all(len(x), past.get_seq_length() if past is not None else 0, x.device)
        self.local: dict[int, Columns] = {}
        """What is left of this call's own columns, by site."""
        self.row: Tensor | None = None
        """[B, H, M] attention of the asking rows to the columns that are left."""
        self.made: dict[Any, Any] = {}
        if images is not None:
            seat.begin(x, None)
            mask = words.get("attention_mask")
            self.real = torch.ones_like(images) if mask is None else mask[:, -x.shape[1] :].bool()
            self.asking = _asking(seat, x, images, self.real)
            count = images.sum(1, keepdim=True)
            here = torch.arange(int(count.max()), device=x.device).expand(len(x), -1)
            self.owner = here.masked_fill(here >= count, -1)
            self._note(-1)

    def site(self, layer: int) -> int | None:
        """The last site before or at a block that tokens left at, in this call or an earlier one."""
        passed = [site for site in self.seat.sites if site <= layer and (site in self.local or site in self.memory)]
        return max(passed, default=None)

    def left(self, site: int | None) -> Columns:
        """What blocks from `site` on hold of this call's columns."""
        return self.every if site is None else self.local.get(site, self.every)

    def follow(self, x: Tensor, words: dict[str, Any], site: int | None, held: int | None) -> dict[str, Any]:
        """The keyword arguments of a block, for the columns left at `site` behind those the cache was left at `held`."""
        before = self.memory.get(held, self.before) if held is not None else self.before
        if site is None and before is self.before:
            return words
        mask, ids = words.get("attention_mask"), words.get("position_ids")
        key = (site, held, id(mask))
        if key not in self.made:
            local, vlm = self.left(site), self.seat.vlm
            flash = "flash" in (vlm.llm.config._attn_implementation or "")
            renumber = self.seat.facts.renumber and not vlm.mrope
            if renumber:
                places = vlm.llm.rotary_emb(x, renumbered(ids, local, before))
            else:
                places = tuple(local.places(one) for one in words["position_embeddings"])
            made = {
                "attention_mask": between(mask, local, before.then(local), flash),
                "position_embeddings": places,
                "position_ids": None if ids is None else local.values(ids),
            }
            self.made[key] = made, mask  # or the id of the mask would be free for another
        return words | self.made[key][0]

    def read(self, seen: Seen, site: int | None = None) -> None:
        """Note the attention of the asking rows."""
        local = self.left(site)
        asks = self.asking.gather(1, local.index) & local.certain()
        most = int(asks.sum(1).max())
        at = (~asks).int().argsort(dim=1, stable=True)[:, :most]
        asks = asks.gather(1, at)[:, None, :, None]
        found = seen.rows(at).masked_fill(~asks, 0.0)  # a row of padding sees nothing, which is NaN
        self.row = (found.sum(2) / asks.sum(2))[:, :, -local.index.shape[1] :]

    def act(self, x: Tensor, layer: int) -> Tensor:
        """Reduce the image tokens of the stream x [B, M, D] before block `layer`; samples with equally many go together."""
        local = self.left(self.site(layer - 1))
        assert self.images is not None
        image = self.images.gather(1, local.index) & local.certain()
        keep, patches = local.certain() & ~image, self.images.sum(1)
        for count in patches.unique().tolist():
            if count:
                x, keep = self._group((patches == count).nonzero()[:, 0], count, x, image, keep, layer)
        fewer = Columns.keeping(keep, local.certain() & self.real.gather(1, local.index))
        self.local[layer] = local.of(fewer)
        self._note(layer - 1)
        return take(x, fewer.index)

    def _group(
        self, rows: Tensor, patches: int, x: Tensor, image: Tensor, keep: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        n = int(image[rows[0]].sum())
        at = (~image[rows]).int().argsort(dim=1, stable=True)[:, :n]  # [G, n] columns of the image tokens
        ledger = Ledger(self.owner[rows, :patches], n)
        seat, row = self.seat, self.row
        if row is not None:
            row = row[rows].gather(2, at[:, None].expand(-1, row.shape[1], -1))
        tokens = Tokens(take(x[rows], at), ledger)
        out = seat.reducer(tokens, Signals(text_row=row, watched=bool(seat.watches)), layer)
        if out.score is not None and seat.watches:
            seat.run.scores[layer] = out.score.detach()
        seat._note(out, layer)
        stands = at.gather(1, ledger.owner.gather(1, out.ledger.first()))  # the column of each token's first patch
        self.owner = self.owner.index_put((rows[:, None], torch.arange(patches, device=x.device)), out.ledger.owner)
        yes = torch.ones_like(stands, dtype=torch.bool)
        return x.index_put((rows[:, None], stands), out.x), keep.index_put((rows[:, None], stands), yes)

    def _note(self, after: int) -> None:
        """The state after a block: image tokens of each sample, those with fewer padded."""
        n = self.owner.amax(1) + 1
        width = int(n.max())
        valid = torch.arange(width, device=n.device) < n[:, None]
        ledger = Ledger(self.owner, width, None if bool(valid.all()) else valid)
        self.seat.run.tokens[after] = Tokens(self.owner.new_empty(0, dtype=torch.float32), ledger)

    def finish(self) -> dict[int, Columns]:
        """What the cache holds now, by site; notes what the blocks between the sites ran on."""
        seat = self.seat
        if self.images is not None:
            seat.now.columns = seat.run.columns = self.left(max(self.local))
            for layer in range(seat.setting.depth):
                seat.run.tokens.setdefault(layer, seat.run.tokens[layer - 1])
        return {site: self.memory.get(site, self.before).then(self.left(site)) for site in {*self.local, *self.memory}}


def decode(slot: Slot, x: Tensor, *args: Any, index: int, **words: Any) -> Any:
    """A block of the language model, on the columns that are left."""
    seat: Any = slot.seat
    block: Any = slot.module
    flow: Flow | None = seat.now.flow
    run = partial(type(block).forward, block)
    if flow is None:
        return run(x, *args, **words)
    ahead, wanted = seat.facts.ahead, "text_attention" in seat.facts.needs and flow.images is not None
    if flow.images is not None and index in seat.sites:
        if wanted and ahead:
            now = flow.site(index - 1)
            _ask(flow, block, x, flow.follow(x, words, now, index), now)
        x = flow.act(x, index)
    site = flow.site(index)
    words = flow.follow(x, words, site, site)
    if wanted and not ahead and index + 1 in seat.sites:
        with reading(block, partial(flow.read, site=site)):
            return run(x, *args, **words)
    return run(x, *args, **words)


class Peek:
    """A cache that shows what it holds and takes nothing in."""

    def __init__(self, past: Any) -> None:
        self.past = past

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **words: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, D] behind those held."""
        if not self.past.get_seq_length(layer):
            return k, v
        held = self.past.layers[layer]
        return torch.cat([held.keys, k], 2), torch.cat([held.values, v], 2)


def _ask(flow: Flow, block: Any, x: Tensor, words: dict[str, Any], site: int | None) -> None:
    """What the block would attend to; left as soon as its queries and keys are there, before they reach the cache."""

    def reader(seen: Seen) -> None:
        flow.read(seen, site)
        raise Enough

    past = words.get("past_key_values")
    words = words | {"past_key_values": None if past is None else Peek(past), "use_cache": False}
    with torch.no_grad(), suppress(Enough), reading(block, reader):
        type(block).forward(block, x, **words)


def _asking(seat: Any, x: Tensor, images: Tensor, real: Tensor) -> Tensor:
    """[B, L] rows whose attention counts: the reducer's choice, those before each answer in training, or the last."""
    place = torch.arange(images.shape[1], device=x.device).expand(images.shape)
    last = place == place.masked_fill(~real, -1).amax(1, keepdim=True)
    raters, labels = getattr(seat.reducer, "raters", None), seat.now.labels
    if raters is not None:
        rows = raters(x, images, real & ~images)
    elif labels is not None:
        answer = labels != -100
        rows = torch.nn.functional.pad(answer[:, 1:] & ~answer[:, :-1], (0, 1))
    else:
        return last
    rows = (
        rows & real & ~images & (images.cumsum(1) > 0)
    )  # a row in front of all images, or one that may go, says nothing
    return torch.where(rows.any(1, keepdim=True), rows, last)
