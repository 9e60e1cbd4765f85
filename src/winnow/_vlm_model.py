"""hf:ID_OR_PATH as a vision-language model with its processor, and what the processor makes of images and questions.

transformers 5. `hf:scenes` is the small one that ships with Winnow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ._parse import parse, parse_way
from ._reduce import SIGNED
from ._save import Trained
from ._weights import reducer_in
from .models import one_line, quiet, reachable_hub

SHIPPED = {"scenes": "llava_scenes.hf"}
"""Names that stand for a folder in `backbones/`."""


def place(spec: str) -> str:
    """The hub id or folder of `hf:ID_OR_PATH`; ValueError for another spelling, FileNotFoundError for a folder not there."""
    host, _, name = spec.partition(":")
    if host != "hf" or not name:
        raise ValueError(f"{spec}: a vision-language model is written hf:ID_OR_PATH, as in hf:llava-hf/llava-1.5-7b-hf")
    if name in SHIPPED:
        return str(Path(__file__).with_name("backbones") / SHIPPED[name])
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"{spec}: no such folder")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def is_vlm(spec: str) -> bool:
    """`spec` names a model of Hugging Face's that answers in words about images."""
    if not spec.startswith("hf:"):
        return False
    try:
        import transformers

        from . import _llava_projected  # noqa: F401  registers ours with transformers
    except ImportError:
        return False
    name = place(spec)
    with quiet(), reachable_hub():
        config = one_line(
            spec, "has no configuration that can be read", lambda: transformers.AutoConfig.from_pretrained(name)
        )
    return type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_vlm(spec: str, *, reduced: bool = True, **words: Any) -> tuple[Any, Any]:
    """Processor and model of `hf:ID_OR_PATH`, in evaluation mode; ValueError in one line where they cannot be had.

    A model that `save_pretrained` wrote while it was reduced comes back reduced, with its reducer's weights, unless
    reduced=False. words: more for the model's `from_pretrained`, e.g. dtype.
    """
    processor, vlm, trained, how = _loaded(spec, words)
    if trained is not None and reduced:
        assert trained.method is not None
        trained.reduce(vlm, trained.method, **how)
    return processor, vlm


def bare_vlm(spec: str, **words: Any) -> tuple[Any, Any, Trained | None]:
    """The same, never reduced; and the reducer that was saved with it, if any."""
    return _loaded(spec, words)[:3]


def _loaded(spec: str, words: dict[str, Any]) -> tuple[Any, Any, Trained | None, dict[str, Any]]:
    name = place(spec)
    try:
        import transformers

        from . import _llava_projected  # noqa: F401  registers ours with transformers
    except ImportError:
        raise ValueError(f'{spec} needs transformers: pip install "winnow-vision[hf]"') from None
    from ._hf_model import no_bars

    kind, made = transformers.AutoModelForImageTextToText, transformers.AutoProcessor
    with quiet(), no_bars(transformers), reachable_hub():
        processor = one_line(spec, "has no processor that can be read", lambda: made.from_pretrained(name))
        vlm = one_line(spec, "cannot be loaded", lambda: kind.from_pretrained(name, **words))
        signed = vlm.config.__dict__.pop(SIGNED, None)
        trained = Trained(Path(name), parse(signed["method"]), _reducer(name)) if signed else None
    processor.tokenizer.padding_side = "left"
    how = {"way": parse_way(signed["way"]), "expand": signed.get("expand", False)} if signed else {}
    return processor, vlm.eval(), trained, how


def _reducer(name: str) -> dict[str, Tensor]:
    """The reducer's weights among the model's, whatever files they are in."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors"]))
    return reducer_in(folder)


def ask(processor: Any, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> dict[str, Any]:
    """What the processor makes of questions, each about some images, in the model's own chat template if it has one."""
    texts = [_told(processor, len(several), prompt) for several, prompt in zip(pictures, prompts, strict=True)]
    # sample by sample: some processors treat one image of a prompt otherwise than several
    images = [list(several) for several in pictures] if any(pictures) else None
    return dict(processor(images=images, text=texts, padding=len(texts) > 1, return_tensors="pt"))


def _told(processor: Any, images: int, prompt: str) -> str:
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt if processor.image_token in prompt else f"{processor.image_token}\n" * images + prompt
