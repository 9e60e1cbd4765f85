"""winnow measure: multiply-adds, time and memory of a model, plain beside reduced; no data needed.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import winnow

from ..adapters import host_of
from ..compare import Comparison
from ..data import open_images
from ..data.batches import Batch, batches
from ..measure import Profile, fvcore_macs, profile_model, record, verdict
from ..measure._evaluating import output_of
from ..measure.profile import table as profile_table
from ..measure.step import measure_step
from ..models import LoadedModel
from ..reducer import Method
from . import _options as o

NAME = "measure"


def command(
    model: o.Model,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="a method as in ToMe(r=8)")] = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    convention: Annotated[
        str, typer.Option(help="mac; fvcore to re-read old tables; with --text fastv, sparsevlm")
    ] = "mac",
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes to time; may be repeated")] = None,
    pairs: Annotated[int, typer.Option(help="interleaved pairs per timing, at least 9")] = 15,
    boundaries: Annotated[
        str | None, typer.Option(help="even: spaced evenly at the rate; data: mean and maximum over --data")
    ] = None,
    data: Annotated[str | None, typer.Option(help="images for --boundaries data, as in winnow compare")] = None,
    split: Annotated[str, typer.Option(help="split or slice of the data")] = "",
    limit: Annotated[int, typer.Option(help="so many images of the data, evenly spaced: one batch")] = 25,
    step: Annotated[
        bool, typer.Option("--step", help="a training step: time, memory, tokens; 9 pairs at --batch")
    ] = False,
    pair: Annotated[
        bool, typer.Option("--pair", help="with --step, both towers of an open_clip model and the contrastive loss")
    ] = False,
    text: Annotated[
        int | None, typer.Option(help="so many prompt tokens beside the image's: the whole vision-language model")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="with --text, patches of the image where any size goes: 48x48")
    ] = None,
    expand: Annotated[
        bool, typer.Option("--expand", help="with --text, save in the tower alone: tokens go back to their patches")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="MACs, time and memory by layer and operator")] = False,
    way: o.WayOption = "auto",
    results: Annotated[Path, typer.Option(help="JSON-lines file the rows are appended to")] = Path(
        "results/measure.jsonl"
    ),
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    threads: o.Threads = 0,
    as_json: o.Json = False,
) -> None:
    """Measure a model on random images, or on data: GMACs (counted and closed form), time against plain, peak memory."""
    methods = o.methods_of(method)
    if text is not None:
        from ._measure_vlm import measure_vlm

        measure_vlm(
            model, methods, text, grid, batch or [1], pairs=pairs, way=o.way_of(way), convention=convention, results=results,
            seed=seed, device=o.device_of(device, threads), pretrained=pretrained, as_json=as_json, expand=expand,
        )  # fmt: skip
        return
    if expand:
        raise ValueError("--expand is for vision-language models: give --text, the number of prompt tokens")
    if (boundaries == "data") != (data is not None):
        raise ValueError("--boundaries data and --data belong together, e.g. --boundaries data --data photographs")
    if boundaries == "even":
        methods = [_even(one) for one in methods]
    elif boundaries not in (None, "data"):
        raise ValueError(f"--boundaries {boundaries}: even or data")
    if convention not in ("mac", "fvcore"):
        raise ValueError(f"--convention {convention}: mac (every multiply-add) or fvcore (as old tables counted)")
    where, run_way = o.device_of(device, threads), o.way_of(way)
    if pair:
        from ._measure_pair import measure_pair, parts_line

        if not step:
            raise ValueError("--pair times a training step of both towers: add --step")
        rows = measure_pair(model, methods, max(batch or [8]), results=results, seed=seed, device=where,
                            pretrained=pretrained, weights=weights)  # fmt: skip
        _said(rows, as_json, lambda row: f"{_step_line(row)}\n{parts_line(row)}")
        return
    loaded = o.model_of(model, weights, pretrained, seed, bare=True)
    reduce, net = o.reducing(weights, methods), loaded.model.to(where)
    for one in methods:
        winnow.restore(reduce(net, one, run_way))
    if data is None:
        noise = torch.Generator().manual_seed(seed)
        images = torch.randn(max(batch or [25]), 3, *loaded.size, generator=noise).to(where)
        source = record.Data(name="random images", n=len(images))
    else:
        chosen = open_images(data, split=split, limit=limit)
        images = next(batches(chosen, loaded.transform, limit, device=where)).images
        source = record.Data(name=chosen.name, split=chosen.split, n=len(chosen), hash=chosen.hash)
    if step:
        _steps(net, loaded, methods, run_way, images, source, results, as_json)
        return
    if profile:
        _profiles(net, methods, run_way, images, reduce, as_json)
        return
    if convention == "fvcore":
        _fvcore(net, loaded, methods, run_way, images[:1], as_json)
        return
    rows = _rows(net, loaded, methods, run_way, images, source, batch or [1, 25], pairs, results, reduce)
    if as_json:
        print("[" + ",\n ".join(row.model_dump_json(by_alias=True) for row in rows) + "]")
    else:
        Console().print(_table(rows, boundaries == "data"))


def _even(method: Method) -> Method:
    if method.even is None:
        raise ValueError(f"--boundaries even: {method} draws no boundaries; DRIP does")
    return method.even


def _rows(
    net, loaded: LoadedModel, methods, way, images: Tensor, data: record.Data, sizes: Sequence[int], pairs: int,
    results: Path, reduce: Callable,
):  # fmt: skip
    """One row per configuration; without data there is no accuracy."""
    comparison = Comparison(
        model=net, name=loaded.spec, weights=loaded.weights_hash, batches=[Batch(images, None, list(range(len(images))))],
        labels=None, data=data, results=results, way=way, sizes=sizes,
        pairs=pairs, fresh=True, task="measure", reduce=reduce,
    )  # fmt: skip
    rows = []
    for method in (None, *methods):
        row, _ = comparison.measure(method)
        record.append(results, row)
        rows.append(row)
    return rows


def _steps(
    net, loaded: LoadedModel, methods: Sequence[Method], way, images: Tensor, data: record.Data, results: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """A row and a line for every method's training step."""
    if not methods:
        raise ValueError('--step compares with the plain model: give a --method, e.g. --method "DRIP(rate=0.25)"')
    with torch.no_grad():
        classes = output_of(net(images[:1])).shape[-1]
    rows = []
    for method in methods:
        with winnow.reduced(net, method, way):
            row = record.Row(
                task="step", model=loaded.spec, weights=loaded.weights_hash, data=data, method=repr(method),
                way=str(way), step=measure_step(net, images, classes), device=str(images.device),
                environment=record.environment(), commit=record.commit(), command=record.command(), time=record.now(),
            )  # fmt: skip
        record.append(results, row)
        rows.append(row)
    _said(rows, as_json, _step_line)


def _said(rows: Sequence[record.Row], as_json: bool, line: Callable[[record.Row], str]) -> None:
    if as_json:
        print("[" + ",\n ".join(row.model_dump_json(by_alias=True) for row in rows) + "]")
        return
    for row in rows:
        print(line(row))


def _step_line(row: record.Row) -> str:
    step = row.step
    assert step is not None
    share = "" if step.promised is None else (
        f"; {step.latency.ratio / step.promised:.2f} of the MACs' {step.promised:.2f}x"
    )  # fmt: skip
    time = step.latency
    return (
        f"{row.method}: a step of batch {time.batch}: {time.plain_ms:.0f} -> {time.reduced_ms:.0f} ms, "
        f"{verdict(time)}{share}; {step.plain_mib:.0f} -> {step.mib:.0f} MiB above the static state; "
        f"tokens {step.tokens[0]} -> {step.tokens[-1]}"
    )


def _table(rows: Sequence[record.Row], spread: bool) -> Table:
    """`spread`: with the mean and the maximum over the images of what one of them costs, by closed form."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in (
        "method",
        "tokens",
        "GMAC",
        "GFLOP",
        "closed form",
        *(("mean of images", "maximum") if spread else ()),
        "peak MiB",
        "time against plain",
        "reducer's share",
    ):
        table.add_column(head, justify="left" if head in ("method", "time against plain") else "right", overflow="fold")
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
            "" if macs.closed is None else f"{macs.closed / 1e9:.3f}",
            *(("" if one is None else f"{one / 1e9:.3f}" for one in (macs.mean, macs.max)) if spread else ()),
            "" if row.memory_mib is None else f"{row.memory_mib:.0f}",
            "\n".join(times),
            "\n".join(shares),
        )
    return table


def _fvcore(net, loaded: LoadedModel, methods: Sequence[Method], way, image: Tensor, as_json: bool) -> None:
    """fvcore's figure beside the true one, and what fvcore leaves out."""
    from ..measure import count_macs

    found: list[dict[str, Any]] = []
    for method in (None, *methods):
        if method is not None:
            winnow.reduce(net, method, way)
        theirs, left_out = fvcore_macs(net, image)
        found.append({"method": repr(method) if method else None, "fvcore": theirs, "macs": count_macs(net, image),
                      "left_out": left_out})  # fmt: skip
        if method is not None:
            winnow.restore(net)
    if as_json:
        import json

        print(json.dumps(found))
        return
    for one in found:
        missing = ", ".join(f"{name} ({times}x)" for name, times in sorted(one["left_out"].items()))
        print(
            f"{one['method'] or 'plain'}: {one['fvcore'] / 1e9:.3f} GMAC by fvcore, {one['macs'] / 1e9:.3f} GMAC counted in "
            f"full ({one['fvcore'] / one['macs'] - 1:+.1%})\n  fvcore leaves out: {missing or 'nothing'}"
        )


def _profiles(net, methods: Sequence[Method], way, images: Tensor, reduce: Callable, as_json: bool) -> None:
    """Plain beside reduced, by layer and by operator; the bottleneck named."""
    layers = {f"block {i}": block for i, block in enumerate(host_of(net).blocks)}
    plain = profile_model(net, images, layers)
    found = []
    for method in methods:
        reduce(net, method, way)
        reduced = profile_model(net, images, layers | {"reducer": winnow.reducer_of(net)})
        winnow.restore(net)
        found.append((repr(method), reduced))
    if as_json:
        import json

        print(
            json.dumps(
                [{"method": name, "rows": profile_table(plain, one)} for name, one in found or [("plain", plain)]]
            )
        )
        return
    for name, one in found or [("plain", plain)]:
        Console().print(_profile(name, plain, one))
        print(f"bottleneck of the plain model: {plain.bottleneck}\nbottleneck of {name}: {one.bottleneck}\n")


def _profile(name: str, plain: Profile, reduced: Profile) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title=f"plain -> {name}, batch", title_justify="left")
    for head in ("", "", "GMAC plain", "reduced", "ms plain", "reduced", "MiB plain", "reduced"):
        table.add_column(head, justify="left" if not head else "right")
    for row in profile_table(plain, reduced)[:48]:
        cells = [row["kind"], row["name"]]
        for quantity, unit in (("macs", 1e9), ("ms", 1), ("mib", 1)):
            for side in ("plain", "reduced"):
                value = row[f"{side}_{quantity}"]
                cells.append("" if value is None else f"{value / unit:.2f}")
        table.add_row(*cells)
    return table
