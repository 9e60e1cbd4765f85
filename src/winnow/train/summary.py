"""The result row of a training run, made from the lines of its log.

Winnow's own; the summary fields are those of Hugging Face's Trainer.
"""

from __future__ import annotations

import math
import resource
import sys
from typing import TYPE_CHECKING, Any

import torch

from ..measure import accuracy_of, record
from .recipe import flat

if TYPE_CHECKING:
    from .loop import Loop

OWN = {"loss", "task_loss", "top1", "grad_norm"}
"""What every run averages; the rest are the method's figures."""
SCORES = {"loss", "top1", "top5", "f1"}
"""Validation scores with a field of their own."""
THEIRS = {
    "train_loss": "loss", "train_runtime": "runtime_s", "train_samples_per_second": "samples_per_s",
    "train_steps_per_second": "steps_per_s",
}  # fmt: skip
"""What document 000's log calls them, as Hugging Face's Trainer does."""


def row_of(loop: Loop, name: str, weights: str) -> record.Row:
    """The row of a finished run."""
    recipe, task, scores = loop.recipe, loop.task, loop.scores
    part = training_of(loop, name)
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[recipe.optim.precision]
    return record.Row(
        task=f"train {recipe.task}", model=task.spec, weights=weights or None, data=task.data, method=recipe.method,
        role="plain" if recipe.method is None else "method", way="auto", train=part,
        counts=None if scores is None else scores.counts,
        accuracy=accuracy_of(scores.hits) if scores is not None and scores.hits is not None else None,
        memory_mib=max(line["memory_mib"] for line in _epochs(loop)), seed=recipe.seed, dtype=dtype,
        device=loop.place.device.type, environment=record.environment(), commit=record.commit(),
        command=record.command(), time=record.now(),
    )  # fmt: skip


def training_of(loop: Loop, name: str) -> record.Training:
    """How it was trained, from the epoch lines."""
    recipe, epochs = loop.recipe, _epochs(loop)
    last, steps = epochs[-1], epochs[-1]["step"]
    runtime = sum(line["seconds"] for line in epochs)
    val: dict[str, float] = last.get("val", {})
    before: dict[str, float] = next((line["val"] for line in loop.history if line["event"] == "before"), {})
    tops = [(line["val"]["top1"], -line["epoch"]) for line in epochs if "top1" in line.get("val", {})]
    best, where = max(tops) if tops else (None, 0)
    given = flat(recipe.model_dump(mode="json", exclude_defaults=True))
    norm = _mean([line["train"]["grad_norm"] for line in epochs])  # fp16's first steps may overflow
    tokens = [line["tokens"] for line in epochs if "tokens" in line]
    return record.Training(
        recipe=name, settings={key: _cell(value) for key, value in given},
        epochs=recipe.epochs, steps=steps, batch=recipe.batch, processes=loop.place.world, runtime_s=runtime,
        samples_per_s=steps * recipe.batch / runtime, steps_per_s=steps / runtime,
        loss=_mean([line["train"]["loss"] for line in epochs]),
        grad_norm=norm if math.isfinite(norm) else None, learning_rate=last["learning_rate"],
        best=best, best_epoch=-where if tops else None,
        last=val.get("top1"), top5=val.get("top5"), f1=val.get("f1"), val_loss=val.get("loss"),
        train_top1=last["train"].get("top1"), gap=last.get("gap"),
        tokens=[_mean(list(layer)) for layer in zip(*tokens)] if tokens else None,
        figures={key: value for key, value in last["train"].items() if key not in OWN}
        | {key: value for key, value in val.items() if key not in SCORES}
        | {f"before_{key}": value for key, value in before.items()},
    )  # fmt: skip


def line_of(train: record.Training) -> dict[str, Any]:
    """The last line of the log, under document 000's names."""
    kept = train.model_dump(exclude={"settings", *THEIRS.values()})
    return {"loss": train.loss, **{theirs: getattr(train, ours) for theirs, ours in THEIRS.items()}, **kept}


def memory_mib(device: torch.device) -> float:
    """Peak so far: allocated on the GPU since the epoch began, resident on the CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _epochs(loop: Loop) -> list[dict[str, Any]]:
    return [line for line in loop.history if line["event"] == "epoch"]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cell(value: Any) -> str | int | float | bool | None:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
