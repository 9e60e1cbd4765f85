"""winnow doctor: does this method do on this model what it says? identity, coverage, prefix, tokens, ways, restore.

Winnow's own; the checks are those of the contract, run on your model.
"""

from __future__ import annotations

import dataclasses
import json

import torch
import typer

from ..checks import CHECKS, examine
from . import _options as o

NAME = "doctor"


def command(
    model: o.Model,
    method: o.Methods,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    as_json: o.Json = False,
) -> None:
    """Examine a model with a method; exit 0 only if every check holds, 1 if one fails, 2 if they do not fit."""
    methods = o.methods_of(method)
    where = o.device_of(device)
    loaded = o.model_of(model, weights, pretrained, seed)
    noise = torch.Generator().manual_seed(seed)
    contrast = torch.tensor([0.3, 1.0, 3.0]).view(3, 1, 1, 1)
    images = (torch.randn(3, 3, *loaded.size, generator=noise) * contrast).to(where)
    found = {repr(one): examine(loaded.model.to(where), one, images) for one in methods}
    if as_json:
        print(json.dumps({name: [dataclasses.asdict(result) for result in results] for name, results in found.items()}))
    else:
        for name, results in found.items():
            print(f"{name} on {model}")
            for result in results:
                about = (CHECKS[result.check].__doc__ or "").splitlines()[0]
                print(f"  {result.outcome:7} {about}" + (f"\n          {result.message}" if result.message else ""))
    if any(result.outcome == "failed" for results in found.values() for result in results):
        raise typer.Exit(1)
