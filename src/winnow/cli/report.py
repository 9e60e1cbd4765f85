"""winnow report: tables, curves and one self-contained page from result rows.

Winnow's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import view
from ..compare import paired
from ..measure import record
from ._options import Json

NAME = "report"


def command(
    results: Annotated[list[Path], typer.Argument(help="JSON-lines files of rows", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for report.html, report.md and the curves")] = Path("report"),
    as_json: Json = False,
) -> None:
    """Make report.html, report.md and accuracy-*.svg from rows."""
    rows = []
    for path in results:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; rows are written by winnow compare and winnow measure")
        rows += record.read(path)
    if not rows:
        raise ValueError(f"{results[0]} holds no rows")
    rows = [row for group in view.cells.groups(rows) for row in paired(group.rows)]
    made = write(rows, [], out)
    print(json.dumps([str(path) for path in made]) if as_json else "\n".join(map(str, made)))


def write(rows: list[record.Row], pictures: list, out: Path) -> list[Path]:
    """The page, the Markdown and the curves of some rows, in a folder."""
    made = [view.html(rows, pictures, out / "report.html")]
    made.append(view.files.write(out / "report.md", view.markdown(rows).encode()))
    made.append(view.save(rows, out / "accuracy-macs.svg"))
    if any(row.latency for row in rows):
        made.append(view.save(rows, out / "accuracy-time.svg", against="time"))
    return made
