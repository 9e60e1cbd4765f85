"""Do DRIP's boundaries follow objects: coverage, F1 and purity of learned, untrained, random and even ones, with intervals.

Documents 000 and 001 (DRIP) show pictures; the figures are Winnow's own, measure/objects.py says of what.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..measure.objects import Share, shares, value

DRAWS, SEED = 1000, 42
FIGURES = {"coverage": "coverage", "boundary_f1": "boundary F1", "purity": "purity", "overlap": "overlap"}
Interval = tuple[float, float, float]
"""2.5 %, value, 97.5 % over resampled images."""


def rivals(owners: np.ndarray) -> dict[str, np.ndarray]:
    """Random and evenly spaced segments, as many per image as `owners` [n, P] has; the last patch ends one."""
    p = owners.shape[1]
    generator = np.random.default_rng(SEED)
    even, random = np.empty_like(owners), np.empty_like(owners)
    for image, k in enumerate(owners.max(1) + 1):
        even[image] = np.arange(p) * k // p
        ends = np.zeros(p, int)
        ends[generator.permutation(p - 1)[: k - 1]] = 1
        random[image] = np.cumsum(ends) - ends
    return {"random": random, "even": even}


def intervals(owners: np.ndarray, things: np.ndarray) -> dict[str, Interval]:
    """Each figure of `FIGURES` from owners and objects [n, P]."""
    found = shares(owners, things)
    return {name: _interval(found[name]) for name in FIGURES}


def _interval(share: Share) -> Interval:
    n = len(share[0])
    drawn = np.random.default_rng(SEED).integers(0, n, (DRAWS, n))
    low, high = np.quantile(share[0][drawn].sum(1) / np.maximum(1, share[1][drawn].sum(1)), (0.025, 0.975))
    return float(low), value(share), float(high)


def section(found: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> str:
    """The page's part on run -> kind of boundaries -> figure; counts the runs that are clearly above their rivals."""
    head = f"| run | boundaries | {' | '.join(FIGURES.values())} |\n|:--|:--|{'--:|' * len(FIGURES)}\n"
    lines = [f"| {run} | {kind} | {_cells(one)} |" for run, kinds in found.items() for kind, one in kinds.items()]
    said = [_verdict(found, name) for name in FIGURES]
    return OBJECTS.format(table=head + "\n".join(lines), verdict="\n".join(said))


def _cells(figures: Mapping[str, Interval]) -> str:
    return " | ".join("{1:.3f} ({0:.3f} to {2:.3f})".format(*figures[name]) for name in FIGURES)


def _verdict(found: Mapping[str, Mapping[str, Mapping[str, Interval]]], name: str) -> str:
    above = {
        rival: [run for run, kinds in found.items() if kinds["learned"][name][0] > kinds[rival][name][2]]
        for rival in ("random", "even")
    }
    named = {rival: ", ".join(f"`{run}`" for run in runs) or "none" for rival, runs in above.items()}
    return (
        f"- {FIGURES[name]}: learned boundaries are above random ones in {len(above['random'])} of {len(found)} runs "
        f"({named['random']}), above even ones in {len(above['even'])} ({named['even']})."
    )


OBJECTS = """## Boundaries and objects

{table}

On the validation scenes, with 95 % intervals over images. Coverage of the object masks: share of object patches that
stand in segments of that one object and nothing else. Boundary F1: changes of segment against changes of object along
the raster. Purity: share of patches in segments that hold only objects or only background. Overlap: intersection over
union of each object with the segment that fits it best (Arbeláez et al., 2011), which also falls where an object is
cut into finer segments; an object lies on two rows and a segment in one, so a half is about the most. Random and even
segments are as many as the learned ones; untrained ones are the same predictor's before training. Objects stand in
cells of 2 x 2 patches, so even boundaries at 4x and 2x fall on the edges of cells. Where the intervals are apart:

{verdict}
"""
