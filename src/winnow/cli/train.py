"""winnow train: one recipe, from the first step or from where it was stopped.

Winnow's own. On several processes: torchrun --nproc-per-node 8 -m winnow train RECIPE, or accelerate launch -m winnow ...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ._options import Json, Results, Threads

NAME = "train"
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file or a shipped name", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", help="change a key, as in optim.lr=1e-3; may be repeated")]
TrainDevice = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is if not given")]


def command(
    recipe: RecipeName,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on exactly where the run in --out stopped")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the run; runs/RECIPE if not given")] = None,
    results: Results = Path("results/train.jsonl"),
    device: TrainDevice = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Train a model, plain or reduced, as a recipe says; Ctrl-C saves, --resume goes on exactly."""
    import torch

    from ..train.loop import train
    from ..train.recipe import find, load_recipe
    from ..train.stop import Stopped

    if threads:
        torch.set_num_threads(threads)
    wish = load_recipe(recipe, sets or ())
    name = find(recipe).stem
    try:
        row = train(wish, out or Path("runs") / name, name=name, device=device, resume=resume, results=results)
    except Stopped as stopped:
        print(f"winnow: {stopped}", file=sys.stderr)
        sys.exit(stopped.code)  # not as typer.Exit: it has said so itself
    if as_json and int(os.environ.get("RANK", "0")) == 0:
        print(row.model_dump_json(by_alias=True))
