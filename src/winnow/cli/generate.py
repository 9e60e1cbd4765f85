"""winnow generate: a vision-language model's answer about a photograph, plain and with each method, and what each kept.

Winnow's own; models and processors are transformers' (Wolf et al., 2020).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

import winnow

from .. import view
from ..models import one_line, quiet, reachable_hub
from ..reducer import Method
from ..view.overlay import grid_of
from ..view.sheets import photograph
from . import _options as o
from .show import _open

NAME = "generate"
Layers = list[tuple[int | str, np.ndarray, int]]


def command(
    model: Annotated[str, typer.Option(help="hf:ID_OR_PATH of a vision-language model", show_default=False)],
    image: Annotated[list[Path], typer.Option(help="a photograph; may be repeated", show_default=False)],
    prompt: Annotated[str, typer.Option(help="what to ask; the model's own chat template is put around it")],
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="as in FastV(layer=2); may be repeated")
    ] = None,
    tokens: Annotated[int, typer.Option(help="at most so many new tokens")] = 64,
    out: Annotated[Path, typer.Option(help="picture of the kept patches: .png or .svg")] = Path("generate.png"),
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Answer a question about photographs, with each method, and draw the image tokens it kept."""
    methods = o.methods_of(method)
    view.files.kind(out)
    pictures = [_open(path) for path in image]
    processor, vlm = load(model)
    where = o.device_of(device)
    inputs = ask(processor, pictures, prompt)
    vlm.to(where)
    there = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = [answer(processor, vlm, None, there, tokens)]
    drawn: list[tuple[str, list[Layers]]] = []
    for one in methods:
        row, layers = _reduced(processor, vlm, one, there, tokens)
        found.append(row)
        drawn.append((repr(one), layers))
    files = draw(processor, inputs, pictures, drawn, out, f"{model}: {prompt}") if drawn else []
    if as_json:
        print(json.dumps({"pictures": [str(file) for file in files], "answers": found}))
        return
    for row in found:
        print(f"{row['method'] or 'plain'} ({row['image_tokens']} image tokens): {row['answer']}")
    for file in files:
        print(file)


def load(spec: str) -> tuple[Any, Any]:
    """Processor and model of `hf:ID_OR_PATH`, in evaluation mode; ValueError in one line where they cannot be had."""
    host, _, name = spec.partition(":")
    if host != "hf" or not name:
        raise ValueError(f"{spec}: a vision-language model is written hf:ID_OR_PATH, as in hf:llava-hf/llava-1.5-7b-hf")
    try:
        import transformers
    except ImportError:
        raise ValueError(f'{spec} needs transformers: pip install "winnow-vision[hf]"') from None
    from .._hf_model import no_bars

    kind, made = transformers.AutoModelForImageTextToText, transformers.AutoProcessor
    with quiet(), no_bars(transformers), reachable_hub():
        processor = one_line(spec, "has no processor that can be read", lambda: made.from_pretrained(name))
        vlm = one_line(spec, "cannot be loaded", lambda: kind.from_pretrained(name))
    return processor, vlm.eval()


def ask(processor: Any, pictures: list[Image.Image], prompt: str) -> dict[str, Any]:
    """What the processor makes of images and a question, in the model's own chat template where it has one."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    elif processor.image_token not in prompt:
        prompt = f"{processor.image_token}\n" * len(pictures) + prompt
    return dict(processor(images=pictures, text=[prompt], return_tensors="pt"))


def answer(processor: Any, vlm: Any, method: Method | None, inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One row: the method, its answer and the image tokens in the prompt."""
    ids = vlm.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    placeholders = int((inputs["input_ids"] == vlm.config.image_token_id).sum())
    words = processor.decode(new, skip_special_tokens=True).strip()
    return {"method": method and repr(method), "answer": words, "image_tokens": placeholders}


def _reduced(
    processor: Any, vlm: Any, method: Method, inputs: dict[str, Any], tokens: int
) -> tuple[dict[str, Any], list[Layers]]:
    with winnow.reduced(vlm, method), winnow.watch(vlm) as run:
        row = answer(processor, vlm, method, inputs, tokens)
    held = run.columns
    taken = int(held.total.sum()) if method.facts.where != "llm" else int((run.ledger.owner < 0).sum())
    row["image_tokens"] -= taken
    return row, layers_of(run, method)


def layers_of(run: Any, method: Method) -> list[Layers]:
    """Per image, tile or (inside the language model) prompt: place, owner [P] and tokens wherever these changed."""
    found: list[Layers] = []
    before = run.tokens[-1].ledger.owner
    for layer, tokens in sorted(run.tokens.items()):
        owner = tokens.ledger.owner
        found = found or [[] for _ in owner]
        if layer >= 0 and owner.shape == before.shape and torch.equal(owner, before):
            continue
        if layer >= 0 or len(run.tokens) == 1:
            label = {"tower": "after the tower", "llm": f"from block {layer + 1}"}.get(method.facts.where, layer)
            for into, row, count in zip(found, owner.cpu().numpy(), tokens.ledger.counts().tolist(), strict=True):
                into.append((label, row, count))
        before = owner
    return found


def draw(
    processor: Any,
    inputs: dict[str, Any],
    pictures: list[Image.Image],
    drawn: list[tuple[str, list[Layers]]],
    out: Path,
    title: str,
) -> list[Path]:
    """A figure per image (or tile) the model saw: a row per method. Where tokens cannot be told apart, none."""
    shown = seen(processor, inputs, pictures)
    files = []
    for place, pixels in enumerate(shown):
        rows = [(name, _of(layers, place, len(shown), pixels.shape[:2])) for name, layers in drawn]
        rows = [(name, layers) for name, layers in rows if layers]
        if rows:
            path = out if not place else out.with_stem(f"{out.stem}-{place + 1}")
            files.append(view.figure(pixels, rows, path, title, most=4))
    return files


def _of(layers: list[Layers], place: int, pictures: int, shape: tuple[int, int]) -> Layers:
    """What belongs to one picture: a ledger of its own, or its equal share of the prompt's; on a grid of its shape."""
    if len(layers) == pictures:
        return [(label, owner.reshape(grid_of(owner, shape)), count) for label, owner, count in layers[place]]
    if len(layers) != 1 or layers[0][0][1].size % pictures:
        return []
    found: Layers = []
    for label, owner, _ in layers[0]:
        part = np.split(owner, pictures)[place]
        found.append((label, part.reshape(grid_of(part, shape)), len(np.unique(part[part >= 0]))))
    return found


def seen(processor: Any, inputs: dict[str, Any], pictures: list[Image.Image]) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each image or tile as the model saw it; the photographs where it saw patches in a row."""
    pixels, image = inputs["pixel_values"], processor.image_processor
    if pixels.ndim < 4:
        return [np.asarray(picture) for picture in pictures]
    tiles = pixels.flatten(0, pixels.ndim - 4)
    return list(photograph(tiles, image.image_mean, image.image_std))
