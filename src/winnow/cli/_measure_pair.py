"""winnow measure --step --pair: a contrastive training step of both towers, plain and reduced in turn.

Winnow's own; document 001's columns of time and memory, as ratios to the plain model in one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import winnow

from .._clip import load_clip
from ..data.scenes import captions
from ..measure import record
from ..measure.step import measure_pair_step
from ..reducer import Method


def measure_pair(
    model: str, methods: Sequence[Method], batch: int, *, results: Path, seed: int, device: torch.device,
    pretrained: bool, weights: Path | None,
) -> list[record.Row]:  # fmt: skip
    """A row for every method: random images beside captions of scenes, as many different ones as the batch has."""
    if not methods:
        raise ValueError('--step compares with the plain model: give a --method, e.g. --method "DRIP(rate=0.25)"')
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
    return rows


def parts_line(row: record.Row) -> str:
    """Where the time of both steps goes, in shares."""
    step = row.step
    assert step is not None
    whole = step.latency.plain_ms, step.latency.reduced_ms
    parts = dict(step.parts_ms)
    spent = [sum(part[side] for part in parts.values()) for side in (0, 1)]
    parts["rest"] = whole[0] - spent[0], whole[1] - spent[1]
    said = (f"{name} {plain / whole[0]:.0%} -> {reduced / whole[1]:.0%}" for name, (plain, reduced) in parts.items())
    return f"  of the step: {', '.join(said)}"
