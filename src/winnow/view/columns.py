"""What the columns of a table say about a result row, for the terminal, Markdown and HTML alike.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from winnow.measure.record import Paired, Row
from winnow.view.rows import Group, absent, at, chance, gmac, name, percent, speed, top1, verdict

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """What one column says about one row."""

    text: str = NONE
    note: str = ""
    """Interval or counts, shown smaller."""
    mark: str = ""
    """`good`, `bad`, `quiet` (not distinguishable from no effect) or nothing."""
    key: float | None = None
    """What to sort by."""

    @property
    def flat(self) -> str:
        """Text and note on one line."""
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class Column:
    """A heading, what it means, and how a row fills it."""

    head: str
    meaning: str
    cell: Callable[[Row, Group], Cell]
    number: bool = True
    wanted: bool = False
    """Shown even when empty."""
    brief: bool = True
    """Belongs in the terminal and in short tables."""


def columns(found: Sequence[Group], brief: bool = False) -> list[Column]:
    """The columns these groups can fill; an empty one is left out."""
    sizes = sorted({one.batch for group in found for row in group.rows for one in row.latency})
    able = [*_COST, *_RIGHT]
    for size in sizes:
        able += _timing(size, bare=len(sizes) == 1)
    able += _OBJECTS
    able.append(Column("peak MiB", "Peak memory of the forward pass.", _memory, brief=False))
    if all(row.vlm is not None for group in found for row in group.rows):
        able = [replace(column, **_ASKED.get(column.head, {})) for column in able]
    return [
        column
        for column in able
        if (column.brief or not brief)
        and (column.wanted or any(column.cell(row, group).text != NONE for group in found for row in group.rows))
    ]


def _method(row: Row, group: Group) -> Cell:
    return Cell(name(row), mark=row.role)


def _tokens(row: Row, group: Group) -> Cell:
    if not row.counts:
        return Cell()
    return Cell(f"{row.counts[-1]:.1f}".removesuffix(".0"), key=row.counts[-1])


def _gmac(row: Row, group: Group) -> Cell:
    cost = gmac(row)
    if cost is None:
        return Cell()
    form = ".3f" if cost < 10 else ".2f"
    most = row.macs.max / 1e9 if row.macs and row.macs.max else cost
    return Cell(f"{cost:{form}}", f"at most {most:{form}}" if most > 1.001 * cost else "", key=cost)


def _share(row: Row, group: Group) -> Cell:
    share = group.saving(row)
    return Cell() if share is None else Cell(f"{share:.2f}×", key=share)


def _top1(row: Row, group: Group) -> Cell:
    right = top1(row)
    if right is None:
        return Cell()
    return Cell(percent(right.value), f"{percent(right.low)}–{percent(right.high)}", key=right.value)


def _agreement(row: Row, group: Group) -> Cell:
    wanted = any(one.accuracy is not None and top1(one) is None for one in group.rows)
    if not wanted or row.accuracy is None or row.accuracy.agreement is None:
        return Cell()
    return Cell(percent(row.accuracy.agreement), key=row.accuracy.agreement)


def _paired(paired: Paired) -> Cell:
    mark = {"wins": "good", "loses": "bad"}.get(verdict(paired), "quiet")
    return Cell(chance(paired.p), f"+{paired.wins} −{paired.losses}", mark, paired.p)


def _vs_plain(row: Row, group: Group) -> Cell:
    right = top1(row)
    return Cell() if right is None or right.vs_plain is None else _paired(right.vs_plain)


def _baseline(row: Row, group: Group) -> Cell:
    right = top1(row)
    if right is None or right.vs_baseline is None:
        return Cell()
    other = group.find(right.vs_baseline.against)
    theirs = top1(other) if other is not None else None
    notes = [percent(theirs.value)] if theirs else []
    return Cell(right.vs_baseline.against, "; ".join([*notes, *(f"no {kind} here" for kind in absent(group))]))


def _vs_baseline(row: Row, group: Group) -> Cell:
    right = top1(row)
    return Cell() if right is None or right.vs_baseline is None else _paired(right.vs_baseline)


def _times(batch: int, row: Row, group: Group) -> Cell:
    one = at(row, batch)
    if one is None:
        return Cell()
    mark = {"faster": "good", "slower": "bad", "same": "quiet"}[speed(one)]
    return Cell(f"{one.ratio:.2f}×", f"{one.low:.2f}–{one.high:.2f}", mark, one.ratio)


def _null(batch: int, row: Row, group: Group) -> Cell:
    one = at(row, batch)
    return Cell() if one is None else Cell(f"{one.null:.2f}×", f"{one.null_low:.2f}–{one.null_high:.2f}", key=one.null)


def _own(batch: int, row: Row, group: Group) -> Cell:
    one = at(row, batch)
    if one is None or one.reducer_share is None:
        return Cell()
    return Cell(f"{percent(one.reducer_share)} %", key=one.reducer_share)


def _object(part: str, row: Row, group: Group) -> Cell:
    if row.objects is None:
        return Cell()
    value = getattr(row.objects, part)
    return Cell(f"{percent(value)} %", key=value)


_OBJECTS = [
    Column("objects kept", "Share of the patches of objects that some token still holds.", partial(_object, "kept")),
    Column(
        "purity",
        "Share of the held patches whose token holds only patches of objects or only background.",
        partial(_object, "purity"),
        brief=False,
    ),
    Column(
        "boundary F1",
        "Changes of token against changes of object, from patch to patch along the raster.",
        partial(_object, "boundary_f1"),
        brief=False,
    ),
]


def _memory(row: Row, group: Group) -> Cell:
    return Cell() if row.memory_mib is None else Cell(f"{row.memory_mib:.0f}", key=row.memory_mib)


def _timing(batch: int, bare: bool) -> list[Column]:
    tag = f"batch {batch}"
    return [
        Column(
            f"speed, {tag}",
            "Measured time of the plain model divided by the method's, interleaved, same kernels, with its 95 % "
            "interval; grey where the interval covers 1.0: no measurable speed-up.",
            partial(_times, batch),
        ),
        Column(
            "A/A null" if bare else f"A/A null, {tag}",
            "The plain model timed against itself in the same way: how far from 1.0 noise alone goes.",
            partial(_null, batch),
            brief=False,
        ),
        Column(
            "reducer" if bare else f"reducer, {tag}",
            "Share of the reduced model's time spent in the reducer itself.",
            partial(_own, batch),
            brief=False,
        ),
    ]


_ASKED: dict[str, dict[str, Any]] = {
    "tokens": {"meaning": "Image tokens entering the last block of the language model, mean over the questions."},
    "GMAC": {"meaning": "10⁹ multiply-adds up to the first token, mean over the questions (1 GMAC = 2 GFLOP)."},
    "top-1 %": {"head": "right %", "meaning": "Share of questions whose answer is right, with its 95 % interval."},
    "objects kept": {
        "head": "asked kept",
        "meaning": "Share of the patches of the object asked about that some token still holds.",
    },
    "agreement with plain %": {"meaning": "Share of questions whose answer equals the plain model's."},
}
"""What some columns are where all rows are of vision-language models."""
_COST = [
    Column(
        "method", "The spelling that runs it again; nothing but defaults left out.", _method, number=False, wanted=True
    ),
    Column("tokens", "Patch tokens after the last block, mean over the images.", _tokens),
    Column("GMAC", "10⁹ multiply-adds per image, counted on executed tokens (1 GMAC = 2 GFLOP).", _gmac),
    Column("of plain", "GMAC as a share of the plain model's.", _share),
]
_RIGHT = [
    Column("top-1 %", "Share of images whose first guess is right, with its 95 % interval.", _top1),
    Column("agreement with plain %", "Share of images whose first guess equals the plain model's.", _agreement),
    Column(
        "p vs plain", "Paired exact McNemar test on the same images; +won −lost against the plain model.", _vs_plain
    ),
    Column(
        "best equal-cost baseline",
        "The most accurate of Random, Grid, Pool and Downsample with at most 1.02 × the method's MACs, and its top-1.",
        _baseline,
        number=False,
    ),
    Column("p vs baseline", "The same paired test against that baseline.", _vs_baseline),
]
