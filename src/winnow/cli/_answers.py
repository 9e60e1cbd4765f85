"""Answers of a vision-language model, plain or reduced; to a file of LLaVA's questions as LLaVA's own scripts write them.

Liu et al., 2023; questions {question_id, image, text}, answers {question_id, prompt, text, answer_id, model_id, metadata}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import winnow

from .._question import tell
from .._vlm_model import ask, bare_vlm
from ..compare_vlm import amount_of, open_to
from ..data.llava_eval.answers import Question, questions, records
from ..reducer import Method
from ..view import vlm as kept
from .show import _open


class Answering:
    """A model with its processor, and the methods asked for: or the one that the model was saved with."""

    def __init__(
        self, spec: str, methods: Sequence[Method], budget: float | None, tokens: int, device: torch.device
    ) -> None:
        self.processor, self.vlm, self.trained = bare_vlm(spec)
        saved = [self.trained.method] if self.trained and self.trained.method else []
        found = list(methods) or saved
        if budget is not None and not found:
            raise ValueError(f"--budget {budget:g} is for a method, and {spec} was saved with none: give --method too")
        if budget is not None and budget <= 0:
            raise ValueError(f"--budget {budget:g}: a share up to 1, or a number of image tokens above")
        if budget is not None and not any(map(open_to, found)):
            raise ValueError(f"--budget {budget:g}: {found[0]} says itself how much it keeps; leave one of the two out")
        self.methods = [one.leaving(amount_of(budget)) if budget is not None and open_to(one) else one for one in found]
        self.vlm.to(device)
        self.spec, self.tokens, self.device = spec, tokens, device

    @property
    def name(self) -> str:
        """The model, with the method that `once` answers with."""
        return f"{self.spec} {self.methods[0]!r}" if self.methods else self.spec

    def inputs(self, pictures: list[Image.Image], prompt: str) -> dict[str, Any]:
        """What the model is given, on its device."""
        found = ask(self.processor, [pictures], [prompt])
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in found.items()}

    def plain(self, inputs: dict[str, Any], method: Method | None = None) -> dict[str, Any]:
        """One row: the method, the model's answer as it is now, and the image tokens in the prompt."""
        ids = self.vlm.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        placeholders = int((inputs["input_ids"] == self.vlm.config.image_token_id).sum())
        words = self.processor.decode(new, skip_special_tokens=True).strip()
        return {"method": method and repr(method), "answer": words, "image_tokens": placeholders}

    def reduced(self, method: Method, inputs: dict[str, Any], prompt: str) -> tuple[dict[str, Any], list[kept.Layers]]:
        """The row of a method, with the image tokens it left, and what it kept where."""
        self._put(method)
        with winnow.watch(self.vlm) as run:
            tell(self.vlm, [prompt])
            row = self.plain(inputs, method)
        winnow.restore(self.vlm)
        apart = method.facts.where == "llm"
        row["image_tokens"] -= int((run.ledger.owner < 0).sum() if apart else run.columns.total.sum())
        return row, kept.layers_of(run, method)

    def once(self, path: Path | None, prompt: str) -> str:
        """The answer with the first method, if there is one; the model stays reduced for the next question."""
        method = next(iter(self.methods), None)
        if method is not None:
            if not hasattr(self.vlm, "reducer"):
                self._put(method)
            tell(self.vlm, [prompt])
        return self.plain(self.inputs([] if path is None else [_open(path)], prompt), method)["answer"]

    def _put(self, method: Method) -> None:
        """Reduce the model, with trained weights where they are the method's."""
        (winnow.reduce if self.trained is None else self.trained.reduce)(self.vlm, method)


def answer_all(
    file: Path, images: Path | None, out: Path, model: str, say: Callable[[Path | None, str], str]
) -> tuple[int, int]:
    """Append to `out` what `say(image, prompt)` answers to every question it lacks; (newly answered, questions).

    Refused before the first answer where an image is missing, or `out` holds answers to other questions or of another model.
    """
    asked = questions(file)
    root = images or file.parent
    missing = [one for one in asked if one.image is not None and not (root / one.image).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(asked)} images are not in {root}, the first is {missing[0].image}: give --images"
        )
    done = {str(one["question_id"]): one for one in records(out, ("question_id", "model_id"))} if out.exists() else {}
    others = sorted(set(done) - {one.id for one in asked}) or [one for one in done if done[one]["model_id"] != model]
    if others:
        raise ValueError(
            f"{out} holds answers to other questions or of another model (question {others[0]}): give another file"
        )
    todo = [one for one in asked if one.id not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as lines:
        for one in todo:
            text = say(None if one.image is None else root / one.image, one.text)
            lines.write(json.dumps(_record(one, text, model), ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    return len(todo), len(asked)


def _record(one: Question, text: str, model: str) -> dict[str, object]:
    name = hashlib.sha256(f"{one.id}\0{model}\0{text}".encode()).hexdigest()[:22]
    asked: int | str = int(one.id) if one.id.isdigit() else one.id
    return {
        "question_id": asked,
        "prompt": one.text,
        "text": text,
        "answer_id": name,
        "model_id": model,
        "metadata": {},
    }
