"""The contract: every method of the table, with its default value and a few telling others, against every check."""

from __future__ import annotations

import pytest

import winnow
from winnow import (
    DRIP,
    AdaptiveKeep,
    Below,
    CurriculumDrop,
    Downsample,
    EViT,
    Exactly,
    FastV,
    Grid,
    Keep,
    NormThreshold,
    Pool,
    PruMerge,
    Random,
    Remove,
    ToMe,
    TopK,
    checks,
)
from winnow.checks import CHECKS, check_method

DEFAULTS = [method() for method in winnow.METHODS]
OTHERS = [
    ToMe(r=0),
    ToMe(r=(16, 4)),
    ToMe(r=(5, 4, 3, 2)),
    ToMe(r=8, inflect=-1.0, proportional=False),
    EViT(fuse=False, layers=(1,)),
    EViT(keep=Keep(0.5, of="input"), layers=(0, 1), attention="received"),
    EViT(keep=Keep(1.0), layers=(1,)),
    TopK(keep=(Exactly(40), Remove(7)), layers=(0, 1)),
    TopK(keep=Exactly(1), layers=(1,)),
    TopK(keep=Remove(9), layers=(0,), attention="received"),
    Random(keep=Exactly(20), at="input"),
    Random(keep=Remove(30), layers=(0, 1), seed=3),
    Grid(keep=Keep(0.25), at="input"),
    Grid(keep=Exactly(37), layers=(0,)),
    Pool(keep=Keep(0.25), at="input"),
    Pool(keep=(Exactly(33), Exactly(9)), layers=(0, 1)),
    Pool(keep=Exactly(10), layers=(1,), proportional=False),
    NormThreshold(below=Below(1.0, of="mean"), before=(0, 2)),
    NormThreshold(below=(Below(5.0), Below(0.95, of="mean")), before=(1, 2)),
    NormThreshold(below=Below(0.3, of="quantile"), before=(1,)),
    NormThreshold(below=(Below(0.2, of="quantile"), Below(0.9, of="mean")), before=(1, 2)),
    Downsample(size=32),
    PruMerge(plus=True),
    PruMerge(keep=Exactly(9), plus=True),
    PruMerge(keep=Keep(0.25), attention="received"),
    PruMerge(compat="reference"),
    FastV(layer=1, keep=Exactly(9)),
    Random(keep=Exactly(9), at="tower"),
    DRIP(rate=(0.5, 0.3), after=(1, 2)),
    DRIP(rate=0.3, after=0, loss="interval", inference="even"),
    DRIP(rate=0.25, predictor="hnet", inference="threshold"),
    DRIP(rate=0.2, after=1, loss="lower_bound", inference="sample"),
    DRIP(rate=0.3, predictor="entropy"),
    DRIP(rate=0.3, predictor="spikes", after=1),
    AdaptiveKeep(budget_max=0.25, head="dot"),
    AdaptiveKeep(budget_min=9, budget_max=9, fuse="after"),
    AdaptiveKeep(budget_max=20, head="index", fuse="after", join="concat"),
    AdaptiveKeep.seed004(budget_max=0.5),
    CurriculumDrop(blocks="all", saliency="received", at_eval=True),
    CurriculumDrop(blocks=(0, 2), per="model", saliency="random"),
    CurriculumDrop(blocks=(0, 1), final=(0.5, 0.3), learn="both", reindex=True),
    CurriculumDrop(blocks=(0, 1), saliency="gradient", learn="positions"),
]
SLOW = {"compiles_as_one_graph", "exports_with_a_free_batch"}
ON_TOKENS = {"spelling_round_trips", "reducer_ignores_batch_mates", "gradient_reaches_the_input"}
ON_MODELS = {
    check.__name__
    for topic in (checks.model, checks.batch, checks.gradients, checks.compiled)
    for check in topic.CHECKS
} - (ON_TOKENS | SLOW)
"""What needs a model: methods of vision-language models are shown on those in tests/test_vlm.py."""
ALSO_SLOW = [
    ToMe(r=(16, 4)),
    EViT(fuse=False, layers=(1,)),
    Random(keep=Exactly(20), at="input"),
    Pool(keep=Keep(0.25), at="input"),
    Downsample(size=32),
]


def pairs():
    for check in CHECKS:
        others = [m for m in OTHERS if m in ALSO_SLOW] if check in SLOW else OTHERS
        for method in (*DEFAULTS, *others):
            yield pytest.param(check, method, id=f"{check}-{method!r}".replace("::", ":"))


@pytest.mark.parametrize(("check", "method"), pairs())
def test_contract(check, method):
    (result,) = check_method(method, only=check)
    if result.outcome == "skipped":
        pytest.skip(result.message)
    assert result.check == check
    assert result.outcome == ("known" if check in getattr(method, "known_failures", {}) else "ok")


def test_the_table_and_the_contract_cover_each_other():
    assert {type(method) for method in DEFAULTS} == set(winnow.METHODS)
    assert {type(method) for method in OTHERS} <= set(winnow.METHODS)
    assert [type(method).__name__ for method in DEFAULTS] == winnow.list_methods()
    assert len(set(CHECKS.values())) == len(CHECKS) and all(check.__doc__ for check in CHECKS.values())


@pytest.mark.parametrize("method", DEFAULTS, ids=repr)
def test_most_checks_concern_every_method(method):
    """A check that skips too easily would be a silent hole."""
    skips = [name for name in CHECKS if name not in SLOW and check_method(method, only=name)[0].outcome == "skipped"]
    on_tokens = ["ledger_is_sound", "count_is_as_promised", "survivors_in_raster_order",
                 "identical_tokens_stay_finite", "dtype_is_kept", "reducer_ignores_batch_mates",
                 "gradient_reaches_the_input"]  # fmt: skip
    own = {"features_are_kept_or_averaged"} if method.facts.combine == "other" else set()
    own |= {"input": {*on_tokens}, "tower": ON_MODELS, "llm": ON_MODELS}.get(method.facts.where, set())
    assert set(skips) == own


def test_all_reports_every_check():
    results = check_method(Downsample(size=32), all=True)
    assert [result.check for result in results] == list(CHECKS)
    assert {result.outcome for result in results} == {"ok", "skipped"}


def test_wrong_calls_are_refused():
    with pytest.raises(TypeError, match="needs a method such as ToMe"):
        winnow.check_method("ToMe(r=8)")
    with pytest.raises(ValueError, match="no check 'nonsense'; checks: ledger_is_sound"):
        check_method(ToMe(), only="nonsense")
    with pytest.raises(AssertionError, match=r"breaks the contract: executed_tokens_are_promised: .*at most half"):
        check_method(ToMe(r=40), only="executed_tokens_are_promised")
