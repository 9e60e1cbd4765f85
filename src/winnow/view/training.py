"""Training runs: curves by epoch (loss, accuracy, tokens executed), the rate finder's plot, and a table of runs.

Winnow's own; the colours are those of the other charts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.measure.record import Row, Training
from winnow.view import files
from winnow.view.curves import COLOURS, INK, MUTED

Lines = Sequence[Mapping[str, Any]]


def training(runs: Mapping[str, Lines]) -> Any:
    """A matplotlib Figure of runs by name, each the lines of its log.jsonl; ValueError where no epoch is done."""
    from matplotlib.figure import Figure

    epochs = {name: [line for line in lines if line["event"] == "epoch"] for name, lines in runs.items()}
    if not any(epochs.values()):
        raise ValueError("curves need at least one finished epoch")
    reduced = any("tokens" in line for lines in epochs.values() for line in lines)
    sheet = Figure(figsize=(4.2 * (2 + reduced), 3.8), layout="constrained", facecolor="white")
    axes = sheet.subplots(1, 2 + reduced)
    for i, (name, lines) in enumerate(epochs.items()):
        colour, label = COLOURS[i % len(COLOURS)], "" if len(epochs) == 1 else f"{name}, "
        steps = [line for line in runs[name] if line["event"] == "step"]
        if len(epochs) == 1 and len(steps) > 1:
            per_epoch = max(lines[0]["step"] / lines[0]["epoch"], 1) if lines else 1
            at = [line["step"] / per_epoch for line in steps]
            axes[0].plot(at, [line["loss"] for line in steps], color=MUTED, linewidth=0.6, alpha=0.5)
        for axis, key, scale in ((axes[0], "loss", 1), (axes[1], "top1", 100)):
            _line(axis, lines, "train", key, scale, {"color": colour, "dashes": (4, 2), "label": f"{label}training"})
            _line(axis, lines, "val", key, scale, {"color": colour, "label": f"{label}validation"})
        if reduced:
            _tokens(axes[2], lines, {"color": colour, "label": name if len(epochs) > 1 else None})
    for axis, words in zip(axes, ("loss", "top-1 accuracy, %", "patch tokens executed, mean over blocks")):
        _dress(axis, words)
    return sheet


def save_training(runs: Mapping[str, Lines], path: str | Path) -> Path:
    """Save the curves as PNG or SVG, by suffix."""
    form = files.kind(path)
    return files.write(path, files.encode(training(runs), form))


def save_rates(rates: Sequence[float], losses: Sequence[float], suggested: float, path: str | Path) -> Path:
    """Save the learning-rate finder's plot, smoothed loss against rate, as PNG or SVG by suffix."""
    from matplotlib.figure import Figure

    form = files.kind(path)
    sheet = Figure(figsize=(6, 3.8), layout="constrained", facecolor="white")
    axis = sheet.add_subplot()
    axis.plot(rates, losses, color=COLOURS[0], linewidth=1.8)
    axis.axvline(suggested, color=COLOURS[1], linewidth=1.2, dashes=(4, 2), label=f"suggested: {suggested:.2e}")
    axis.set_xscale("log")
    _dress(axis, "loss, smoothed", "learning rate")
    return files.write(path, files.encode(sheet, form))


def table(rows: Sequence[Row]) -> str:
    """Markdown of training runs, in the order of the rows: what was trained from what, how well, at what cost."""
    cells = [list(_cells(row, row.train)) for row in rows if row.train is not None]
    heads = [head for head, _ in cells[0]] if cells else []
    lines = ["| " + " | ".join(heads) + " |", "|:--|:--|:--|:--|" + "--:|" * (len(heads) - 4)]
    return "\n".join([*lines, *("| " + " | ".join(text for _, text in row) + " |" for row in cells)]) + "\n"


def _cells(row: Row, train: Training) -> Iterator[tuple[str, str]]:
    given, ends = train.settings, row.accuracy
    start = "pretrained" if given.get("model.pretrained") else str(given.get("model.weights") or "scratch")
    yield "recipe", train.recipe
    yield "model", f"`{row.model}`"
    yield "method", "plain" if row.method is None else f"`{row.method}`"
    yield "from", start + {"backbone": ", frozen", "probe": ", linear probe"}.get(str(given.get("freeze")), "")
    yield "batch", str(train.batch)
    yield "epochs", str(train.epochs)
    yield "seed", str(row.seed)
    interval = f" ({_percent(ends.low)}–{_percent(ends.high)})" if ends is not None and ends.low is not None else ""
    yield "top-1 %", _percent(train.last) + interval
    yield "best %", _percent(train.best)
    yield "top-5 %", _percent(train.top5)
    yield "macro F1 %", _percent(train.f1)
    yield "train top-1 %", _percent(train.train_top1)
    yield "gap, points", "–" if train.gap is None else f"{100 * train.gap:+.1f}"
    yield "tokens in training", "–" if train.tokens is None else f"{sum(train.tokens) / len(train.tokens):.1f}"
    yield "ms a step", f"{1e3 / train.steps_per_s:.1f}"
    yield "training, s", f"{train.runtime_s:.0f}"
    yield "peak MiB", "–" if row.memory_mib is None else f"{row.memory_mib:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _line(axis: Any, lines: Lines, part: str, key: str, scale: float, style: dict[str, Any]) -> None:
    found = [(line["epoch"], scale * line[part][key]) for line in lines if key in line.get(part, {})]
    if found:
        marker = {"marker": "o", "markersize": 3.5} if len(found) < 30 else {}
        axis.plot(*zip(*found), linewidth=1.6, **marker, **style)


def _tokens(axis: Any, lines: Lines, style: dict[str, Any]) -> None:
    found = [(line["epoch"], sum(line["tokens"]) / len(line["tokens"])) for line in lines if "tokens" in line]
    if found:
        axis.plot(*zip(*found), linewidth=1.6, marker="o", markersize=3.5, **style)
        axis.set_ylim(bottom=0)


def _dress(axis: Any, words: str, across: str = "epoch") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_ylabel(words, color=INK, fontsize=9.5)
    axis.set_xlabel(across, color=INK, fontsize=9.5)
    axis.grid(axis="y", color=MUTED, alpha=0.22, linewidth=0.7)
    if across == "epoch":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(colors=INK, labelsize=9, color=MUTED)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(MUTED)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=2.8)
