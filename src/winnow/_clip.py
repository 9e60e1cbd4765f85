"""load_clip and load_tower: a whole open_clip model with its tokenizer, or its image tower, as features or as a classifier.

Ilharco et al., OpenCLIP, 2021; names, configurations, tokenizers and preprocessing are open_clip's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._weights import file_hash, fit, read_weights, state_hash
from .models import LoadedModel, Wish, build, unknown, weigh

SECTIONS = ("vision_cfg", "text_cfg")
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}
"""Stands in for a text tower that is not used, so that nothing large is drawn."""
DROPS = ("drop_rate", "drop_path_rate")


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP in evaluation mode on the CPU, and what is needed to feed it and to say which one it was."""

    model: nn.Module
    """encode_image, encode_text, logit_scale, logit_bias, visual."""
    spec: str
    tokenize: Callable[[Sequence[str]], Tensor]
    """n texts -> int64 [n, context length]."""
    transform: Callable[[Any], Tensor]
    """PIL RGB image -> [3, H, W] float32, normalised."""
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights_hash: str | None


def load_clip(
    spec: str,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    seed: int = 0,
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Clip:
    """Build `open_clip:NAME[/TAG]`; weights from a file, from the TAG if pretrained, else drawn from `seed`.

    options change open_clip's configuration, as in {"embed_dim": 64, "text_cfg": {"layers": 2}}. A reducer's weights in
    the file are left out. ValueError or FileNotFoundError, one line, where anything is unknown, absent or does not fit.
    """
    host, _, name = spec.partition(":")
    if host != "open_clip" or not name:
        raise ValueError(f"{spec!r} has no text tower: write open_clip:NAME[/TAG], as in open_clip:ViT-B-32")
    pixels = None if size is None else (size, size)
    wish = Wish(weights, pretrained, None, seed, pixels, mean, std, None, options or {})
    named = _named(spec, name, wish, download=pretrained and weights is None)
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"no such weights file: {weights}")
    settings = named.settings()
    model = build(spec, named.wish, lambda: named.open_clip.create_model(named.plain, **settings))
    context = settings.get("text_cfg", {}).get("context_length")
    tokenize = build(spec, wish, lambda: named.open_clip.get_tokenizer(named.plain, context_length=context))
    hashed = state_hash(model.state_dict()) if named.wish.pretrained else None
    if weights is not None:
        state = read_weights(weights)
        fit(model, {key: value for key, value in state.items() if not key.startswith("reducer.")}, weights, spec)
        hashed = file_hash(weights)
    transform, pixels, mean, std = named.feed(model.visual)
    return Clip(model.eval(), spec, tokenize, transform, pixels, mean, std, hashed)


def load_tower(spec: str, name: str, wish: Wish) -> LoadedModel:
    """The image tower alone: features of the texts' space, or logits where the wish names a number of classes."""
    if wish.crop_pct is not None:
        raise ValueError(f"{spec} is an image tower and crops nothing: leave crop_pct out")
    drops = [key for key in DROPS if wish.options.get(key)]
    if drops:
        raise ValueError(f"{spec} has no {drops[0]}: leave it out")
    wish = replace(wish, options={key: value for key, value in wish.options.items() if key not in DROPS})
    named = _named(spec, name, wish, download="/" in name and wish.weights is None)
    settings = named.settings()
    if not named.wish.pretrained:
        settings["text_cfg"] = NO_TEXT
    clip = build(spec, named.wish, lambda: named.open_clip.create_model(named.plain, **settings))
    transform, pixels, mean, std = named.feed(clip.visual)
    model = clip.visual
    if classes := wish.num_classes:
        model = build(spec, wish, lambda: Classifier(clip.visual, classes, pixels))
    hashed = weigh(spec, model, named.wish, lambda state: _state(named.open_clip, clip, model, state))
    return LoadedModel(model.eval(), spec, transform, pixels, mean, std, wish.num_classes or None, hashed)


class Classifier(nn.Module):
    """An image tower with a linear head: images [B, 3, H, W] -> logits [B, classes].

    The head reads what the tower pools, before its projection into the texts' space, as CLIP's linear probe does.
    """

    def __init__(self, visual: nn.Module, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        if getattr(visual, "proj", None) is not None:
            visual.proj = None
        with torch.no_grad():
            width = visual(torch.zeros(1, 3, *size)).shape[-1]
        self.visual, self.head = visual, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.visual(images))

    def get_classifier(self) -> nn.Linear:
        """The head, as timm names it."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the tower."""
        self.visual.set_grad_checkpointing(enable)  # type: ignore[operator]


@dataclass(frozen=True)
class _Named:
    """A model that open_clip knows, and where its weights come from: `wish.pretrained` means its own download."""

    open_clip: Any
    spec: str
    plain: str
    tag: str
    tags: Sequence[str]
    wish: Wish

    def settings(self) -> dict[str, Any]:
        """Arguments of open_clip.create_model."""
        found: dict[str, Any] = _configured(self.open_clip, self.plain, self.wish.options)
        found |= {"force_image_size": self.wish.size, "load_weights": self.wish.pretrained}
        return found | ({"pretrained": self.tag, "require_pretrained": True} if self.wish.pretrained else {})

    def feed(
        self, visual: Any
    ) -> tuple[Callable[[Any], Tensor], tuple[int, int], tuple[float, ...], tuple[float, ...]]:
        """The transform, and its size, mean and deviation."""
        # without its weights open_clip assumes CLIP's own mean and std, which is wrong for SigLIP and others
        tags = [self.tag] if self.tag else self.tags
        known = {} if self.wish.pretrained else _agreed(self.open_clip, self.plain, tags)
        chosen = dict(visual.preprocess_cfg) | known
        size = chosen["size"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        mean, std = tuple(self.wish.mean or chosen["mean"]), tuple(self.wish.std or chosen["std"])
        ways = {key: chosen[key] for key in ("interpolation", "resize_mode", "fill_color")}
        return self.open_clip.image_transform(size, is_train=False, mean=mean, std=std, **ways), size, mean, std


def _named(spec: str, name: str, wish: Wish, download: bool) -> _Named:
    try:
        import open_clip
    except ImportError:
        raise ValueError(f'{spec} needs open_clip: pip install "winnow-vision[clip]"') from None
    plain, _, tag = name.partition("/")
    if plain not in open_clip.list_models():
        raise ValueError(unknown(spec, plain, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(plain)
    if (tag and tag not in tags) or (wish.pretrained and not tag):
        asked = f"no pretrained tag {tag!r}" if tag else "several pretrained tags"
        raise ValueError(
            f"{spec}: {plain} has {asked}; write open_clip:{plain}/TAG, TAG one of: {', '.join(tags) or 'none'}"
        )
    return _Named(open_clip, spec, plain, tag, tags, replace(wish, pretrained=download))


def _configured(open_clip: Any, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the model's configuration that `options` touch, with them put in."""
    own = open_clip.get_model_config(name)
    found = dict(options)
    for section in SECTIONS:
        if section in options:
            found[section] = {**own[section], **options[section]}
    return found


def _agreed(open_clip: Any, name: str, tags: Sequence[str]) -> dict[str, Any]:
    """The preprocessing that all these tags share."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    found = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    shared = {key: {str(one.get(key)): one.get(key) for one in found} for key in keys}
    return {
        key: next(iter(values.values()))
        for key, values in shared.items()
        if len(values) == 1 and None not in values.values()
    }


def _state(open_clip: Any, clip: nn.Module, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a CLIP, a tower or a classifier's weights belongs to `model`, which is clip's tower or a classifier of it."""
    head = {key: state[key] for key in ("head.weight", "head.bias") if key in state}
    whole = any(key.startswith("visual.") for key in state)
    if isinstance(model, Classifier):
        state = {key: value for key, value in state.items() if key not in head}
    tower = dict(state) if whole else {f"visual.{key}": value for key, value in state.items()}
    open_clip.model.resize_pos_embed(tower, clip)
    tower = {key: value for key, value in tower.items() if key.startswith("visual.")}
    if not isinstance(model, Classifier):
        return {key.removeprefix("visual."): value for key, value in tower.items()}
    if model.visual.state_dict().get("proj") is None:
        tower.pop("visual.proj", None)
    return tower | head
