"""What the controllers of recipes/adaptive.py are up against: rows by name and budget, paired tests, verdicts.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .._parse import parse
from ..measure import record
from ..measure.accuracy import mcnemar, unpack
from ..methods import BASELINES, Downsample
from ..parts.amount import Keep
from ..reducer import Method

Found = dict[str, dict[float, record.Row]]
"""By name, by budget."""
TESTED = (0.125, 0.0625)
KINDS = ("trivial", "before the language model", "inside the language model")
VERDICTS = ("significantly above", "above", "level with", "below", "significantly below")


def of_training(
    rows: Sequence[record.Row], training: record.Row, budgets: Sequence[float], n: int
) -> dict[float, record.Row]:
    """What came of a training, by budget; of a method that has one, by the share of the n tokens that it left."""
    method = parse(training.method or "")
    own = [row for row in rows if row.weights == training.weights and row.method]
    if not method.facts.budgeted:
        return {left(row) / n: row for row in own}
    known = {method.leaving(Keep(budget)): budget for budget in budgets}
    return {known[parse(row.method or "")]: row for row in own if parse(row.method or "") in known}


def left(row: record.Row) -> int:
    """Image tokens that the language model was given."""
    return row.vlm.image_tokens[0] if row.vlm else 0


def others_of(rows: Sequence[record.Row], budgets: Sequence[float], n: int) -> Found:
    """Methods that learn nothing, by name and budget."""
    found: Found = {}
    for row in rows:
        method = parse(row.method) if row.method else None
        if isinstance(method, Downsample):
            found.setdefault(repr(Downsample()), {})[left(row) / n] = row
        if method is None or "keep" not in method.__dataclass_fields__:  # type: ignore[attr-defined]
            continue
        budget = next((one for one in budgets if method == method.leaving(Keep(one))), None)
        if budget is not None:
            known = method.__dataclass_fields__["keep"].default  # type: ignore[attr-defined]
            found.setdefault(repr(replace(method, keep=known)), {})[budget] = row  # type: ignore[type-var]
    return found


def kind_of(name: str) -> str:
    method = parse(name)
    if type(method) in BASELINES:
        return KINDS[0]
    return KINDS[2] if method.facts.where == "llm" else KINDS[1]


def hits(row: record.Row) -> np.ndarray:
    assert row.accuracy is not None and row.data is not None
    return unpack(row.accuracy.hits, row.data.n)


def paired(ours: record.Row, theirs: record.Row) -> str:
    wins, losses, p = mcnemar(hits(ours), hits(theirs))
    return f"{wins} won, {losses} lost, p = {p:.2g}"


def right(row: record.Row | None) -> str:
    return "–" if row is None else f"{100 * float(hits(row).mean()):.1f}"


def best_of(others: Found, budget: float, kinds: Sequence[str]) -> str | None:
    """The rival of these kinds that is most often right."""
    rivals = {name: rows[budget] for name, rows in others.items() if budget in rows and kind_of(name) in kinds}
    return max(rivals, key=lambda name: float(hits(rivals[name]).mean()), default=None)


def listed(budgets: Sequence[float]) -> str:
    names = [f"1/{round(1 / budget)}" for budget in budgets]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _verdict(ours: record.Row, theirs: record.Row) -> str:
    wins, losses, p = mcnemar(hits(ours), hits(theirs))
    if wins == losses:
        return VERDICTS[2]
    return VERDICTS[int(p >= 0.05) if wins > losses else 4 - int(p >= 0.05)]


def standing(ours: Found, others: Found, methods: Mapping[str, Method], budgets: Sequence[float]) -> str:
    """A line a checkpoint: how it stands to the best before the language model, and to the best inside it."""
    lines = []
    for arm, rows in ours.items():
        told = []
        for kinds, said in ((KINDS[:2], "before"), (KINDS[2:], "inside")):
            found: dict[str, list[float]] = {}
            for budget in (one for one in budgets if one in rows):
                best = best_of(others, budget, kinds)
                if best is not None:
                    found.setdefault(_verdict(rows[budget], others[best][budget]), []).append(budget)
            words = ", ".join(f"{word} at {listed(found[word])}" for word in VERDICTS if word in found)
            told.append(f"{said} it {words or 'no rows'}")
        question = "with" if methods[arm].text else "without"  # type: ignore[attr-defined]
        lines.append(f"- `{arm}`, {question} the question: {'; '.join(told)}.")
    return "\n".join([*lines, ""])


def tests(ours: Found, others: Found, main: Sequence[str]) -> str:
    """Each controller against the best of three kinds of rivals, question by question."""
    lines = [
        "## Paired tests\n",
        "Exact McNemar test on the same questions, against the best of each kind at the same budget.\n",
    ]
    lines += ["| controller | budget | " + " | | ".join(KINDS) + " | |", "|:--|--:|" + ":--|:--|" * len(KINDS)]
    for name in main:
        for budget, row in ours.get(name, {}).items():
            if budget not in TESTED:
                continue
            cells = [f"{name}: {right(row)}", f"1/{round(1 / budget)}"]
            for kind in KINDS:
                best = best_of(others, budget, (kind,))
                rival = None if best is None else others[best][budget]
                cells += ["–", "–"] if rival is None else [f"`{best}` {right(rival)}", paired(row, rival)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def more(
    rows: Sequence[record.Row], trained: Mapping[str, record.Row], main: Sequence[str], budgets: Sequence[float], n: int
) -> str:
    """Those that were asked more questions, against each other."""
    ours = {arm: of_training(rows, trained[arm], budgets, n) for arm in main if arm in trained}
    rivals = others_of(rows, budgets, n)
    asked = next((row.data.n for found in ours.values() for row in found.values() if row.data), None)
    if asked is None:
        return ""
    lines = ["## Where so few questions cannot tell\n", f"The same on {asked:,} questions about the test scenes.\n"]
    lines += ["| | budget | right | " + " | | ".join(f"`{name}`" for name in rivals) + " | |"]
    lines += ["|:--|--:|--:|" + "--:|:--|" * len(rivals)]
    for name, found in ours.items():
        for budget, row in sorted(found.items(), reverse=True):
            cells = [name, listed([budget]), right(row)]
            for other in rivals.values():
                cells += [right(other.get(budget)), paired(row, other[budget]) if budget in other else "–"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def seeds(ours: Found, again: Sequence[str]) -> str:
    """Mean and range over the seeds there are."""
    groups: dict[str, list[str]] = {}
    for name in (name for name in again if name in ours):
        base = name.rpartition(", seed ")[0]
        groups.setdefault(base, [base] if base in ours else []).append(name)
    lines = ["## By seed\n", "Mean of the seeds' Top-1 in %, and in brackets the lowest and the highest.\n"]
    lines += ["| | seeds | " + " | ".join(f"1/{round(1 / budget)}" for budget in TESTED) + " |"]
    lines += ["|:--|--:|" + "--:|" * len(TESTED)]
    for base, names in groups.items():
        cells = []
        for budget in TESTED:
            right = [100 * float(hits(ours[name][budget]).mean()) for name in names if budget in ours[name]]
            cells.append(f"{np.mean(right):.1f} ({min(right):.1f} to {max(right):.1f})" if right else "–")
        lines.append(f"| {base} | {len(names)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""]) if groups else ""
