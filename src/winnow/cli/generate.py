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
from .._save import Trained
from .._vlm_model import ask, bare_vlm
from ..compare_vlm import at_budgets
from ..reducer import Method
from ..view import vlm as kept
from . import _options as o
from ._answers import answer_all
from .show import _open

NAME = "generate"


def command(
    model: Annotated[str, typer.Option(help="hf:ID_OR_PATH of a vision-language model", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option(help="a photograph; may be repeated", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option(help="what to ask; the model's own chat template is put around it")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="as in FastV(layer=2); may be repeated")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="image tokens for methods written without an amount: a share up to 1, a number above"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="at most so many new tokens")] = 64,
    out: Annotated[Path, typer.Option(help="picture of the kept patches: .png or .svg")] = Path("generate.png"),
    questions: Annotated[
        Path | None, typer.Option(help="instead: a file of LLaVA's questions, as LLaVA-Bench's questions.jsonl")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="folder of their images; the file's own if not given")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="JSON lines to append the answers to; goes on where it stopped")
    ] = None,
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
        done, n = _file(model, methods, budget, questions, images, answers, tokens, o.device_of(device))
        print(
            json.dumps({"answered": done, "questions": n})
            if as_json
            else f"{done} of {n} questions answered now: {answers}"
        )
        return
    if not image or prompt is None:
        raise ValueError("give --image and --prompt, or --questions and --answers")
    view.files.kind(out)
    pictures = [_open(path) for path in image]
    processor, vlm, trained = bare_vlm(model)
    methods = _methods(methods, trained, budget)
    where = o.device_of(device)
    inputs = ask(processor, [pictures], [prompt])
    vlm.to(where)
    there = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = [answer(processor, vlm, None, there, tokens)]
    drawn: list[tuple[str, list[kept.Layers]]] = []
    for one in methods:
        row, layers = _reduced(processor, vlm, one, there, prompt, tokens, trained)
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
    processor: Any,
    vlm: Any,
    method: Method,
    inputs: dict[str, Any],
    prompt: str,
    tokens: int,
    trained: Trained | None = None,
) -> tuple[dict[str, Any], list[kept.Layers]]:
    _put(vlm, method, trained)
    with winnow.watch(vlm) as run:
        tell(vlm, [prompt])
        row = answer(processor, vlm, method, inputs, tokens)
    winnow.restore(vlm)
    held = run.columns
    taken = int(held.total.sum()) if method.facts.where != "llm" else int((run.ledger.owner < 0).sum())
    row["image_tokens"] -= taken
    return row, kept.layers_of(run, method)


def _methods(methods: list[Method], trained: Trained | None, budget: float | None) -> list[Method]:
    """The methods asked for, or the one the model was saved with; under the budget where one is given."""
    found = methods or ([trained.method] if trained and trained.method else [])
    return found if budget is None else at_budgets(found, [budget])


def _put(vlm: Any, method: Method, trained: Trained | None) -> None:
    """Reduce the model, with trained weights where they are the method's."""
    if trained is not None:
        trained.reduce(vlm, method)
    else:
        winnow.reduce(vlm, method)


def _file(
    model: str,
    methods: list[Method],
    budget: float | None,
    questions: Path,
    images: Path | None,
    answers: Path,
    tokens: int,
    where: Any,
) -> tuple[int, int]:
    """Answer a file of questions, with the method the model was saved with where none is given."""
    processor, vlm, trained = bare_vlm(model)
    method = next(iter(_methods(methods, trained, budget)), None)
    if method is not None:
        _put(vlm, method, trained)
    vlm.to(where)

    def say(path: Path | None, prompt: str) -> str:
        if method is not None:
            tell(vlm, [prompt])
        inputs = ask(processor, [[] if path is None else [_open(path)]], [prompt])
        there = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return answer(processor, vlm, method, there, tokens)["answer"]

    return answer_all(questions, images, answers, model if method is None else f"{model} {method!r}", say)


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
