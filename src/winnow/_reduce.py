"""reduce, restore, reduced, watch, reducer_of: put a reducer into a model, take it out, look at what it did.

Winnow's own; what is done to the model is said in the README.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from ._host import Host
from ._run import Seat, Slot, Watch, block_forward
from .adapters import host_of, unwrap
from .reducer import Method, Reducer
from .ways import Way, check_way

Model = TypeVar("Model", bound=nn.Module)
LACKING = {
    "cls_attention": "class-token attention",
    "received": "received attention",
    "keys": "attention keys",
    "values": "attention values",
    "sizes": "attention that weighs token sizes",
    "padding": "attention that skips padding",
    "image": "the image itself",
    "text_attention": "the prompt's attention to image tokens",
    "cls": "a class token",
    "token": "a token of its own in the tower",
    "token_read": "a token of its own in the tower",
    "question": "the question",
}
SIGNED = "winnow"
"""Field of a Hugging Face configuration that says how the model is reduced, so that `save_pretrained` keeps it."""


def reduce(model: Model, method: Method, way: Way = "auto", blocks: str | None = None, expand: bool = False) -> Model:
    """Put `method` into the model, in place; returns the model.

    way: "auto", "static", "masked" or Padded(16). blocks: dotted path of the list of blocks, for models of no known
    family. expand: only inside the tower of a vision-language model; behind it every patch has its token again, so that
    what needs the whole grid works, and the language model reads as many as before. TypeError / ValueError, before
    anything is touched, where model and method do not fit; says what would.
    """
    if not isinstance(method, Method):
        raise TypeError(f"reduce() needs a method such as ToMe(r=8), got {method!r}; winnow.parse() reads spellings")
    _check_free(model)
    host = host_of(model, blocks).serving(method.facts, expand)
    _check_fit(model, host, method)
    way = check_way(way, method.facts, repr(method))
    if way not in ("auto", "static") and "padding" not in host.offers:
        raise ValueError(f'{host.family} cannot run way={way!r}: its attention does not skip padding; use way="static"')

    setting = host.setting
    reducer = method.build(setting.depth, setting.width, setting.heads, setting.patches, setting.prefix)
    seat = (host.seat or Seat)(host, reducer, way)
    seat.told = {name: value for name, value in (("blocks", blocks), ("expand", expand)) if value}
    like = next(host.blocks[0].parameters(), torch.empty(0))
    reducer.to(like.device, like.dtype).train(model.training)
    reducer.seat = seat
    model.reducer = reducer
    for index, (block, view) in enumerate(zip(host.blocks, host.views)):  # no views: the adapter brings its own
        _replace(seat, block, "forward", block_forward, Slot(seat, block, index, view))
    for patch in host.patches:
        _replace(seat, patch.module, patch.name, patch.function, Slot(seat, patch.module))
        if patch.signed:
            own = getattr(type(patch.module), patch.name).__get__(patch.module)
            patch.module.__dict__[patch.name].__signature__ = _names(inspect.signature(own))
    if hasattr(model, "save_pretrained"):
        setattr(model.config, SIGNED, {"method": repr(method), "way": str(way), **seat.told})
    return model


def restore(model: Model) -> Model:
    """Take the reducer out again: bit for bit the model that came; returns the model. ValueError if there is none."""
    inner = unwrap(model)
    for module, name in seat_of(inner).patched:
        del module.__dict__[name]
    del inner.reducer
    if hasattr(inner, "save_pretrained"):
        delattr(inner.config, SIGNED)
    return model


@contextmanager
def reduced(
    model: Model, method: Method, way: Way = "auto", blocks: str | None = None, expand: bool = False
) -> Iterator[Model]:
    """`reduce` on entry, `restore` on exit."""
    reduce(model, method, way, blocks, expand)
    try:
        yield model
    finally:
        restore(model)


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """What the last forward did: counts, valid_counts, ledger, ledgers by layer, scores by site. Watches nest."""
    seat, seen = seat_of(model), Watch()
    seat.watches.append(seen)
    try:
        yield seen
    finally:
        seat.watches.remove(seen)


def reducer_of(model: nn.Module) -> Reducer:
    """The reducer inside, through DDP, compile and peft wrappers; ValueError if the model is not reduced."""
    if not is_reduced(model):
        raise ValueError(f"{type(unwrap(model)).__name__} is not reduced: call winnow.reduce(model, method) first")
    return unwrap(model).reducer  # type: ignore[return-value]


def is_reduced(model: nn.Module) -> bool:
    """Whether there is a reducer inside."""
    return isinstance(getattr(unwrap(model), "reducer", None), Reducer)


def seat_of(model: nn.Module) -> Seat:
    """The seat of the model's reducer."""
    seat = reducer_of(model).seat
    assert isinstance(seat, Seat)
    return seat


def _replace(seat: Seat, module: nn.Module, name: str, function, slot: Slot) -> None:
    # a partial, not a closure or a bound method: after deepcopy it belongs to the copy, and it pickles
    module.__dict__[name] = partial(function, slot)
    seat.patched.append((module, name))


def _names(signature: inspect.Signature) -> inspect.Signature:
    """The same without annotations: some of the host's hold code, which does not pickle."""
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return inspect.Signature(bare)


def _check_free(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"reduce() needs a torch.nn.Module, got {type(model).__name__}")
    if unwrap(model) is not model or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"reduce the model before it is wrapped: {type(model).__name__} is a wrapper around it")
    found = getattr(model, "reducer", None)
    if isinstance(found, Reducer):
        raise ValueError(f"the model is already reduced with {found.method}: call winnow.restore(model) first")
    if hasattr(model, "reducer"):
        raise ValueError(f"{type(model).__name__} has an attribute `reducer` of its own: rename it")


def _check_fit(model: nn.Module, host: Host, method: Method) -> None:
    facts, name = method.facts, type(model).__name__
    if facts.where not in host.accepts:
        raise ValueError(
            f'{method} acts at "{facts.where}", which {host.family} ({name}) does not offer; '
            f"it offers {', '.join(sorted(host.accepts))}"
        )
    padding = set() if (facts.static and not facts.ragged) or facts.unmasked else {"padding"}
    wants = facts.needs | ({"sizes"} if facts.sizes else set()) | padding
    if "cls_attention" in wants & host.offers and not host.setting.cls:
        raise ValueError(
            f"{method} needs class-token attention; {name} has no class token. "
            'Use ToMe or NormThreshold, or attention="received".'
        )
    missing = sorted(wants - host.offers)
    if missing:
        raise ValueError(
            f"{method} needs {LACKING.get(missing[0], missing[0])}, which {host.family} ({name}) does not offer. "
            "Use Random, Grid or Pool(proportional=False)."
        )
    method.check(host.setting)
