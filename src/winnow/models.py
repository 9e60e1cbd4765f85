"""load_model: a timm, open_clip or Hugging Face vision model by name, with its weights and the transform that belongs to it.

Winnow's own; the `timm:NAME`, `open_clip:NAME/TAG`, `hf:ID` spelling keeps each host's own names.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from winnow._weights import file_hash, fit, read_weights, state_hash, transferred, without_reducer

Numbers = float | Sequence[float]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode and what is needed to feed it and to say which one it was."""

    model: nn.Module
    spec: str
    transform: Callable[[Any], Tensor]
    """PIL RGB image -> [3, H, W] float32, normalised."""
    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int | None
    """None where the model gives features."""
    weights_hash: str | None
    """First 16 hex digits of the SHA-256 of the weights file, or of the downloaded state dict; None = random."""


@dataclass(frozen=True)
class Wish:
    """What the caller asked for beside the name."""

    weights: Path | None
    pretrained: bool
    num_classes: int | None
    seed: int
    size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop_pct: float | None
    options: Mapping[str, Any] = field(default_factory=dict)
    new_head: bool = False
    bare: bool = False


def load_model(
    spec: str,
    *,
    weights: Path | str | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    crop_pct: float | None = None,
    options: Mapping[str, Any] | None = None,
    new_head: bool = False,
    bare: bool = False,
) -> LoadedModel:
    """Build `timm:NAME`, the image tower of `open_clip:NAME[/TAG]`, or `hf:ID_OR_PATH`, in evaluation mode, on the CPU.

    An open_clip tower gives features; with num_classes it gets a linear head.
    weights: a .safetensors, .pth, .pt or .bin file; pretrained (or a TAG): the host's own download; neither: random
    weights drawn from `seed`, the global generator untouched. With weights, a TAG only chooses the preprocessing.
    A Hugging Face folder that holds weights brings them.
    size, mean, std, crop_pct replace what the model's own configuration says. options: more arguments of
    timm.create_model, or sections of open_clip's configuration. new_head: weights of another number of classes are taken
    without these. bare: those of a reduced model are taken without the reducer's.
    ValueError or FileNotFoundError, one line, for an unknown name, a missing package, or weights that do not fit.
    """
    if weights is not None and pretrained:
        raise ValueError("weights and pretrained are two sources: give one of them")
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: give the number of classes, or 0 for features")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct}: give a share of the resized image in (0, 1]")
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and (len(pair) != 2 or min(pair) < 1):
        raise ValueError(f"size={size}: give pixels, as one number or as (height, width)")
    file = None if weights is None else Path(weights).expanduser()
    channels = _channels("mean", mean), _channels("std", std)
    wish = Wish(file, pretrained, num_classes, seed, pair, *channels, crop_pct, dict(options or {}), new_head, bare)
    host, _, name = spec.partition(":")
    if host not in _HOSTS or not name:
        raise ValueError(
            f"unknown model {spec!r}: write timm:NAME, open_clip:NAME[/TAG] or hf:ID_OR_PATH, "
            "as in timm:vit_small_patch16_224"
        )
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"no such weights file: {file}")
    return _HOSTS[host](spec, name, wish)


def _channels(what: str, value: Numbers | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    values = (float(value),) * 3 if isinstance(value, int | float) else tuple(float(v) for v in value)
    if len(values) != 3 or (what == "std" and min(values) <= 0):
        raise ValueError(f"{what}={value}: give one number or three{', above 0' if what == 'std' else ''}")
    return values


def _load_timm(spec: str, name: str, wish: Wish) -> LoadedModel:
    try:
        import timm
    except ImportError:
        raise ValueError(f'{spec} needs timm: pip install "winnow-vision[timm]"') from None
    from . import backbones  # noqa: F401  registers our own with timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        raise ValueError(unknown(spec, plain, timm.list_models()))
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{plain}.*")]
    if tag and tag not in tags:
        raise ValueError(f"{spec}: {plain} has no pretrained tag {tag!r} (there are: {', '.join(tags) or 'none'})")
    settings = dict(wish.options) | ({} if wish.num_classes is None else {"num_classes": wish.num_classes})
    model = build(spec, wish, lambda: timm.create_model(name, pretrained=wish.pretrained, **settings))
    hashed = weigh(spec, model, wish)
    config = timm.data.resolve_model_data_config(model)
    if wish.size is not None and wish.size != tuple(config["input_size"][1:]):
        if hasattr(model, "set_input_size"):
            one_line(spec, "cannot take this size", lambda: model.set_input_size(img_size=wish.size))
        elif model.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"{spec} takes {config['input_size'][1:]} pixels only: leave size out")
        config["input_size"] = (config["input_size"][0], *wish.size)
    asked = {"mean": wish.mean, "std": wish.std, "crop_pct": wish.crop_pct}
    config.update({key: value for key, value in asked.items() if value is not None})
    return LoadedModel(
        model=model.eval(),
        spec=spec,
        transform=timm.data.create_transform(**config, is_training=False),
        size=tuple(config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        num_classes=getattr(model, "num_classes", None) or None,
        weights_hash=hashed,
    )


def _load_open_clip(spec: str, name: str, wish: Wish) -> LoadedModel:
    from ._clip import load_tower

    return load_tower(spec, name, wish)


def _load_hf(spec: str, name: str, wish: Wish) -> LoadedModel:
    from ._hf_model import load

    return load(spec, name, wish)


_HOSTS: dict[str, Callable[[str, str, Wish], LoadedModel]] = {
    "timm": _load_timm,
    "open_clip": _load_open_clip,
    "hf": _load_hf,
}


def weigh(spec: str, model: nn.Module, wish: Wish, convert: Callable | None = None) -> str | None:
    """Fill `model` from the wished file, if any; the hash of what is in it now."""
    if wish.weights is None:
        return state_hash(model.state_dict()) if wish.pretrained else None
    state = read_weights(wish.weights)
    if wish.bare:
        state = without_reducer(model, state)
    if wish.new_head:
        state = transferred(model, state)
    fit(model, convert(state) if convert else state, wish.weights, spec)
    return file_hash(wish.weights)


def unknown(spec: str, name: str, known: Sequence[str]) -> str:
    """What to say of a name that its host does not know."""
    close = get_close_matches(name, known, n=3, cutoff=0.0)
    host = spec.partition(":")[0]
    return f"unknown model {spec!r}: {host} has no {name!r}; close names: {', '.join(close)}"


def build(spec: str, wish: Wish, create: Callable[[], Any]) -> Any:
    """Run a host's constructor with its own seeded generator, and its failures as one line."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(wish.seed)  # torch.manual_seed would also seed the accelerators
        if not wish.pretrained:
            return one_line(spec, "cannot be built", create)
        with reachable_hub():
            return one_line(spec, "cannot be downloaded; offline, --weights FILE works", create)


def one_line(spec: str, what: str, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:  # hosts and hubs raise a zoo of types, most of them meant for a traceback
        reason = " ".join(str(error).split()).partition(". ")[0][:240]
        raise ValueError(f"{spec} {what} ({type(error).__name__}: {reason})") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Hosts log to the root logger, which also gives it a handler: silence them and take that handler away again."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers


@contextmanager
def reachable_hub() -> Iterator[None]:
    """Where the hub's name does not resolve, use its cache at once instead of retrying for most of a minute."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():  # behind a proxy, names need not resolve here
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
