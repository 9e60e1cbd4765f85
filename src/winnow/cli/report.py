"""winnow report: tables, curves and one self-contained page from result rows.

Winnow's own.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .. import view
from ..compare import paired
from ..measure import record
from ._options import Json
from ._progress import Progress

NAME = "report"
DOCUMENTS = ("seed001-flops", "seed002")
"""Recipes of the documents' experiments, which `winnow report NAME` runs and writes up."""


def command(
    results: Annotated[
        list[Path], typer.Argument(help="JSON-lines files of rows, or a document: seed002", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="folder for report.html, report.md and the curves")] = Path("report"),
    kept: Annotated[Path | None, typer.Option("--results", help="rows of an experiment go here")] = None,
    epochs: Annotated[int | None, typer.Option(help="of an experiment; as its document says if not given")] = None,
    steps: Annotated[int | None, typer.Option(help="per epoch of an experiment; all if not given")] = None,
    as_json: Json = False,
) -> None:
    """Make report.html, report.md and accuracy-*.svg from rows; or run a document's experiment: winnow report seed002."""
    if len(results) == 1 and str(results[0]) in DOCUMENTS:
        made = experiment(str(results[0]), out, kept, epochs=epochs, steps=steps)
        print(json.dumps([str(path) for path in made]) if as_json else "\n".join(map(str, made)))
        return
    if any(option is not None for option in (kept, epochs, steps)):
        raise ValueError(f"--results, --epochs and --steps belong to an experiment: {', '.join(DOCUMENTS)}")
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


def experiment(name: str, out: Path, results: Path | None, **wishes: int | None) -> list[Path]:
    """Run a document's experiment, as far as its rows are missing, and write its page."""
    recipe = import_module(f"..recipes.{name.replace('-', '_')}", __package__)
    given = {option: value for option, value in wishes.items() if value is not None}
    for option, value in given.items():
        if value < 1:
            raise ValueError(f"--{option} {value}: at least 1 is needed")
    with Progress() as progress:
        return recipe.write(recipe.Wish(**given), results or Path("results") / f"{name}.jsonl", out, progress.say)


def write(rows: list[record.Row], pictures: list, out: Path) -> list[Path]:
    """The page, the Markdown and the curves of some rows, in a folder."""
    made = [view.html(rows, pictures, out / "report.html")]
    made.append(view.files.write(out / "report.md", view.markdown(rows).encode()))
    made.append(view.save(rows, out / "accuracy-macs.svg"))
    if any(row.latency for row in rows):
        made.append(view.save(rows, out / "accuracy-time.svg", against="time"))
    return made
