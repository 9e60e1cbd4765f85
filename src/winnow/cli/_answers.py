"""Answers to a file of LLaVA's questions, one JSON line each, as LLaVA's own scripts write them; goes on where it stopped.

Liu et al., 2023; questions {question_id, image, text}, answers {question_id, prompt, text, answer_id, model_id, metadata}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from ..data.llava_eval.answers import Question, questions, records


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
