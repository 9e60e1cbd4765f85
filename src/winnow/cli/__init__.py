"""The command `winnow`: one file per verb; exit 0 ok, 1 a check failed, 2 refusal or bad input in one line.

Winnow's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import typer

from . import compare, doctor, generate, list_, lr_find, measure, report, show, train
from . import data as data_
from . import eval as eval_

# typer may carry its own copy of click, so the base of its errors is looked up rather than imported
Usage: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Vision transformers that read fewer tokens, and say honestly what that costs and saves.",
)  # fmt: skip
for verb in (list_, show, doctor, measure, compare, report, generate, train, lr_find):
    app.command(name=verb.NAME)(verb.command)
app.add_typer(eval_.app, name=eval_.NAME)
app.add_typer(data_.app, name=data_.NAME)
INTERRUPTED = 130
REFUSALS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""What the library raises on purpose, with words that say what would work."""


@app.callback()
def _group() -> None:
    pass


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2 (WINNOW_TRACEBACK=1 shows where it came from)."""
    try:
        words = _together(sys.argv[1:])
        if words in ([], [eval_.NAME], [data_.NAME]):  # typer has an error say the help, or not, as its version goes
            words.append("--help")
        code = app(args=words, standalone_mode=False)
        if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into a code
            raise KeyboardInterrupt
    except Usage as error:
        print(
            f"winnow: {error.format_message()} (winnow --help lists verbs, winnow VERB --help options)", file=sys.stderr
        )
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("winnow: interrupted; rows already made are kept, the same command goes on from there", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # who reads has enough, as in `winnow list | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if os.environ.get("WINNOW_TRACEBACK"):
            raise
        print(f"winnow: {_said(error)}", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _together(words: Sequence[str]) -> list[str]:
    """`--budgets 64 128 256` as `--budgets 64,128,256`: typer gives an option one value."""
    found: list[str] = []
    for word in words:
        if found[-2:-1] == ["--budgets"] and word.replace(".", "", 1).isdigit():
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def _said(error: Exception) -> str:
    """What went wrong, in one line."""
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in words:
        return f"out of memory ({words.partition('. ')[0] or type(error).__name__}): try a smaller --batch"
    if isinstance(error, REFUSALS):
        return words
    return f"{type(error).__name__}: {words} (nobody foresaw this: please report it; WINNOW_TRACEBACK=1 shows where)"
