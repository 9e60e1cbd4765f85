"""winnow measure: multiply-adds, time and memory of a model, plain beside reduced; no data needed.

Winnow's own. What is measured stands in _measure_model.py, _measure_step.py (--step) and _measure_vlm.py (--text).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

import winnow

from ..data import open_images
from ..data.batches import batches
from ..measure import record
from ..models import LoadedModel
from ..reducer import Method
from . import _measure_model as whole
from . import _options as o

NAME = "measure"
CONVENTIONS = ("mac", "fvcore")
RANDOM = 25
"""Random images where no batch size is given."""

Convention = Annotated[str, typer.Option(help="mac; fvcore to re-read old tables; with --text fastv, sparsevlm")]
Batch = Annotated[list[int] | None, typer.Option(min=0, help="batch sizes to time; may be repeated")]
Boundaries = Annotated[
    str | None, typer.Option(help="even: spaced evenly at the rate; data: mean and maximum over --data")
]
Data = Annotated[str | None, typer.Option(help="images for --boundaries data, as in winnow compare")]
Limit = Annotated[int, typer.Option(help="so many images of the data, evenly spaced: one batch")]
Step = Annotated[bool, typer.Option("--step", help="a training step: time, memory, tokens; 9 pairs at --batch")]
Pair = Annotated[
    bool, typer.Option("--pair", help="with --step, both towers of an open_clip model and the contrastive loss")
]
Text = Annotated[
    int | None, typer.Option(help="so many prompt tokens beside the image's: the whole vision-language model")
]
Grid = Annotated[str | None, typer.Option(help="with --text, patches of the image where any size goes: 48x48")]
Expand = Annotated[
    bool, typer.Option("--expand", help="with --text, save in the tower alone: tokens go back to their patches")
]
ProfileOption = Annotated[bool, typer.Option("--profile", help="MACs, time and memory by layer and operator")]


def command(
    model: o.Model,
    method: o.SomeMethods = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    convention: Convention = "mac",
    batch: Batch = None,
    pairs: o.Pairs = 15,
    boundaries: Boundaries = None,
    data: Data = None,
    split: o.Split = "",
    limit: Limit = 25,
    step: Step = False,
    pair: Pair = False,
    text: Text = None,
    grid: Grid = None,
    expand: Expand = False,
    profile: ProfileOption = False,
    way: o.WayOption = "auto",
    results: o.Results = Path("results/measure.jsonl"),
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    threads: o.Threads = 0,
    as_json: o.Json = False,
) -> None:
    """Measure a model on random images, or on data: GMACs (counted and closed form), time against plain, peak memory."""
    methods, where, run_way = o.methods_of(method), o.device_of(device, threads), o.way_of(way)
    if text is not None:
        from ._measure_vlm import measure_vlm

        other = {"--weights": weights, "--boundaries": boundaries, "--data": data, "--step": step, "--pair": pair}
        o.refuse(
            other | {"--profile": profile}, "does not go with --text, which measures a whole vision-language model"
        )
        measure_vlm(
            model, methods, text, grid, batch or [1], pairs=pairs, way=run_way, convention=convention, results=results,
            seed=seed, device=where, pretrained=pretrained, as_json=as_json, expand=expand,
        )  # fmt: skip
        return
    if expand or grid is not None:
        raise ValueError("--expand and --grid are for vision-language models: give --text, the number of prompt tokens")
    if convention not in CONVENTIONS:
        raise ValueError(f"--convention {convention}: mac (every multiply-add) or fvcore (as old tables counted)")
    if step + profile + (convention == "fvcore") > 1:
        raise ValueError("--step, --profile and --convention fvcore print different things: one at a time")
    methods = _bounded(methods, boundaries, data)
    if pair:
        from ._measure_step import pair_steps

        if not step:
            raise ValueError("--pair times a training step of both towers: add --step")
        pair_steps(model, methods, max(batch or [8]), results=results, seed=seed, device=where, pretrained=pretrained,
                   weights=weights, as_json=as_json)  # fmt: skip
        return
    loaded, reduce = o.model_of(model, weights, pretrained, seed, bare=True), o.reducing(weights, methods)
    for one in methods:
        winnow.restore(reduce(loaded.model.to(where), one, run_way))
    images, source = _images(loaded, where, max(batch or [RANDOM]), seed, data, split, limit)
    asked = whole.Asked(loaded, methods, run_way, images, source, reduce, as_json)
    if step:
        from ._measure_step import steps

        steps(asked, results)
    elif profile:
        whole.profile(asked)
    elif convention == "fvcore":
        whole.fvcore(asked)
    else:
        whole.measure(asked, batch or [1, 25], pairs, results, spread=boundaries == "data")


def _bounded(methods: Sequence[Method], boundaries: str | None, data: str | None) -> list[Method]:
    """The methods, with evenly spaced boundaries where these are asked for."""
    if (boundaries == "data") != (data is not None):
        raise ValueError("--boundaries data and --data belong together, e.g. --boundaries data --data photographs")
    if boundaries not in (None, "data", "even"):
        raise ValueError(f"--boundaries {boundaries}: even or data")
    return [_even(one) for one in methods] if boundaries == "even" else list(methods)


def _even(method: Method) -> Method:
    if method.even is None:
        raise ValueError(f"--boundaries even: {method} draws no boundaries; DRIP does")
    return method.even


def _images(
    loaded: LoadedModel, where: torch.device, n: int, seed: int, data: str | None, split: str, limit: int
) -> tuple[torch.Tensor, record.Data]:
    """One batch [B, 3, H, W], of the data where some is named, else random; and what it is."""
    loaded.model.to(where)
    if data is None:
        noise = torch.Generator().manual_seed(seed)
        return torch.randn(n, 3, *loaded.size, generator=noise).to(where), record.Data(name="random images", n=n)
    chosen = open_images(data, split=split, limit=limit)
    images = next(batches(chosen, loaded.transform, limit, device=where)).images
    return images, record.Data(name=chosen.name, split=chosen.split, n=len(chosen), hash=chosen.hash)
