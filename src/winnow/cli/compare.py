"""winnow compare: the main job; one model, many methods, the same images, one page of what came out.

Winnow's own. Classifiers are compared in _compare_model.py, vision-language models in _compare_vlm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .._vlm_model import is_vlm
from ..data import open_images
from ..measure import record
from ..view import table
from . import _options as o
from ._printed import print_rows
from .report import write

NAME = "compare"
MODEL, DATA = "timm:vit_scenes", "scenes"
"""What is compared where no model is named: the ViT that ships, on the built-in scenes."""
METHODS = ("ToMe(r=4)", "ToMe(r=8)", "PiToMe()", "EViT()", "TopK()", "TopK(keep=Keep(0.5))")
"""What is compared where no method is named."""

Model = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help=f"{o.MODELS}; not given: the ViT that ships, on the scenes")
]
Method = Annotated[
    list[str] | None, typer.Option("--method", "-m", help=f"{o.A_METHOD}; not given: {', '.join(METHODS)}")
]
Data = Annotated[
    str | None, typer.Option(help="a csv, ImageFolder, CIFAR or parquet path, or the name photographs or scenes")
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        help="of a vision-language model's image tokens, e.g. 1 0.5 64 or 1,0.5,64: shares and numbers that methods written "
        "without an amount are given"
    ),
]
Limit = Annotated[int | None, typer.Option(help="so many images, evenly spaced")]
Out = Annotated[Path, typer.Option(help="folder for the page and the pictures")]
Fresh = Annotated[bool, typer.Option("--fresh", help="run again what the rows file holds")]
Batch = Annotated[int, typer.Option(min=1, help="batch size of the accuracy runs")]
Time = Annotated[list[int] | None, typer.Option(min=0, help="batch sizes to time; may be repeated; 0 = none")]
Pictures = Annotated[int, typer.Option(min=0, help="images to show")]


def command(
    model: Model = None,
    method: Method = None,
    data: Data = None,
    split: o.Split = "",
    budgets: Budgets = None,
    limit: Limit = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    out: Out = Path("compare"),
    results: o.Results = Path("results/compare.jsonl"),
    fresh: Fresh = False,
    batch: Batch = 25,
    time: Time = None,
    pairs: o.Pairs = 11,
    pictures: Pictures = 6,
    way: o.WayOption = "auto",
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    threads: o.Threads = 0,
    as_json: o.Json = False,
) -> None:
    """Compare methods on images, each beside its equal-cost baselines; rows are kept one by one, a rerun goes on.

    A vision-language model (hf:scenes ships) is asked questions: data is scenes or a .json of LLaVA's conversations.
    """
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give a folder")
    asked = model is not None and is_vlm(model)
    methods = o.methods_of(method or list(METHODS))
    shared = {"results": results, "fresh": fresh, "batch": batch, "pairs": pairs, "pictures": pictures,
              "way": o.way_of(way), "device": o.device_of(device, threads)}  # fmt: skip
    if asked:
        from ._compare_vlm import compare_vlm

        whole = {"--weights": weights, "--pretrained": pretrained, "--mean": mean, "--std": std}
        o.refuse(whole, "is for classifiers: a vision-language model brings its weights and its processor, hf:FOLDER")
        wished, amounts = methods if method else None, _budgets(budgets or [])
        rows, shown = compare_vlm(str(model), wished, amounts, data, split, limit, sizes=time or [], **shared)  # type: ignore[arg-type]
    else:
        from ._compare_model import compare_model

        if budgets:
            raise ValueError(f"--budgets is for vision-language models; {model or MODEL} is none")
        images = open_images(data or (DATA if model is None else "photographs"), split=split, limit=limit)
        if model is None:
            model, pretrained = MODEL, weights is None
        loaded = o.model_of(model, weights, pretrained, seed, mean, std, bare=True)
        reduce = o.reducing(weights, methods)
        rows, shown = compare_model(loaded, methods, images, reduce=reduce, sizes=time or [batch], **shared)  # type: ignore[arg-type]
    _told(rows, shown, out, results, as_json)


def _told(rows: list[record.Row], shown: list, out: Path, results: Path, as_json: bool) -> None:
    """Write the page; print the rows or the table."""
    made = write(rows, shown, out)
    if as_json:
        print_rows(rows)
        return
    console = Console()
    console.print(table(rows))
    console.print(f"page: {made[0]}   rows: {results}", highlight=False)


def _budgets(texts: Sequence[str]) -> list[float]:
    text = " ".join(texts)
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = [0.0]
    if any(not 0 < budget < float("inf") for budget in found):
        raise ValueError(
            f"--budgets {text}: shares up to 1 and whole numbers of image tokens above, e.g. 1,0.5,0.25,64"
        )
    return found
