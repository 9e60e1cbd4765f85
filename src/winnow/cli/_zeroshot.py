"""winnow eval zeroshot and winnow eval retrieval: a contrastive model, plain or reduced, judged in words.

Radford et al., CLIP, 2021; towers, class names and templates by open_clip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import winnow

from .. import _clip
from .._reduce import seat_of
from ..data import batches as decode
from ..data.images import Images, check_labels
from ..measure import accuracy_of, record
from ..measure.accuracy import wilson
from ..measure.zero_shot import class_features, classes_of, retrieval, templates_of
from ..reducer import Method
from ..tasks._reducer import reducer_weights
from . import _options as o
from ._progress import Progress

Model = Annotated[str, typer.Option(help="open_clip:NAME, or the folder of a run of winnow train (its last weights)")]
Tag = Annotated[str | None, typer.Option("--pretrained", help="open_clip's tag, downloaded, e.g. laion2b_s34b_b79k")]
MethodOption = Annotated[str | None, typer.Option("--method", "-m", help="a method as in ToMe(r=8); plain without")]
Split = Annotated[str, typer.Option(help="val, train[-500:], ...")]
Limit = Annotated[int | None, typer.Option(help="at most so many, evenly spaced")]
BatchSize = Annotated[int, typer.Option("--batch", help="images at a time")]
Workers = Annotated[int, typer.Option(help="threads that decode ahead")]
Results = Annotated[Path, typer.Option(help="JSON-lines file the row is appended to")]


@dataclass
class Judged:
    """A model on its device, and how it is fed."""

    clip: _clip.Clip
    method: Method | None
    device: torch.device
    batch: int
    workers: int

    def images(self, images: Images) -> tuple[Tensor, list[float] | None]:
        """Features [n, D], and the mean patch tokens of a reduced model [depth+1]."""
        found, counts = [], []
        with Progress() as progress:
            progress.total = len(images)
            progress.say(f"{self.clip.spec}: images")
            words: dict[str, Any] = {"workers": self.workers, "device": self.device, "progress": progress.images}
            for one in decode.batches(images, self.clip.transform, self.batch, **words):
                found.append(self.clip.model.encode_image(one.images, normalize=True).float())  # type: ignore[operator]
                if self.method is not None:
                    counts.append(seat_of(self.clip.model).run.valid_counts.float())
        if not bool(torch.cat(found).isfinite().all()):
            raise FloatingPointError("the model gives NaN or infinity on these images")
        return torch.cat(found), torch.cat(counts).mean(0).tolist() if counts else None

    def texts(self, tokens: Tensor) -> Tensor:
        """Features [n, D] of tokens [n, context]."""
        return self.clip.model.encode_text(tokens, normalize=True).float()  # type: ignore[operator]


def judged(
    model: str,
    tag: str | None,
    weights: Path | None,
    method: str | None,
    device: str,
    batch: int,
    workers: int,
    seed: int,
) -> Judged:
    """The model as the options say, or as a run left it; with weights, a reducer's own are taken from them too."""
    words: dict[str, Any] = {}
    if (Path(model).expanduser() / "recipe.yaml").is_file():
        from ..train.recipe import load_recipe

        o.refuse({"--pretrained": tag}, f"is not for a run: {model} has its own weights")
        recipe = load_recipe(Path(model) / "recipe.yaml")
        if recipe.task != "contrast":
            raise ValueError(f"{model} is a run of task: {recipe.task}; only those of task: contrast have a text tower")
        weights, method = weights or Path(model).expanduser() / "last.safetensors", method or recipe.method
        words = {"size": recipe.augment.size, "mean": recipe.data.mean, "std": recipe.data.std}
        model, words["options"] = recipe.model.name, recipe.model.options
    clip = _clip.load_clip(f"{model}/{tag}" if tag else model, pretrained=tag is not None and weights is None,
                           weights=weights, seed=seed, **words)  # fmt: skip
    parsed = None if method is None else winnow.parse(method)
    if parsed is not None:
        winnow.reduce(clip.model, parsed)
    reducer_weights(clip.model, weights)
    where = o.device_of(device)
    clip.model.to(where)
    return Judged(clip, parsed, where, batch, workers)


@torch.inference_mode()
def zeroshot(
    model: Model,
    data: Annotated[str, typer.Option(help="labelled images: folder, CSV, parquet, CIFAR folder, scenes")],
    pretrained: Tag = None,
    weights: o.Weights = None,
    split: Split = "",
    limit: Limit = None,
    classes: Annotated[str | None, typer.Option(help="imagenet, or a file; the data's own names if not given")] = None,
    templates: Annotated[str, typer.Option(help="openai, simple, or a file with one a line, {} the class")] = "openai",
    method: MethodOption = None,
    batch: BatchSize = 64,
    workers: Workers = 0,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    results: Results = Path("results/zeroshot.jsonl"),
    as_json: o.Json = False,
) -> None:
    """Top-1 and top-5 with classes named in words, 95 % Wilson intervals."""
    from ..data import open_images

    record.ready(results)
    images = open_images(data, split=split, limit=limit)
    if images.labels is None:
        raise ValueError(f"{images.name} has no labels, and zero-shot accuracy is counted with them")
    names, prompts = classes_of(classes, images.classes, images.name), templates_of(templates)
    check_labels(images, len(names))
    by = judged(model, pretrained, weights, method, device, batch, workers, seed)
    features, counts = by.images(images)
    named = class_features(by.texts, by.clip.tokenize, names, prompts, by.device)
    right = (features @ named.T).topk(min(5, len(names))).indices == torch.tensor(images.labels, device=by.device)[
        :, None
    ]
    top1, top5 = right[:, 0].cpu().numpy(), right.any(1).cpu().numpy()
    row = record.Row(
        task="zeroshot", model=by.clip.spec, weights=by.clip.weights_hash,
        method=None if by.method is None else repr(by.method),
        data=record.Data(name=images.name, split=images.split, n=len(images), hash=images.hash),
        role="plain" if by.method is None else "method", way="auto", counts=counts, accuracy=accuracy_of(top1),
        top5=accuracy_of(top5), seed=seed, device=by.device.type, environment=record.environment(), commit=record.commit(),
        command=record.command(), time=record.now(),
    )  # fmt: skip
    record.append(results, row)
    if as_json:
        print(row.model_dump_json(by_alias=True))
        return
    print(
        f"{by.clip.spec}, {row.method or 'plain'}: {len(names)} classes, {len(prompts)} templates, {len(images)} images"
    )
    for name, hits in (("top-1", top1), ("top-5", top5)):
        print(_line(name, int(hits.sum()), len(hits)))


@torch.inference_mode()
def retrieve(
    model: Model,
    data: Annotated[str, typer.Option(help="images with captions: shards, a table, or scenes")],
    pretrained: Tag = None,
    weights: o.Weights = None,
    split: Split = "",
    limit: Limit = None,
    method: MethodOption = None,
    batch: BatchSize = 64,
    workers: Workers = 0,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Recall at 1, 5 and 10 of the caption to an image and of the image to a caption, 95 % Wilson intervals."""
    from ..data.pairs import groups, open_pairs

    pairs = open_pairs(data, split=split, limit=limit).sound()
    by = judged(model, pretrained, weights, method, device, batch, workers, seed)
    features, _ = by.images(pairs.images)
    said = [pairs.caption(i) for i in range(len(pairs))]
    tokens = [by.clip.tokenize(said[i : i + batch]).to(by.device) for i in range(0, len(said), batch)]
    found = retrieval(features, torch.cat([by.texts(one) for one in tokens]), groups(pairs).to(by.device))
    if as_json:
        shares = {name: [share, *wilson(round(share * len(pairs)), len(pairs))] for name, share in found.items()}
        print(json.dumps({"pairs": len(pairs), "left_out": len(pairs.failures), **shares}))
        return
    print(f"{by.clip.spec}, {by.method or 'plain'}: {len(pairs)} pairs, {len(pairs.failures)} left out")
    for name, share in found.items():
        print(_line(name, round(share * len(pairs)), len(pairs)))


def _line(name: str, hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{name}: {100 * hits / n:.2f} % ({100 * low:.2f} to {100 * high:.2f})"
