"""winnow data: what is in a data set of images with captions or of conversations, counted; captions made into LLaVA's.

Winnow's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import _options as o
from ._progress import Progress

NAME = "data"
app = typer.Typer(rich_markup_mode=None, help="Look at data before training on it.")


@app.callback()
def _group() -> None:
    pass


@app.command("count")
def count(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS...",
            help="folder of .tar shards, .tar files, a table of files and captions, or LLaVA's conversations, a mixture",
            show_default=False,
        ),
    ],
    split: Annotated[str, typer.Option(help="sub-folder of the shards, or value of the table's column split")] = "",
    headers: Annotated[
        bool, typer.Option("--headers", help="decode no image: what cannot be decoded is counted")
    ] = False,
    failures: Annotated[bool, typer.Option("--failures", help="name every sample that failed")] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="of conversations: folder that image names start at; the file's own if not given"),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Count the samples: whole ones, and those without image or caption, cut short, or impossible to decode.

    Conversations are counted by kind: caption, detailed description, question, conversation, interleaved, text only.
    """
    from ..data.conversations import are_conversations, open_conversations
    from ..data.pairs import open_pairs

    shards = "::".join(what)
    if are_conversations(shards):
        told = open_conversations(shards, split, images=images)
        kinds = told.kinds()
        if as_json:
            print(json.dumps({"samples": len(told), "kinds": kinds}))
            return
        for kind, several in kinds.items():
            print(f"{several:>10,}  {kind}")
        print(f"{len(told):>10,}  in all")
        return
    found = open_pairs(shards, split=split)
    listed = len(found) + len(found.failures)
    if not headers:
        with Progress() as progress:
            progress.total = len(found)
            progress.say(f"{shards}: images")
            found = found.sound(progress.images)
    if as_json:
        print(json.dumps({"samples": len(found), "failed": len(found.failures), "failures": list(found.failures)}))
        return
    print(f"{len(found):,} samples, {len(found.failures):,} failed, of {listed:,}")
    if failures:
        for line in found.failures:
            Console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command("captions2llava")
def captions2llava(
    captions: Annotated[
        str, typer.Argument(help="shards, a table (CSV, JSON lines, parquet) or COCO's captions_NAME.json")
    ],
    out: Annotated[Path, typer.Argument(help="the .json to write; images of shards are put beside it")],
    split: Annotated[str, typer.Option(help="sub-folder of the shards, or value of the table's column split")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="at most so many, evenly spaced")] = None,
    column: Annotated[
        str | None, typer.Option(help="the table's column of captions, where it has an unusual name")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the questions")] = 0,
    as_json: o.Json = False,
) -> None:
    """Turn images with captions into conversations for LLaVA's first stage: a question from the seed, and the caption."""
    from ..data.captions import to_llava

    with Progress() as progress:
        written, failed = to_llava(
            captions, out, split=split, limit=limit, column=column, seed=seed, done=progress.images
        )
    if as_json:
        print(json.dumps({"written": written, "failures": failed, "file": str(out)}))
        return
    print(f"{written:,} conversations in {out}, {len(failed):,} left out")
    for line in failed:
        Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
