"""MME: two questions per image, answered by yes and by no; points for each answer and for each image with both right.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", 2023.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from .answers import Record, Score, by_key, first_line, join, per_cent, records

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def verdict(answer: str) -> str | None:
    """ "yes", "no", or None: the first four letters say, as in the benchmark's own tool."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def score_mme(answers_file: Path | str, labels: Path | str) -> Score:
    """Points per category (at most 200): accuracy + share of images with both answers right, both in per cent.

    answers_file: {question_id: "category/image file", prompt, text}. labels: the folder of the release, one folder per
    category with a text file per image, lines "question<TAB>Yes".
    Papers print "perception" (at most 2000), or its sum with "cognition" (800), as MME: which of the two must be said.
    """
    truth = _truth(Path(labels))
    found = by_key(records(answers_file, ("question_id", "prompt", "text")), _key, str(answers_file))
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for key, one in zip(truth, (one for _, one in join(truth, found, str(answers_file)))):
        images[key[:2]].append(verdict(one["text"]) == truth[key])
    groups = {}
    for category in sorted({name for name, _ in images}):
        right = [both for (name, _), both in images.items() if name == category]
        accuracy = per_cent(sum(map(sum, right)), sum(map(len, right)))
        plus = per_cent(sum(map(all, right)), len(right))
        groups[category] = {"score": accuracy + plus, "accuracy": accuracy, "accuracy+": plus}
    parts = {"perception": PERCEPTION, "cognition": COGNITION}
    figures = {part: sum(groups[name]["score"] for name in names if name in groups) for part, names in parts.items()}
    figures["total"] = sum(figures.values())
    absent = [name for names in parts.values() for name in names if name not in groups]
    notes = (f"{labels} lacks {', '.join(absent)}: the sums are not comparable",) if absent else ()
    return Score("mme", "perception", figures, len(truth), groups, notes)


def _truth(folder: Path) -> dict[tuple[str, str, str], str]:
    """ "yes" or "no" by (category, image, question)."""
    found: dict[tuple[str, str, str], str] = {}
    for path in sorted(folder.glob("*/*.txt")) + sorted(folder.glob("*/questions_answers_YN/*.txt")):
        category = path.relative_to(folder).parts[0]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            question, tab, answer = line.strip().partition("\t")
            if not question:
                continue
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise ValueError(f"{path}:{number}: question<TAB>Yes or No is needed, found {line!r}")
            found[category, path.stem, _bare(question)] = answer.strip().lower()
    if not found:
        raise ValueError(f"{folder} holds no CATEGORY/IMAGE.txt: give the folder of MME's release")
    return found


def _key(answer: Record) -> tuple[str, str, str]:
    category, _, image = str(answer["question_id"]).partition("/")
    return category, Path(image).stem, _bare(first_line(answer["prompt"]))


def _bare(question: str) -> str:
    """Without the request that the release puts behind each question and LLaVA leaves out."""
    return question.replace("Please answer yes or no.", "").strip()
