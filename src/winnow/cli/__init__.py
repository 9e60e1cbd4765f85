"""The command `winnow`: one file per verb; exit 0 ok, 1 a check failed, 2 refusal or bad input in one line.

Winnow's own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from . import compare, doctor, generate, list_, lr_find, measure, report, show, train
from . import data as data_
from . import eval as eval_

# typer may carry its own copy of click, so the base of its errors is looked up rather than imported
Usage: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Vision transformers that read fewer tokens, and say honestly what that costs and saves.",
)  # fmt: skip
for verb in (list_, show, doctor, measure, compare, report, generate, train, lr_find):
    app.command(name=verb.NAME)(verb.command)
app.add_typer(eval_.app, name=eval_.NAME)
app.add_typer(data_.app, name=data_.NAME)


@app.callback()
def _group() -> None:
    pass


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2 (WINNOW_TRACEBACK=1 shows where it came from)."""
    try:
        code = app(standalone_mode=False)
    except Usage as error:
        print(
            f"winnow: {error.format_message()} (winnow --help lists verbs, winnow VERB --help options)", file=sys.stderr
        )
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("winnow: interrupted; rows already made are kept, the same command goes on from there", file=sys.stderr)
        code = 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("WINNOW_TRACEBACK"):
            raise
        print("winnow: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
