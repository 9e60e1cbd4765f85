"""Times to the first token of recipes/adaptive.py: measured in turn with the plain model; their part of the page.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import winnow

from ..compare_vlm import VlmComparison
from ..measure import compare_latency, record
from ..measure.vlm_time import first_token
from ..reducer import Method
from ..twin import twin

TASK = "time-vlm"
Times = Mapping[tuple[str | None, str | None], record.Latency]
"""By weights and method."""
HEAD = """## Time to the first token

Times faster than the plain model, timed in turn with it ({time.pairs} pairs of a batch of {time.batch} questions,
{time.threads} CPU threads); in brackets the 95 % interval. The plain model against itself gave {low:.2f} to {high:.2f}.
A model as small as this spends much of its time on other things than multiply-adds.
"""


def measured(comparison: VlmComparison, method: Method, batch: int) -> record.Row:
    """A row of the time alone, on the first questions of the comparison."""
    prompts = comparison.batches
    inputs = prompts.batch_of(prompts.samples[:batch]).inputs  # type: ignore[attr-defined]
    model = comparison.model
    plain = twin(model)
    comparison.reduce(model, method, comparison.way)
    try:
        time = compare_latency(
            first_token(plain, inputs), first_token(model, inputs), batch=batch, pairs=comparison.pairs
        )
    finally:
        winnow.restore(model)
    return record.Row(
        task=TASK, model=comparison.name, weights=comparison.weights, data=comparison.data, method=repr(method),
        latency=[time], environment=record.environment(), commit=record.commit(), command=record.command(),
        time=record.now(),
    )  # fmt: skip


def same(row: record.Row, comparison: VlmComparison, method: Method, batch: int) -> bool:
    """Whether this is the time that `measured` would take."""
    mine = (TASK, comparison.name, comparison.weights, repr(method))
    return (row.task, row.model, row.weights, row.method) == mine and row.latency[0].batch == batch


def known(rows: Sequence[record.Row]) -> Times:
    """The times among rows."""
    return {(row.weights, row.method): row.latency[0] for row in rows if row.task == TASK}


def section(
    found: Mapping[str, Mapping[float, record.Row]], times: Times, budgets: Sequence[float], heads: Sequence[str]
) -> str:
    """A table of the rows that were timed, by name and budget; "" if none was."""
    each = {
        name: {
            budget: times[row.weights, row.method] for budget, row in rows.items() if (row.weights, row.method) in times
        }
        for name, rows in found.items()
    }
    shown = [time for rows in each.values() for time in rows.values()]
    if not shown:
        return ""
    nulls = [time.null for time in shown]
    lines = [HEAD.format(time=shown[0], low=min(nulls), high=max(nulls)), f"| | {' | '.join(heads)} |"]
    lines.append("|:--|" + "--:|" * len(heads))
    for name, rows in each.items():
        if rows:
            lines.append(f"| {name} | {' | '.join(_cell(rows.get(budget)) for budget in budgets)} |")
    return "\n".join([*lines, ""])


def _cell(time: record.Latency | None) -> str:
    return "–" if time is None else f"{time.ratio:.2f} ({time.low:.2f} to {time.high:.2f})"
