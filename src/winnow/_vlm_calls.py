"""What happens when a reduced vision-language model is called: which columns its language model reads, what is refused.

Winnow's own, on transformers 5. Image features keep one slot per placeholder, and a slot that holds nothing is a row of
-inf; where the language model begins, empty slots leave the sequence. So the caller's ids are never rewritten.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._columns import Columns, renumbered
from ._decoder import Flow
from ._run import Slot
from ._tower import EMPTY
from .parts.combine import take

MEMORY = "winnow_columns"
"""Attribute of a cache: by first block, the columns that the layers from there on hold."""
CACHES = (None, "dynamic", "dynamic_full", "offloaded", "quantized")


class Moment:
    """State of one call of the model; copying leaves it behind."""

    def __init__(self) -> None:
        self.images: Tensor | None = None
        """[B, L] placeholders that image features were put into."""
        self.labels: Tensor | None = None
        self.columns: Columns | None = None
        """What the last column axis of this call holds; None where nothing was shortened."""
        self.flow: Flow | None = None
        self.seen: Any = None
        """What the tower's attention was called with."""
        self.cls: Tensor | None = None
        self.token: Tensor | None = None
        """[I, 1, C] the reducer's own token, as far as it has come."""
        self.asked: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None
        """Ids, attention mask and labels of this call."""

    def __deepcopy__(self, memo: dict) -> Moment:
        return Moment()

    def __reduce__(self):
        return Moment, ()


def forward(slot: Slot, *args: Any, **words: Any) -> Any:
    """The whole model; the loss is that of the shortened labels, as the sequence is known only once it has run."""
    seat: Any = slot.seat
    model: Any = slot.module
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    words = dict(zip(names, args)) | words
    if words.get("vision_feature_layer") is not None and seat.facts.where != "llm":
        raise ValueError("vision_feature_layer at call time: set it in the config before winnow.reduce")
    images, past = words.get("pixel_values"), words.get("past_key_values")
    unknown = words.get("inputs_embeds") is not None and images is None and not words.get("mm_encoder_outputs")
    if seat.facts.where == "llm" and unknown and not (past is not None and past.get_seq_length()):
        raise ValueError(
            f"{seat.reducer.method} must know which embeddings are images': pass input_ids and pixel_values, or "
            "inputs_embeds of the placeholders and pixel_values"
        )
    seat.now = Moment()
    seat.now.labels = labels = words.pop("labels", None)
    seat.now.asked = words.get("input_ids"), words.get("attention_mask"), labels
    if labels is None:
        return type(model).forward(model, **words)
    tuple_wanted = words.pop("return_dict", None) is False
    out: Any = type(model).forward(model, **words, return_dict=True)
    columns = seat.now.columns
    beside = {name: words[name] for name in ("num_items_in_batch",) if name in words}
    loss = model.loss_function(
        logits=out.logits,
        labels=labels if columns is None else columns.labels(labels),
        vocab_size=model.config.get_text_config().vocab_size,
        **beside,
    )
    out = type(out)(**(dict(out.items()) | {"loss": loss}))
    return out.to_tuple() if tuple_wanted else out


def generate(slot: Slot, *args: Any, **words: Any) -> Any:
    """`generate`, less what counts columns of the prompt in the cache."""
    model: Any = slot.module
    given = words.get("generation_config") or (args[1] if len(args) > 1 else None)

    def wish(name: str) -> Any:
        found = [words.get(name), getattr(given, name, None), getattr(model.generation_config, name, None)]
        return next((value for value in found if value is not None), None)

    assisted = (
        words.get("assistant_model") is not None or wish("prompt_lookup_num_tokens") or wish("assistant_early_exit")
    )
    if assisted:
        raise ValueError(
            "assisted decoding takes tokens back out of the cache by their number in the prompt, and a reduced model's "
            "cache holds fewer: leave assistant_model and prompt_lookup_num_tokens out"
        )
    if wish("prefill_chunk_size") is not None:
        raise ValueError("chunked prefill cuts the prompt between image tokens: leave prefill_chunk_size out")
    if wish("cache_implementation") not in CACHES:
        raise ValueError(
            f"cache_implementation={wish('cache_implementation')!r} gives every layer the same room, and a reduced "
            'model\'s layers hold different numbers of tokens: leave it out, or "offloaded"'
        )
    if 0 in getattr(words.get("past_key_values"), MEMORY, {}):
        raise ValueError(
            "this cache holds fewer columns than the prompt it was made from, so generate() cannot tell what is new: "
            "pass the whole conversation without past_key_values"
        )
    seat: Any = slot.seat
    seat.now = Moment()  # since 5.23 images are encoded here, before the model is called
    ids = words.get("input_ids", words.get("inputs", args[0] if args else None))
    seat.now.asked = ids, words.get("attention_mask"), None
    return type(model).generate(model, *args, **words)


def language(slot: Slot, **words: Any) -> Any:
    """The language model on the columns that are left; a prompt without images goes straight through."""
    seat: Any = slot.seat
    llm = slot.module
    run: Callable[..., Any] = partial(type(llm).forward, llm)
    past, images = words.get("past_key_values"), seat.now.images
    if images is None and seat.facts.where != "llm":
        images = _given(words.get("inputs_embeds"))
    seat.now.images = seat.now.asked = None
    memory: dict[int, Columns] = getattr(past, MEMORY, {})
    if images is None and not memory:
        return run(**words)
    _check(words, memory)
    if seat.facts.where == "llm":
        flow = seat.now.flow = Flow(seat, images, words, memory)
        try:
            out, held = run(**words), flow.finish()
        finally:
            seat.now.flow = None
    else:
        words, whole = _shorten(seat, images, words, memory)
        out, held = run(**words), {0: whole}
    if getattr(out, "past_key_values", None) is not None:
        setattr(out.past_key_values, MEMORY, held)
    return out


def _given(x: Tensor | None) -> Tensor | None:
    """[B, L] empty slots among a prompt's embeddings [B, L, D], into which the caller put image features; None if none."""
    if x is None or x.shape[1] == 1:
        return None
    empty = (x == EMPTY).all(-1)
    return empty if bool(empty.any()) else None


def _check(words: dict[str, Any], memory: dict[int, Columns]) -> None:
    mask, past, x = words.get("attention_mask"), words.get("past_key_values"), words["inputs_embeds"]
    if past is not None and past.is_compileable:
        raise ValueError(
            "a static cache gives every layer the same room, and a reduced model's layers hold different numbers of "
            "tokens: use DynamicCache, which is the default"
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError(
            "a reduced model takes an attention_mask of shape [B, L]; a mask of pairs cannot follow the tokens"
        )
    for columns in memory.values():
        if len(columns.index) != len(x):
            raise ValueError(
                f"the cache was made for {len(columns.index)} sequences, this call has {len(x)}: "
                "a reduced model's cache cannot be cut or repeated"
            )


def _shorten(
    seat: Any, images: Tensor | None, words: dict[str, Any], memory: dict[int, Columns]
) -> tuple[dict[str, Any], Columns]:
    """What the language model is given without the empty slots, and the columns it then holds."""
    x, past = words["inputs_embeds"], words.get("past_key_values")
    batch, n = x.shape[:2]
    before = memory.get(0) or Columns.all(batch, past.get_seq_length() if past is not None else 0, x.device)
    mask, new = words.get("attention_mask"), Columns.all(batch, n, x.device)
    if images is not None:
        empty = images & (x == EMPTY).all(-1)
        x = x.masked_fill(empty.unsqueeze(-1), 0)  # where a row is filled up with one, 0 times infinity would be NaN
        new = Columns.keeping(~empty, None if mask is None else mask[:, -n:].bool())
        seat.now.columns = seat.run.columns = new
    whole = before.then(new)
    given = words.get("position_ids")
    if given is None:
        given = torch.arange(before.seen, before.seen + n, device=x.device)[None]
    more = seat.vlm.follow(words, new) if seat.vlm.follow else {}
    return words | more | {
        "inputs_embeds": take(x, new.index),
        "attention_mask": whole.mask(mask),
        "position_ids": _positions(given, new, before, seat.vlm.mrope),
    }, whole


def _positions(given: Tensor, new: Columns, before: Columns, mrope: bool) -> Tensor:
    given = given[..., given.shape[-1] - new.seen :]  # some hosts pass those of the columns in the cache too
    if not mrope:
        return renumbered(given, new, before)
    held = new.values(given)
    if held.ndim == 3 and len(held) == 4:  # the first row numbers the text, and a gap there would end a document
        held = torch.cat([renumbered(given[0], new, before)[None], held[1:]])
    return held
