"""winnow generate: a vision-language model's answer about a photograph, plain and with each method, and what each kept.

Winnow's own; models and processors are transformers' (Wolf et al., 2020).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from torch import Tensor

import winnow

from .. import view
from .._question import tell
from .._vlm_model import ask, load_vlm
from ..reducer import Method
from ..view import vlm as kept
from . import _options as o
from .show import _open

NAME = "generate"


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
    processor, vlm = load_vlm(model)
    where = o.device_of(device)
    inputs = ask(processor, [pictures], [prompt])
    vlm.to(where)
    there = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = [answer(processor, vlm, None, there, tokens)]
    drawn: list[tuple[str, list[kept.Layers]]] = []
    for one in methods:
        row, layers = _reduced(processor, vlm, one, there, prompt, tokens)
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


def answer(processor: Any, vlm: Any, method: Method | None, inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One row: the method, its answer and the image tokens in the prompt."""
    ids = vlm.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    placeholders = int((inputs["input_ids"] == vlm.config.image_token_id).sum())
    words = processor.decode(new, skip_special_tokens=True).strip()
    return {"method": method and repr(method), "answer": words, "image_tokens": placeholders}


def _reduced(
    processor: Any, vlm: Any, method: Method, inputs: dict[str, Any], prompt: str, tokens: int
) -> tuple[dict[str, Any], list[kept.Layers]]:
    with winnow.reduced(vlm, method), winnow.watch(vlm) as run:
        tell(vlm, [prompt])
        row = answer(processor, vlm, method, inputs, tokens)
    held = run.columns
    taken = int(held.total.sum()) if method.facts.where != "llm" else int((run.ledger.owner < 0).sum())
    row["image_tokens"] -= taken
    return row, kept.layers_of(run, method)


def draw(
    processor: Any,
    inputs: dict[str, Any],
    pictures: list[Image.Image],
    drawn: list[tuple[str, list[kept.Layers]]],
    out: Path,
    title: str,
) -> list[Path]:
    """A figure per image (or tile) the model saw: a row per method. Where tokens cannot be told apart, none."""
    shown = kept.seen(processor, inputs, pictures)
    files = []
    for place, pixels in enumerate(shown):
        found = [(name, kept.of(layers, place, len(shown), pixels.shape[:2])) for name, layers in drawn]
        rows = [(name, [(kept.words(at), owner, n) for at, owner, n in layers]) for name, layers in found if layers]
        if rows:
            path = out if not place else out.with_stem(f"{out.stem}-{place + 1}")
            files.append(view.figure(pixels, rows, path, title, most=4))
    return files
