"""winnow measure: a model on images, plain beside reduced: multiply-adds, time and memory, by layer, or as fvcore counts.

Winnow's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import winnow

from ..adapters import host_of
from ..compare import Comparison
from ..data.batches import Batch
from ..measure import Profile, count_macs, fvcore_macs, profile_model, record, verdict
from ..measure.profile import table as profile_table
from ..models import LoadedModel
from ..reducer import Method
from ._printed import print_rows, table_of


@dataclass(frozen=True)
class Asked:
    """A model on its device, the methods, and the images that both are run on."""

    loaded: LoadedModel
    methods: Sequence[Method]
    way: Any
    images: Tensor
    data: record.Data
    reduce: Callable
    as_json: bool

    @property
    def net(self) -> nn.Module:
        """The plain model."""
        return self.loaded.model


def measure(asked: Asked, sizes: Sequence[int], pairs: int, results: Path, spread: bool) -> None:
    """One row per configuration; without labels there is no accuracy. spread: of what one image costs, too."""
    comparison = Comparison(
        model=asked.net, name=asked.loaded.spec, weights=asked.loaded.weights_hash, labels=None, data=asked.data,
        batches=[Batch(asked.images, None, list(range(len(asked.images))))], results=results, way=asked.way, sizes=sizes,
        pairs=pairs, fresh=True, task="measure", reduce=asked.reduce,
    )  # fmt: skip
    rows = []
    for method in (None, *asked.methods):
        row, _ = comparison.measure(method)
        record.append(results, row)
        rows.append(row)
    if asked.as_json:
        print_rows(rows)
    else:
        Console().print(_table(rows, spread))


def _table(rows: Sequence[record.Row], spread: bool) -> Table:
    """`spread`: with the mean and the maximum over the images of what one of them costs, by closed form."""
    more = ("mean of images", "maximum") if spread else ()
    heads = (
        "method",
        "tokens",
        "GMAC",
        "GFLOP",
        "closed form",
        *more,
        "peak MiB",
        "time against plain",
        "reducer's share",
    )
    table = table_of(heads, left=("method", "time against plain"))
    for row in rows:
        macs = row.macs
        assert macs is not None
        times = [f"batch {t.batch}: {t.plain_ms:.0f} -> {t.reduced_ms:.0f} ms, {verdict(t)}" for t in row.latency]
        shares = [f"{t.reducer_share:.1%}" for t in row.latency if t.reducer_share is not None]
        table.add_row(
            row.method or "plain",
            f"{row.counts[-1]:g}" if row.counts else "",
            f"{macs.counted / 1e9:.3f}",
            f"{2 * macs.counted / 1e9:.3f}",
            *(
                ("" if one is None else f"{one / 1e9:.3f}")
                for one in (macs.closed, macs.mean, macs.max)[: 1 + len(more)]
            ),
            "" if row.memory_mib is None else f"{row.memory_mib:.0f}",
            "\n".join(times),
            "\n".join(shares),
        )
    return table


def fvcore(asked: Asked) -> None:
    """fvcore's figure beside the true one, and what fvcore leaves out."""
    found: list[dict[str, Any]] = []
    net, image = asked.net, asked.images[:1]
    for method in (None, *asked.methods):
        if method is not None:
            winnow.reduce(net, method, asked.way)
        theirs, left_out = fvcore_macs(net, image)
        found.append({"method": repr(method) if method else None, "fvcore": theirs, "macs": count_macs(net, image),
                      "left_out": left_out})  # fmt: skip
        if method is not None:
            winnow.restore(net)
    if asked.as_json:
        print(json.dumps(found))
        return
    for one in found:
        missing = ", ".join(f"{name} ({times}x)" for name, times in sorted(one["left_out"].items()))
        print(
            f"{one['method'] or 'plain'}: {one['fvcore'] / 1e9:.3f} GMAC by fvcore, {one['macs'] / 1e9:.3f} GMAC counted in "
            f"full ({one['fvcore'] / one['macs'] - 1:+.1%})\n  fvcore leaves out: {missing or 'nothing'}"
        )


def profile(asked: Asked) -> None:
    """Plain beside reduced, by layer and by operator; the bottleneck named."""
    net = asked.net
    layers = {f"block {i}": block for i, block in enumerate(host_of(net).blocks)}
    plain = profile_model(net, asked.images, layers)
    found = []
    for method in asked.methods:
        asked.reduce(net, method, asked.way)
        reduced = profile_model(net, asked.images, layers | {"reducer": winnow.reducer_of(net)})
        winnow.restore(net)
        found.append((repr(method), reduced))
    found = found or [("plain", plain)]
    if asked.as_json:
        print(json.dumps([{"method": name, "rows": profile_table(plain, one)} for name, one in found]))
        return
    for name, one in found:
        Console().print(_profile(name, plain, one))
        print(f"the plain model spends {_most(plain)}\n{name} spends {_most(one)}\n")


def _most(found: Profile) -> str:
    """The bottleneck in words, with shares, as the profiler slows a run."""
    layer, operator = found.bottleneck
    shares = [cost.ms / found.total.ms for cost in (found.layers[layer], found.operators[operator])]
    return f"most time in {layer} ({shares[0]:.0%}) and, of the operators, in {operator} ({shares[1]:.0%})"


def _profile(name: str, plain: Profile, reduced: Profile) -> Table:
    heads = ("", "", "GMAC plain", "reduced", "ms plain", "reduced", "MiB plain", "reduced")
    table = table_of(heads, left=("",), title=f"plain -> {name}, batch")
    for row in profile_table(plain, reduced)[:48]:
        cells = [row["kind"], row["name"]]
        for quantity, unit in (("macs", 1e9), ("ms", 1), ("mib", 1)):
            for side in ("plain", "reduced"):
                value = row[f"{side}_{quantity}"]
                cells.append("" if value is None else f"{value / unit:.2f}")
        table.add_row(*cells)
    return table
