"""The page about document 003, made of rows of `winnow train`: its tables, and what of it the rows confirm or refute.

Winnow's own; figures of document 003 (Curriculum Token Drop, 2025) are marked as its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch

from ..measure.record import Row, Training
from ..methods import CurriculumDrop
from ..reducer import Setting
from ._ctd_arms import Arm, ablations, arms_of
from ._ctd_claims import THEIRS, claims_over

DOCUMENT = Setting(depth=8, width=384, heads=6, prefix=1, cls=True, grid=(8, 8))
EPOCHS, SHOWN = 200, (20, 60, 90, 120, 160)
ABLATIONS = {"gamma": "curriculum parameter", "saliency": "saliency metric", "schedule": "schedule shape"}


def page(rows: Sequence[Row]) -> str:
    """Markdown of the rows; ValueError where none is of a training."""
    experiments = arms_of(rows)
    if not experiments:
        raise ValueError("no row is of a training: rows are written by winnow train RECIPE --results FILE")
    parts = [_head(), _presets()]
    for arms in experiments:
        parts += [_title(arms), _table(arms)]
        for field, words in ABLATIONS.items():
            parts += [f"### By {field}: {words}\n\n{_table(group, field)}" for group in ablations(arms, field)]
    parts.append(_claims(experiments))
    return "\n\n".join(parts) + "\n"


def _head() -> str:
    return """# Document 003: Curriculum Token Drop, from rows

Every figure is computed from result rows, except document 003's own, which are marked "theirs": one run on an Apple M2 Pro.
Validation is the last epoch's (the document gives its best epoch's), ± standard deviation over seeds; final train is
the last epoch's own steps, augmentation and dropping included; mean drop is the share of patches that the blocks did
not execute, over all of training; tokens are those each block leaves (or gets, where a method acts between blocks),
mean over training, and GMAC is what they cost in one image's forward, by closed form. Training time is the trainings'
own, one after another on a machine that did other work too: it is no comparison. Speed is: a step at each epoch's
progress (one where nothing grows), timed in turn with the plain model's in one process; plain time / time over all
epochs, 95 % interval.
A claim is judged by the longest experiment that has rows for it; of accuracy only where both sides have several seeds."""


def _presets() -> str:
    plain, lines = training_macs(None), []
    for name in CurriculumDrop.presets:
        method = getattr(CurriculumDrop, name)()
        counts = [" ".join(map(str, method.counts(DOCUMENT, epoch / EPOCHS)[1:])) for epoch in SHOWN]
        macs = training_macs(method)
        lines.append(_line([f"`{name}`", f"`{method}`", *counts, f"{macs / 1e9:.3f}", f"{plain / macs:.2f}"]))
    heads = ["preset", "drops", *(f"epoch {epoch}" for epoch in SHOWN), "GMAC", "times fewer"]
    return f"""## Tokens after blocks 1 to 8 of 64, {EPOCHS} epochs

{_line(heads)}
{"|:--" * (2 + len(SHOWN))}|--:|--:|
{chr(10).join(lines)}

GMAC: of one image forward, mean over training, closed form of `timm:hybrid_vit` (plain: {plain / 1e9:.3f}). Where products
are what takes the time, training cannot become faster than so many times."""


def training_macs(method: CurriculumDrop | None) -> float:
    """MACs per image of document 003's network, forward, mean over its epochs; None: the plain model."""
    import timm

    from .. import backbones, reduce, reducer_of  # noqa: F401  backbones registers our own with timm
    from ..measure.closed_form import closed_macs, plain_macs

    model = timm.create_model("hybrid_vit").train()
    if method is None:
        return plain_macs(model) or 0.0
    reducer, found = reducer_of(reduce(model, method)), []
    for epoch in range(EPOCHS):
        reducer.progress = epoch / EPOCHS
        found.append(closed_macs(model, torch.tensor([method.counts(DOCUMENT, reducer.progress)])))
    return float(torch.stack(found).mean())  # type: ignore[arg-type]


def _title(arms: Sequence[Arm]) -> str:
    row = arms[0].rows[0]
    train, data = row.train, row.data
    assert train is not None
    machine = row.environment.get("gpu") or row.environment.get("cpu", "?")
    threads = row.environment.get("threads", "?")
    images = "" if data is None else f", {data.name} {data.split}".rstrip() + f", {data.n} validation images"
    steps = f"{train.epochs} epochs of {train.steps // train.epochs} steps of {train.batch}"
    return f"## `{row.model}`{images}, {steps}, {machine}, {threads} threads"


HEADS = "seeds|validation, %|final train, %|training time|speed|train-val gap, points|mean drop|GMAC|tokens".split("|")


def _table(arms: Sequence[Arm], field: str | None = None) -> str:
    lines = [_line([field or "method", *HEADS]), "|:--|" + "--:|" * (len(HEADS) - 1) + ":--|"]
    for arm in arms:
        name = arm.name if field is None or arm.method is None else str(getattr(arm.method, field))
        lines.append(_line([name, str(len(arm.rows)), *_cells(arm)]))
    for name, validation, train, hours, gap in THEIRS[field or "method"]:
        lines.append(_line([f"{name}, theirs", "–", validation, train, hours, "–", gap, *["not given"] * 3]))
    return "\n".join(lines)


def _cells(arm: Arm) -> list[str]:
    speed = "1" if arm.method is None else "not timed"
    if arm.speed is not None:
        speed = "{:.2f} ({:.2f} to {:.2f})".format(*arm.speed)
    return [
        _spread(arm.validation),
        _spread(arm.each(lambda run: run.train_top1)),
        _hours(mean(arm.seconds)),
        speed,
        _spread(arm.each(lambda run: run.gap)),
        f"{100 * arm.drop:.0f} %",
        "–" if arm.macs is None else f"{arm.macs / 1e9:.4f}",
        " ".join(f"{n:.3g}" for n in arm.executed) or "all",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _claims(experiments: Sequence[Sequence[Arm]]) -> str:
    lines = ["## What document 003 claims, by these rows", "", "| claim | verdict | evidence |", "|:--|:--|:--|"]
    lines += [f"| {one.words} | {one.verdict} | {one.evidence} |" for one in claims_over(experiments)]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """results.csv: one line per run."""
    lines = [_csv(row, row.train) for row in rows if row.train is not None]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv(row: Row, run: Training) -> dict[str, Any]:
    return {
        "model": row.model, "method": row.method or "plain", "seed": row.seed, "epochs": run.epochs, "batch": run.batch,
        "validation": run.last, "best": run.best, "top5": run.top5, "f1": run.f1, "final_train": run.train_top1,
        "gap": run.gap, "seconds": run.runtime_s, "samples_per_s": run.samples_per_s,
        "mean_drop": round(Arm(None, (row,)).drop, 4), "tokens": " ".join(f"{n:.4g}" for n in run.tokens or []),
        "device": row.device, "commit": row.commit,
    }  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation in percent."""
    if not values:
        return "–"
    sd = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{sd}"


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
