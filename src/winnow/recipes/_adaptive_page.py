"""The page of recipes/adaptive.py: document 004's three parts, ablations, paired tests, curve and pictures, from rows.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import winnow

from .._parse import parse
from .._save import trained_reducer
from ..data.scenes import SPLITS, scene
from ..measure import record
from ..measure.accuracy import mcnemar, unpack
from ..methods import BASELINES
from ..parts.amount import Keep
from ..view import files
from ..view.overlay import picture

Found = dict[str, dict[float, record.Row]]
"""By name, by budget."""
TESTED = (0.125, 0.0625)
KINDS = ("trivial", "before the language model", "inside the language model")
SHOWN, CELL = (3, 11), 160
"""Scenes of the pictures, and the height of one in pixels."""
KEPT = """## What is kept

Two scenes: the image, then what is left of it at 1/2, 1/8 and 1/16; of the controller that reads the question, at 1/16 for
the scene's first four questions.

"""
HEAD = """# Adaptive pruning under a budget

Document 004 in small: controllers that learn, from the language model's loss alone, which of the {n} patches of a scene to
hand on under a budget; everything else of `{model}` is frozen. Each is trained once (at most {steps} steps) and serves
every budget. {questions} questions about unseen scenes, each about one of eight small objects. Command (what the results
file lacks is trained and asked):

```
winnow report adaptive --out docs
```

The rows' own commands say how they were made; controllers were trained and asked one at a time, by that command's functions.
Expectation: at or above every other method below half the tokens. It is {met}: see the paired tests. docs/log.md says why.

Read the rows with the question for what they are: the projector of `hf:scenes` was taught, with labels, to put patches near
their words (`python -m winnow.recipes.scenes_vlm`), and the controller starts from that likeness. How near a LLaVA's own
projector puts them was not measured here. Learning rate and temperature of `after` and `encoder` were tried on scenes
of the test seed.
"""


def written(
    rows: Sequence[record.Row], main: Sequence[str], ablations: Sequence[str], budgets: Sequence[float], out: Path
) -> list[Path]:
    """OUT/adaptive.md and OUT/adaptive.png from rows."""
    asked = [row for row in rows if row.task == "compare-vlm"]
    trained = {row.train.recipe: row for row in rows if row.train is not None}
    plain = next(row for row in asked if row.role == "plain")
    ours = {arm: _of(asked, trained[arm], budgets) for arm in (*main, *ablations) if arm in trained}
    others = _others(asked, budgets)
    steps = max(row.train.steps for row in trained.values() if row.train)
    met = "met" if _ahead(ours, others, main) else "not met"
    asked_of = plain.data.n if plain.data else 0
    head = HEAD.format(model=plain.model, steps=steps, questions=asked_of, n=_patches(plain), met=met)
    parts = [
        head,
        _phases(ours, plain, budgets),
        _curves(ours, others, plain, main, budgets),
        _tests(ours, others, main),
    ]
    parts += [_ablations(ours, ablations), _kept(out)]
    chart = files.encode(figure({name: ours[name] for name in main if name in ours} | others, plain), "png")
    made = [files.write(out / "adaptive.png", chart)]
    return [files.write(out / "adaptive.md", "\n".join(part for part in parts if part).encode()), *made]


def _of(rows: Sequence[record.Row], training: record.Row, budgets: Sequence[float]) -> dict[float, record.Row]:
    """What the controller of a training answered, by budget."""
    return {
        budget: row
        for row in rows
        if row.weights == training.weights and row.method
        for budget in budgets
        if parse(row.method) == parse(training.method or "").leaving(Keep(budget))
    }


def _others(rows: Sequence[record.Row], budgets: Sequence[float]) -> Found:
    """Methods that learn nothing, by name and budget."""
    found: Found = {}
    for row in rows:
        method = parse(row.method) if row.method else None
        if method is None or "keep" not in method.__dataclass_fields__:  # type: ignore[attr-defined]
            continue
        budget = next((one for one in budgets if method == method.leaving(Keep(one))), None)
        if budget is not None:
            known = method.__dataclass_fields__["keep"].default  # type: ignore[attr-defined]
            found.setdefault(repr(replace(method, keep=known)), {})[budget] = row  # type: ignore[type-var]
    return found


def _ahead(ours: Found, others: Found, main: Sequence[str]) -> bool:
    """At every budget below a half some controller is at or above every other method."""
    small = {budget for rows in others.values() for budget in rows if budget < 0.5}
    best = lambda found, budget: max((_hits(rows[budget]).mean() for rows in found if budget in rows), default=0.0)  # noqa: E731
    return all(best([ours.get(arm, {}) for arm in main], one) >= best(others.values(), one) for one in small)


def _patches(plain: record.Row) -> int:
    return plain.vlm.image_tokens[0] if plain.vlm else 0


def _phases(ours: Found, plain: record.Row, budgets: Sequence[float]) -> str:
    """Parts one and two: one checkpoint of each fusion, all budgets."""
    text = ["## Phase 1 and phase 2: one checkpoint, every budget\n"]
    text.append("Phase 1 joins the budget behind the tower, phase 2 sends it through the tower as one more token.\n")
    names = {"after": 'phase 1 (`fuse="after"`)', "encoder": 'phase 2 (`fuse="encoder"`)'}
    text.append(_table({names[key]: ours[key] for key in names if key in ours}, plain, budgets))
    first, second = ours.get("after", {}), ours.get("encoder", {})
    both = [budget for budget in TESTED if budget in first and budget in second]
    told = "; ".join(f"{_share(budget, plain)}: {_test(second[budget], first[budget])}" for budget in both)
    return "\n".join([*text, "", f"Phase 2 against phase 1, paired: {told}." if told else "", ""])


def _curves(ours: Found, others: Found, plain: record.Row, main: Sequence[str], budgets: Sequence[float]) -> str:
    """Part three: everything at equal budgets."""
    shown = {f"**AdaptiveKeep, {name}**": ours[name] for name in main if name in ours}
    text = ["## All methods at equal budgets\n", "Top-1 in %, and in brackets the GMACs up to the first token. "]
    text += ["FastV, PyramidDrop and SparseVLM drop inside the language model, whose first blocks read all tokens.\n"]
    named = {f"`{name}`": rows for name, rows in others.items()}
    text.append(_table(shown | named, plain, budgets))
    return "\n".join([*text, "", "![Accuracy against multiply-adds](adaptive.png)", ""])


def _table(found: Found, plain: record.Row, budgets: Sequence[float]) -> str:
    heads = ["", "N", *(_share(budget, plain) for budget in budgets)]
    lines = [f"| {' | '.join(heads)} |", "|:--|" + "--:|" * (len(heads) - 1)]
    for name, rows in found.items():
        cells = [_cell(plain), *(_cell(rows.get(budget)) for budget in budgets)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(budget: float, plain: record.Row) -> str:
    return f"{Keep(budget).count(_patches(plain))} of {_patches(plain)}"


def _cell(row: record.Row | None) -> str:
    if row is None or row.accuracy is None or row.accuracy.value is None or row.macs is None:
        return "–"
    return f"{100 * row.accuracy.value:.1f} ({row.macs.per_image / 1e9:.3f})"


def _test(ours: record.Row, theirs: record.Row) -> str:
    wins, losses, p = mcnemar(_hits(ours), _hits(theirs))
    return f"{wins} won, {losses} lost, p = {p:.2g}"


def _hits(row: record.Row) -> np.ndarray:
    assert row.accuracy is not None and row.data is not None
    return unpack(row.accuracy.hits, row.data.n)


def _tests(ours: Found, others: Found, main: Sequence[str]) -> str:
    """Each controller against the best of three kinds of rivals, question by question."""
    lines = [
        "## Paired tests\n",
        "Exact McNemar test on the same questions, against the best of each kind at the same budget.\n",
    ]
    lines += ["| controller | budget | " + " | | ".join(KINDS) + " | |", "|:--|--:|" + ":--|:--|" * len(KINDS)]
    for name in main:
        for budget, row in ours.get(name, {}).items():
            if budget not in TESTED:
                continue
            cells = [f"{name}: {_right(row)}", f"1/{round(1 / budget)}"]
            for kind in KINDS:
                rivals = {
                    other: rows[budget] for other, rows in others.items() if budget in rows and _kind(other) == kind
                }
                best = max(rivals, key=lambda other: float(_hits(rivals[other]).mean()), default=None)
                cells += ["–", "–"] if best is None else [f"`{best}` {_right(rivals[best])}", _test(row, rivals[best])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _kind(name: str) -> str:
    method = parse(name)
    if type(method) in BASELINES:
        return KINDS[0]
    return KINDS[2] if method.facts.where == "llm" else KINDS[1]


def _right(row: record.Row | None) -> str:
    return "–" if row is None else f"{100 * float(_hits(row).mean()):.1f}"


def _ablations(ours: Found, ablations: Sequence[str]) -> str:
    """One setting changed at a time, at the small budgets."""
    rows = {name: ours[name] for name in ("after", "encoder", *ablations) if name in ours}
    if not set(rows) & set(ablations):
        return ""
    lines = [
        "## One setting changed\n",
        "From `after`, or `encoder` where it says so; without the question. Top-1 in %.\n",
    ]
    lines += ["| | " + " | ".join(f"1/{round(1 / budget)}" for budget in TESTED) + " |", "|:--|--:|--:|"]
    for name, found in rows.items():
        lines.append(f"| `{name}` | " + " | ".join(_right(found.get(budget)) for budget in TESTED) + " |")
    return "\n".join([*lines, ""])


def _kept(out: Path) -> str:
    """The pictures that are there."""
    shown = "\n".join(f"![{path.stem}]({path.name})" for path in sorted(out.glob("adaptive-kept-*.png")))
    return KEPT + shown + "\n" if shown else ""


def figure(found: Found, plain: record.Row) -> Any:
    """Accuracy against multiply-adds, one line per method."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    chart = Figure(figsize=(9, 4.5), layout="constrained")
    axes = chart.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](at / 20) for at in (*range(0, 20, 2), *range(1, 20, 2))])
    for name, rows in found.items():
        ordered = [*(rows[budget] for budget in sorted(rows)), plain]
        x = [row.macs.per_image / 1e9 for row in ordered if row.macs]
        y = [100 * row.accuracy.value for row in ordered if row.accuracy and row.accuracy.value is not None]
        learned = "(" not in name
        axes.plot(x, y, marker="o", ms=4, lw=2 if learned else 1, ls="-" if learned else "--",
                  label=f"AdaptiveKeep, {name}" if learned else name)  # fmt: skip
    axes.set(xlabel="GMACs up to the first token", ylabel="right answers in %")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return chart


@torch.inference_mode()
def pictures(loaded: tuple[Any, Any], runs: Mapping[str, Path], out: Path) -> list[Path]:
    """OUT/adaptive-kept-*.png: of two scenes, what each controller keeps by budget, and by question where it is asked."""
    processor, model = loaded
    made = []
    for name, path in runs.items():
        trained = trained_reducer(path)
        if trained is None or trained.method is None:
            continue
        trained.reduce(model, trained.method)
        try:
            strips = [_strip(processor, model, number, trained.method.facts.needs) for number in SHOWN]
        finally:
            winnow.restore(model)
        wide = max(strip.shape[1] for strip in strips)
        strips = [np.pad(strip, ((0, 6), (0, wide - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
        kind = "".join(letter if letter.isalnum() else "-" for letter in name).replace("--", "-")
        made.append(files.write(out / f"adaptive-kept-{kind}.png", _png(np.concatenate(strips))))
    return made


def _strip(processor: Any, model: Any, number: int, needs: frozenset[str]) -> np.ndarray:
    """One scene: budgets of 1/2, 1/8 and 1/16 with one question; or 1/16 with four."""
    from .._vlm_model import ask

    shown = scene(SPLITS["test"][0], number)
    asks = [question for question, _ in shown.questions]
    wishes = (
        [(0.0625, one) for one in asks[:4]] if "question" in needs else [(b, asks[0]) for b in (0.5, 0.125, 0.0625)]
    )
    owners, grid = [], (1, 1)
    for budget, question in wishes:
        from PIL import Image

        inputs = ask(processor, [[Image.fromarray(shown.image)]], [question])
        with winnow.budget(model, budget), winnow.watch(model) as run:
            model(**inputs, logits_to_keep=1)
        owners.append(run.ledger.owner[0].numpy())
        grid = run.grid or grid
    return picture(shown.image, owners, grid, cell=CELL)


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
