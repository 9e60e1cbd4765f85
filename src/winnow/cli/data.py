"""winnow data: what is in a data set of images with captions, counted exactly.

Winnow's own.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from . import _options as o

NAME = "data"
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at data before training on it.")


@app.callback()
def _group() -> None:
    pass


@app.command("count")
def count(
    shards: Annotated[str, typer.Argument(help="folder of .tar shards, one .tar, or a table of files and captions")],
    split: Annotated[str, typer.Option(help="sub-folder of the shards, or value of the table's column split")] = "",
    headers: Annotated[
        bool, typer.Option("--headers", help="decode no image: what cannot be decoded is counted")
    ] = False,
    failures: Annotated[bool, typer.Option("--failures", help="name every sample that failed")] = False,
    as_json: o.Json = False,
) -> None:
    """Count the samples: whole ones, and those without image or caption, cut short, or impossible to decode."""
    from ..data.pairs import open_pairs

    found = open_pairs(shards, split=split)
    listed = len(found) + len(found.failures)
    if not headers:
        found = found.sound()
    if as_json:
        print(json.dumps({"samples": len(found), "failed": len(found.failures), "failures": list(found.failures)}))
        return
    print(f"{len(found):,} samples, {len(found.failures):,} failed, of {listed:,}")
    if failures:
        for line in found.failures:
            Console().print(line, highlight=False, markup=False, soft_wrap=True)
