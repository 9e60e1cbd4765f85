"""winnow show: one photograph, and what each method kept or merged, layer by layer.

Winnow's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .. import view
from ..reducer import Method
from ..view.sheets import layers_of, photograph, watched
from . import _options as o

NAME = "show"


def command(
    image: Annotated[Path, typer.Argument(help="a photograph", show_default=False)],
    model: o.Model,
    method: o.Methods,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    out: Annotated[Path, typer.Option(help="picture to write: .png or .svg")] = Path("show.png"),
    layers: Annotated[int, typer.Option(min=1, help="at most so many layers per method")] = 4,
    verbose: Annotated[bool, typer.Option("--verbose", help="print counts, scores and the kept mask by layer")] = False,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Draw what methods keep and merge of one photograph."""
    methods = o.methods_of(method)
    view.files.kind(out)
    picture = _open(image)
    loaded = o.model_of(model, weights, pretrained, seed, mean, std, bare=True)
    reduce = o.reducing(weights, methods)
    pixels = loaded.transform(picture)[None]
    rows = [(repr(one), layers_of(loaded.model, one, pixels, reduce)[0]) for one in methods]
    weighed = "" if loaded.weights_hash else ", random weights"
    view.figure(
        photograph(pixels, loaded.mean, loaded.std)[0], rows, out, f"{image.name}, {model}{weighed}", most=layers
    )
    found = [_counts(loaded.model, one, pixels, verbose, reduce) for one in methods]
    if as_json:
        print(json.dumps({"picture": str(out), "methods": found}))
        return
    for one in found:
        print(f"{one['method']}: tokens {' '.join(map(str, one['counts']))}")
        for site in one.get("sites", []):
            print(_words(site))
    print(out)


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); give a JPEG, PNG or WebP file") from None


def _counts(model: torch.nn.Module, method: Method, pixels: Tensor, verbose: bool, reduce: Callable) -> dict[str, Any]:
    """Tokens by layer; with verbose, scores and kept mask of every layer where something happened."""
    run = watched(model, method, pixels, reduce)
    counts = run.valid_counts[0].tolist()
    found: dict[str, Any] = {"method": repr(method), "counts": counts}
    if verbose:
        found["sites"] = []
        for layer, ledger in run.ledgers.items():
            score = run.scores.get(layer if method.facts.where == "block" else layer + 1)
            if layer >= 0 and counts[layer + 1] == counts[layer] and score is None:
                continue
            grid = run.tokens[layer].grid or (1, ledger.owner.shape[1])
            kept = _kept(ledger.owner[0]).view(grid).int().tolist()
            site = {"layer": layer, "tokens": counts[layer + 1], "kept": kept}
            if score is not None:
                site["scores"] = [float(f"{value:.4g}") for value in score[0].tolist()]
            found["sites"].append(site)
    return found


def _kept(owner: Tensor) -> Tensor:
    """[P] bool: the patch is the first of a token, so the token stands where it stood."""
    first = torch.full((int(owner.max()) + 2,), owner.numel()).scatter_reduce(
        0, owner.clamp_min(-1) + 1, torch.arange(owner.numel()), "amin"
    )
    return (first[owner + 1] == torch.arange(owner.numel())) & (owner >= 0)


def _words(site: dict[str, Any]) -> str:
    lines = [f"  layer {site['layer']}: {site['tokens']} tokens"]
    scores = site.get("scores")
    if scores:
        ordered = sorted(scores)
        middle = ordered[len(ordered) // 2]
        lines.append(f"    scores: lowest {ordered[0]:.4g}, median {middle:.4g}, highest {ordered[-1]:.4g}")
    lines += ["    " + "".join("#" if cell else "." for cell in row) for row in site["kept"]]
    return "\n".join(lines)
