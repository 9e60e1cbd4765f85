"""What Hugging Face's vision transformers share (transformers 5): layer, entry, and wishes that cannot be granted.

Wolf et al., Transformers, 2020. Layers differ in the names of their parts alone; hidden states are captured by hooks on
the layers and so come out as they are, shorter after each reduction. Attention weights are never made: asking is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .._host import BlockView, Host, Patch, refuse_beside
from .._run import Slot
from ..reducer import Setting
from . import pooling
from .timm_blocks import linear_macs

ABOUT_OUTPUT = ("output_hidden_states", "output_attentions", "return_dict", "interpolate_pos_encoding")


@dataclass(frozen=True)
class Layer(BlockView):
    """A pre-norm layer by the names of its parts ("" where it has none)."""

    norm1: str
    norm2: str
    attention: str
    out_proj: str
    scale1: str = ""
    scale2: str = ""
    drop: str = ""
    names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")

    def call(
        self,
        block: Any,
        forward: Callable[..., Tensor],
        x: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **words: Any,
    ) -> Tensor:
        """The mask is one the tower made itself (transformers 5.12, compiled) and hides nothing; users' are refused above.

        Since 5.21 gradient checkpointing is in the class's forward, which is replaced: it is done here then."""
        for name in ABOUT_OUTPUT:
            words.pop(name, None)
        beside = self.beside(words)
        refuse_beside(*args, **words)
        inside = "__call__" not in vars(GradientCheckpointingLayer)
        if inside and block.training and getattr(block, "gradient_checkpointing", False):
            return block._gradient_checkpointing_func(partial(forward, beside=beside), x)
        return forward(x, beside)

    def beside(self, words: dict[str, Any]) -> Any:
        """What `place` needs, taken out of the words."""
        return None

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        attn, y = block.get_submodule(self.attention), getattr(block, self.norm1)(x)
        size = _head_size(attn)
        q, k, v = (getattr(attn, name)(y).unflatten(-1, (-1, size)).transpose(1, 2) for name in self.names)
        return q, k, v, None

    def options(self, block: Any) -> dict[str, Any]:
        attn = block.get_submodule(self.attention)
        named = ("attention_dropout", "dropout_prob", "dropout")
        dropout = next(getattr(attn, name) for name in named if hasattr(attn, name))
        eager = attn.config._attn_implementation == "eager"
        return {"dropout": dropout if attn.training else 0.0, "path": "math" if eager else "auto"}

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        y = block.get_submodule(self.out_proj)(o.transpose(1, 2).flatten(2))
        return self._after(block, y, self.scale1)

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return self._after(block, block.mlp(getattr(block, self.norm2)(x)), self.scale2)

    def _after(self, block: Any, y: Tensor, scale: str) -> Tensor:
        y = getattr(block, scale)(y) if scale else y
        return getattr(block, self.drop)(y) if self.drop else y

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        attn = block.get_submodule(self.attention)
        projections = [*(getattr(attn, name) for name in self.names), block.get_submodule(self.out_proj)]
        width = projections[0].out_features
        mlp = linear_macs(block.mlp)
        return sum(linear_macs(p) for p in projections) * n_attn + 2 * width * n_attn * n_attn + mlp * n_mlp


def _head_size(attn: Any) -> int:
    return attn.head_dim if hasattr(attn, "head_dim") else attn.attention_head_size


def known(layer: Any, attention: str, kinds: tuple[tuple[Any, Any], ...]) -> None:
    """TypeError unless layer and attention run the forwards of one of these pairs of classes."""
    pair = (type(layer).forward, type(layer.get_submodule(attention)).forward)
    if pair not in [(a.forward, b.forward) for a, b in kinds] or "forward" in layer.__dict__:
        raise TypeError(f"{type(layer).__name__} (or its replaced forward) is a kind of block Winnow does not know")


def tower_host(
    family: str,
    tower: Any,
    layers: Any,
    view: Layer,
    *,
    patch: Any,
    grid: tuple[int, int],
    prefix: int,
    conv: nn.Module,
    also: tuple[Patch, ...] = (),
    averages: bool = False,
    outside: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Host:
    """The host of a vision tower; `averages`: what calls the tower takes the mean of its patch tokens.

    also: what else is replaced, such as a head that reads all tokens.
    """
    attn = layers[0].get_submodule(view.attention)
    width = view_width(layers[0], view)
    names = list(inspect.signature(type(tower).forward).parameters)
    mask_at = names.index("attention_mask") - 1 if "attention_mask" in names else None
    forward = partial(_averaging if averages else _forward, mask_at=mask_at)
    patch = tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)
    return Host(
        family=family,
        setting=Setting(len(layers), width, width // _head_size(attn), prefix, prefix > 0, grid, patch),
        blocks=tuple(layers),
        views=(view,) * len(layers),
        patches=(
            Patch(tower, "forward", forward),
            Patch(tower.embeddings, "forward", partial(_embed, patch=patch)),
            *also,
        ),
        accepts=frozenset({"block", "between", "input"}),
        outside_macs=partial(_outside, conv, outside),
    )


def view_width(layer: Any, view: Layer) -> int:
    """Channels that q of this layer has."""
    return getattr(layer.get_submodule(view.attention), view.names[0]).out_features


def _outside(conv: Any, more: Callable[[Tensor, Tensor], Tensor] | None, patches: Tensor, n: Tensor) -> Tensor:
    macs = conv.weight.numel() * patches
    return macs if more is None else macs + more(patches, n)


def linear_outside(layers: tuple[nn.Module, ...], patches: Tensor, n: Tensor) -> Tensor:
    """MACs of linear layers that see one token per image."""
    return 0.0 * n + sum(linear_macs(layer) for layer in layers)


def _forward(slot: Slot, *args: Any, mask_at: int | None, **words: Any) -> Any:
    tower: Any = slot.module
    if words.get("output_attentions", tower.config.output_attentions):
        raise ValueError(
            "a reduced model makes no attention weights: output_attentions=True works after winnow.restore"
        )
    if words.get("attention_mask") is not None or (mask_at is not None and any(a is not None for a in args[mask_at:])):
        raise ValueError("a reduced model takes no attention_mask: it cannot follow the tokens")
    return type(tower).forward(tower, *args, **words)


def _averaging(slot: Slot, *args: Any, **words: Any) -> Any:
    """For a classifier that averages: prefix and one patch token, the mean with sizes and without padding."""
    words["return_dict"] = True
    out = _forward(slot, *args, **words)
    out.last_hidden_state = pooling.averaged(slot, out.last_hidden_state)
    return out


def _embed(slot: Slot, pixel_values: Tensor, *args: Any, patch: tuple[int, int], **words: Any) -> Tensor:
    seat = slot.seat
    seat.begin(pixel_values, (pixel_values.shape[-2] // patch[0], pixel_values.shape[-1] // patch[1]))
    if seat.facts.where == "input":
        pixel_values = seat.reducer(pixel_values, patch)
        seat.run.small = (pixel_values.shape[-2] // patch[0], pixel_values.shape[-1] // patch[1])
        if "interpolate_pos_encoding" in words:  # the others resample their positions unasked
            words["interpolate_pos_encoding"] = True
    return type(slot.module).forward(slot.module, pixel_values, *args, **words)
