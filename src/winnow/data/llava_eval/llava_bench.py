"""LLaVA-Bench: free answers about COCO images or images in the wild, rated beside GPT-4's by a language model as the judge.

Liu et al., "Visual Instruction Tuning", NeurIPS 2023; the judge is anything that speaks OpenAI's chat completions.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import Question, Record, Score, answers, by_key, join, questions, records, whole

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."


@dataclass(frozen=True)
class Judge:
    """A server of chat completions; its key, if it wants one, is in the environment variable `key`."""

    url: str
    """Up to and without /chat/completions, e.g. http://localhost:8000/v1."""
    model: str
    key: str = "OPENAI_API_KEY"
    temperature: float = 0.2
    max_tokens: int = 1024
    timeout: float = 120.0
    tries: int = 3

    def __call__(self, prompt: str) -> str:
        """What the judge answers; ValueError where it cannot be asked."""
        body = {
            "model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
        }  # fmt: skip
        head = {"Content-Type": "application/json"}
        if os.environ.get(self.key):
            head["Authorization"] = f"Bearer {os.environ[self.key]}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), head, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"the judge at {self.url} refuses: {error.code} {error.read()[:200].decode(errors='replace')}"
            ) from None
        except (OSError, json.JSONDecodeError, KeyError, IndexError) as error:
            raise ValueError(f"the judge at {self.url} cannot be asked: {type(error).__name__} {error}") from None


def judge_all(
    judge: Judge, questions_file: Path | str, answers_file: Path | str, reference: Path | str, context: Path | str,
    rules: Path | str, *, reviews: Path, say: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """Ask the judge about every question and append its reviews one by one; those the file holds are not asked again.

    reference: GPT-4's answers. context: what the judge is told of each image, {image, caption} or {image, captions,
    instances}. rules: rule.json. ValueError where two scores do not come back.
    """
    prompts = dict(_prompts(questions(questions_file), answers_file, reference, context, rules))
    done = {str(one["question_id"]) for one in _reviews(reviews)} if reviews.exists() else set()
    for number, (question, prompt) in enumerate(prompts.items(), 1):
        if question.id in done:
            continue
        say(f"question {number} of {len(prompts)}")
        text, scores = _asked(judge, prompt, question)
        review = {
            "question_id": question.id,
            "category": question.category,
            "tuple": scores,
            "content": text,
            "judge": judge.model,
        }
        reviews.parent.mkdir(parents=True, exist_ok=True)
        with open(reviews, "a", encoding="utf-8") as file:
            file.write(json.dumps(review) + "\n")


def score_llava_bench(reviews: Path | str, questions_file: Path | str) -> Score:
    """Ours / GPT-4's in per cent, by category and over all questions, from the judge's reviews.

    Reviews that hold no two scores (-1 in LLaVA's own files) are left out, and a note says how many; LLaVA averages them in.
    """
    asked = [q.id for q in questions(questions_file)]
    found = by_key(_reviews(reviews), lambda one: str(one["question_id"]), str(reviews))
    rated = [one for _, one in join(asked, found, str(reviews), "review")]
    good = [one for one in rated if min(one["tuple"]) >= 0]
    if not good:
        raise ValueError(f"{reviews}: no review holds two scores")
    kinds = {kind: [one for one in good if kind in (one["category"], "all")] for kind in
             ("all", *sorted({one["category"] for one in good}))}  # fmt: skip
    groups = {kind: _relative(ones) for kind, ones in kinds.items()}
    notes = [f"judged by {', '.join(sorted({str(one.get('judge', 'an unknown judge')) for one in good}))}"]
    if len(good) < len(rated):
        notes.append(f"{len(rated) - len(good)} reviews without two scores are left out")
    return Score(
        "llava-bench", "all", {kind: one["relative"] for kind, one in groups.items()}, len(asked), groups, tuple(notes)
    )


def _relative(reviews: list[Record]) -> dict[str, float]:
    theirs, ours = (sum(one["tuple"][side] for one in reviews) / len(reviews) for side in (0, 1))
    return {"relative": 100 * ours / theirs if theirs else 0.0, "reference": 10 * theirs, "ours": 10 * ours}


def _reviews(path: Path | str) -> list[Record]:
    """Reviews, ours or LLaVA's, whose categories are called llava_bench_conv and so on."""
    found = records(path, ("question_id", "category", "tuple"))
    for one in found:
        if not (isinstance(one["tuple"], list) and len(one["tuple"]) == 2):
            raise ValueError(
                f"{path}: the review of question {one['question_id']} holds {one['tuple']!r}, not two scores"
            )
    return [one | {"category": one["category"].removeprefix("llava_bench_")} for one in found]


def _asked(judge: Judge, prompt: str, question: Question) -> tuple[str, list[float]]:
    """The review and its two scores; a judge that answers otherwise is asked again."""
    for _ in range(judge.tries):
        text = judge(prompt)
        scores = re.findall(r"\d+(?:\.\d+)?", text.strip().split("\n")[0].replace(",", " "))
        if len(scores) == 2:
            return text, [float(one) for one in scores]
    raise ValueError(
        f"question {question.id}: no two scores in the first line of {text[:80]!r}, asked {judge.tries} times"
    )


def _prompts(
    asked: list[Question], answers_file: Path | str, reference: Path | str, context: Path | str, rules: Path | str
) -> Iterator[tuple[Question, str]]:
    ids = [q.id for q in asked]
    ours, theirs = answers(answers_file, ids), answers(reference, ids)
    told = by_key(records(context, ("image",)), lambda one: one["image"], str(context))
    images = dict(join([q.image for q in asked], told, str(context), "context"))
    rule = whole(rules)
    wild = any("caption" in one for one in images.values())
    for q in asked:
        name = f"llava_bench_{q.category}" if wild else q.category
        if not isinstance(rule, dict) or name not in rule:
            raise ValueError(f"{rules} has no rule {name!r}")
        yield q, _prompt(q, _told(images[q.image], context), theirs[q.id], ours[q.id], rule[name])


def _told(image: Record, where: Path | str) -> str:
    """What the judge is told of an image: a caption, or captions and boxes."""
    if "caption" in image:
        return image["caption"] if isinstance(image["caption"], str) else "\n".join(image["caption"])
    if not {"captions", "instances"} <= set(image):
        raise ValueError(f"{where}: {image['image']} has neither caption nor captions and instances")
    boxes = (f"{one['category']}: {one['bbox']}" for one in image["instances"])
    return "\n".join(image["captions"]) + "\n\n" + "\n".join(boxes)


def _prompt(question: Question, told: str, theirs: str, ours: str, rule: dict[str, Any]) -> str:
    role = rule["role"]
    return (
        f"[Context]\n{told}\n\n[Question]\n{question.text}\n\n[{role} 1]\n{theirs}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{ours}\n\n[End of {role} 2]\n\n[System]\n{rule['prompt']}\n\n"
    )
