"""winnow compare: the main job; one model, many methods, the same images, one page of what came out.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from .._vlm_model import is_vlm
from ..compare import Comparison
from ..data import Images, check_labels, open_images
from ..data.batches import cached
from ..data.scenes import patch_objects
from ..measure import record
from ..models import LoadedModel
from ..view import table
from ..view.sheets import photograph, sheets
from . import _options as o
from ._progress import Progress
from .report import write

NAME = "compare"
MODEL, DATA = "timm:vit_scenes", "scenes"
"""What is compared where no model is named: the ViT that ships, on the built-in scenes."""
METHODS = ("ToMe(r=4)", "ToMe(r=8)", "PiToMe()", "EViT()", "TopK()", "TopK(keep=Keep(0.5))")
"""What is compared where no method is named."""
VLM_METHODS = ("PruMerge()", "VisionZip()", "DivPrune()", "VisPruner()", "FastV()", "ToMe(r=8)")
"""The same with a vision-language model."""


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=f"{o.MODELS}; not given: the ViT that ships, on the scenes")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help=f"a method as in ToMe(r=8); may be repeated; not given: {', '.join(METHODS)}"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="a csv, ImageFolder, CIFAR or parquet path, or the name photographs or scenes")
    ] = None,
    split: Annotated[str, typer.Option(help="split or slice of the data, e.g. train[-5000:]")] = "",
    budgets: Annotated[
        str,
        typer.Option(
            help="of a vision-language model's image tokens, e.g. 1,0.5,64: shares and numbers that methods "
            "written without an amount are given"
        ),
    ] = "",
    limit: Annotated[int | None, typer.Option(help="so many images, evenly spaced")] = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    out: Annotated[Path, typer.Option(help="folder for the page and the pictures")] = Path("compare"),
    results: Annotated[Path, typer.Option(help="JSON-lines file the rows are appended to")] = Path(
        "results/compare.jsonl"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="run again what the rows file holds")] = False,
    batch: Annotated[int, typer.Option(help="batch size of the accuracy runs")] = 25,
    time: Annotated[list[int] | None, typer.Option(help="batch sizes to time; may be repeated; 0 = none")] = None,
    pairs: Annotated[int, typer.Option(help="interleaved pairs per timing, at least 9")] = 11,
    pictures: Annotated[int, typer.Option(help="images to show")] = 6,
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
    asked = model is not None and is_vlm(model)
    methods = o.methods_of(method or list(VLM_METHODS if asked else METHODS))
    where, run_way = o.device_of(device, threads), o.way_of(way)
    if asked:
        from ._compare_vlm import compare_vlm

        rows, shown = compare_vlm(
            str(model), methods, _budgets(budgets), data, split, limit, results=results, fresh=fresh, batch=batch,
            sizes=time or [], pairs=pairs, pictures=pictures, way=run_way, device=where,
        )  # fmt: skip
        return _told(rows, shown, out, results, as_json)
    if budgets:
        raise ValueError(f"--budgets is for vision-language models; {model or MODEL} is none")
    images = open_images(data or (DATA if model is None else "photographs"), split=split, limit=limit)
    if model is None:
        model, pretrained = MODEL, weights is None
    loaded = o.model_of(model, weights, pretrained, seed, mean, std, bare=True)
    reduce = o.reducing(weights, methods)
    if loaded.num_classes is None:
        raise ValueError(f"{model} gives features, not classes: compare needs a classifier")
    check_labels(images, loaded.num_classes)
    # with random weights top-1 means nothing: only agreement with the plain model is reported
    labels = None if images.labels is None or loaded.weights_hash is None else np.array(images.labels)

    with Progress() as progress:
        comparison = Comparison(
            model=loaded.model.to(where), name=model, weights=loaded.weights_hash, labels=labels, way=run_way,
            batches=cached(images, loaded.transform, batch, workers=2, device=where, progress=progress.images),
            data=record.Data(name=images.name, split=images.split, n=len(images), hash=images.hash),
            results=results, sizes=[size for size in time or [batch] if size], pairs=pairs, fresh=fresh,
            say=progress.say, objects=_objects(images, loaded), reduce=reduce,
        )  # fmt: skip
        progress.total = len(images)
        rows = comparison.run(methods)
        progress.say("pictures")
        shown = sheets(comparison.model, images, loaded, methods, rows, pictures, where, reduce)
    return _told(rows, shown, out, results, as_json)


def _told(rows: list[record.Row], shown: list, out: Path, results: Path, as_json: bool) -> None:
    """Write the page; print the rows or the table."""
    made = write(rows, shown, out)
    if as_json:
        print("[" + ",\n ".join(row.model_dump_json(by_alias=True) for row in rows) + "]")
        return
    console = Console()
    console.print(table(rows))
    console.print(f"page: {made[0]}   rows: {results}", highlight=False)


def _budgets(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = [0.0]
    if any(not 0 < budget < float("inf") for budget in found):
        raise ValueError(
            f"--budgets {text}: shares up to 1 and whole numbers of image tokens above, e.g. 1,0.5,0.25,64"
        )
    return found


def _objects(images: Images, loaded: LoadedModel) -> Callable[[tuple[int, int]], np.ndarray] | None:
    """The object of each patch, masks having gone through the model's own resizing and cropping; None without masks."""
    if images.mask(0) is None:
        return None

    def patches(grid: tuple[int, int]) -> np.ndarray:
        masks = (images.mask(i) for i in range(len(images)))
        return np.stack([patch_objects(seen(mask, loaded.transform, loaded.mean, loaded.std), grid) for mask in masks])

    return cache(patches)


def seen(mask: np.ndarray | None, transform: Callable, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A mask as the model would see it; ids are spread over the grey values, so that resizing can be undone by rounding."""
    assert mask is not None
    step = 255 // max(1, int(mask.max()))
    pixels = transform(Image.fromarray(mask * np.uint8(step)).convert("RGB"))
    return np.rint(photograph(pixels[None], mean, std)[0, ..., 0] / step).astype(np.uint8)
