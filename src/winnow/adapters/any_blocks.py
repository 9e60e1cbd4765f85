"""Any model whose blocks the user names: reduction sits between blocks, and nothing is known of the attention.

Winnow's own; for models that have no adapter yet.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .._host import Host, Patch
from .._run import Slot
from ..reducer import Setting

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def host(model: nn.Module, path: str) -> Host:
    """The model with its list of blocks at the dotted `path`; ValueError if there is none."""
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    children = tuple(blocks.children()) if blocks is not None else ()
    if not children:
        lists = [
            name for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1
        ]
        raise ValueError(
            f"blocks={path!r} is no list of blocks of {type(model).__name__}; lists it has: {', '.join(lists[:6])}"
        )
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        prefix = int(any(name.split(".")[-1] in CLASS_TOKENS for name, _ in model.named_parameters()))
    width = next((p.shape[-1] for p in children[0].parameters()), 0)
    return Host(
        family=f"{type(model).__name__}, between the blocks of {path!r}",
        setting=Setting(len(children), width, 1, prefix, prefix > 0, None),
        blocks=children,
        views=(),
        patches=(
            Patch(model, "forward", _enter),
            *(Patch(block, "forward", partial(_block, layer=layer)) for layer, block in enumerate(children)),
        ),
        offers=frozenset({"noise", "training_noise"}),
    )


def _enter(slot: Slot, x: Any, *args: Any, **words: Any) -> Any:
    slot.seat.begin(x, None)
    return type(slot.module).forward(slot.module, x, *args, **words)


def _block(slot: Slot, x: Tensor, *args: Any, layer: int, **words: Any) -> Any:
    seat, n = slot.seat, x.shape[1]
    beside = [a for a in (*args, *words.values()) if isinstance(a, Tensor) and n in a.shape]
    if beside:
        raise ValueError(
            "the block is given a tensor with one entry per token (a mask?), which cannot follow the tokens"
        )
    x, tokens = seat.enter(x) if layer == 0 else (x, seat.run.tokens[layer - 1])
    out = type(slot.module).forward(slot.module, x, *args, **words)
    y, *rest = out if isinstance(out, tuple) else (out,)
    site = layer + (seat.facts.where == "between")
    if site in seat.sites:
        y, _ = seat.act(y, tokens, site, layer)
    else:
        seat.carry(tokens, layer)
    return (y, *rest) if isinstance(out, tuple) else y
