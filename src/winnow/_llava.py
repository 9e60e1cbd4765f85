"""LLaVA models to be trained: opened with their processor, taken apart into what learns, written back as a folder.

Liu et al., LLaVA-1.5, 2024; classes and files are Hugging Face's, projector files also LLaVA's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from ._hf_model import no_bars
from ._llava_new import PROJECTORS, new_llava, resized
from ._save import Trained
from ._vlm_model import bare_vlm
from ._weights import file_hash, fit, read_weights, state_hash, without_reducer

PARTS = ("vision", "projector", "llm", "reducer")
LLAVA_NAMES = {"0": "linear_1", "2": "linear_2"}
"""Layers of the projector in LLaVA's own files, and in Hugging Face's."""
PROJECTOR = re.compile(r"(?:^|\.)(?:mm_projector|multi_modal_projector)\.(.+)$")
BARE = ("weight", "bias")
"""Names of a linear projector in LLaVA's files."""


@dataclass(frozen=True, eq=False)
class Llava:
    """A model with its processor, and what an image costs it."""

    model: nn.Module
    processor: Any
    spec: str
    weights_hash: str
    slots: int
    """Placeholders of an image in the sequence."""
    size: tuple[int, int]
    """Height and width in pixels of what the tower sees."""
    trained: Trained | None = None
    """The reducer that was saved with it, left out of the model."""

    @property
    def image_token(self) -> str:
        """What stands for one image feature in a text."""
        return self.processor.image_token

    def pixels(self, image: Image.Image, pad: bool) -> Tensor:
        """[3, H, W] of a PIL RGB image; pad: made square with the mean colour first, as in LLaVA-1.5."""
        maker = self.processor.image_processor
        if pad:
            image = squared(image, tuple(int(255 * mean) for mean in maker.image_mean))
        return maker(images=image, return_tensors="pt")["pixel_values"][0]


def load_llava(
    spec: str,
    *,
    weights: Path | None = None,
    vision: str | None = None,
    vision_weights: Path | None = None,
    projector: str | None = None,
    layer: int = -2,
    size: int | None = None,
    seed: int = 0,
) -> Llava:
    """`hf:ID_OR_PATH` in float32; or, where `vision` names a tower, that tower and the language model `spec`.

    weights: a whole model's file; projector: mlp, linear or downsample for a new one, or the file of another run's in
    either format; layer: the hidden state it reads; size: pixels of the images, the tower's positions are resampled.
    ValueError or FileNotFoundError, one line, where anything is absent or does not fit.
    """
    trained = None
    new, file = (projector or "mlp", None) if projector in (None, *PROJECTORS) else ("mlp", Path(str(projector)))
    if vision is not None:
        words = {"weights": vision_weights, "projector": new, "layer": layer, "seed": seed}
        processor, model = new_llava(spec, vision, **words)  # type: ignore[arg-type]
    elif projector in PROJECTORS or vision_weights is not None:
        raise ValueError(f"{spec} has a tower and a projector: a new one of either needs the name of a tower (vision)")
    else:
        processor, model, trained = bare_vlm(spec, dtype=torch.float32)
    parts_of(model)
    if size is not None:
        resized(processor, model, size)
    pixels = _tried(processor, spec)
    if weights is not None:
        fit(model, without_reducer(model, read_weights(weights)), weights, spec)
    if file is not None:
        read_projector(model, file)
    hashed = file_hash(weights) if weights is not None else state_hash(model.state_dict())
    with torch.no_grad():
        features = model.get_image_features(pixel_values=torch.zeros_like(pixels[:1])).pooler_output[0]  # type: ignore[operator]
    return Llava(model, processor, spec, hashed, len(features), tuple(pixels.shape[-2:]), trained)  # type: ignore[arg-type]


def _tried(processor: Any, spec: str) -> Tensor:
    """[2, 3, H, W] of two images of different shapes; ValueError where processor or tokenizer does not do."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise ValueError(
            f"{spec}: its tokenizer must be a fast one with an end token, to tell which tokens are the answer's"
        )
    images = [Image.new("RGB", size) for size in ((64, 48), (48, 64))]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        raise ValueError(
            f"{spec}: its image processor cuts images up or leaves their shape; task: instruct takes one size"
        )
    return pixels


def parts_of(model: Any) -> dict[str, list[nn.Module]]:
    """Vision tower, projector, language model, and the reducer if there is one; TypeError where this is no LLaVA."""
    core = getattr(model, "model", None)
    names = ("vision_tower", "multi_modal_projector", "language_model")
    if not all(hasattr(core, name) for name in names):
        raise TypeError(
            f"{type(model).__name__} has no vision_tower, multi_modal_projector and language_model: "
            "task: instruct trains LlavaForConditionalGeneration"
        )
    assert core is not None
    found = {"vision": [core.vision_tower], "projector": [core.multi_modal_projector]}
    found |= {"llm": [core.language_model, model.lm_head]}
    return found | {"reducer": [model.reducer] if hasattr(model, "reducer") else []}


def read_projector(model: nn.Module, path: Path) -> None:
    """Fill the projector from a file of Hugging Face's names or of LLaVA's (`mm_projector.bin`); ValueError otherwise."""
    found = {}
    if not path.expanduser().is_file():
        raise FileNotFoundError(f"no such file: {path}; instruct.projector is a file or one of {', '.join(PROJECTORS)}")
    for key, value in read_weights(path.expanduser()).items():
        match = PROJECTOR.search(key)
        if match:
            first, dot, rest = (f"linear.{match[1]}" if match[1] in BARE else match[1]).partition(".")
            found[LLAVA_NAMES.get(first, first) + dot + rest] = value
    if not found:
        raise ValueError(
            f"{path} holds no projector: its names must have mm_projector or multi_modal_projector in them"
        )
    fit(parts_of(model)["projector"][0], found, path, "the projector")


def projector_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole model's projector under LLaVA's names, `model.mm_projector.0.weight` and so on."""
    theirs = {ours: name for name, ours in LLAVA_NAMES.items()}
    found = {}
    for key, value in state.items():
        match = PROJECTOR.search(key)
        if match:
            first, dot, rest = match[1].removeprefix("linear.").partition(".")
            found[f"model.mm_projector.{theirs.get(first, first)}{dot}{rest}"] = value
    return found


def write_folder(llava: Llava, folder: Path, state: Mapping[str, Tensor]) -> None:
    """`state` as a Hugging Face folder with the processor, and the projector beside it as LLaVA's `mm_projector.bin`."""
    folder.mkdir(parents=True, exist_ok=True)
    with no_bars(transformers):
        llava.model.save_pretrained(folder, state_dict=dict(state))  # type: ignore[operator]
        llava.processor.save_pretrained(folder)
    torch.save(projector_state(state), folder / "mm_projector.bin")


def squared(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of one colour."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    found = Image.new("RGB", (side, side), colour)
    found.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return found
