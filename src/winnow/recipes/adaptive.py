"""Document 004 in small: budget controllers for a small LLaVA, beside every other method at equal budgets; the page.

"Adaptive Vision Token Prune". `winnow report adaptive --out docs`: what the results file lacks is trained and asked, one
controller after another, on 2 cores; then the page is written; `winnow report adaptive ROWS` writes it of rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import winnow

from .._save import trained_reducer
from .._vlm_model import load_vlm
from .._weights import read_weights, state_hash
from ..compare_vlm import VlmComparison
from ..data.conversations import open_conversations
from ..measure import record
from ..methods import AdaptiveKeep, CDPruner, DivPrune, FastV, Grid, Pool, PruMerge, Random, VisionZip, VisPruner
from ..parts.amount import Keep
from ..reducer import Method
from ..tasks.answer import Prompts
from ..train.recipe import Recipe, load_recipe
from . import _adaptive_page as page

Say = Callable[[str], object]
RECIPE, MODEL, DATA = "scenes_adaptive", "hf:scenes", "scenes"
COMPARED = "vlm-scenes.jsonl"
"""Rows of `winnow compare hf:scenes`, which are not made again."""
BUDGETS = (0.75, 0.5, 0.25, 0.125, 0.0625)
"""Shares of the image tokens; all of them is the plain model."""
SMALL = BUDGETS[-2:]
"""What ablations are asked at."""
AFTER = AdaptiveKeep(budget_max=0.5, fuse="after", train="zero")
ENCODER = replace(AFTER, fuse="encoder")
MAIN: dict[str, AdaptiveKeep] = {
    "after": AFTER,
    "encoder": ENCODER,
    "after, diverse": replace(AFTER, select="diverse"),
    "encoder, diverse": replace(ENCODER, select="diverse"),
    "after, question": replace(AFTER, text=True),
    "encoder, question": replace(ENCODER, text=True),
}
ABLATIONS: dict[str, AdaptiveKeep] = {
    'train="gather"': replace(AFTER, train="gather"),
    'train="mask"': replace(AFTER, train="mask"),
    'join="concat"': replace(AFTER, join="concat"),
    'head="dot"': replace(AFTER, head="dot"),
    'head="index"': replace(AFTER, head="index"),
    "conditioned=False": replace(AFTER, conditioned=False),
    "cls=True": replace(AFTER, cls=True, train="gather"),
    "one for 1/8": AFTER.leaving(Keep(0.125)),  # type: ignore[dict-item]
    "one for 1/16": AFTER.leaving(Keep(0.0625)),  # type: ignore[dict-item]
    'encoder, read="both"': replace(ENCODER, read="both"),
    'encoder, position="borrowed"': replace(ENCODER, position="borrowed"),
}
TRAINING_FREE: tuple[Method, ...] = (PruMerge(), VisionZip(), DivPrune(), CDPruner(), VisPruner(), FastV(layer=2))
TRIVIAL: tuple[Method, ...] = (Random(at="tower"), Grid(at="tower"), Pool(at="tower"))


@dataclass(frozen=True)
class Wish:
    """The experiment's sizes."""

    steps: int = 120
    """Of one controller's training; with the question, twice as many."""
    questions: int = 500
    """Of the test scenes, the first."""
    model: str = MODEL


def recipe_of(arm: str, wish: Wish) -> Recipe:
    """How an arm is trained: without the question, the eight of a scene together; with it, one at a time, twice as long."""
    method = (MAIN | ABLATIONS)[arm]
    recipe = load_recipe(RECIPE, [f"method={method}", f"model.name={wish.model}"])
    recipe.data.train.limit = wish.steps * recipe.batch * (1 + method.text)
    if method.text:
        recipe.data.train.path = DATA
    return recipe


def folder(results: Path, arm: str) -> Path:
    """Where an arm's weights and log are."""
    name = "".join(letter if letter.isalnum() else "-" for letter in arm).strip("-")
    return results.with_name(f"{results.stem}-runs") / name


def train(arm: str, wish: Wish, results: Path) -> Path:
    """The arm's weights, trained if they are not there."""
    from ..train.loop import train as run

    out = folder(results, arm)
    weights = out / "last.safetensors"
    if not any(row.train is not None and row.train.recipe == arm for row in _rows(results)) or not weights.is_file():
        run(recipe_of(arm, wish), out, name=arm, resume=(out / "checkpoints").is_dir(), results=results)
    return weights


def run(wish: Wish, results: Path, say: Say = lambda words: None) -> list[record.Row]:
    """Rows of every method and of every controller at every budget, made once."""
    comparison = _comparison(wish, results, say)
    plain = comparison.weights
    _measure(comparison, None)
    for arm in MAIN:
        _ask(comparison, arm, wish, BUDGETS)
    comparison.reduce, comparison.weights = winnow.reduce, plain
    for method in _at(TRIVIAL + TRAINING_FREE, BUDGETS):
        _measure(comparison, method)
    for arm in ABLATIONS:
        _ask(comparison, arm, wish, SMALL)
    return _rows(results)


def _ask(comparison: VlmComparison, arm: str, wish: Wish, budgets: Sequence[float]) -> None:
    """Rows of one controller, trained if it is not there."""
    comparison.say(f"{arm}: training")
    weights = train(arm, wish, comparison.results)
    trained = trained_reducer(weights)
    assert trained is not None, "the recipe trains one"
    comparison.reduce, comparison.weights = trained.reduce, state_hash(read_weights(weights))
    for method in _at(((MAIN | ABLATIONS)[arm],), budgets):
        _measure(comparison, method)


def _comparison(wish: Wish, results: Path, say: Say) -> VlmComparison:
    samples = open_conversations(DATA, f"test[:{wish.questions}]")
    processor, model = load_vlm(wish.model)
    prompts = Prompts(processor, samples, batch=50)
    data = record.Data(name=samples.name, split=samples.split, n=len(samples), hash=samples.hash)
    return VlmComparison(
        model=model, name=wish.model, weights=state_hash(model.state_dict()), labels=prompts.answers, batches=prompts,
        data=data, results=results, sizes=(), say=say,
    )  # fmt: skip


def _measure(comparison: VlmComparison, method: Method | None) -> None:
    """One row, unless this file or the one of `winnow compare` beside it has it."""
    mine = (comparison.name, comparison.weights, None if method is None else repr(method), comparison.data)
    if all((row.model, row.weights, row.method, row.data) != mine for row in _rows(comparison.results)):
        record.append(comparison.results, comparison.measure(method, timed=False)[0])


def _at(methods: Sequence[Method], budgets: Sequence[float]) -> Iterator[Method]:
    for method in methods:
        yield from (method.leaving(Keep(budget)) for budget in budgets)


def _rows(results: Path) -> list[record.Row]:
    both = (results.with_name(COMPARED), results)
    return [row for path in both if path.is_file() for row in record.read(path)]


def write(wish: Wish, results: Path, out: Path, say: Say = lambda words: None) -> list[Path]:
    """Train and ask what is missing; write the page, its curve and its pictures."""
    rows = run(wish, results, say)
    runs = {arm: folder(results, arm) / "last.safetensors" for arm in MAIN}
    return [*written(rows, out), *page.pictures(load_vlm(wish.model), runs, out)]


def written(rows: Sequence[record.Row], out: Path) -> list[Path]:
    """OUT/adaptive.md and its curve from rows."""
    return page.written(rows, tuple(MAIN), tuple(ABLATIONS), BUDGETS, out)
