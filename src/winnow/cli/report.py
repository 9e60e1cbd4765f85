"""winnow report: tables, curves and one self-contained page from result rows.

Winnow's own.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import view
from ..compare import paired
from ..measure import record
from ..view.rows import groups
from ..view.training import table as training_table
from ._options import Json
from ._progress import Progress

NAME = "report"
DOCUMENTS = ("adaptive", "clip", "ctd", "drip", "seed001-flops", "seed002")
"""Recipes of the documents' experiments, which `winnow report NAME` runs and writes up."""


def command(
    results: Annotated[
        list[Path], typer.Argument(help="JSON-lines files of rows, or a document: seed002", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="folder for report.html, report.md and the curves")] = Path("report"),
    kept: Annotated[Path | None, typer.Option("--results", help="rows of an experiment go here")] = None,
    epochs: Annotated[int | None, typer.Option(help="of an experiment; as its document says if not given")] = None,
    steps: Annotated[int | None, typer.Option(help="per epoch of an experiment; all if not given")] = None,
    data: Annotated[str | None, typer.Option(help="of an experiment; as its recipe says if not given")] = None,
    batch: Annotated[int | None, typer.Option(help="timed batch of an experiment; 0 times nothing")] = None,
    as_json: Json = False,
) -> None:
    """Make report.html, report.md and accuracy-*.svg from rows; or run a document's experiment: winnow report seed002.

    A document and rows, as in `winnow report ctd results/train.jsonl`: its page from these rows, and nothing is run.
    """
    first, rest = str(results[0]), results[1:]
    asked = {"--results": kept, "--epochs": epochs, "--steps": steps, "--data": data, "--batch": batch}
    if first in DOCUMENTS and not rest:
        made = experiment(first, out, kept, epochs=epochs, steps=steps, data=data, batch=batch)
    elif any(value is not None for value in asked.values()):
        raise ValueError(f"{', '.join(asked)} belong to an experiment that is run: {', '.join(DOCUMENTS)}")
    elif first in DOCUMENTS:
        made = page_of(first, _read(rest), out)
    else:
        rows = [row for group in groups(_read(results)) for row in paired(group.rows)]
        made = write(rows, [], out)
    print(json.dumps([str(path) for path in made]) if as_json else "\n".join(map(str, made)))


def _read(paths: list[Path]) -> list[record.Row]:
    rows = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; rows are written by winnow compare, measure and train")
        rows += record.read(path)
    if not rows:
        raise ValueError(f"{paths[0]} holds no rows")
    return rows


def page_of(name: str, rows: list[record.Row], out: Path) -> list[Path]:
    """The page of a document from rows that are there."""
    recipe = _recipe(name)
    if not hasattr(recipe, "written"):
        raise ValueError(f"{name} takes no rows of others: winnow report {name}")
    return recipe.written(rows, out)


def _recipe(name: str) -> Any:
    return import_module(f"..recipes.{name.replace('-', '_')}", __package__)


def experiment(name: str, out: Path, results: Path | None, **wishes: int | str | None) -> list[Path]:
    """Run a document's experiment, as far as its rows are missing, and write its page."""
    recipe = _recipe(name)
    given = {option: value for option, value in wishes.items() if value is not None}
    for option, value in given.items():
        least = int(option != "batch")
        if isinstance(value, int) and value < least:
            raise ValueError(f"--{option} {value}: at least {least} is needed")
    try:
        wish = recipe.Wish(**given)
    except TypeError:
        raise ValueError(f"winnow report {name} does not take all of --{', --'.join(given)}") from None
    with Progress() as progress:
        return recipe.write(wish, results or Path("results") / f"{name}.jsonl", out, progress.say)


def write(rows: list[record.Row], pictures: list, out: Path) -> list[Path]:
    """The page, the Markdown and the curves of some rows, in a folder; training runs have a table of their own."""
    trained = [row for row in rows if row.train is not None]
    made = [view.files.write(out / "training.md", training_table(trained).encode())] if trained else []
    rows = [row for row in rows if row.train is None]
    if not rows:
        return made
    made.append(view.html(rows, pictures, out / "report.html"))
    made.append(view.files.write(out / "report.md", view.markdown(rows).encode()))
    for against in ("macs", "time", "tokens"):
        if view.curves.drawable(rows, against):
            made.append(view.save(rows, out / f"accuracy-{against}.svg", against))
    return made
