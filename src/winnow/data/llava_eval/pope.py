"""POPE: is there a ... in the image? F1 of "yes" in three splits, which differ in how absent objects were chosen.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023; LLaVA prints the mean F1.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path

from .answers import Record, Score, answers, by_key, first_line, join, per_cent, questions, records

SPLITS = ("random", "popular", "adversarial")
LABELS = "coco_pope_{}.json"
NEGATIVE = frozenset({"no", "No", "not"})


def says_yes(answer: str) -> bool:
    """Anything whose first sentence holds no "no" or "not" is a yes, as in the paper's own evaluation."""
    return not NEGATIVE & set(answer.split(".")[0].replace(",", "").split(" "))


def score_pope(questions_file: Path | str, answers_file: Path | str, labels: Path | str) -> Score:
    """F1, accuracy, precision, recall and share of yes, per split and their means.

    labels: the folder of coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json. Labels are
    joined to questions by (category, image, question).
    """
    asked = questions(questions_file)
    given = answers(answers_file, [q.id for q in asked])
    truth: dict[Hashable, Record] = {}
    for split in sorted({q.category for q in asked}):
        path = Path(labels) / LABELS.format(split)
        if split not in SPLITS:
            raise ValueError(f"{questions_file}: category {split!r} is none of {', '.join(SPLITS)}")
        found = records(path, ("image", "text", "label"))
        truth |= by_key(found, lambda one, split=split: (split, one["image"], one["text"]), str(path))  # type: ignore[misc]
    keys = [(q.category, q.image, first_line(q.text)) for q in asked]
    gold = [_yes(record["label"], labels) for _, record in join(keys, truth, str(labels), "label")]
    pairs = [(q.category, says_yes(given[q.id]), yes) for q, yes in zip(asked, gold)]
    groups = {split: _figures((said, is_) for name, said, is_ in pairs if name == split) for split in SPLITS}
    groups = {split: figures for split, figures in groups.items() if figures}
    means = {name: sum(one[name] for one in groups.values()) / len(groups) for name in next(iter(groups.values()))}
    absent = tuple(f"no questions of the split {split}" for split in SPLITS if split not in groups)
    return Score("pope", "f1", means, len(asked), groups, absent)


def _yes(label: str, where: Path | str) -> bool:
    if not re.fullmatch("yes|no", str(label)):
        raise ValueError(f"{where}: label {label!r} is neither yes nor no")
    return label == "yes"


def _figures(pairs: Iterable[tuple[bool, bool]]) -> dict[str, float]:
    """Of (said yes, is yes)."""
    found = list(pairs)
    if not found:
        return {}
    both = sum(said and is_ for said, is_ in found)
    said, is_ = sum(said for said, _ in found), sum(is_ for _, is_ in found)
    right = sum(said == is_ for said, is_ in found)
    return {
        "f1": per_cent(2 * both, said + is_), "accuracy": per_cent(right, len(found)), "precision": per_cent(both, said),
        "recall": per_cent(both, is_), "yes": per_cent(said, len(found)),
    }  # fmt: skip
