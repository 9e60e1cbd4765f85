"""winnow measure --step: a training step, plain and reduced in turn: of a classifier, or of both towers of a CLIP.

Winnow's own; documents 001's and 003's columns of time and memory, as ratios to the plain model in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import winnow

from .._clip import load_clip
from ..data.scenes import captions
from ..measure import record, verdict
from ..measure._evaluating import output_of
from ..measure.step import measure_pair_step, measure_step
from ..reducer import Method
from ._measure_model import Asked
from ._printed import print_rows


def steps(asked: Asked, results: Path) -> None:
    """A row and a line for every method's training step."""
    _some(asked.methods)
    net, loaded = asked.net, asked.loaded
    with torch.no_grad():
        classes = output_of(net(asked.images[:1])).shape[-1]
    rows = []
    for method in asked.methods:
        with winnow.reduced(net, method, asked.way):
            rows.append(record.Row(
                task="step", model=loaded.spec, weights=loaded.weights_hash, data=asked.data, method=repr(method),
                way=str(asked.way), step=measure_step(net, asked.images, classes), device=str(asked.images.device),
                environment=record.environment(), commit=record.commit(), command=record.command(), time=record.now(),
            ))  # fmt: skip
        record.append(results, rows[-1])
    _said(rows, asked.as_json, _line)


def pair_steps(
    model: str, methods: Sequence[Method], batch: int, *, results: Path, seed: int, device: torch.device,
    pretrained: bool, weights: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """The same of both towers: random images beside captions of scenes, as many different ones as the batch has."""
    _some(methods)
    clip = load_clip(model, pretrained=pretrained, weights=weights, seed=seed)
    net = clip.model.to(device)
    images = torch.randn(batch, 3, *clip.size, generator=torch.Generator().manual_seed(seed)).to(device)
    texts = clip.tokenize(captions(batch, "train")).to(device)
    data = record.Data(name="random images, captions of scenes", n=batch)
    rows = []
    for method in methods:
        with winnow.reduced(net, method):
            step = measure_pair_step(net, images, texts)
        rows.append(record.Row(
            task="step contrast", model=clip.spec, weights=clip.weights_hash, data=data, method=repr(method), step=step,
            seed=seed, device=device.type, environment=record.environment(), commit=record.commit(),
            command=record.command(), time=record.now(),
        ))  # fmt: skip
        record.append(results, rows[-1])
    _said(rows, as_json, lambda row: f"{_line(row)}\n{_parts(row)}")


def _some(methods: Sequence[Method]) -> None:
    if not methods:
        raise ValueError('--step compares with the plain model: give a --method, e.g. --method "DRIP(rate=0.25)"')


def _said(rows: Sequence[record.Row], as_json: bool, line: Callable[[record.Row], str]) -> None:
    if as_json:
        print_rows(rows)
        return
    for row in rows:
        print(line(row))


def _line(row: record.Row) -> str:
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


def _parts(row: record.Row) -> str:
    """Where the time of both steps goes, in shares."""
    step = row.step
    assert step is not None
    whole = step.latency.plain_ms, step.latency.reduced_ms
    parts = dict(step.parts_ms)
    spent = [sum(part[side] for part in parts.values()) for side in (0, 1)]
    parts["rest"] = whole[0] - spent[0], whole[1] - spent[1]
    said = (f"{name} {plain / whole[0]:.0%} -> {reduced / whole[1]:.0%}" for name, (plain, reduced) in parts.items())
    return f"  of the step: {', '.join(said)}"
