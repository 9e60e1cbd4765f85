"""load_clip: a whole open_clip model, image and text tower, with the tokenizer and the transform that belong to it.

Ilharco et al., OpenCLIP, 2021; names, configurations, tokenizers and preprocessing are open_clip's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ._weights import file_hash, fit, read_weights, state_hash
from .models import Wish, _agreed, _unknown, build

SECTIONS = ("vision_cfg", "text_cfg")


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
    try:
        import open_clip
    except ImportError:
        raise ValueError(f'{spec} needs open_clip: pip install "winnow-vision[clip]"') from None
    plain, _, tag = name.partition("/")
    if plain not in open_clip.list_models():
        raise ValueError(_unknown(spec, plain, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(plain)
    if (tag and tag not in tags) or (pretrained and not tag):
        raise ValueError(f"{spec}: write open_clip:{plain}/TAG, TAG one of: {', '.join(tags) or 'none there'}")
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"no such weights file: {weights}")
    download = pretrained and weights is None
    wish = Wish(weights, download, None, seed, None, mean, std, None)
    settings: dict[str, Any] = {**_configured(open_clip, plain, options or {}), "force_image_size": size}
    settings |= {"pretrained": tag, "require_pretrained": True} if download else {"load_weights": False}
    model = build(spec, wish, lambda: open_clip.create_model(plain, **settings))
    context = settings.get("text_cfg", {}).get("context_length")
    tokenize = build(spec, wish, lambda: open_clip.get_tokenizer(plain, context_length=context))
    hashed = state_hash(model.state_dict()) if download else None
    if weights is not None:
        state = read_weights(weights)
        fit(model, {key: value for key, value in state.items() if not key.startswith("reducer.")}, weights, spec)
        hashed = file_hash(weights)
    # without its weights open_clip assumes CLIP's own mean and std, which is wrong for SigLIP and others
    known = {} if download else _agreed(open_clip, plain, [tag] if tag else tags)
    chosen = dict(model.visual.preprocess_cfg) | known
    pixels = chosen["size"]
    pixels = (pixels, pixels) if isinstance(pixels, int) else tuple(pixels)
    mean, std = tuple(mean or chosen["mean"]), tuple(std or chosen["std"])
    ways = {key: chosen[key] for key in ("interpolation", "resize_mode", "fill_color")}
    transform = open_clip.image_transform(pixels, is_train=False, mean=mean, std=std, **ways)
    return Clip(model.eval(), spec, tokenize, transform, pixels, mean, std, hashed)


def _configured(open_clip: Any, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the model's configuration that `options` touch, with them put in."""
    own = open_clip.get_model_config(name)
    found = dict(options)
    for section in SECTIONS:
        if section in options:
            found[section] = {**own[section], **options[section]}
    return found
