"""hf:ID_OR_PATH: a Hugging Face image classifier or vision tower, with the transform of its own image processor.

Wolf et al., Transformers, 2020; transformers 5. Its classes read the files; Winnow only says which, and refuses in one line.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._weights import REDUCER, state_hash
from .models import LoadedModel, Wish, build, one_line, quiet, reachable_hub, weigh

WEIGHTS = ("*.safetensors", "*.bin")


def load(spec: str, name: str, wish: Wish) -> LoadedModel:
    """The model of a hub id or of a folder made by `save_pretrained`; a folder brings its weights unless others are given.

    ValueError or FileNotFoundError, one line, where anything is missing or does not fit.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError(f'{spec} needs transformers: pip install "winnow-vision[hf]"') from None
    folder = Path(name).expanduser()
    _refuse(spec, name, folder, wish)
    where = str(folder) if folder.is_dir() else name
    with quiet(), no_bars(transformers), reachable_hub():
        config = one_line(
            spec, "has no configuration that can be read", lambda: transformers.AutoConfig.from_pretrained(where)
        )
        processor = _processor(transformers, spec, where, wish)
        kind, config = _kind(transformers, spec, config, wish)
        stored = wish.pretrained or (folder.is_dir() and any(next(folder.glob(pattern), None) for pattern in WEIGHTS))
        if stored and wish.weights is None:
            model = one_line(spec, "cannot be loaded", lambda: _stored(spec, kind, where, config))
            hashed: str | None = state_hash(model.state_dict())
        else:
            model = build(spec, wish, lambda: kind.from_config(config))
            hashed = weigh(spec, model, wish, None if _classifies(config) else _tower)
    transform = partial(_pixels, processor)
    size = _size(spec, transform)
    _meet(spec, model, size)
    plain = not getattr(processor, "do_normalize", True)
    return LoadedModel(
        model=model.eval(),
        spec=spec,
        transform=transform,
        size=size,
        mean=(0.0,) * 3 if plain else tuple(processor.image_mean),
        std=(1.0,) * 3 if plain else tuple(processor.image_std),
        num_classes=config.num_labels if _classifies(config) else None,
        weights_hash=hashed,
    )


def _refuse(spec: str, name: str, folder: Path, wish: Wish) -> None:
    """What can be told before anything is read."""
    from ._vlm_model import SHIPPED

    if name in SHIPPED:
        raise ValueError(
            f"{spec} is a vision-language model: winnow generate and compare take it, and measure with --text"
        )
    if wish.size is not None or wish.crop_pct is not None:
        raise ValueError(f"{spec}: its own image processor resizes and crops; leave size and crop_pct out")
    if wish.options or wish.new_head:
        raise ValueError(f"{spec}: options and new_head are for timm models; leave them out")
    if not folder.is_dir() and name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{spec}: no such folder {folder}")


def _classifies(config: Any) -> bool:
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def _kind(transformers: Any, spec: str, config: Any, wish: Wish) -> tuple[Any, Any]:
    """The class to build, and the part of the configuration it is built from: of a model of images and text, the images'."""
    if _classifies(config):
        if wish.num_classes not in (None, config.num_labels):
            raise ValueError(f"{spec} has {config.num_labels} classes: leave num_classes out")
        return transformers.AutoModelForImageClassification, config
    if wish.num_classes:
        raise ValueError(f"{spec} is a vision tower, it has no classes: leave num_classes out")
    vision = getattr(config, "vision_config", config)
    if type(vision) not in transformers.MODEL_MAPPING:
        raise ValueError(f"{spec} is a {type(config).__name__}: give an image classifier or a vision tower")
    return transformers.AutoModel, vision


def _stored(spec: str, kind: Any, where: str, config: Any) -> nn.Module:
    """The model with its own weights, every one of them; the pooler of a bare tower may be missing."""
    words = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    model, found = kind.from_pretrained(where, **words)
    if any(key.startswith(REDUCER) for key in found["unexpected_keys"]):
        raise ValueError("it was saved while reduced, and winnow.load(model, FOLDER) in Python takes its reducer along")
    missing = sorted(found["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model, found = kind.from_pretrained(where, add_pooling_layer=False, **words)
        missing = sorted(found["missing_keys"])
    if missing or found["mismatched_keys"]:
        wrong = [*missing, *(str(key) for key in found["mismatched_keys"])]
        raise ValueError(f"{len(wrong)} weights are missing or of another shape, the first is {wrong[0]}")
    return model


def _tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's part of a whole model's state; a bare tower is taken as it is."""
    prefix = "vision_model."
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return part or state


def _processor(transformers: Any, spec: str, where: str, wish: Wish) -> Any:
    wished = {"image_mean": wish.mean, "image_std": wish.std}
    words = {key: list(value) for key, value in wished.items() if value is not None}
    return one_line(
        spec,
        "has no image processor configuration that can be read; save its processor beside it",
        lambda: transformers.AutoImageProcessor.from_pretrained(where, **words),
    )


def _pixels(processor: Any, image: Any) -> Tensor:
    """[3, H, W] of a PIL image."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _size(spec: str, transform: Any) -> tuple[int, int]:
    """Pixels of what the transform gives, whatever comes in."""
    from PIL import Image

    wide, tall = (tuple(transform(Image.new("RGB", size)).shape[-2:]) for size in ((320, 240), (240, 320)))
    if wide != tall:
        raise ValueError(f"{spec}: its image processor gives images of several sizes ({wide}, {tall}); it must crop")
    return wide


def _meet(spec: str, model: Any, size: tuple[int, int]) -> None:
    """Give the model the processor's size as its own where it takes any size; ValueError where it takes but one.

    DINOv2 resamples its positions at every call, from 518 to 224 pixels as a rule: here once, with its own function.
    """
    own = model.config.vision_config.image_size if hasattr(model.config, "vision_config") else model.config.image_size
    if tuple(own if isinstance(own, list | tuple) else (own, own)) == size:
        return
    embed = next((part for part in model.modules() if hasattr(part, "interpolate_pos_encoding")), None)
    if embed is not None and "interpolate_pos_encoding" in inspect.signature(type(embed).forward).parameters:
        raise ValueError(f"{spec} takes images of {own} pixels, its image processor gives {size}: mend one of the two")
    if embed is not None:
        patch = embed.patch_embeddings.patch_size
        width = embed.position_embeddings.shape[-1]
        tokens = torch.empty(1, 1 + (size[0] // patch[0]) * (size[1] // patch[1]), width)
        with torch.no_grad():
            embed.position_embeddings = nn.Parameter(embed.interpolate_pos_encoding(tokens, *size).clone())
    model.config.image_size = size[0] if size[0] == size[1] else list(size)


@contextmanager
def no_bars(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers' own meanwhile."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
