"""ScienceQA: multiple choice about science, with and without an image; LLaVA prints the accuracy on those with one.

Lu et al., "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering", NeurIPS 2022.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .answers import Question, Record, Score, by_key, join, per_cent, records, whole

LETTERS = "ABCDE"


def scienceqa_questions(path: Path | str) -> list[tuple[Question, str]]:
    """(question, letter of the right answer) of llava_test_CQM-A.json."""
    found = []
    for one in records(path, ("id", "conversations")):
        turns = one["conversations"]
        if len(turns) != 2 or turns[1].get("value") not in tuple(LETTERS):
            raise ValueError(
                f"{path}: question {one['id']} needs one turn and a letter as its answer (llava_test_CQM-A.json has)"
            )
        found.append((Question(str(one["id"]), turns[0]["value"], one.get("image")), turns[1]["value"]))
    return found


def letter(answer: str) -> str | None:
    """The option an answer names: "B", "B. ...", or "The answer is B."; None where it names none or several."""
    answer = answer.strip()
    if answer in tuple(LETTERS):
        return answer
    if re.match(f"[{LETTERS}]\\. ", answer):
        return answer[0]
    found = re.findall(r"The answer is ([A-Z])\.", answer)
    return found[0] if len(found) == 1 else None


def score_scienceqa(questions_file: Path | str, answers_file: Path | str) -> Score:
    """Accuracy on questions with an image ("image"), without ("text"), and on all.

    answers_file: answers {question_id, text}, or LLaVA's own evaluation of them, one object {correct, incorrect}.
    """
    asked = scienceqa_questions(questions_file)
    found = by_key(_answers(answers_file), lambda one: str(one["question_id"]), str(answers_file))
    given = dict(join([q.id for q, _ in asked], found, str(answers_file)))
    named = {q.id: letter(str(given[q.id].get("pred", given[q.id].get("text")))) for q, _ in asked}
    seen = [(q.image is not None, named[q.id] == right) for q, right in asked]
    figures = {
        "image": _accuracy(right for image, right in seen if image),
        "text": _accuracy(right for image, right in seen if not image),
        "all": _accuracy(right for _, right in seen),
    }
    failed = sum(one is None for one in named.values())
    notes = (f"{failed} answers name no option and count as wrong",) if failed else ()
    return Score("scienceqa", "image", figures, len(asked), notes=notes)


def _answers(path: Path | str) -> list[Record]:
    found = whole(path)
    if isinstance(found, dict) and {"correct", "incorrect"} <= set(found):
        return records(path, ("question_id", "pred"), [*found["correct"], *found["incorrect"]])
    return records(path, ("question_id", "text"), found)


def _accuracy(right: Iterable[bool]) -> float:
    found = list(right)
    return per_cent(sum(found), len(found))
