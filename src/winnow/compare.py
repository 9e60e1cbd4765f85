"""compare: one model, many methods, the same images; a row each, with equal-cost baselines and paired tests.

Winnow's own; the protocol is written down in docs/measuring.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import winnow

from ._parse import parse
from .baselines import NEAR, SLACK, equal_cost
from .measure import accuracy_of, compare_latency, count_macs, mcnemar, peak_memory, share, unpack
from .measure import record as rec
from .measure.closed_form import check_counted, closed_macs, plain_macs
from .measure.latency import MIN_PAIRS
from .measure.objects import objects_of
from .methods import BASELINES
from .reducer import Method
from .tasks.classify import Answers, classify
from .twin import twin
from .ways import Way, resolve

Progress = Callable[[str], object]


@dataclass
class Comparison:
    """Everything that stays the same from row to row."""

    model: nn.Module
    name: str
    weights: str | None
    batches: Iterable
    labels: np.ndarray | None
    data: rec.Data
    results: Path
    way: Way = "auto"
    sizes: Sequence[int] = (25,)
    """Batch sizes to time; none = no timing."""
    pairs: int = 11
    calibration: int = 4
    """Batches that quantile limits are calibrated on."""
    objects: Callable[[tuple[int, int]], np.ndarray] | None = None
    """For a grid, the object of each patch of each image [n, P], 0 for none."""
    fresh: bool = False
    """Run again what the results file already holds."""
    say: Progress = lambda words: None
    task: str = "compare"
    reduce: Callable = winnow.reduce
    """How a method gets into the model: `Trained.reduce` brings trained weights along."""
    rows: list[rec.Row] = field(default_factory=list)
    tops: dict[str | None, np.ndarray] = field(default_factory=dict)

    def run(self, methods: Sequence[Method]) -> list[rec.Row]:
        """Plain, then each method after its equal-cost baselines; rows already in the results file are not made again."""
        self._check(methods)
        self._one(None, timed=False)
        baselines = [method for method in methods if type(method) in BASELINES]
        for method in [*baselines, *(method for method in methods if method not in baselines)]:
            row, fresh = self.measure(method)
            if type(method) not in BASELINES and row.macs is not None:
                for baseline in self._rivals(row.macs.per_image):
                    self._one(baseline, timed=False)
            self._keep(row, fresh)
        return paired(self.rows)

    def _check(self, methods: Sequence[Method]) -> None:
        """Everything that can be refused is refused before any work is done."""
        if self.sizes and self.pairs < MIN_PAIRS:
            raise ValueError(f"pairs={self.pairs}: an interval needs at least {MIN_PAIRS} pairs")
        for method in methods:
            if method.facts.training_only:
                raise ValueError(f"{method} acts while training only; at inference it is the plain model")
            winnow.restore(self.reduce(self.model, method, self.way))
        rec.ready(self.results)

    def _one(self, method: Method | None, timed: bool = True) -> None:
        if not any(row.method == _spell(method) for row in self.rows):
            self._keep(*self.measure(method, timed))

    def _keep(self, row: rec.Row, fresh: bool) -> None:
        if any(known.method == row.method for known in self.rows):
            return
        self.rows.append(row)
        if fresh:
            rec.append(self.results, paired(self.rows)[-1])

    def _rivals(self, macs: float) -> list[Method]:
        """Equal-cost baselines that no row stands in for yet."""
        found = []
        for method in self._equal_cost(macs):
            near = [r for r in self.rows if r.role == "baseline" and _alike(r.method, method)]
            if not any(r.macs and NEAR * macs <= r.macs.counted <= SLACK * macs for r in near):
                found.append(method)
        return found

    def _equal_cost(self, macs: float) -> Iterable[Method]:
        return equal_cost(self.model, macs)

    def measure(self, method: Method | None, timed: bool = True) -> tuple[rec.Row, bool]:
        """The row of one configuration and whether it was made now."""
        found = None if self.fresh else self._made(method, timed)
        if found is not None:
            self.say(f"{_spell(method) or 'plain'}: already in {self.results}")
            return found, False
        self.say(_spell(method) or "plain")
        if method is None:
            return self._row(None, False), True
        self.reduce(self.model, method, self.way)
        try:
            if winnow.reducer_of(self.model).quantiles():
                winnow.calibrate(self.model, _first(self.batches, self.calibration))
            return self._row(method, timed), True
        finally:
            winnow.restore(self.model)

    def _row(self, method: Method | None, timed: bool) -> rec.Row:
        answers = self._answers(self.model, watched=method is not None)
        self.tops[_spell(method)] = answers.top
        latency = [self._latency(method, size) for size in self.sizes] if timed else []
        host = next(self.model.parameters())
        agrees = None if method is None else answers.top == self._plain_top()
        if self.labels is None:
            accuracy = rec.Accuracy(agreement=None if agrees is None else float(agrees.mean()))
        else:
            accuracy = accuracy_of(answers.top == self.labels, agrees=agrees)
        return rec.Row(
            task=self.task,
            model=self.name,
            weights=self.weights,
            data=self.data,
            method=_spell(method),
            role="plain" if method is None else "baseline" if type(method) in BASELINES else "method",
            way=self._way(method),
            accuracy=accuracy,
            objects=self._objects(answers),
            latency=latency,
            memory_mib=self._memory() if timed or method is None else None,
            device=str(host.device),
            dtype=str(host.dtype).removeprefix("torch."),
            environment=rec.environment(),
            commit=rec.commit(),
            command=rec.command(),
            time=rec.now(),
            **self._cost(method, answers),
        )

    def _answers(self, model: nn.Module, watched: bool) -> Any:
        """What the model says: `top` [n], comparable with `labels`, and where patches went."""
        return classify(model, self.batches, watched=watched)

    def _objects(self, answers: Answers) -> rec.Objects | None:
        if self.objects is None or answers.grid is None:
            return None
        return objects_of(answers.owners, self.objects(answers.grid))

    def _way(self, method: Method | None) -> str:
        return "static" if method is None else str(resolve(self.way, method.facts, training=False))

    def _cost(self, method: Method | None, answers: Any) -> dict[str, Any]:
        """Counts and MACs of a row."""
        images = next(iter(self.batches)).images
        if method is not None:
            counts = [round(float(n), 2) for n in answers.counts.double().mean(0)]
            return {"counts": counts, "macs": self._macs(method, images, answers.counts, answers.executed)}
        macs = rec.Macs(counted=count_macs(self.model, images[:2]), closed=plain_macs(self.model))
        check_counted(macs.counted, macs.closed, self.name)
        return {"macs": macs}

    def _macs(self, method: Method, images: Tensor, counts: Tensor, executed: list[int]) -> rec.Macs:
        """Counted on the first batch as executed; closed form for the same, and per image over all of them."""
        counted = count_macs(self.model, images)
        ran = closed_macs(self.model, torch.tensor([executed]))
        each = closed_macs(self.model, counts)
        check_counted(counted, None if ran is None else float(ran[0]), repr(method))
        return rec.Macs(
            counted=counted,
            closed=None if ran is None else float(ran[0]),
            mean=None if each is None else float(each.mean()),
            max=None if each is None else float(each.max()),
        )

    def _latency(self, method: Method | None, size: int) -> rec.Latency:
        """Plain and reduced in turn, on the same weights and images."""
        images = _batch_of(self.batches, size)
        plain = twin(self.model)
        winnow.restore(plain)
        device = images.device.type

        def forward(model: nn.Module) -> Callable[[], object]:
            def run() -> None:
                with torch.inference_mode():
                    model(images)

            return run

        reduced = forward(self.model)
        own = share(self.model, winnow.reducer_of(self.model), reduced, device)
        timed = compare_latency(forward(plain), reduced, batch=size, pairs=self.pairs, device=device)
        return timed.model_copy(update={"reducer_share": own, "threads": torch.get_num_threads()})

    def _memory(self) -> float:
        images = next(iter(self.batches)).images

        def run() -> None:
            with torch.inference_mode():
                self.model(images)

        return peak_memory(run, images.device.type)

    def _plain_top(self) -> np.ndarray:
        if None not in self.tops:  # the plain row came from the file: its answers are needed to say what agrees
            reducer = getattr(self.model, "reducer", None)
            bare = self.model if reducer is None else winnow.restore(twin(self.model))
            self.tops[None] = self._answers(bare, watched=False).top
        return self.tops[None]

    def _made(self, method: Method | None, timed: bool) -> rec.Row | None:
        """The row of an earlier run of the same configuration on the same images and weights."""
        if not self.results.exists():
            return None
        for row in reversed(rec.read(self.results)):
            mine = (self.name, self.weights, _spell(method), self._way(method), self.data)
            enough = not timed or {one.batch for one in row.latency} >= set(self.sizes)
            if enough and mine == (row.model, row.weights, row.method, row.way, row.data):
                return row
        return None


def paired(rows: Sequence[rec.Row]) -> list[rec.Row]:
    """Each row with its paired tests: against the plain model, and against the most accurate baseline of equal cost.

    Of several rows of one method, counted in one way, the newest stands, in the place of the first.
    """
    rows = list({(row.method, row.macs and row.macs.convention): row for row in rows}.values())
    plain = next((row for row in rows if row.role == "plain"), None)
    baselines = [row for row in rows if row.role == "baseline"]
    out = []
    for row in rows:
        accuracy = row.accuracy
        if accuracy is None or not accuracy.hits or row is plain:
            out.append(row)
            continue
        rival = max((b for b in baselines if _cheap(b, row)), key=_top1, default=None)
        update = {
            "vs_plain": _against(row, plain),
            "vs_baseline": _against(row, rival) if row.role == "method" else None,
        }
        out.append(row.model_copy(update={"accuracy": accuracy.model_copy(update=update)}))
    return out


def _cheap(baseline: rec.Row, row: rec.Row) -> bool:
    if baseline.macs is None or row.macs is None or baseline.accuracy is None:
        return False
    return baseline.macs.per_image <= SLACK * row.macs.per_image


def _top1(row: rec.Row) -> float:
    return (row.accuracy.value if row.accuracy else None) or 0.0


def _against(row: rec.Row, other: rec.Row | None) -> rec.Paired | None:
    if other is None or other.accuracy is None or row.accuracy is None or row.data is None or other.data != row.data:
        return None
    ours, theirs = (unpack(one.accuracy.hits, row.data.n) for one in (row, other))  # type: ignore[union-attr]
    wins, losses, p = mcnemar(ours, theirs)
    return rec.Paired(against=other.method or "plain", wins=wins, losses=losses, p=p)


def _alike(spelling: str | None, method: Method) -> bool:
    """The same kind of method, acting in the same part of the model."""
    other = parse(spelling or "")
    return type(other) is type(method) and other.facts.where == method.facts.where


def _spell(method: Method | None) -> str | None:
    return None if method is None else repr(method)


def _first(batches: Iterable, how_many: int) -> list[Tensor]:
    found = []
    for batch in batches:
        found.append(batch.images)
        if len(found) == how_many:
            break
    return found


def _batch_of(batches: Iterable, size: int) -> Tensor:
    """`size` images from the first batches, repeated where there are too few."""
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch.images)
        if sum(map(len, found)) >= size:
            break
    images = torch.cat(found)
    return images.repeat(-(-size // len(images)), 1, 1, 1)[:size].contiguous()


__all__ = ["Comparison", "paired"]
