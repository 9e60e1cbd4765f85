"""The page of recipes/adaptive.py: document 004's three parts, paired tests and ablations, from rows.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .._parse import parse
from ..baselines import SLACK
from ..measure import record
from ..parts.amount import Keep
from ..reducer import Method
from ..view import files
from ._adaptive_pictures import figure
from ._adaptive_rivals import (
    KINDS,
    TESTED,
    Found,
    hits,
    kind_of,
    left,
    listed,
    more,
    of_training,
    others_of,
    paired,
    right,
    seeds,
    standing,
    tests,
)
from ._adaptive_times import known, section

CHANGED = """Each arm against the one that it differs from in one setting; without the question. Top-1 in %, and the exact
McNemar test on the same questions; of twenty such tests one is below 0.05 by chance alone. Each arm is one training (seed
0). `place="first"` is the same network as without it, rounding apart, so those two rows differ by what rounding makes of
a training. `train` says what becomes of dropped patches in training: they leave ("gather"), they leave behind the
projector ("mask"), they stay as zeros ("zero"); docs/log.md has what that means. `diverse` reads what the projector makes
of all patches, so there "gather" and "mask" are one.
"""
TOGETHER = """In the rest of the page all but the controller is frozen. Here the language model learns too: `jointly`, with
projector and controller. DRIP merges inside the tower: in a first stage projector and boundaries learn, in a second
tower, projector, boundaries and language model, as the tower of `hf:scenes` was not trained with DRIP before. It is
compared with the best of as many tokens, and with the best of no more multiply-adds.
"""
KEPT = """## What is kept

Two scenes: the image, then what is left of it at 1/2, 1/8 and 1/16; of the controller that reads the question, at 1/16 for
the scene's first four questions.

"""
HEAD = """# Adaptive pruning under a budget

Document 004 in small: controllers that learn, from the language model's loss alone, which of the {n} patches of a scene to
hand on under a budget; everything else of `{model}` is frozen, but where the page says so. Each is trained once (at most
{steps} steps) and serves every budget. {questions} questions about unseen scenes, each about one of eight small objects.
Command (what the results file lacks is trained and asked):

```
winnow report adaptive --out docs
```

Its parts ran at several commits, which the rows name.
Expectation: below half the tokens one checkpoint is at or above every method that acts before the language model, and
significantly above (p < 0.05 in the paired tests) at 1/8 and 1/16. What came out at {small} of the tokens, against the
best that acts before the language model and the best inside it:

{stand}
Methods inside the language model read all tokens in its first blocks, and nothing can be above one that is at 100 %.
docs/log.md says why it came out so.

Read the rows with the question for what they are: the projector of `hf:scenes` was taught, with labels, to put patches near
their words (`python -m winnow.recipes.scenes_vlm`), and the controller starts from that likeness. How near a LLaVA's own
projector puts them was not measured here. Learning rate and temperature of `after` and `encoder`, and `train` of all, were
chosen on scenes of the test seed. `diverse` is trained with `train="gather"`, the others with `"zero"`.
"""


def written(
    rows: Sequence[record.Row], arms: Mapping[str, Sequence[str]], budgets: Sequence[float], out: Path
) -> list[Path]:
    """OUT/adaptive.md and OUT/adaptive.png from rows; arms: names of the trainings, "main", "ablations", "again"
    (by other seeds) and "together"."""
    every = [row for row in rows if row.task == "compare-vlm"]
    plain = next((row for row in every if row.role == "plain"), None)
    if plain is None:
        raise ValueError("no row is of the plain model: give results/vlm-scenes.jsonl as well")
    asked = [row for row in every if row.data == plain.data]
    trained = {row.train.recipe: row for row in rows if row.train is not None}
    main, patches = arms["main"], _patches(plain)
    ours = {
        arm: of_training(asked, trained[arm], budgets, patches)
        for names in arms.values()
        for arm in names
        if arm in trained
    }
    methods = {arm: parse(trained[arm].method or "") for arm in ours}
    others, times = others_of(asked, budgets, patches), known(rows)
    steps = max(trained[arm].train.steps for arm in main if arm in trained)  # type: ignore[union-attr]
    asked_of = plain.data.n if plain.data else 0
    small = [one for one in budgets if one < 0.5]
    head = HEAD.format(
        model=plain.model, steps=steps, questions=asked_of, n=patches, small=listed(small),
        stand=standing({arm: ours[arm] for arm in main if arm in ours}, others, methods, small),
    )  # fmt: skip
    parts = [
        head,
        _phases(ours, plain, budgets),
        _curves(ours, others, plain, main, budgets),
        section(
            _named(ours, others, [*main, *arms["together"]]), times, budgets, [_share(one, plain) for one in budgets]
        ),
        tests(ours, others, main),
        more([row for row in every if row.data != plain.data], trained, main, budgets, patches),
        seeds(ours, arms["again"]),
    ]
    parts += [_ablations(ours, methods, arms["ablations"])]
    parts += [_together(ours, others, methods, arms["together"], plain), _kept(out)]
    chart = files.encode(figure({name: ours[name] for name in main if name in ours} | others, plain, times), "png")
    made = [files.write(out / "adaptive.png", chart)]
    return [files.write(out / "adaptive.md", "\n".join(part for part in parts if part).encode()), *made]


def _patches(plain: record.Row) -> int:
    return left(plain)


def _phases(ours: Found, plain: record.Row, budgets: Sequence[float]) -> str:
    """Parts one and two: one checkpoint of each fusion, all budgets."""
    text = ["## Phase 1 and phase 2: one checkpoint, every budget\n"]
    text.append("Phase 1 joins the budget behind the tower, phase 2 sends it through the tower as one more token.\n")
    names = {"after": 'phase 1 (`fuse="after"`)', "encoder": 'phase 2 (`fuse="encoder"`)'}
    text.append(_table({names[key]: ours[key] for key in names if key in ours}, plain, budgets))
    first, second = ours.get("after", {}), ours.get("encoder", {})
    both = [budget for budget in TESTED if budget in first and budget in second]
    told = "; ".join(f"{_share(budget, plain)}: {paired(second[budget], first[budget])}" for budget in both)
    return "\n".join([*text, "", f"Phase 2 against phase 1, paired: {told}." if told else "", ""])


def _curves(ours: Found, others: Found, plain: record.Row, main: Sequence[str], budgets: Sequence[float]) -> str:
    """Part three: everything at equal budgets."""
    text = ["## All methods at equal budgets\n", "Top-1 in %, and in brackets the GMACs up to the first token. "]
    text += ["FastV, PyramidDrop and SparseVLM drop inside the language model, whose first blocks read all tokens."]
    text += [
        "`CDPruner()` without a CLIP text tower, as here, reads no question: it is the determinant alone, and what"
    ]
    text += ["`diverse` is without its logits. `TopK` and `EViT` drop inside the tower."]
    text += ["`Downsample()` makes the image smaller and leaves square numbers of tokens, of which one is here.\n"]
    text.append(_table(_named(ours, others, main), plain, budgets))
    return "\n".join([*text, "", "![Accuracy against multiply-adds and time](adaptive.png)", ""])


def _named(ours: Found, others: Found, main: Sequence[str]) -> Found:
    """As tables call them: settings of AdaptiveKeep have no method's name."""
    shown = {f"`{name}`" if "(" in name else f"**AdaptiveKeep, {name}**": ours[name] for name in main if name in ours}
    return shown | {f"`{name}`": rows for name, rows in others.items()}


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


def _ablations(ours: Found, methods: Mapping[str, Method], ablations: Sequence[str]) -> str:
    """One setting changed at a time, at the small budgets."""
    lines = ["## One setting changed\n", CHANGED]
    lines += ["| | against | " + " | | ".join(f"1/{round(1 / budget)}" for budget in TESTED) + " | |"]
    lines += ["|:--|:--|" + "--:|:--|" * len(TESTED)]
    for name in (name for name in ablations if name in ours):
        near = [one for one, method in methods.items() if _differ(method, methods[name]) == 1]
        base = max(near, key=lambda one: len(one) * name.startswith(one), default="")
        cells = [f"`{name}`", f"`{base}`" if base else "–"]
        for budget in TESTED:
            row, other = ours[name].get(budget), ours.get(base, {}).get(budget)
            cells += [right(row), f"{right(other)}: {paired(row, other)}" if row and other else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""]) if set(ablations) & set(ours) else ""


def _differ(one: Method, other: Method) -> int:
    """Settings that differ; both bounds of the budget are one."""
    fields = one.__dataclass_fields__  # type: ignore[attr-defined]
    return len({name.partition("_")[0] for name in fields if getattr(one, name) != getattr(other, name, None)})


def _together(
    ours: Found, others: Found, methods: Mapping[str, Method], together: Sequence[str], plain: record.Row
) -> str:
    """Trained with the model around it: against the same controller beside a frozen model, or the best rivals before it."""
    lines = ["## Trained together with the model\n", TOGETHER]
    lines += ["| | tokens | GMACs | right | against | tokens | GMACs | |", "|:--|--:|--:|--:|:--|--:|--:|:--|"]
    for name in (name for name in together if name in ours):
        alone = [ours[one] for one, method in methods.items() if method == methods[name] and one != name]
        for budget, row in sorted(ours[name].items(), reverse=True):
            cells = [f"`{name}`", *_size(row), right(row)]
            rivals = [found[budget] for found in alone if budget in found] if alone else _rivals(row, others)
            for rival in rivals:
                against = [f"{'`' + str(rival.method) + '`' if not alone else 'frozen'} {right(rival)}", *_size(rival)]
                lines.append(f"| {' | '.join([*cells, *against, paired(row, rival)])} |")
    return "\n".join([*lines, ""]) if set(together) & set(ours) else ""


def _rivals(row: record.Row, others: Found) -> list[record.Row]:
    """The best of those that act before the language model: with as many tokens, and with no more multiply-adds."""
    near = [one for name, rows in others.items() if kind_of(name) != KINDS[2] for one in rows.values()]
    groups = (
        [one for one in near if left(one) == left(row)],
        [one for one in near if _macs(one) <= SLACK * _macs(row)],
    )
    return [max(group, key=lambda one: float(hits(one).mean())) for group in groups if group]


def _size(row: record.Row) -> tuple[str, str]:
    return str(left(row)), f"{_macs(row) / 1e9:.3f}"


def _macs(row: record.Row) -> float:
    return row.macs.per_image if row.macs else float("inf")


def _kept(out: Path) -> str:
    """The pictures that are there."""
    shown = "\n".join(f"![{path.stem}]({path.name})" for path in sorted(out.glob("adaptive-kept-*.png")))
    return KEPT + shown + "\n" if shown else ""
