"""Curves of accuracy against GMACs or measured speed, with 95 % intervals, a line per method family.

Winnow's own; colours are Okabe and Ito's (2008), told apart without red-green vision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from winnow._parse import parse
from winnow.measure.record import Row
from winnow.view import files
from winnow.view.rows import at, family, gmac, groups, name, percent, things, top1

INK, MUTED, PAPER = "#1c1f23", "#767c83", "#fdfdfc"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fbf", "#8c564b")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ((4, 2), (1, 1.5), (6, 2, 1, 2), (2, 2))


@dataclass(frozen=True)
class Point:
    """A row on a chart: where, and its 95 % intervals (None = none measured)."""

    row: Row
    x: float
    y: float
    across: tuple[float, float] | None
    up: tuple[float, float] | None


def points(rows: Sequence[Row], against: str = "macs", batch: int | None = None) -> list[Point]:
    """The rows that have both numbers: top-1 (agreement where that means nothing), and GMAC, speed or image tokens.

    "tokens" are those of vision-language models, mean over the blocks of the language model.
    """
    if against not in ("macs", "time", "tokens"):
        raise ValueError(f"against is 'macs', 'time' or 'tokens', not {against!r}")
    scored = any(top1(row) for row in rows)
    found = []
    for row in rows:
        x, across = _across(row, against, batch)
        right = top1(row)
        if scored and right is not None:
            y, up = right.value, (100 * right.low, 100 * right.high)
        elif not scored and row.accuracy is not None and row.accuracy.agreement is not None:
            y, up = row.accuracy.agreement, None
        else:
            continue
        if x is not None:
            found.append(Point(row, x, 100 * y, across, up))
    return found


def _across(row: Row, against: str, batch: int | None) -> tuple[float | None, tuple[float, float] | None]:
    if against == "macs":
        return gmac(row), None
    if against == "tokens":
        return (None if row.vlm is None else sum(row.vlm.image_tokens) / len(row.vlm.image_tokens)), None
    if row.role == "plain":
        return 1.0, None
    one = at(row, batch) if batch is not None else None
    return (None, None) if one is None else (one.ratio, (one.low, one.high))


def curve(rows: Sequence[Row], against: str = "macs", batch: int | None = None, narrow: bool = False) -> Any:
    """A matplotlib Figure of the chart, or None where fewer than two rows can be drawn; `narrow` = for a phone."""
    from matplotlib.figure import Figure

    batch = _largest(rows) if batch is None else batch
    found = points(rows, against, batch)
    if not _enough(found):
        return None
    sheet = Figure(figsize=(4.3, 4.9) if narrow else (9, 4.5), layout="constrained", facecolor="none")
    axes = sheet.add_subplot(facecolor="none")
    _lines(axes, found)
    _plain(axes, found, against)
    one = things(rows)[:-1]
    right = "answers right, %" if one == "question" else "top-1 accuracy, %"
    _axes(axes, against, batch, right if any(point.up for point in found) else "agreement with plain, %", one)
    place = {"loc": "outside lower center", "ncols": 3} if narrow else {"loc": "outside right center"}
    sheet.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=2.6, columnspacing=1.1, **place)
    return sheet


def _enough(found: list[Point]) -> bool:
    return len(found) > 1 and any(point.row.role != "plain" for point in found)


def drawable(rows: Sequence[Row], against: str = "macs") -> bool:
    """Whether any group of comparable rows has a chart."""
    return any(_enough(points(group.rows, against, _largest(group.rows))) for group in groups(rows))


def _largest(rows: Sequence[Row]) -> int | None:
    return max((one.batch for row in rows for one in row.latency), default=None)


def line(row: Row) -> str:
    """What one line of a chart joins: rows whose methods differ in their amount alone."""
    try:
        method: Any = parse(row.method or "")
        keep = method.__dataclass_fields__.get("keep")
        return family(row) if keep is None else repr(replace(method, keep=keep.default)).removesuffix("()")
    except (ValueError, TypeError):  # a spelling of another Winnow, or settings that go with other amounts
        return family(row)


def _lines(axes: Any, found: list[Point]) -> None:
    counts = {"method": 0, "baseline": 0}
    families = dict.fromkeys((point.row.role, line(point.row)) for point in found if point.row.role != "plain")
    for role, kind in sorted(families, key=lambda key: key[0] == "baseline"):
        mine = sorted((p for p in found if (p.row.role, line(p.row)) == (role, kind)), key=lambda p: p.x)
        i, counts[role] = counts[role], counts[role] + 1
        colour = MUTED if role == "baseline" else COLOURS[i % len(COLOURS)]
        dash = {"dashes": DASHES[i % len(DASHES)]} if role == "baseline" else {}
        size = 5.5 if role == "baseline" else 6
        for p in mine:
            thin = {"color": colour, "linewidth": 0.9, "alpha": 0.45, "zorder": 2, "solid_capstyle": "butt"}
            if p.up:
                axes.plot([p.x, p.x], p.up, **thin)
            if p.across:
                axes.plot(p.across, [p.y, p.y], **thin)
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]  # where colours begin again, shapes differ
        style = {"color": colour, "marker": marker, "markersize": size, "markeredgecolor": PAPER}
        xs, ys = [p.x for p in mine], [p.y for p in mine]
        axes.plot(
            xs,
            ys,
            linewidth=1.3 if dash else 1.9,
            label=kind,
            markeredgewidth=0.8,
            zorder=3 if dash else 4,
            **style,
            **dash,
        )
        for p in mine:
            axes.plot([p.x], [p.y], "o", markersize=11, alpha=0, zorder=6, gid=f"tip:{_tip(p)}")


def _plain(axes: Any, found: list[Point], against: str) -> None:
    from matplotlib.patheffects import withStroke

    plain = next((point for point in reversed(found) if point.row.role == "plain"), None)
    if plain is None:
        return
    axes.axhline(plain.y, color=MUTED, linewidth=0.8, alpha=0.6, zorder=1)
    if plain.up:
        axes.axhspan(plain.y - 1, plain.y, color=MUTED, alpha=0.10, linewidth=0, zorder=0)
        axes.plot([plain.x] * 2, plain.up, color=INK, linewidth=1.1, zorder=5)
    axes.plot(
        [plain.x], [plain.y], "o", color=INK, markersize=8, markeredgecolor=PAPER, zorder=7, gid=f"tip:{_tip(plain)}"
    )
    side = -7 if against == "macs" else 7
    axes.annotate(
        f"plain {plain.y:.1f}",
        (plain.x, plain.y),
        (side, 6),
        textcoords="offset points",
        ha="right" if side < 0 else "left",
        color=INK,
        fontsize=9.5,
        weight="bold",
        zorder=8,
        path_effects=[withStroke(linewidth=3, foreground=PAPER)],
    )


def _axes(axes: Any, against: str, batch: int | None, label: str, one: str) -> None:
    axes.set_ylabel(label, color=INK, fontsize=9.5)
    words = f"GMAC per {one} (left is cheaper)"
    if against == "tokens":
        words = "image tokens per block of the language model, on average"
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if against == "time":
        words = f"measured speed, plain = 1, batch {batch} (right is faster)"
        axes.axvline(1, color=MUTED, linewidth=0.8, alpha=0.6, zorder=1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel(words, color=INK, fontsize=9.5)
    axes.grid(axis="y", color=MUTED, alpha=0.22, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.06, y=0.07)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9, color=MUTED)


def save(rows: Sequence[Row], path: str | Path, against: str = "macs", batch: int | None = None) -> Path:
    """Save the chart of the first group that has one as PNG or SVG by suffix, about 900 px wide; ValueError if none has."""
    form = files.kind(path)
    charts = (curve(group.rows, against, batch) for group in groups(rows))
    sheet = next((chart for chart in charts if chart is not None), None)
    if sheet is None:
        raise ValueError(f"{path}: a curve needs two rows that have both accuracy and {against}")
    sheet.set_facecolor("white")
    return files.write(path, files.encode(sheet, form))


def svg(
    rows: Sequence[Row], against: str = "macs", batch: int | None = None, narrow: bool = False, tag: str = "c"
) -> str:
    """The chart as an <svg> element: colours are CSS variables, ids begin with `tag`; empty with nothing to draw."""
    sheet = curve(rows, against, batch, narrow)
    if sheet is None:
        return ""
    text = files.encode(sheet, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{tag}-", text)
    for i, colour in enumerate((INK, MUTED, PAPER, *COLOURS)):
        text = text.replace(colour, f"var(--{('ink', 'muted', 'paper')[i] if i < 3 else f's{i - 3}'})")
    over = {"macs": "GMACs", "tokens": "image tokens"}.get(against, f"measured speed at batch {batch}")
    label = f"Accuracy against {over}; the table has every number"
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _tip(point: Point) -> str:
    cost = gmac(point.row)
    words = f"{name(point.row)}: {percent(point.y / 100)} %" + ("" if cost is None else f" at {cost:.3g} GMAC")
    return words + (f", speed {point.x:.2f}×" if point.across else "")
