"""Write what `winnow compare hf:scenes` found into docs/vlm.md, and its figure, from results/vlm-scenes.jsonl.

Winnow's own. `python docs/vlm.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from winnow import Keep, parse, view
from winnow.compare import paired
from winnow.measure import record
from winnow.methods import BASELINES
from winnow.reducer import Method
from winnow.view.columns import NONE
from winnow.view.rows import groups, percent, top1, verdict
from winnow.view.summary import sentences

PAGE = Path(__file__).with_suffix(".md")
ROWS = PAGE.parents[1] / "results" / "vlm-scenes.jsonl"
SHARES = (0.5, 0.25, 0.125, 0.0625)
MARKS = {"wins": " ▲", "loses": " ▼", "even": "", "": ""}


def share_of(method: Method) -> float | None:
    """The share of the image tokens that a method's settings leave; None where they say it in another way."""
    for share in SHARES:
        try:
            if method.leaving(Keep(share)) == method:
                return share
        except TypeError:
            return None
    return None


def table(rows: Sequence[record.Row]) -> str:
    """A line per method, a column per share of the image tokens: answers right, with interval and verdict."""
    found: dict[tuple[bool, str], dict[float, record.Row]] = {}
    for row in rows:
        method = parse(row.method) if row.method else None
        share = share_of(method) if method else None
        if method is None or share is None:
            continue
        default = type(method).__dataclass_fields__["keep"].default
        bare = repr(replace(method, keep=default))
        found.setdefault((type(method) in BASELINES, bare), {})[share] = row
    lines = [
        "| method | " + " | ".join(f"1/{1 / share:.0f}" for share in SHARES) + " |",
        "|:--|" + "--:|" * len(SHARES),
    ]
    for (_, bare), by in sorted(found.items(), key=lambda item: item[0][0]):
        lines.append(f"| `{bare}` | " + " | ".join(_cell(by.get(share)) for share in SHARES) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: record.Row | None) -> str:
    right = top1(row) if row is not None else None
    if right is None:
        return NONE
    span = f"{percent(right.low, 0)}–{percent(right.high, 0)}"
    return f"{percent(right.value)} ({span}){MARKS[verdict(right.vs_baseline)]}"


def others(rows: Sequence[record.Row]) -> str:
    """The plain model and the methods whose settings are no share of the image tokens."""
    kept = [
        row for row in rows if row.role != "baseline" and (row.method is None or share_of(parse(row.method)) is None)
    ]
    return view.markdown(kept, brief=True)


def page() -> str:
    """The page with what today's rows say."""
    rows = paired(record.read(ROWS))
    (group,) = groups(rows)
    findings = "\n".join(f"- {words}" for words in sentences(group)) + "\n"
    parts = {"table": table(group.rows), "others": others(group.rows), "findings": findings}

    def made(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{parts[found[1]]}<!-- end -->"

    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", made, text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for against in ("macs", "tokens"):
        for form in ("svg", "png"):
            view.save(paired(record.read(ROWS)), PAGE.with_name(f"vlm-{against}.{form}"), against)
    print(PAGE)
