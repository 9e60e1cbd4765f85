"""The page's part on boundaries: do segments of CLIP-trained towers follow objects, in figures and in a picture; from rows.

Documents 000 and 001 (DRIP), 2025, show pictures; the figures are Winnow's own, measure/objects.py says of what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np

from ..data.readers import open_images
from ..measure.record import Row
from ..view.overlay import grid_of, picture
from ._drip_figures import stacked
from ._drip_objects import FIGURES, rivals

FOLLOWED = {name: FIGURES[name] for name in ("coverage", "boundary_f1")}
RIVALS = ("untrained", "random", "even")
KINDS = ("learned", *RIVALS)
PICTURE = "clip-boundaries.png"
CELL = 144
"""Pixels of a scene's side in the picture."""
Method = str | None


def section(rows: Sequence[Row]) -> str:
    """Figures by method, what they say, and the picture; "" without rows."""
    found = trainings(rows)
    if not found:
        return ""
    heads = ["method", "seeds", *(f"{name}: {kind}" for name in FOLLOWED.values() for kind in KINDS)]
    figures = {
        method: [str(len(own)), *(_cell(own, kind, name) for name in FOLLOWED for kind in KINDS)]
        for method, own in found.items()
    }
    above = {
        method: [_apart(own, name, rival) for name in FOLLOWED for rival in RIVALS] for method, own in found.items()
    }
    won = ["method", *(f"{name} above {rival}" for name in FOLLOWED.values() for rival in RIVALS)]
    shown = pictured(rows)
    columns = ", then ".join(f"`{method}`" for method in shown)
    seen = SEEN.format(picture=PICTURE, columns=columns) if shown else ""
    return SECTION.format(table=_table(heads, figures), apart=_table(won, above)) + seen


def trainings(rows: Sequence[Row]) -> dict[Method, list[Row]]:
    """The last row of each seed, by method."""
    last: dict[Method, dict[int, Row]] = {}
    for row in rows:
        if row.task == "boundaries" and row.objects is not None:
            last.setdefault(row.method, {})[row.seed] = row
    return {method: list(seeds.values()) for method, seeds in last.items()}


def _interval(row: Row, kind: str, name: str) -> tuple[float, float, float]:
    assert row.objects is not None
    return row.objects.boundaries[kind][name]


def _cell(own: Sequence[Row], kind: str, name: str) -> str:
    low, middle, high = zip(*(_interval(row, kind, name) for row in own))
    return f"{mean(middle):.3f} ({min(low):.3f} to {max(high):.3f})"


def _apart(own: Sequence[Row], name: str, rival: str) -> str:
    """In how many trainings the learned boundaries are above the others, intervals apart."""
    won = sum(_interval(row, "learned", name)[0] > _interval(row, rival, name)[2] for row in own)
    return f"{won} of {len(own)}"


def pictured(rows: Sequence[Row]) -> dict[Method, Row]:
    """The first training of each method that kept segments to show."""
    kept = {method: next((row for row in own if row.objects and row.objects.segments), None)
            for method, own in trainings(rows).items()}  # fmt: skip
    return {method: row for method, row in kept.items() if row is not None}


def drawn(rows: Sequence[Row]) -> bytes | None:
    """PNG: a scene in each line, its segments by each method, random ones as many as the first method's; None without."""
    shown = list(pictured(rows).values())
    if not shown or shown[0].data is None:
        return None
    segments = [np.array(row.objects.segments) for row in shown if row.objects is not None]
    segments.append(rivals(segments[0])["random"])
    data = shown[0].data
    scenes = open_images(data.name, split=data.split, limit=data.n)
    strips = []
    for i, owners in enumerate(zip(*segments)):
        image = np.asarray(scenes[i][0])
        strips.append(picture(image, owners, grid_of(owners[0], image.shape[:2]), "auto", CELL))
    return stacked(strips)


def _table(heads: Sequence[str], lines: Mapping[Method, Sequence[str]]) -> str:
    """Markdown, a line per method."""
    found = [heads, *([f"`{method}`", *cells] for method, cells in lines.items())]
    head, *rest = (f"| {' | '.join(cells)} |" for cells in found)
    return "\n".join([head, "|:--|" + "--:|" * (len(heads) - 1), *rest])


SECTION = """## Boundaries and objects

The segments of the trained towers on the validation scenes, beside the same network's before training and as many random and
evenly spaced ones: means over the seeds, and the outer ends of their 95 % intervals over images. Coverage: share of object
patches whose segment holds that object and nothing else; boundary F1: changes of segment against changes of object along the
raster. A patch is a cell, so an object is one patch, and no evenly spaced segment, being longer, covers one.

{table}

Trainings in which learned boundaries are above the others, intervals apart:

{apart}
"""

SEEN = """
![Segments]({picture})

Validation scenes and their segments: {columns}, then random ones, as many as the first method's. Patches that stand alone
are shown, others in their segment's mean colour, in which an object is lost.
"""
