"""Vision-language models: where image features come in, which columns the language model reads, what is refused.

Winnow's own, on transformers 5. Image features keep one slot per placeholder, and a slot that holds nothing is a row of
-inf; where the language model begins, empty slots leave the sequence. So the caller's ids are never rewritten.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._columns import Columns, renumbered
from ._decoder import Flow, decode
from ._host import Host, Patch
from ._run import Seat, Slot
from ._tower import EMPTY, look, project, reduced_features
from .parts.combine import take
from .reducer import Facts, Reducer, Setting
from .ways import Way

MEMORY = "winnow_columns"
"""Attribute of a cache: by first block, the columns that the layers from there on hold."""
CACHES = (None, "dynamic", "dynamic_full", "offloaded", "quantized")
SIGNALS = frozenset("queries keys values cls_attention received".split())


@dataclass(frozen=True)
class Vlm:
    """A vision-language model as its family's adapter sees it."""

    family: str
    model: nn.Module
    """What is called: `forward`, `generate`."""
    core: nn.Module
    """What puts image features among the embeddings: `get_placeholder_mask`."""
    llm: nn.Module
    """The language model without its head: `layers`, `rotary_emb`, `config`."""
    tower: Host | None = None
    """The vision tower as its own adapter sees it; None where nothing is known of it."""
    begin: Patch | None = None
    """Where the tower is entered with its images."""
    projector: nn.Module | None = None
    """What reads the tower's features; None where patches are merged before, and features are reduced as they come out."""
    made: int = 0
    """Block of the tower whose output the projector reads."""
    grids: Callable[..., list[tuple[int, int]] | int] | None = None
    """Without a projector: grids of the images, from the arguments of `get_image_features`; or features per tile."""
    in_place: bool = False
    """Something after the projector needs each token in the slot of its own patch."""
    mrope: bool = False
    """Positions are rows and columns of the image: kept, not renumbered."""
    more: tuple[Patch, ...] = ()
    follow: Callable[[dict[str, Any], Columns], dict[str, Any]] | None = None
    """What else the language model is given per column, for the columns that are left."""
    inside: str = ""
    """Why methods inside the tower cannot be served; "" where they can."""
    first: int = 1
    """First block of the language model before which image tokens may leave."""
    drops: bool = False
    """Features that are combined would lose what later blocks add to each of them."""


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

    def __deepcopy__(self, memo: dict) -> Moment:
        return Moment()

    def __reduce__(self):
        return Moment, ()


class VlmSeat(Seat):
    """The seat of a reducer in a vision-language model."""

    def __init__(self, vlm: Vlm, host: Host, reducer: Reducer, way: Way) -> None:
        super().__init__(host, reducer, way)
        self.vlm, self.now = vlm, Moment()
        early = [site for site in self.sites if self.facts.where == "llm" and site < vlm.first]
        if early:
            raise ValueError(
                f"{reducer.method}: {vlm.family} adds image features in its first blocks, so tokens may leave before "
                f"block {vlm.first} at the earliest"
            )
        if vlm.drops and self.facts.where == "tower" and self.facts.combine != "none":
            raise TypeError(
                f"{reducer.method} combines tokens, and {vlm.family} adds features to each of them in later blocks: "
                "methods that only drop work, such as Random(at='tower') or FastV"
            )


def host(vlm: Vlm) -> Host:
    """The host for methods inside the tower, which knows those for methods after it and in the language model."""
    for module in (vlm.model, vlm.core, vlm.llm, vlm.projector):
        if module is not None and "forward" in module.__dict__:
            raise TypeError(
                f"{type(module).__name__} has a replaced forward (spread over devices by accelerate?): "
                "load the model on one device, and reduce it before anything else wraps it"
            )
    elsewhere = dict.fromkeys(("block", "between", "input"), partial(_inside, vlm))
    elsewhere |= {"tower": partial(_after, vlm), "llm": partial(_llm, vlm)}
    if vlm.tower is None:
        return replace(_features(vlm), elsewhere=elsewhere)
    return replace(vlm.tower, family=vlm.family, elsewhere=elsewhere)


def _inside(vlm: Vlm, facts: Facts) -> Host:
    if vlm.inside or vlm.tower is None or vlm.projector is None:
        raise TypeError(
            f"{vlm.family} cannot be reduced inside its tower: {vlm.inside}. Works: a method at the tower or llm"
        )
    patches = (*vlm.tower.patches, Patch(vlm.projector, "forward", project), *_doors(vlm))
    return replace(vlm.tower, family=vlm.family, patches=patches, seat=partial(VlmSeat, vlm))


def _after(vlm: Vlm, facts: Facts) -> Host:
    """The host of methods that act once, on what the projector is about to read."""
    if vlm.tower is None or vlm.projector is None or vlm.begin is None:
        return _features(vlm)
    setting, blocks = vlm.tower.setting, vlm.tower.blocks
    reads, gives = bool(facts.needs & SIGNALS), "cls" in facts.needs
    reader = vlm.made + facts.ahead
    lacks = "cls_attention" in facts.needs and not setting.cls  # which is refused with what would work
    if reads and reader >= len(blocks) and not lacks:
        raise ValueError(
            f"{vlm.family}: the features come out of the last block, so no block reads them next; "
            "use a method with ahead=0, such as Random(at='tower')"
        )
    gives_at = {vlm.made} if gives else set()
    reads_at = {reader} & set(range(len(blocks))) if reads else set()
    watched = [
        Patch(blocks[at], "forward", partial(look, reads=at in reads_at, gives=at in gives_at))
        for at in sorted(gives_at | reads_at)
    ]
    return Host(
        family=vlm.family,
        setting=Setting(1, setting.width, setting.heads, 0, setting.cls, setting.grid, setting.patch),
        blocks=blocks,
        views=(),
        patches=(vlm.begin, *watched, Patch(vlm.projector, "forward", project), *_doors(vlm)),
        accepts=frozenset({"tower"}),
        offers=(SIGNALS if vlm.tower.views else frozenset())
        | {"noise", "projected", "padding"}
        | ({"cls"} if setting.cls else frozenset()),
        seat=partial(VlmSeat, vlm),
    )


def _features(vlm: Vlm) -> Host:
    """The host of methods that act once, on the features that come out of a tower which merges patches itself."""
    config: Any = vlm.llm.config
    return Host(
        family=vlm.family,
        setting=Setting(1, config.hidden_size, 1, 0, False, None),
        blocks=tuple(vlm.llm.layers),  # type: ignore[arg-type]
        views=(),
        patches=(Patch(vlm.core, "get_image_features", reduced_features, signed=True), *_doors(vlm)),
        accepts=frozenset({"tower"}),
        offers=frozenset({"noise", "projected", "padding"}),
        seat=partial(VlmSeat, vlm),
    )


def _llm(vlm: Vlm, facts: Facts) -> Host:
    """The host of methods that act before blocks of the language model."""
    config: Any = vlm.llm.config
    layers = tuple(vlm.llm.layers)  # type: ignore[arg-type]
    if getattr(config, "sliding_window", None) and any("sliding" in kind for kind in config.layer_types or ()):
        raise TypeError(
            f"{vlm.family}: its sliding windows count columns, which pruning moves; use a method at the tower"
        )
    return Host(
        family=vlm.family,
        setting=Setting(len(layers), config.hidden_size, config.num_attention_heads, 0, False, None),
        blocks=layers,
        views=(),
        patches=(
            *(Patch(layer, "forward", partial(decode, index=index)) for index, layer in enumerate(layers)),
            *_doors(vlm),
        ),
        accepts=frozenset({"llm"}),
        offers=frozenset({"text_attention"}),
        seat=partial(VlmSeat, vlm),
    )


def _doors(vlm: Vlm) -> tuple[Patch, ...]:
    return (
        Patch(vlm.core, "get_placeholder_mask", _placeholders),
        Patch(vlm.llm, "forward", language),
        Patch(vlm.model, "forward", _forward, signed=True),
        Patch(vlm.model, "generate", _generate, signed=True),
        *vlm.more,
    )


def _placeholders(slot: Slot, *args: Any, **words: Any) -> Any:
    """The host's own mask of placeholders; asked exactly when image features are put among the embeddings."""
    seat: Any = slot.seat
    found = type(slot.module).get_placeholder_mask(slot.module, *args, **words)  # type: ignore[attr-defined]
    if "image_features" in words or len(args) > 2:
        seat.now.images = (found[0] if isinstance(found, tuple) else found)[..., 0]
    return found


def _forward(slot: Slot, *args: Any, **words: Any) -> Any:
    """The whole model; the loss is that of the shortened labels, as the sequence is known only once it has run."""
    seat: Any = slot.seat
    model: Any = slot.module
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    words = dict(zip(names, args)) | words
    if words.get("vision_feature_layer") is not None and seat.facts.where != "llm":
        raise ValueError("vision_feature_layer at call time: set it in the config before winnow.reduce")
    seat.now = Moment()
    seat.now.labels = labels = words.pop("labels", None)
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


def _generate(slot: Slot, *args: Any, **words: Any) -> Any:
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
    return type(model).generate(model, *args, **words)


def language(slot: Slot, **words: Any) -> Any:
    """The language model on the columns that are left; a prompt without images goes straight through."""
    seat: Any = slot.seat
    llm = slot.module
    run: Callable[..., Any] = partial(type(llm).forward, llm)
    past, images = words.get("past_key_values"), seat.now.images
    seat.now.images = None
    memory: dict[int, Columns] = getattr(past, MEMORY, {})
    if images is None and not memory:
        return run(**words)
    _check(words, memory)
    if seat.facts.where == "llm":
        flow = seat.now.flow = Flow(seat, images, words, memory)
        out, held = run(**words), flow.finish()
        seat.now.flow = None
    else:
        words, whole = _shorten(seat, images, words, memory)
        out, held = run(**words), {0: whole}
    if getattr(out, "past_key_values", None) is not None:
        setattr(out.past_key_values, MEMORY, held)
    return out


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
