"""Document 004 in small: budget controllers for a small LLaVA, beside every other method at equal budgets; the page.

"Adaptive Vision Token Prune". `winnow report adaptive --out docs`: what the results file lacks is trained and asked, one
controller after another; then the page is written; `winnow report adaptive ROWS` writes it of rows there are.
Cost: one to three minutes an arm on one core, some 40 in all. Expected: docs/adaptive.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .._save import trained_reducer
from .._vlm_model import load_vlm
from .._weights import read_weights, state_hash
from ..compare_vlm import VlmComparison
from ..data.conversations import open_conversations
from ..measure import record
from ..methods import DRIP, AdaptiveKeep, CDPruner, DivPrune, FastV, Grid, Pool, PruMerge, Random, VisionZip, VisPruner
from ..parts.amount import Keep
from ..reducer import Method
from ..tasks.answer import Prompts
from ..train.recipe import LearningPart, Recipe, load_recipe
from . import _adaptive_page as page
from . import _adaptive_times as times
from ._adaptive_pictures import pictures

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
DIVERSE = replace(AFTER, select="diverse", train="gather")
MAIN: dict[str, AdaptiveKeep] = {
    "after": AFTER,
    "encoder": ENCODER,
    "after, diverse": DIVERSE,
    "encoder, diverse": replace(DIVERSE, fuse="encoder"),
    "after, question": replace(AFTER, text=True),
    "encoder, question": replace(ENCODER, text=True),
}
ABLATIONS: dict[str, AdaptiveKeep] = {
    'encoder, train="gather"': replace(ENCODER, train="gather"),
    'train="gather"': replace(AFTER, train="gather"),
    'train="mask"': replace(AFTER, train="mask"),
    'after, diverse, train="zero"': replace(DIVERSE, train="zero"),
    'train="gather", cls=True': replace(AFTER, cls=True, train="gather"),
    'join="concat"': replace(AFTER, join="concat"),
    'head="dot"': replace(AFTER, head="dot"),
    'head="index"': replace(AFTER, head="index"),
    "conditioned=False": replace(AFTER, conditioned=False),
    "one for 1/8": AFTER.leaving(Keep(0.125)),  # type: ignore[dict-item]
    "one for 1/16": AFTER.leaving(Keep(0.0625)),  # type: ignore[dict-item]
    'encoder, read="both"': replace(ENCODER, read="both"),
    'encoder, read="both", place="first"': replace(ENCODER, read="both", place="first"),
    'encoder, position="borrowed"': replace(ENCODER, position="borrowed"),
}
AGAIN = {
    f"{arm}, seed {seed}": MAIN[arm]
    for seed in (1, 2)
    for arm in ("after, diverse", "encoder, diverse", "after, question", "encoder, question")
}
"""The same by other seeds."""
ALIGN, TUNE = ("projector", "reducer"), ("vision", "projector", "llm", "reducer")
TOGETHER: dict[str, tuple[Method, tuple[tuple[str, ...], ...]]] = {
    "DRIP(rate=0.5)": (DRIP(rate=0.5), (ALIGN, TUNE)),
    "DRIP(rate=0.25)": (DRIP(rate=0.25), (ALIGN, TUNE)),
    "after, jointly": (replace(AFTER, train="gather"), (("projector", "llm", "reducer"),)),
}
"""Methods that are trained with the model around them: what learns, stage after stage."""
TRAINING_FREE: tuple[Method, ...] = (
    PruMerge(), PruMerge(plus=True), VisionZip(), DivPrune(), CDPruner(), VisPruner(), FastV(layer=2)
)  # fmt: skip
CLOSE: tuple[Method, ...] = (DivPrune(), CDPruner())
BLIND = ("after, diverse", "encoder, diverse")
"""Too near these for a few hundred questions to tell."""
TRIVIAL: tuple[Method, ...] = (Random(at="tower"), Grid(at="tower"), Pool(at="tower"))


@dataclass(frozen=True)
class Wish:
    """The experiment's sizes."""

    steps: int = 120
    """Of one controller's training; with the question, twice as many."""
    questions: int = 500
    """Of the test scenes, the first."""
    more: int = 2000
    """So many where those cannot tell."""
    batch: int = 25
    """Questions of a timed batch; 0 times nothing. Times want a machine that does nothing else."""
    model: str = MODEL


def recipe_of(arm: str, wish: Wish) -> Recipe:
    """How an arm is trained: without the question, the eight of a scene together; with it, one at a time, twice as long."""
    method = (MAIN | ABLATIONS | AGAIN)[arm]
    recipe = _recipe(method, wish, wish.model)
    recipe.seed = int(arm.rpartition(", seed ")[2]) if arm in AGAIN else recipe.seed
    if method.text:
        recipe.data.train.limit = 2 * wish.steps * recipe.batch
        recipe.data.train.path = DATA
    return recipe


def stages_of(arm: str, wish: Wish, out: Path) -> Iterator[tuple[str, Path, Recipe]]:
    """(name, folder, recipe) of each stage of a training of the whole model; each begins with what the last one left."""
    method, stages = TOGETHER[arm]
    model = wish.model
    for number, learns in enumerate(stages, 1):
        last = number == len(stages)
        here = out if last else out.with_name(f"{out.name}-stage-{number}")
        recipe = _recipe(method, wish, model)
        recipe.instruct.train = LearningPart(**{part: part in learns for part in LearningPart.model_fields})
        yield arm if last else f"{arm}, stage {number}", here, recipe
        model = f"hf:{here / 'last'}"


def _recipe(method: Method, wish: Wish, model: str) -> Recipe:
    recipe = load_recipe(RECIPE, [f"method={method}", f"model.name={model}"])
    recipe.data.train.limit = wish.steps * recipe.batch
    return recipe


def folder(results: Path, arm: str) -> Path:
    """Where an arm's weights and log are."""
    name = "".join(letter if letter.isalnum() else "-" for letter in arm).strip("-")
    return results.with_name(f"{results.stem}-runs") / name


def train(name: str, recipe: Recipe, out: Path, results: Path) -> Path:
    """The weights of a training, which is done if they or its row are not there."""
    from ..train.loop import train as run

    weights = out / "last.safetensors"
    if not any(row.train is not None and row.train.recipe == name for row in _rows(results)) or not weights.is_file():
        run(recipe, out, name=name, resume=(out / "checkpoints").is_dir(), results=results)
    return weights


def run(wish: Wish, results: Path, say: Say = lambda words: None) -> list[record.Row]:
    """Rows of every method and of every controller at every budget, made once."""
    for _, comparison, methods in _groups(wish, results, say):
        for method in methods:
            _measure(comparison, method)
    return _rows(results)


def time(wish: Wish, results: Path, say: Say = lambda words: None) -> list[record.Row]:
    """Rows of times to the first token, ablations and other seeds left out; they want a machine that does nothing else."""
    for name, comparison, methods in _groups(wish, results, say):
        for method in () if name in ABLATIONS | AGAIN else filter(None, methods):
            if not any(times.same(row, comparison, method, wish.batch) for row in _rows(results)):
                say(f"time of {method}")
                record.append(results, times.measured(comparison, method, wish.batch))
    return _rows(results)


def _groups(wish: Wish, results: Path, say: Say) -> Iterator[tuple[str, VlmComparison, tuple[Method | None, ...]]]:
    """What was trained as one, trained if it was not, and what is asked of it; "" are those that learn nothing."""
    comparison = _comparison(wish, results, say)
    yield "", comparison, (None, *_at(TRIVIAL + TRAINING_FREE, BUDGETS))
    for group in (MAIN, ABLATIONS | AGAIN):
        for arm, method in group.items():
            say(f"{arm}: training")
            weights = train(arm, recipe_of(arm, wish), folder(results, arm), results)
            yield arm, _with(comparison, weights), (*_at((method,), BUDGETS if group is MAIN else SMALL),)
        if group is MAIN:
            yield from _more(wish, results, say)
    for arm, (whole, _) in TOGETHER.items():
        weights = folder(results, arm)
        for name, out, recipe in stages_of(arm, wish, folder(results, arm)):
            say(f"{name}: training")
            weights = train(name, recipe, out, results)
        trained = _comparison(replace(wish, model=f"hf:{weights.with_suffix('')}"), results, say)
        yield arm, _with(trained, weights), (*_at((whole,), BUDGETS),) if whole.facts.budgeted else (whole,)


def _more(wish: Wish, results: Path, say: Say) -> Iterator[tuple[str, VlmComparison, tuple[Method, ...]]]:
    """More questions for those that are near each other, below half the tokens."""
    comparison, small = _comparison(replace(wish, questions=wish.more), results, say), BUDGETS[2:]
    yield "", comparison, (*_at(CLOSE, small),)
    for arm in BLIND:
        yield arm, _with(comparison, folder(results, arm) / "last.safetensors"), (*_at((MAIN[arm],), small),)


def _with(comparison: VlmComparison, weights: Path) -> VlmComparison:
    """The comparison of what was trained."""
    trained = trained_reducer(weights)
    assert trained is not None, "the recipe trains one"
    return replace(comparison, reduce=trained.reduce, weights=state_hash(read_weights(weights)))


def _comparison(wish: Wish, results: Path, say: Say) -> VlmComparison:
    samples = open_conversations(DATA, f"test[:{wish.questions}]")
    processor, model = load_vlm(wish.model, reduced=False)
    prompts = Prompts(processor, samples, batch=50)
    data = record.Data(name=samples.name, split=samples.split, n=len(samples), hash=samples.hash)
    return VlmComparison(
        model=model, name=wish.model, weights=state_hash(model.state_dict()), labels=prompts.answers, batches=prompts,
        data=data, results=results, sizes=(), say=say,
    )  # fmt: skip


def _measure(comparison: VlmComparison, method: Method | None) -> None:
    """One row, unless this file or the one of `winnow compare` beside it has it."""
    mine = (comparison.name, comparison.weights, None if method is None else repr(method), comparison.data)
    made = (row for row in _rows(comparison.results) if row.task == comparison.task)
    if all((row.model, row.weights, row.method, row.data) != mine for row in made):
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
    rows = time(wish, results, say) if wish.batch else rows
    runs = {arm: folder(results, arm) / "last.safetensors" for arm in MAIN}
    return [*pictures(load_vlm(wish.model), runs, out), *written(rows, out)]


def written(rows: Sequence[record.Row], out: Path) -> list[Path]:
    """OUT/adaptive.md and its curve from rows."""
    arms = {"main": tuple(MAIN), "ablations": tuple(ABLATIONS), "again": tuple(AGAIN), "together": tuple(TOGETHER)}
    return page.written(rows, arms, BUDGETS, out)
