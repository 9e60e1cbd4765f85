"""What pages and tables ask of result rows: groups that may be compared, and each row's name, cost, accuracy and verdict.

Winnow's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from winnow.measure.record import Latency, Paired, Row, Top1
from winnow.methods import BASELINES


@dataclass(frozen=True)
class Group:
    """Rows that may be compared: same task, model, weights, data, dtype and device."""

    rows: tuple[Row, ...]

    @property
    def plain(self) -> Row | None:
        """The newest row of the plain model, if there is one."""
        return next((row for row in reversed(self.rows) if row.role == "plain"), None)

    def find(self, spelling: str) -> Row | None:
        """The newest row of a method's spelling."""
        return next((row for row in reversed(self.rows) if row.method == spelling), None)

    def saving(self, row: Row) -> float | None:
        """MACs of a row as a share of the plain model's."""
        plain = None if self.plain is None else gmac(self.plain)
        cost = gmac(row)
        return cost / plain if cost and plain else None


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows that may be compared, each group in order: plain, methods, baselines; a family together, dearest first."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        data = row.data and (row.data.name, row.data.split, row.data.n, row.data.hash)
        key = (row.task, row.model, row.weights, data, row.dtype, row.device)
        found.setdefault(key, []).append(row)
    return [Group(tuple(_ordered(group))) for group in found.values()]


def _ordered(rows: list[Row]) -> list[Row]:
    names = list(dict.fromkeys(family(row) for row in rows))
    roles = ("plain", "method", "baseline")
    return sorted(rows, key=lambda row: (roles.index(row.role), names.index(family(row)), -(gmac(row) or 0)))


def family(row: Row) -> str:
    """The class name in a row's spelling; `plain` for the plain model."""
    return row.method.split("(", 1)[0] if row.method else "plain"


def name(row: Row) -> str:
    """The row's spelling, with the way it ran unless that is `static` and how it was counted unless in full."""
    counting = row.macs.convention if row.macs else "mac"
    return " · ".join([row.method or "plain", *[row.way] * (row.way != "static"), *[counting] * (counting != "mac")])


def absent(group: Group) -> list[str]:
    """Baselines that this model does not take: the search for equal cost was made and found no row of them."""
    searched = any(row.role == "method" and row.accuracy is not None for row in group.rows)
    found = {family(row) for row in group.rows if row.role == "baseline"}
    return sorted({kind.__name__ for kind in BASELINES} - found) if searched and found else []


def gmac(row: Row) -> float | None:
    """GMAC per image."""
    return None if row.macs is None else row.macs.per_image / 1e9


def top1(row: Row) -> Top1 | None:
    """The row's top-1 where it means something: not with random weights, nor where only agreement was measured."""
    right = row.accuracy
    if right is None or right.value is None or math.isnan(right.value):
        return None
    return None if row.weights is None and right.agreement is not None else cast(Top1, right)


def speed(latency: Latency) -> str:
    """`faster`, `slower`, or `same` where the interval covers 1.0."""
    return "faster" if latency.low > 1 else "slower" if latency.high < 1 else "same"


def verdict(paired: Paired | None) -> str:
    """`wins`, `loses` or `even` at p < 0.05; empty without a test."""
    if paired is None:
        return ""
    if paired.p >= 0.05 or paired.wins == paired.losses:
        return "even"
    return "wins" if paired.wins > paired.losses else "loses"


def percent(share: float, digits: int = 1) -> str:
    """0.8812 -> `88.1`."""
    return f"{100 * share:.{digits}f}"


def chance(p: float) -> str:
    """A p value with two digits that matter."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.095 else f"{p:.2f}"


def things(rows: Sequence[Row]) -> str:
    """What accuracy is a share of."""
    return "questions" if any(row.vlm is not None for row in rows) else "images"


def at(row: Row, batch: int) -> Latency | None:
    """The row's newest latency at a batch size."""
    return next((one for one in reversed(row.latency) if one.batch == batch), None)
