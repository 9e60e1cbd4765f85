"""Measured times on the page of recipes/adaptive.py: to the first token, in turn with the plain model, from rows.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..measure import record

HEAD = """## Time to the first token

Times faster than the plain model, timed in turn with it ({time.pairs} pairs of a batch of {time.batch} questions, {machine},
{time.threads} threads); in brackets the 95 % interval. The plain model against itself gave {low:.2f} to {high:.2f}. A model
as small as this spends much of its time on other things than multiply-adds.
"""


def section(found: Mapping[str, Mapping[float, record.Row]], budgets: Sequence[float], heads: Sequence[str]) -> str:
    """A table of the rows that were timed, by name and budget; "" if none was."""
    timed = {name: rows for name, rows in found.items() if any(row.latency for row in rows.values())}
    all_rows = [row for rows in timed.values() for row in rows.values() if row.latency]
    if not all_rows:
        return ""
    machine = ", ".join(sorted({row.environment.get("cpu", row.device) for row in all_rows}))
    nulls = [row.latency[0].null for row in all_rows]
    head = HEAD.format(time=all_rows[0].latency[0], machine=machine, low=min(nulls), high=max(nulls))
    lines = [head, f"| | {' | '.join(heads)} |", "|:--|" + "--:|" * len(heads)]
    for name, rows in timed.items():
        lines.append(f"| {name} | {' | '.join(_cell(rows.get(budget)) for budget in budgets)} |")
    return "\n".join([*lines, ""])


def _cell(row: record.Row | None) -> str:
    if row is None or not row.latency:
        return "–"
    time = row.latency[0]
    return f"{time.ratio:.2f} ({time.low:.2f} to {time.high:.2f})"
