"""Options that several verbs share, and what they load.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

import winnow

from .._parse import parse, parse_way
from .._save import trained_reducer
from ..models import LoadedModel, load_model
from ..reducer import Method

MODELS = "timm:NAME, open_clip:NAME[/TAG] or hf:ID_OR_PATH"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODELS, show_default=False)]
A_METHOD = "a method as in ToMe(r=8); may be repeated"
Methods = Annotated[list[str], typer.Option("--method", "-m", help=A_METHOD)]
SomeMethods = Annotated[list[str] | None, typer.Option("--method", "-m", help=A_METHOD)]
Weights = Annotated[Path | None, typer.Option(help="weights file: .safetensors, .pth, .pt")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="download the model's own weights")]
WayOption = Annotated[str, typer.Option("--way", help='auto, static, masked or "Padded(16)"')]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Mean = Annotated[str | None, typer.Option(help="normalisation mean, e.g. 0.5 or 0.48,0.46,0.41")]
Std = Annotated[str | None, typer.Option(help="normalisation standard deviation")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 = as torch chooses")]
Seed = Annotated[int, typer.Option(help="seed of random weights and of nothing else")]
Split = Annotated[str, typer.Option(help="split or slice of the data, e.g. train[-5000:]")]
Pairs = Annotated[int, typer.Option(help="interleaved pairs per timing, at least 9")]
Results = Annotated[Path, typer.Option(help="JSON-lines file the rows are appended to")]


def methods_of(texts: list[str] | None) -> list[Method]:
    """The methods, spelled out on the command line."""
    return [parse(text) for text in texts or []]


def model_of(
    spec: str,
    weights: Path | None,
    pretrained: bool,
    seed: int = 0,
    mean: str | None = None,
    std: str | None = None,
    bare: bool = False,
) -> LoadedModel:
    """The model in evaluation mode; bare: a reducer's weights in the file are for `reducing`."""
    return load_model(
        spec, weights=weights, pretrained=pretrained, seed=seed, mean=_numbers("mean", mean), std=_numbers("std", std),
        bare=bare,
    )  # fmt: skip


def reducing(weights: Path | None, methods: Sequence[Method]) -> Callable:
    """`winnow.reduce`, with the trained reducer in the weights file; ValueError where it is none of the methods'."""
    trained = None if weights is None else trained_reducer(weights.expanduser())
    if trained is None:
        return winnow.reduce
    trained.check(methods)
    return trained.reduce


def refuse(given: Mapping[str, object], why: str) -> None:
    """ValueError where an option was given that means nothing here: nothing is left out in silence."""
    for name, value in given.items():
        if value:
            raise ValueError(f"{name} {why}")


def way_of(text: str):
    """The way to run."""
    return parse_way(text)


def device_of(name: str, threads: int = 0) -> torch.device:
    """The device, if it is there; ValueError otherwise."""
    if threads:
        torch.set_num_threads(threads)
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; cpu always works") from None
    return torch.device(name)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | float | None:
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--{option} {text}: give one number or one per channel, e.g. 0.5 or 0.48,0.46,0.41") from None
    return found[0] if len(found) == 1 else found
