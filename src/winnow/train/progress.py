"""What a run says: a bar on a terminal, a line every so many steps, and the same as JSON lines, which are the record.

Winnow's own; the fields are those of documents 000 and 001: samples seen / total (%), value (running mean), rate, norm.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..measure.record import Training

Line = dict[str, Any]


class Meter:
    """Running means of an epoch, exact after a resume."""

    def __init__(self, sums: Mapping[str, float] | None = None, steps: int = 0) -> None:
        self.sums, self.steps = dict(sums or {}), steps

    def add(self, values: Mapping[str, float]) -> None:
        """One step's values."""
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean per step."""
        return {name: value / self.steps for name, value in self.sums.items()} if self.steps else {}


class Log:
    """Lines of one run; `quiet` on every process but the first."""

    def __init__(self, path: Path, total: int, quiet: bool, tensorboard: bool = False) -> None:
        self.path, self.quiet = path, quiet
        self.console = Console(stderr=True, quiet=quiet)
        self.start = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Bar(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        self.task = self.bar.add_task("training", total=total)
        self.board = _board(path.parent / "tensorboard") if tensorboard and not quiet else None

    def __enter__(self) -> Log:
        if self.console.is_terminal and not self.quiet:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar.live.is_started:  # stopping what never started prints an empty line
            self.bar.stop()
        if self.board is not None:
            self.board.close()

    def say(self, words: str) -> None:
        """A line for people."""
        stamp = "" if self.console.is_terminal else f"{time.monotonic() - self.start:6.0f} s  "
        self.console.print(stamp + words, highlight=False, markup=False, soft_wrap=True)

    def done(self, step: int, words: str) -> None:
        """So many steps are done."""
        self.bar.update(self.task, completed=step, description=words)

    def write(self, line: Line, sync: bool = False) -> None:
        """One JSON line; `sync` forces it to disk."""
        if self.quiet:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if self.board is not None:
            for name, value in _numbers(line):
                self.board.add_scalar(f"{line['event']}/{name}", value, line["step"])


def read_log(path: Path) -> list[Line]:
    """All whole lines; what a crash cut in two is left out."""
    found: list[Line] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").split("\n"):
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return found


def sentence(line: Line, means: Mapping[str, float], samples: int) -> str:
    """A step's line for people: samples seen/total (%), value (running mean), learning rate, gradient norm."""
    seen = line["samples"]
    values = "  ".join(f"{name} {line[name]:.4g} ({mean:.4g})" for name, mean in means.items() if name != "grad_norm")
    share = f"{seen:,}/{samples:,} samples ({100 * seen / samples:.0f} %)"
    return (
        f"epoch {line['epoch']}  {share}  {values}  lr {line['learning_rate']:.3g}  grad norm {line['grad_norm']:.3g}"
    )


def epoch_sentence(line: Line) -> str:
    """An epoch's line for people."""
    parts = [f"epoch {line['epoch']} done"]
    for name in ("loss", "top1", "top5", "f1", "image_to_text_r1", "text_to_image_r1"):
        if name in line.get("val", {}):
            value = line["val"][name]
            parts.append(f"val {name} {value:.4g}" if name == "loss" else f"val {name} {100 * value:.2f} %")
    if "text_loss" in line.get("val", {}):
        parts.append(f"text loss {line['val']['text_loss']:.4g}")
    if "gap" in line:
        parts.append(f"gap {100 * line['gap']:+.2f} points")
    parts.append(f"{1e3 * line['step_s']:.1f} ms a step, {line['samples_per_s']:.0f} samples/s")
    parts.append(f"{line['memory_mib']:.0f} MiB")
    return "  ".join(parts)


def summary_sentence(train: Training) -> str:
    """A run's line for people."""
    words = (
        f"done: {train.runtime_s:.0f} s of training, {train.samples_per_s:.0f} samples/s, {train.steps_per_s:.2f} steps/s, "
        f"mean loss {train.loss:.4g}"
    )
    if train.best is None or train.last is None:
        return words
    return f"{words}, best top-1 {100 * train.best:.2f} % (epoch {train.best_epoch}), last {100 * train.last:.2f} %"


def _numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("step", "epoch"):
            yield prefix + name, value


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError('log.tensorboard needs tensorboard: pip install "winnow-vision[tensorboard]"') from None
    return SummaryWriter(str(folder))
