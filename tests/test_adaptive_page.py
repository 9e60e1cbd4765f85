"""The page of the budget controllers: which rows are whose, paired tests, and how each controller is trained."""

from __future__ import annotations

import numpy as np
import pytest

from winnow import Keep, Random
from winnow.measure import pack, record
from winnow.methods import DivPrune, FastV
from winnow.recipes import _adaptive_times as times
from winnow.recipes import adaptive

pytest.importorskip("transformers")
N = 40


def row(method, right: int, *, weights: str = "w", role: str = "method", **more) -> record.Row:
    hits = np.arange(N) < right
    return record.Row(
        task="compare-vlm", model="hf:scenes", weights=weights, method=None if method is None else repr(method), role=role,
        data=record.Data(name="scenes", n=N), accuracy=record.Accuracy(value=right / N, hits=pack(hits)),
        macs=record.Macs(counted=1e8),
        vlm=record.Vlm(stages={}, image_tokens=[144], prompt_tokens=150, kv_bytes=1), **more,
    )  # fmt: skip


def trained(arm: str, weights: str) -> record.Row:
    part = record.Training(
        recipe=arm, epochs=1, steps=120, batch=16, runtime_s=1, samples_per_s=1, steps_per_s=1, loss=0.5
    )
    method = repr((adaptive.MAIN | adaptive.ABLATIONS | adaptive.AGAIN)[arm])
    return record.Row(task="train instruct", model="hf:scenes", weights=weights, method=method, train=part)


@pytest.fixture
def rows() -> list[record.Row]:
    few = Keep(0.0625)
    found = [row(None, 40, role="plain"), row(Random(at="tower").leaving(few), 10, role="baseline")]
    found += [
        row(DivPrune().leaving(few), 30),
        row(FastV(layer=1).leaving(few), 38),
        row(DivPrune().leaving(Keep(0.3)), 1),
    ]
    for weights, (arm, right) in enumerate(
        {"after": 12, "encoder": 20, "after, question": 39, 'train="gather"': 10, "one for 1/16": 25}.items()
    ):
        method = (adaptive.MAIN | adaptive.ABLATIONS)[arm]
        found += [trained(arm, str(weights)), row(method.leaving(few), right, weights=str(weights))]
    return found


def test_rows_are_read_by_weights(rows, tmp_path):
    """Two trainings of one method at one budget are told apart; budgets that are none of the page's are left out."""
    page, chart = adaptive.written(rows, tmp_path)
    text = page.read_text()
    assert chart.stat().st_size > 10_000
    assert "| after, question: 97.5 | 1/16 | `Random(at='tower')` 25.0 | 29 won, 0 lost, p = 3.7e-09 " in text
    assert "| `DivPrune()` 75.0 | 9 won, 0 lost, p = 0.0039 | `FastV(layer=1)` 95.0 | 1 won, 0 lost, p = 1 |" in text
    assert "Phase 2 against phase 1, paired: 9 of 144: 8 won, 0 lost, p = 0.0078." in text
    assert "| `one for 1/16` | `after` | – | – | 62.5 | 30.0: 13 won, 0 lost, p = 0.00024 |" in text
    assert '| `train="gather"` | `after` | – | – | 25.0 | 30.0: 0 won, 2 lost, p = 0.5 |' in text
    assert "2.5 (0.100)" not in text, "a budget of 0.3 is none of the page's"


def test_more_questions_and_other_seeds_stand_apart(rows, tmp_path):
    """Rows of more questions are compared with each other alone; seeds are told by their mean and range."""
    few, arm = Keep(0.0625), "after, diverse"
    method = adaptive.MAIN[arm].leaving(few)
    wide = [row(DivPrune().leaving(few), 10), row(method, 36, weights="t")]
    wide = [one.model_copy(update={"data": record.Data(name="scenes", n=N, split="more")}) for one in wide]
    seeds = [
        trained(arm, "t"),
        row(method, 32, weights="t"),
        trained(f"{arm}, seed 1", "u"),
        row(method, 34, weights="u"),
    ]
    text = adaptive.written([*rows, *wide, *seeds], tmp_path)[0].read_text()
    assert "| after, diverse | 1/16 | 90.0 | 25.0 | 26 won, 0 lost, p = 3e-08 |" in text
    assert "| after, diverse | 2 | – | 82.5 (80.0 to 85.0) |" in text
    assert (
        "- `after, question`, with the question: before it significantly above at 1/16; inside it above at 1/16."
        in text
    )
    assert (
        "- `after, diverse`, without the question: before it above at 1/16; inside it significantly below at 1/16."
        in text
    )


@pytest.mark.parametrize("arm", [*adaptive.MAIN, *adaptive.ABLATIONS, *adaptive.AGAIN])
def test_how_a_controller_is_trained(arm):
    """Only the controller learns; where the question is read, one is asked at a time and twice as long."""
    recipe = adaptive.recipe_of(arm, adaptive.Wish(steps=10))
    method = (adaptive.MAIN | adaptive.ABLATIONS | adaptive.AGAIN)[arm]
    assert recipe.seed == int(arm[-1] if arm in adaptive.AGAIN else 0)
    assert recipe.method == repr(method) and recipe.model.name == adaptive.MODEL
    assert not any((recipe.instruct.train.vision, recipe.instruct.train.projector, recipe.instruct.train.llm))
    assert recipe.data.train.path == ("scenes" if method.text else "scene_dialogues")
    assert recipe.data.train.limit == 10 * recipe.batch * (2 if method.text else 1)
    assert method.trained.leaving(Keep(0.5)) == method.leaving(Keep(0.5))


def test_stages_begin_with_what_the_last_one_left(tmp_path):
    first, second = adaptive.stages_of("DRIP(rate=0.25)", adaptive.Wish(steps=10), tmp_path / "drip")
    assert (first[0], second[0]) == ("DRIP(rate=0.25), stage 1", "DRIP(rate=0.25)")
    assert first[2].model.name == adaptive.MODEL and second[2].model.name == f"hf:{first[1] / 'last'}"
    learns = [{name for name, on in recipe.instruct.train if on} for _, _, recipe in (first, second)]
    assert learns == [{"projector", "reducer"}, {"vision", "projector", "llm", "reducer"}]
    assert first[2].method == second[2].method == "DRIP(rate=0.25)"


def test_rows_without_the_plain_model_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=r"vlm-scenes\.jsonl"):
        adaptive.written([row for row in rows if row.role != "plain"], tmp_path)


def test_times_stand_on_the_page_beside_the_rows_they_are_of(rows, tmp_path):
    def timed(row, ratio: float) -> record.Row:
        time = record.Latency(
            batch=25, plain_ms=10, reduced_ms=10 / ratio, ratio=ratio, low=ratio - 0.1, high=ratio + 0.1, null=1.01,
            null_low=0.9, null_high=1.1, pairs=11, threads=2,
        )  # fmt: skip
        return record.Row(task=times.TASK, model=row.model, weights=row.weights, method=row.method, latency=[time])

    _, *others = (row for row in rows if row.task == "compare-vlm")
    page, chart = adaptive.written(rows, tmp_path / "without")
    assert "Time to the first token" not in page.read_text()
    few = chart.stat().st_size
    made = [timed(row, 1.3) for row in others if row.weights == "0"] + [timed(others[1], 1.5)]
    page, chart = adaptive.written([*rows, *made], tmp_path / "with")
    (section,) = (part for part in page.read_text().split("\n## ") if part.startswith("Time to the first token"))
    assert "| **AdaptiveKeep, after** | – | – | – | – | 1.30 (1.20 to 1.40) |" in section
    assert "| `DivPrune()` | – | – | – | – | 1.50 (1.40 to 1.60) |" in section and "Random" not in section
    assert "(11 pairs of a batch of 25 questions,\n2 CPU threads)" in section and "itself gave 1.01 to 1.01" in section
    assert chart.stat().st_size > few, "a second panel"


def test_a_time_is_measured_once_in_turn_with_the_plain_model(tmp_path):
    comparison = adaptive._comparison(adaptive.Wish(questions=2), tmp_path / "rows.jsonl", print)
    comparison.pairs = 9
    method = DivPrune(keep=Keep(0.25))
    row = times.measured(comparison, method, 2)
    assert row.latency[0].pairs == 9 and row.latency[0].ratio > 0 and not hasattr(comparison.model, "reducer")
    assert times.same(row, comparison, method, 2) and not times.same(row, comparison, method, 3)
    assert times.known([row]) == {(comparison.weights, repr(method)): row.latency[0]}
