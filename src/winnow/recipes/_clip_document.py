"""Document 001's table 2, every column of it, beside ours: true GMACs, a pair's step time and memory as ratios to plain.

DRIP (document 001), 2025: its figures are marked as its own. Ours come from rows of `winnow measure --step --pair`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from .._clip import load_clip
from .._parse import parse
from .._reduce import reduced, reducer_of, seat_of
from ..measure.closed_form import closed_macs, plain_macs
from ..measure.record import Row
from ..measure.step import text_macs
from ..train.recipe import load_recipe


class Theirs(NamedTuple):
    """A row of document 001's table, as printed; "" where it is empty."""

    recipe: str
    """Ours of the same training."""
    name: str
    gflops: str
    patch: str
    epochs: str
    top1: str
    top5: str
    memory: str
    seconds: str


TABLE = (
    Theirs("clip_b32", "ViT-B-32", "2.96", "32", "10", "28.77 %", "54.34 %", "20.1", "0.429"),
    Theirs("clip_b32_drip2", "2x comp", "2.69", "32", "10", "25.72 %", "49.95 %", "18.4", "0.412"),
    Theirs("clip_b32_drip4", "4x comp", "1.83", "32", "10", "24.24 %", "47.82 %", "16.3", "0.378"),
    Theirs("clip_b32_drip10", "10x comp", "1.26", "32", "10", "21.70 %", "44.30 %", "15.0", "0.365"),
    Theirs("clip_b16", "ViT-B-16", "11.33", "32 (sic)", "10", "", "", "", ""),
    Theirs("clip_b16_drip2", "2x comp", "10.22", "16", "10", "33.44 %", "60.17 %", "43.9", "0.762"),
    Theirs("clip_b16_drip4", "4x comp", "6.62", "16", "10", "33.77 %", "61.10 %", "43.9", "0.763"),
    Theirs("clip_b16_drip10", "10x comp", "4.53", "16", "10", "26.36 %", "50.79 %", "26.3", "0.515"),
)
RESOLUTION = "224"
REACHED = 0.85
"""Share of the ideal speed-up that is aimed at."""


def document_table(rows: Sequence[Row]) -> str:
    """Their columns, then ours; where nobody ran a row, its recipe's name stands instead of a number."""
    steps = step_rows(rows)
    heads = [
        "model", "GFLOPs (fvcore)", "resolution", "patch size", "#epochs", "top-1", "top-5", "avg GPU memory (GB)",
        "avg step time (s)", "ours: GMAC", "pair, ideal", "step, times faster", "of the ideal", "memory, plain = 1",
        "epochs, top-1, top-5",
    ]  # fmt: skip
    lines = [_line(heads), "|:--|" + "--:|" * (len(heads) - 2) + ":--|"]
    for row in TABLE:
        theirs = [row.name, row.gflops, RESOLUTION, row.patch, row.epochs, row.top1, row.top5, row.memory, row.seconds]
        lines.append(_line([*theirs, *_ours(row.recipe, steps.get(row.recipe)), f"`{row.recipe}`"]))
    return DOCUMENT.format(table="\n".join(lines), machine=_machine(rows), verdict=_verdict(steps))


def step_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """The last timed step of every recipe of the table."""
    timed = {(row.model, row.method): row for row in rows if row.step is not None and row.task == "step contrast"}
    recipes = {one.recipe: load_recipe(one.recipe) for one in TABLE}
    keys = {name: (recipe.model.name, recipe.method) for name, recipe in recipes.items()}
    return {name: timed[key] for name, key in keys.items() if key in timed}


def _ours(name: str, row: Row | None) -> list[str]:
    """GMAC of the image tower, the ideal of the pair, times faster, share of the ideal, memory."""
    macs = macs_of(load_recipe(name).model.name)
    method = load_recipe(name).method
    cells = [f"{macs.image[method] / 1e9:.3f}", f"{macs.ideal(method):.2f}x"]
    if method is None:
        return [*cells, "1", "", "1"]
    if row is None or row.step is None:
        return [*cells, *[f"`{name}`"] * 3]
    time = row.step.latency
    return [
        *cells, f"{time.ratio:.2f} ({time.low:.2f} to {time.high:.2f})", f"{time.ratio / macs.ideal(method):.2f}",
        f"{row.step.mib / row.step.plain_mib:.2f}",
    ]  # fmt: skip


class Pair(NamedTuple):
    """MACs per image and caption of a CLIP: its image tower by method (None: plain), its text tower."""

    image: dict[str | None, float]
    text: float

    def ideal(self, method: str | None) -> float:
        """Plain / reduced, the text tower being constant: what time can reach in the mean of any hardware."""
        return (self.image[None] + self.text) / (self.image[method] + self.text)


@cache
def macs_of(model: str) -> Pair:
    """Of the methods that the table's recipes name for this model; in evaluation, by closed form."""
    clip = load_clip(model)
    image: dict[str | None, float] = {None: plain_macs(clip.model) or 0.0}
    for one in TABLE:
        recipe = load_recipe(one.recipe)
        if recipe.model.name == model and recipe.method is not None:
            with reduced(clip.model, parse(recipe.method)):
                counts = torch.tensor([reducer_of(clip.model).method.counts(seat_of(clip.model).setting)])
                found = closed_macs(clip.model, counts)
            image[recipe.method] = image[None] if found is None else float(found[0])
    return Pair(image, text_macs(clip.model, clip.tokenize([""])))


def parts_table(rows: Sequence[Row]) -> str:
    """Where the time of a step goes: shares of the plain and of the reduced step."""
    lines = []
    for name, row in step_rows(rows).items():
        step = row.step
        if step is None or not step.parts_ms:
            continue
        time = step.latency
        spent = [sum(part[side] for part in step.parts_ms.values()) for side in (0, 1)]
        parts = {**step.parts_ms, "rest": (time.plain_ms - spent[0], time.reduced_ms - spent[1])}
        cells = (f"{plain / time.plain_ms:.0%} -> {less / time.reduced_ms:.0%}" for plain, less in parts.values())
        lines.append(_line([f"`{name}`", *cells, f"{step.tokens[0]} -> {step.tokens[-1]}"]))
    return PARTS.format(table="\n".join(lines)) if lines else ""


def _machine(rows: Sequence[Row]) -> str:
    timed = list(step_rows(rows).values())
    if not timed or timed[-1].step is None:
        return "nobody timed a step yet"
    row, time = timed[-1], timed[-1].step.latency
    machine = row.environment.get("gpu") or row.environment.get("cpu", "?")
    return f"batch {time.batch}, {row.dtype}, {machine}, {time.pairs} interleaved pairs"


def _verdict(steps: dict[str, Row]) -> str:
    """How many timed rows reach what is aimed at."""
    if not steps:
        return ""
    shares = {
        name: row.step.latency.ratio / macs_of(row.model).ideal(row.method) for name, row in steps.items() if row.step
    }
    short = [f"`{name}` {share:.2f}" for name, share in shares.items() if share < REACHED]
    met = f"{len(shares) - len(short)} of {len(shares)} timed rows reach {REACHED} of their ideal"
    return f"{met}; short of it: {', '.join(short)}." if short else f"{met}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


DOCUMENT = """## Document 001's table

The first nine columns are document 001's, as printed (LAION-2B, 26M samples); empty cells are empty there. The others are
ours: every multiply-add of the image tower, the speed-up of a whole pair if time followed the multiply-adds (the text tower
is constant), and a training step of both towers timed in turn with the plain one ({machine}). Nobody trained these here:
the recipe's name stands for the figures it would give.

{table}

{verdict}
"""

PARTS = """### Where a step's time goes

Shares of the plain step and of the reduced one. In training DRIP keeps places for 1.25 times its rate, filled or not.

| recipe | image tower | text tower | optimiser | loss and the rest | tokens |
|:--|--:|--:|--:|--:|--:|
{table}
"""
