"""winnow list: the methods there are, what each needs and promises.

Winnow's own; read from the table in methods/__init__.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from ..methods import BASELINES, METHODS
from ..reducer import Method
from ._options import Json

NAME = "list"


def command(as_json: Json = False) -> None:
    """List the methods."""
    if as_json:
        print(json.dumps([about(method) for method in METHODS], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("method", "what it does", "tokens", "needs"):
        table.add_column(head, overflow="fold")
    for method in METHODS:
        found = about(method)
        table.add_row(str(found["spelling"]), str(found["does"]), str(found["tokens"]), ", ".join(found["needs"]))
    Console().print(table)


def about(method: type[Method]) -> dict:
    """One method as the list, the README and the docs show it."""
    default = method()
    facts = default.facts
    module = (sys.modules[method.__module__].__doc__ or "").strip().splitlines()
    fields = [f"{f.name}={f.default!r}" for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    return {
        "name": method.__name__,
        "spelling": f"{method.__name__}({', '.join(fields)})",
        "does": module[0].split(": ", 1)[-1].rstrip("."),
        "source": module[2].rstrip(".") if len(module) > 2 else "",
        "tokens": "known beforehand" if facts.static else "decided per image",
        "where": facts.where,
        "needs": sorted(need.replace("_", " ") for need in facts.needs),
        "baseline": method in BASELINES,
    }
