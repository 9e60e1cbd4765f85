"""winnow generate: a vision-language model's answer about a photograph, plain and with each method, and what each kept.

Winnow's own; models and processors are transformers' (Wolf et al., 2020).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from .. import view
from ..view import vlm as kept
from . import _options as o
from ._answers import Answering, answer_all
from .show import _open

NAME = "generate"

Model = Annotated[str, typer.Option(help="hf:ID_OR_PATH of a vision-language model", show_default=False)]
Photographs = Annotated[list[Path] | None, typer.Option(help="a photograph; may be repeated", show_default=False)]
Prompt = Annotated[str | None, typer.Option(help="what to ask; the model's own chat template is put around it")]
Budget = Annotated[
    float | None,
    typer.Option(help="image tokens for methods written without an amount: a share up to 1, a number above"),
]
MostTokens = Annotated[int, typer.Option(help="at most so many new tokens")]
Out = Annotated[Path, typer.Option(help="picture of the kept patches: .png or .svg")]
Questions = Annotated[
    Path | None, typer.Option(help="instead: a file of LLaVA's questions, as LLaVA-Bench's questions.jsonl")
]
Images = Annotated[Path | None, typer.Option(help="folder of their images; the file's own if not given")]
Answers = Annotated[Path | None, typer.Option(help="JSON lines to append the answers to; goes on where it stopped")]


def command(
    model: Model,
    image: Photographs = None,
    prompt: Prompt = None,
    method: o.SomeMethods = None,
    budget: Budget = None,
    tokens: MostTokens = 64,
    out: Out = Path("generate.png"),
    questions: Questions = None,
    images: Images = None,
    answers: Answers = None,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Answer a question about photographs, with each method, and draw the image tokens it kept; or a file of questions."""
    methods = o.methods_of(method)
    if questions is not None or answers is not None:
        if questions is None or answers is None or image or prompt or len(methods) > 1:
            raise ValueError(
                "a file of questions takes --questions, --answers, at most one --method, no --image or --prompt"
            )
        asked = Answering(model, methods, budget, tokens, o.device_of(device))
        done, n = answer_all(questions, images, answers, asked.name, asked.once)
        print(
            json.dumps({"answered": done, "questions": n})
            if as_json
            else f"{done} of {n} questions answered now: {answers}"
        )
        return
    o.refuse({"--images": images}, "is for a file of questions: give --questions and --answers")
    if not image or prompt is None:
        raise ValueError("give --image and --prompt, or --questions and --answers")
    view.files.kind(out)
    pictures = [_open(path) for path in image]
    asked = Answering(model, methods, budget, tokens, o.device_of(device))
    inputs = asked.inputs(pictures, prompt)
    found, drawn = [asked.plain(inputs)], []
    for one in asked.methods:
        row, layers = asked.reduced(one, inputs, prompt)
        found.append(row)
        drawn.append((repr(one), layers))
    files = draw(asked, inputs, pictures, drawn, out, f"{model}: {prompt}") if drawn else []
    if as_json:
        print(json.dumps({"pictures": [str(file) for file in files], "answers": found}))
        return
    for row in found:
        print(f"{row['method'] or 'plain'} ({row['image_tokens']} image tokens): {row['answer']}")
    for file in files:
        print(file)


def draw(
    asked: Answering,
    inputs: dict[str, Any],
    pictures: list[Image.Image],
    drawn: list[tuple[str, list[kept.Layers]]],
    out: Path,
    title: str,
) -> list[Path]:
    """A figure per image (or tile) the model saw: a row per method. Where tokens cannot be told apart, none."""
    where, files = kept.places(asked.vlm.config, inputs), list[Path]()
    for place, pixels in enumerate(kept.seen(asked.processor, inputs, pictures)):
        found = [(name, kept.of(layers, place, where, pixels.shape[:2])) for name, layers in drawn]
        rows = [(name, [(kept.words(at), owner, n) for at, owner, n in layers]) for name, layers in found if layers]
        if rows:
            path = out if not place else out.with_stem(f"{out.stem}-{place + 1}")
            files.append(view.figure(pixels, rows, path, title, most=4))
    return files
