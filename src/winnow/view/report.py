"""Reports from result rows: a table for the terminal, Markdown, and one self-contained HTML page.

Winnow's own.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.measure.record import Row
from winnow.view import curves, files
from winnow.view.columns import Cell, columns
from winnow.view.overlay import after, spaced
from winnow.view.rows import Group, groups, things, top1
from winnow.view.summary import sentences

if TYPE_CHECKING:
    import rich.table

QUALITY = 82
"""Of WebP pictures: edges of patches stay clean, a page of six images stays at a few MB."""
OVERVIEW = 3
"""Layers of a method shown at first; the others are there to be chosen."""
STYLES = {"good": "green", "bad": "red", "quiet": "dim"}


@dataclass(frozen=True)
class Sheet:
    """The pictures of one image: what each method kept or merged, layer by layer."""

    name: str
    credit: str
    """Who took it, under which licence; shown with every picture."""
    label: str
    images: Sequence[tuple[str, int, float, bytes | np.ndarray]]
    """(method, block it stands after, -1: before all, tokens, encoded bytes or uint8 [H, W, 3]), in order."""
    photo: bytes | np.ndarray | None = None
    """The image as the model saw it."""
    lost: str = ""
    """How many methods lost it, in words; empty where nothing is known of that."""
    places: Mapping[int, str] = field(default_factory=dict)
    """Words for numbers in `images` that are no blocks of a ViT."""

    def place(self, layer: int) -> str:
        """Where a number in `images` stands."""
        return self.places.get(layer) or after(layer)


def table(rows: Sequence[Row]) -> rich.table.Table:
    """A compact table for the terminal; groups that cannot be compared stand under their own heading."""
    from rich.table import Table
    from rich.text import Text

    found = groups(rows)
    shown = columns(found, brief=True)
    out = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for column in shown:
        out.add_column(column.head, justify="right" if column.number else "left", overflow="fold")
    for group in found:
        if len(found) > 1:
            out.add_row(Text(title(group), style="bold"))
        for row in group.rows:
            texts = [column.cell(row, group) for column in shown]
            out.add_row(*(Text(cell.flat, style=STYLES.get(cell.mark, "")) for cell in texts))
        out.add_section()
    return out


def markdown(rows: Sequence[Row], brief: bool = False) -> str:
    """Markdown: per group a heading, what was compared, the findings and the table; `brief` = the short table alone."""
    found = groups(rows)
    parts = []
    for group in found:
        lines = []
        if not brief or len(found) > 1:
            lines += [f"## {_plain(title(group))}", ""]
        if not brief:
            lines += [f"- {head}: {_code(text) if head == 'command' else _plain(text)}" for head, text in facts(group)]
            lines += ["", *(f"- {_findings(words)}" for words in sentences(group)), ""]
        shown = columns([group], brief)
        lines.append("| " + " | ".join(column.head for column in shown) + " |")
        lines.append("|" + "|".join("--:" if column.number else ":--" for column in shown) + "|")
        for row in group.rows:
            cells = [(column.number, column.cell(row, group)) for column in shown]
            lines.append("| " + " | ".join(_plain(c.flat) if number else _spelling(c) for number, c in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def html(rows: Sequence[Row], pictures: Sequence[Sheet], path: str | Path) -> Path:
    """Write ONE self-contained page: header, findings, curves, the table, pictures; ValueError without rows."""
    if not rows:
        raise ValueError("a report needs at least one row")
    found = groups(rows)
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title(found[0]) if len(found) == 1 else "Winnow report",
            groups=[_section(group, i) for i, group in enumerate(found)],
            sheets=[_sheet(sheet) for sheet in pictures],
            ordered=any(sheet.lost for sheet in pictures),
            methods=list(dict.fromkeys(one[0] for sheet in pictures for one in sheet.images)),
            layers=sorted({(one[1], sheet.place(one[1])) for sheet in pictures for one in sheet.images}),
        )
    )
    return files.write(path, page.encode("utf-8"))


def title(group: Group) -> str:
    """One line naming the model and the data of a group."""
    first = group.rows[0]
    return f"{first.model} with fewer tokens" + (f", on {first.data.name}" if first.data else "")


def facts(group: Group) -> list[tuple[str, str]]:
    """What was compared, on what, by which command, where and when: (heading, text) pairs drawn from the rows."""
    first, rows = group.rows[0], group.rows

    def all_of(values: Any, join: str = ", ") -> str:
        return join.join(dict.fromkeys(str(value) for value in values if value))

    data = first.data
    where = [row.environment for row in rows]
    known = dict.fromkeys(key for one in where for key in one if key not in ("cpu", "gpu", "threads", "platform"))
    machine = [all_of(one.get(key) for one in where) for key in ("gpu", "cpu", "platform")]
    threads = all_of(one.get("threads") for one in where)
    times = sorted(row.time for row in rows if row.time)
    missing = {key: count for row in rows if row.macs for key, count in row.macs.left_out.items()}
    pairs = [
        ("model", first.model),
        ("weights", f"SHA-256 {first.weights}…" if first.weights else "random weights"),
        ("task", first.task),
        (
            "data",
            ""
            if data is None
            else all_of([data.name, data.split, f"{data.n} {things(rows)}", data.hash and f"hash {data.hash}"]),
        ),
        ("device", f"{first.device}, {first.dtype}"),
        ("machine", all_of([*machine, threads and f"{threads} threads"])),
        ("versions", all_of(f"{key} {all_of((one.get(key) for one in where), ' / ')}" for key in known)),
        ("counting", all_of(row.macs.convention for row in rows if row.macs and row.macs.convention != "mac")),
        ("not counted", ", ".join(f"{key} ×{count}" for key, count in missing.items())),
        ("commit", all_of(row.commit for row in rows)),
        ("date", " to ".join(dict.fromkeys([times[0], times[-1]])) if times else ""),
        ("command", all_of((row.command for row in rows), "\n")),
    ]
    return [(head, text) for head, text in pairs if text]


def _section(group: Group, i: int) -> dict[str, Any]:
    shown, known = columns([group]), facts(group)
    sizes = sorted({one.batch for row in group.rows for one in row.latency})
    asked = [("macs", None), *(("time", size) for size in sizes), ("tokens", None)]
    charts = []
    for j, (against, size) in enumerate(asked):
        wide, narrow = (
            curves.svg(group.rows, against, size, thin, f"g{i}c{j}{'n' if thin else 'w'}") for thin in (False, True)
        )
        if wide:
            over = {"macs": "cost", "tokens": "image tokens"}.get(against, f"measured time, batch {size}")
            charts.append({"wide": wide, "narrow": narrow, "over": over})
    return {
        "title": title(group),
        "where": " · ".join(text for head, text in known if head in ("data", "weights", "device", "commit", "date")),
        "facts": known,
        "findings": sentences(group),
        "scored": any(top1(row) for row in group.rows),
        "charts": charts,
        "columns": shown,
        "rows": [(row, [column.cell(row, group) for column in shown]) for row in group.rows],
    }


def _sheet(sheet: Sheet) -> dict[str, Any]:
    strips: dict[str, list[dict[str, Any]]] = {}
    for method, layer, tokens, image in sheet.images:
        count = f"{tokens:.1f}".removesuffix(".0")
        one = {"layer": layer, "label": sheet.place(layer), "tokens": count, "uri": _uri(image)}
        strips.setdefault(method, []).append(one)
    for strip in strips.values():
        shown = [one["layer"] for one in spaced(strip, OVERVIEW)]
        strip[:] = [one | {"overview": one["layer"] in shown} for one in strip]
    photo = None if sheet.photo is None else _uri(sheet.photo)
    name = " – ".join(part for part in (sheet.name, sheet.label, sheet.lost) if part)
    return {"name": sheet.name, "title": name, "credit": sheet.credit, "photo": photo, "strips": strips}


def _uri(image: bytes | np.ndarray) -> str:
    """A data URI: arrays become WebP (a tenth of a PNG), encoded bytes go in as they are."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        out = io.BytesIO()
        Image.fromarray(image).save(out, "WEBP", quality=QUALITY)
        image = out.getvalue()
    with Image.open(io.BytesIO(image)) as opened:
        form = (opened.format or "png").lower()
    return f"data:image/{form};base64,{base64.b64encode(image).decode()}"


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def codes(text: str) -> Markup:
        """Text with `spellings` set as code, everything escaped."""
        return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))

    def breaks(text: str) -> Markup:
        """A spelling that may wrap after its brackets and commas."""
        return Markup(re.sub(r"([(,=])(?!$)", r"\1<wbr>", str(escape(text))))

    loaded = Environment(
        loader=PackageLoader("winnow.view"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loaded.filters.update(codes=codes, breaks=breaks)
    return loaded


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", re.sub(r"\s+", " ", text))


def _code(text: str) -> str:
    """A spelling as Markdown code, safe inside a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return text if text == Cell().text else f"{fence}{pad}{text}{pad}{fence}"


def _spelling(cell: Cell) -> str:
    return _code(cell.text) + (f" ({_plain(cell.note)})" if cell.note else "")


def _findings(words: str) -> str:
    parts = words.split("`")
    return "".join(_code(part) if i % 2 else _plain(part) for i, part in enumerate(parts))
