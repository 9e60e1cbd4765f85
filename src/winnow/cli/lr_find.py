"""winnow lr-find: which learning rate a recipe should start with, and the plot that shows why.

Winnow's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ._options import Json
from ._progress import Progress
from .train import RecipeName, Sets, TrainDevice

NAME = "lr-find"


def command(
    recipe: RecipeName,
    sets: Sets = None,
    low: Annotated[float, typer.Option(help="first rate")] = 1e-7,
    high: Annotated[float, typer.Option(help="last rate")] = 1.0,
    steps: Annotated[int, typer.Option(help="rates tried, one step each")] = 100,
    out: Annotated[Path | None, typer.Option(help="plot, .svg or .png; RECIPE-lr.svg if not given")] = None,
    device: TrainDevice = None,
    as_json: Json = False,
) -> None:
    """Train a few steps at growing learning rates and suggest the one where the loss falls most steeply."""
    from ..train.finder import find_rate
    from ..train.recipe import find, load_recipe
    from ..view.files import kind
    from ..view.training import save_rates

    name = find(recipe).stem
    path = out or Path(f"{name}-lr.svg")
    kind(path)
    with Progress() as progress:
        progress.total = steps
        progress.say(f"{name}: {steps} rates from {low:g} to {high:g}")
        found = find_rate(
            load_recipe(recipe, sets or ()), low=low, high=high, steps=steps, device=device, say=progress.images
        )
    save_rates(found.rates, found.losses, found.suggested, path)
    if as_json:
        print(
            json.dumps({"suggested": found.suggested, "plot": str(path), "rates": found.rates, "losses": found.losses})
        )
        return
    print(f"suggested learning rate: {found.suggested:.2e} (--set optim.lr={found.suggested:.2e}); plot: {path}")
