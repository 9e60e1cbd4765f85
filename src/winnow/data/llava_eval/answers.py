"""LLaVA's question and answer files: JSON lines, a JSON list, or one JSON object; refused where cut off or incomplete.

Liu et al., 2023; questions {question_id, image, text, category}, answers {question_id, prompt, text}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What a model is asked."""

    id: str
    text: str
    """The whole prompt, as LLaVA asks it."""
    image: str | None = None
    category: str = ""


@dataclass(frozen=True)
class Score:
    """What a benchmark says; figures in per cent, MME's in points."""

    benchmark: str
    main: str
    """The figure that papers print."""
    figures: dict[str, float]
    n: int
    """Questions."""
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by split or category."""
    notes: tuple[str, ...] = ()


def whole(path: Path | str) -> Any:
    """What a file holds: a list where it is JSON lines, else the one value; OSError or ValueError in one line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text: a JSON or JSON-lines file is needed") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        first = error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if not found:
                raise ValueError(f"{path}:{first.lineno} is not JSON: {first.msg} (a file that was cut off?)") from None
            raise ValueError(f"{path}:{number} is not JSON (a file that was cut off?)") from None
    return found


def records(path: Path | str, columns: Sequence[str], found: Any = None) -> list[Record]:
    """The records of a file, each with these columns; `found` where the file is read already."""
    found = whole(path) if found is None else found
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ValueError(f"{path} holds a {type(found).__name__}, a list of records is needed")
    for number, one in enumerate(found, 1):
        if not isinstance(one, dict):
            raise ValueError(f"{path}: record {number} is a {type(one).__name__}, not an object")
        missing = [column for column in columns if column not in one]
        if missing:
            have = ", ".join(one) or "none"
            raise ValueError(f"{path}: record {number} lacks {' and '.join(missing)} (its columns: {have})")
    return found


def questions(path: Path | str) -> list[Question]:
    """The questions of a LLaVA question file, in its order."""
    found = records(path, ("question_id", "text"))
    return [Question(str(q["question_id"]), q["text"], q.get("image"), q.get("category", "")) for q in found]


def first_line(text: str) -> str:
    """The question without the instruction LLaVA puts under it."""
    return text.split("\n")[0].strip()


def by_key(found: Iterable[Record], key: Callable[[Record], Hashable], what: str) -> dict[Hashable, Record]:
    """Records by key; ValueError where two have the same one."""
    table: dict[Hashable, Record] = {}
    for one in found:
        if key(one) in table:
            raise ValueError(f"{what}: {key(one)} occurs twice")
        table[key(one)] = one
    return table


def join(
    wanted: Iterable[Hashable], there: Mapping[Hashable, Record], what: str, kind: str = "answer"
) -> list[tuple[Hashable, Record]]:
    """(key, record) of every wanted key; ValueError where any is missing."""
    wanted = list(wanted)
    missing = [key for key in wanted if key not in there]
    if missing:
        raise ValueError(
            f"{what}: {len(missing)} of {len(wanted)} questions have no {kind}, the first is {missing[0]} "
            "(cut off, or of another set of questions?)"
        )
    return [(key, there[key]) for key in wanted]


def answers(path: Path | str, ids: Iterable[str]) -> dict[str, str]:
    """The answer to each of these questions by its id."""
    found = by_key(records(path, ("question_id", "text")), lambda one: str(one["question_id"]), str(path))
    return {str(key): one["text"] for key, one in join(ids, found, str(path))}


def per_cent(part: float, of: float) -> float:
    """100 part / of; 0 where there is nothing."""
    return 100 * part / of if of else 0.0
