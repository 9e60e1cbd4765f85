"""A token of the reducer's own, which goes through the vision tower beside the image's; and the question asked about it.

Document 004's option A; that the token may read without being read is Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._host import BlockView
from ._reading import Seen, reading
from ._run import Slot
from .attention import attend

TOKEN = frozenset({"token", "token_read"})
"""Of `Facts.needs`: it reads patches, or they read it, too."""


def enter(slot: Slot, *args: Any, begin: Callable[..., Tensor], **words: Any) -> Tensor:
    """The tower's embeddings [I, K+N, C] and, behind them, the reducer's token."""
    seat: Any = slot.seat
    x = begin(slot, *args, **words)
    learned = (weight.requires_grad for block in seat.vlm.tower.blocks for weight in block.parameters())
    seat.still = torch.is_grad_enabled() and not x.requires_grad and not any(learned)
    n = x.shape[1] - seat.vlm.tower.setting.prefix
    token = seat.reducer.token(seat.budget(len(x), n), n, len(x), partial(seat.vlm.place, slot.module))
    return torch.cat([x, token[:, None].to(x.dtype)], 1)


def beside(slot: Slot, x: Tensor, *args: Any, view: BlockView, gives: bool, **words: Any) -> Any:
    """A block on the image's tokens alone; the token, behind them, reads them in a row of its own, and nothing reads it.

    It comes and goes with them: what is in neither input nor output of a block, a sharded block gives up too early.
    """
    block = slot.module
    x, token = x[:, :-1].contiguous(), x[:, -1:]
    x = x.detach() if slot.seat.still else x  # type: ignore[attr-defined]  # or the token's gradient would run through it
    found: list[Seen] = []
    words.pop("attention_mask", None)  # the tower's own, for one token more; it hides nothing
    with reading(block, found.append, graph=True):
        out = type(block).forward(block, x, None, *args[1:], **words)  # type: ignore[call-arg]
    seen = out[0] if isinstance(out, tuple) else out
    if gives:
        slot.seat.now.cls = seen[:, 0]  # type: ignore[attr-defined]
    both = torch.cat([seen, _row(view, block, token, found[0])], 1)
    return (both, *out[1:]) if isinstance(out, tuple) else both


def leave(slot: Slot, x: Tensor, *args: Any, **words: Any) -> Any:
    """The block behind those that the token passes: the image's tokens go on without it."""
    words.pop("attention_mask", None)
    return type(slot.module).forward(slot.module, x[:, :-1].contiguous(), None, *args[1:], **words)  # type: ignore[call-arg]


def _row(view: BlockView, block: nn.Module, token: Tensor, seen: Seen) -> Tensor:
    """The block on token [I, 1, C] alone, which attends to what the block's attention saw and to itself."""
    q, k, v, extra = view.qkv(block, token)
    o = attend(q, torch.cat([seen.k, k], 2), torch.cat([seen.v, v], 2), scale=seen.scale, **view.options(block))
    token = view.add(block, token, view.out(block, o, extra), False)
    added = view.mlp(block, token)
    return token if added is None else view.add(block, token, added, True)


def among(slot: Slot, x: Tensor, *args: Any, first: bool, last: bool, gives: bool, **words: Any) -> Any:
    """A block on the image's tokens and the reducer's; `first` puts it in front, `last` back to the end."""
    block = slot.module
    x = torch.cat([x[:, -1:], x[:, :-1]], 1) if first else x
    out = type(block).forward(block, x, *args, **words)
    if last:
        tail = lambda y: torch.cat([y[:, 1:], y[:, :1]], 1)  # noqa: E731
        out = (tail(out[0]), *out[1:]) if isinstance(out, tuple) else tail(out)
    if gives:
        slot.seat.now.cls = (out[0] if isinstance(out, tuple) else out)[:, 0]  # type: ignore[attr-defined]
    return out


def asked(seat: Any, images: int, n: int) -> tuple[Tensor, Tensor]:
    """Embeddings [I, L, D] of the words asked about each image of n tokens, and [I, L] False where a row is filled up.

    What is answered (the labels) and the image's own places are not asked; ValueError where no prompt is known.
    """
    ids, mask, labels = seat.now.asked or (None, None, None)
    if ids is None:
        raise ValueError(f"{seat.reducer.method} reads the question: call the model itself, with input_ids")
    here = ids == seat.vlm.model.config.image_token_id
    each = here.sum(1) // n
    if int(each.sum()) != images:
        raise ValueError(
            f"{seat.reducer.method}: the prompts have places for {int(each.sum())} images of {n} tokens, "
            f"{images} are given: which is asked about which cannot be told (images in tiles work without text=True)"
        )
    text = ~here
    if mask is not None:
        text = text & mask[:, -ids.shape[1] :].bool()
    if labels is not None:
        text = text & (labels == -100)
    index = (~text).int().argsort(dim=1, stable=True)[:, : int(text.sum(1).max())]
    words = seat.vlm.llm.get_input_embeddings()(ids.gather(1, index)).detach()
    return words.repeat_interleave(each, 0), text.gather(1, index).repeat_interleave(each, 0)
