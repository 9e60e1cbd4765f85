"""The page about contrastive pretraining with fewer image tokens, made of rows: tables, document 001's table 2, the figure.

Winnow's own; figures of documents 000 and 001 (DRIP, 2025) are marked as theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import count
from math import hypot, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from .._clip import load_clip
from .._parse import parse
from .._reduce import reduced
from ..data.scenes import NAMES, SHAPES, captions
from ..measure.accuracy import Z95
from ..measure.closed_form import closed_macs, plain_macs
from ..measure.record import Row, Training
from ..train.recipe import load_recipe
from ..view.curves import COLOURS, INK, MARKERS, MUTED
from ._clip_boundaries import section
from ._clip_document import document_table, parts_table
from ._ctd_arms import Arm, arms_of, difference

SCORES: dict[str, Callable[[Training], float | None]] = {
    "zero-shot top-1": lambda run: run.last,
    "top-5": lambda run: run.top5,
    "image to text R@1": lambda run: run.figures.get("image_to_text_r1"),
    "text to image R@1": lambda run: run.figures.get("text_to_image_r1"),
}
PROBES = {"probe": "yes", "backbone": "yes, the reducer learns", "none": "no"}


def page(rows: Sequence[Row]) -> str:
    """The whole page, Markdown."""
    parts = [HEAD]
    for arms in contrasts(rows):
        parts.append(_title(arms) + table(arms) + _asked(arms))
    if figure(rows) is not None:
        parts.append("![Zero-shot accuracy and retrieval against the image tower's cost](clip.svg)\n")
    parts += [section(rows), _towers(rows), document_table(rows), parts_table(rows)]
    return "\n".join(part for part in parts if part)


def contrasts(rows: Sequence[Row]) -> list[list[Arm]]:
    """Arms of every contrastive experiment, scenes before photographs, the plain one first, then by cost."""
    found = arms_of([row for row in rows if row.train is not None and row.task == "train contrast"])
    found.sort(key=lambda arms: arms[0].runs[0].recipe, reverse=True)
    return [sorted(arms, key=lambda arm: (arm.method is not None, -macs_of(arm))) for arms in found]


def _title(arms: Sequence[Arm]) -> str:
    row = arms[0].rows[0]
    assert row.train is not None
    machine = row.environment.get("gpu") or row.environment.get("cpu", "?")
    part, data = row.train, row.data
    images = "?" if data is None else f"{data.name} {data.split}, {data.n} images".replace(" ,", ",")
    source = Path(str(part.settings.get("data.train.path", "?"))).name
    return (
        f"## `{part.recipe}`: {part.epochs} epochs of {part.steps // part.epochs} steps of {part.batch}\n\n"
        f"Trained on {source}, judged on {images}; {machine}.\n\n"
    )


def _asked(arms: Sequence[Arm]) -> str:
    """What zero-shot asks of scenes, and what chance gives."""
    data = arms[0].rows[0].data
    if data is None or data.name not in NAMES:
        return ""
    texts = Counter(captions(data.n, data.split, data.name))
    said = sum(n * n for n in texts.values()) / data.n**2
    return ASKED.format(chance=100 / len(SHAPES), texts=len(texts), found=100 * said)


def table(arms: Sequence[Arm]) -> str:
    """One line per arm: tokens, cost, scores, and top-1 beside the plain model's."""
    heads = [
        "method",
        "seeds",
        "tokens in training",
        "in evaluation",
        "image tower, MMAC",
        *SCORES,
        "top-1 less plain's",
    ]
    lines = [_line(heads), "|:--|--:|:--|:--|" + "--:|" * (len(heads) - 4)]
    for arm in arms:
        beside = difference(arm, arms[0]) if arm.method is not None else None
        lines.append(_line([
            arm.name, str(len(arm.rows)), _tokens(arm.tokens), _tokens(arm.rows[0].counts or []),
            f"{macs_of(arm) / 1e6:.1f}",
            *(spread(arm.each(what), _images(arm)) for what in SCORES.values()),
            "" if beside is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in beside)),
        ]))  # fmt: skip
    return "\n".join([*lines, "", INTERVALS])


def _images(arm: Arm) -> int:
    return 1 if arm.rows[0].data is None else arm.rows[0].data.n


def _tokens(counts: Sequence[float]) -> str:
    """Entering each block."""
    return " ".join(f"{n:.3g}" for n in counts[:-1]) or "all"


def spread(values: Sequence[float], n: int) -> str:
    """Mean ± deviation over seeds and a 95 % interval, in percent: which n images and which seeds, added as variances."""
    if not values:
        return "–"
    low, high = _interval(values, n)
    shown = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{shown} ({100 * low:.1f} to {100 * high:.1f})"


def _interval(values: Sequence[float], n: int) -> tuple[float, float]:
    middle = mean(values)
    sd = stdev(values) if len(values) > 1 else 0.0
    half = Z95 * hypot(sqrt(middle * (1 - middle) / n), sd / sqrt(len(values)))
    return max(0.0, middle - half), min(1.0, middle + half)


def macs_of(arm: Arm) -> float:
    """MACs of the image tower per image in evaluation, closed form; a training-only method costs as much as plain."""
    row = arm.rows[0]
    assert row.train is not None
    counts = row.counts if row.method is not None else None
    return _macs(row.train.recipe, row.method, None if counts is None else tuple(counts))


@cache
def _macs(name: str, method: str | None, counts: tuple[float, ...] | None) -> float:
    recipe = load_recipe(name)
    model = load_clip(recipe.model.name, size=recipe.augment.size, options=recipe.model.options).model
    if method is None or counts is None:
        return plain_macs(model) or 0.0
    with reduced(model, parse(method)):
        found = closed_macs(model, torch.tensor([counts]))
    return 0.0 if found is None else float(found[0])


def _towers(rows: Sequence[Row]) -> str:
    """Towers tuned on, in document 001's columns, with its own rows below."""
    shots = {(row.method, row.seed): row for row in rows if row.task == "train contrast" and row.train is not None
             and row.data is not None and row.data.name in NAMES}  # fmt: skip
    lines = []
    for row in rows:
        run = row.train
        if run is None or row.task != "train classify" or "model.weights" not in run.settings:
            continue
        shot = shots.get((row.method, row.seed))
        zero = (
            "–" if shot is None or shot.train is None or shot.train.last is None else f"{100 * shot.train.last:.1f} %"
        )
        ends = row.accuracy
        interval = "" if ends is None or ends.low is None or ends.high is None else (
            f" ({100 * ends.low:.1f} to {100 * ends.high:.1f})"
        )  # fmt: skip
        frozen = PROBES[str(run.settings.get("freeze", "none"))]
        accuracy = "–" if run.last is None else f"{100 * run.last:.1f} %{interval}"
        name = f"`{row.method}`" if row.method else "plain"
        lines.append(_line([name, "5,000 scenes with captions", zero, frozen, str(run.epochs), accuracy]))
    return TOWERS.format(table="\n".join(lines)) if lines else ""


def figure(rows: Sequence[Row]) -> Any:
    """A matplotlib Figure of zero-shot top-1 and retrieval R@1 against MMAC; None without rows."""
    groups = [arms for arms in contrasts(rows) if len(arms) > 1]
    if not groups:
        return None
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(9.5, 3.9 * len(groups)), layout="constrained", facecolor="white")
    # a method looks the same in every experiment, and no two alike: once the colours are used up, other marks have them
    kinds = ((colour, MARKERS[(i + turn) % len(MARKERS)]) for turn in count() for i, colour in enumerate(COLOURS))
    looks = dict(zip(dict.fromkeys(arm.name for arms in groups for arm in arms), kinds))
    for axes, arms in zip(sheet.subplots(len(groups), 2, squeeze=False), groups):
        _panel(axes[0], arms, ["zero-shot top-1"], looks)
        _panel(axes[1], arms, ["image to text R@1", "text to image R@1"], looks)
        axes[0].set_title(arms[0].runs[0].recipe, color=INK, fontsize=10, loc="left")
        axes[1].legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1))
    return sheet


def _panel(axes: Any, arms: Sequence[Arm], shown: Sequence[str], looks: Mapping[str, tuple[str, str]]) -> None:
    for arm in arms:
        for score in shown:
            values = [100 * value for value in arm.each(SCORES[score])]
            if not values:
                continue
            side = 1 if score == "text to image R@1" else 0
            style = {**dict(zip(("color", "marker"), looks[arm.name])), "linestyle": "none"}
            axes.errorbar(
                macs_of(arm) / 1e6, mean(values), yerr=stdev(values) if len(values) > 1 else None, capsize=3, markersize=7,
                markerfacecolor="white" if side else style["color"],
                label=(arm.name.strip("`") if not side else None), **style,
            )  # fmt: skip
    axes.set_ylabel(
        f"{shown[0]}, %" if len(shown) == 1 else "R@1, %: of captions (filled), of images (open)",
        color=INK,
        fontsize=9.5,
    )
    axes.set_xlabel("image tower, MMAC", color=INK, fontsize=9.5)
    axes.grid(axis="y", color=MUTED, alpha=0.22, linewidth=0.7)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


HEAD = """# CLIP with fewer image tokens

Documents 000 and 001, task 2, in small. Made from the rows in `results/clip.jsonl` by
`winnow report clip results/clip.jsonl --out docs`; `winnow report clip --data CIFAR100 --out docs` first trains what of
three seeds these rows lack.
"""

INTERVALS = """Mean ± standard deviation over the seeds, in percent, and a 95 % interval: which images and which seeds, added
as variances. Tokens: patches that enter each block. PatchDropout acts in training only and is judged with every patch.
"""

ASKED = """
Zero-shot: the object's shape, from "a COLOUR SHAPE" over eight colours, {chance:.1f} % by chance. There are {texts}
different captions, and every scene that has the same is right: {found:.1f} % by chance.
"""

TOWERS = """## Their towers, tuned on

The tower of one seed in the classification recipe `scenes_from_clip`: the object's shape, from a linear head on what the
tower pools. Below, document 001's own rows, on ImageNet; its rows of DRIP wait for numbers, and are not filled here.

| tower | pretrained on | zero-shot | frozen? | epochs | accuracy |
|:--|:--|--:|:--|--:|--:|
{table}
| ViT-B-32, theirs | laion2b_s34b_b79k | 66.53 % | yes | 30 | 76.81 % |
| ViT-B-32, theirs | laion2b_s34b_b79k | 66.53 % | no | 30 | 60.98 % |
| DRIP-2x-32, DRIP-4x-32, DRIP-10x-32, theirs | 280M LAION after 10 epochs | | yes | 30 | |
"""
