"""What several verbs print: rows as JSON, tables in one style.

Winnow's own, drawn by rich.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from rich.table import Table

from ..measure.record import Row


def print_rows(rows: Sequence[Row]) -> None:
    """Rows as one JSON array, a line each."""
    print("[" + ",\n ".join(row.model_dump_json(by_alias=True) for row in rows) + "]")


def table_of(heads: Sequence[str], left: Container[str] = (), title: str | None = None) -> Table:
    """An empty table; columns named in `left` are words, the others numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", overflow="fold")
    return table
