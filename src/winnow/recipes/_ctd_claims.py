"""What document 003 claims, each confirmed, refuted or untested by rows of `winnow train`.

Curriculum Token Drop (document 003), 2025; `THEIRS` are its own figures, from one run on an Apple M2 Pro.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot, sqrt
from statistics import mean, stdev

from ..measure.accuracy import Z95
from ..methods import CurriculumDrop
from ._ctd_arms import Arm, ablations, difference

THEIRS: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "method": (
        ("baseline", "68.23", "88.23", "9 h 10 min", "20.0"),
        ("CTD (γ=1.5)", "67.53 ± 0.22", "86.15", "5 h 43 min", "18.6"),
    ),
    "gamma": (
        ("0.5", "68.10", "–", "5 h 50 min", "19.2"),
        ("1.0", "67.82 ± 0.19", "–", "5 h 45 min", "18.8"),
        ("1.5", "67.53 ± 0.22", "–", "5 h 43 min", "18.6"),
        ("2.0", "67.31 ± 0.20", "–", "5 h 42 min", "18.1"),
        ("3.0", "66.95 ± 0.25", "–", "5 h 40 min", "17.6"),
    ),
    "saliency": (
        ("attention", "67.53 ± 0.22", "–", "5 h 43 min", "18.6"),
        ("gradient", "66.71 ± 0.28", "–", "6 h 12 min", "19.4"),
        ("random", "65.47 ± 0.31", "–", "5 h 45 min", "20.8"),
    ),
    "schedule": (),
}
"""(name, validation, final train, training time, gap) by table; the document gives no table of schedule shapes."""
SPEEDUP, PENALTY, ROBUST, SLOWER, CLAIMED = 1.6, 0.7, 1.0, 372 / 343, 0.35
NOTHING = "no such rows"
FORMULA = "by its own formula the mean of t^gamma is 1 / (gamma + 1): a larger gamma drops less"


@dataclass(frozen=True)
class Claim:
    """A sentence of the document, what the rows say of it, and why."""

    words: str
    verdict: str
    evidence: str


Answer = tuple[str, str]


def claims_of(arms: Sequence[Arm]) -> list[Claim]:
    """Every claim, by the arms of one experiment."""
    plain = next((arm for arm in arms if arm.method is None), None)
    drops = [arm for arm in arms if isinstance(arm.method, CurriculumDrop)]
    run = next((arm for arm in drops if arm.method.blocks == "all" and arm.method.final == 0.5), None)  # type: ignore[union-attr]
    said = next((arm for arm in drops if arm.method.blocks != "all" and arm.method.final == 0.35), None)  # type: ignore[union-attr]
    pairs = {"as run": run, "as described": said}
    found: list[Claim] = []
    for name, arm in pairs.items():
        found.append(Claim(f"training is {SPEEDUP} times faster, {name}", *_timed(arm, _faster)))
        found.append(Claim(f"at most {PENALTY} points are lost, {name}", *_both(plain, arm, _penalty)))
        found.append(Claim(f"the train-validation gap is smaller, {name}", *_both(plain, arm, _gap)))
    found.append(Claim("35 % of the tokens are dropped", *_share(run)))
    found.append(Claim("time falls in proportion to the tokens", *_timed(run, _linear)))
    found.append(Claim("inference is unchanged: every token is used", *_inference(drops)))
    found += _of_gamma(arms) + _of_saliency(arms)
    for words in ("full exposure at first gives stability", "dropping makes features compact", "dropping regularises"):
        found.append(Claim(words, "untested", "no arm isolates it"))
    return found


def claims_over(experiments: Sequence[Sequence[Arm]]) -> list[Claim]:
    """Every claim, each by the longest experiment that has rows for it."""
    found: dict[str, Claim] = {}
    for arms in sorted(experiments, key=lambda arms: -arms[0].runs[0].steps):
        for one in claims_of(arms):
            if one.words not in found or found[one.words].evidence in (NOTHING, FORMULA):
                found[one.words] = one
    return list(found.values())


def _both(plain: Arm | None, arm: Arm | None, ask: Callable[[Arm, Arm], Answer]) -> Answer:
    if plain is None or arm is None:
        return "untested", NOTHING
    return ask(plain, arm)


Speed = tuple[float, float, float]
"""Plain time / time, with its interval."""


def _timed(arm: Arm | None, ask: Callable[[Arm, Speed], Answer]) -> Answer:
    if arm is None:
        return "untested", NOTHING
    if arm.speed is None:
        return "untested", "no steps timed in turn with the plain model's"
    return ask(arm, arm.speed)


def _faster(arm: Arm, speed: Speed) -> Answer:
    ratio, low, high = speed
    verdict = "confirmed" if low >= SPEEDUP else "refuted" if high < SPEEDUP else "untested"
    return (
        verdict,
        f"{ratio:.2f} times ({low:.2f} to {high:.2f}), {100 * arm.drop:.0f} % of the patch tokens not executed",
    )


def _penalty(plain: Arm, arm: Arm) -> Answer:
    return _better(arm, plain, -PENALTY / 100)


def _better(ours: Arm, theirs: Arm, limit: float = 0.0) -> Answer:
    """Whether validation top-1 of ours less theirs is above a limit; one seed cannot say."""
    return _above(difference(ours, theirs), limit, alone=min(len(ours.rows), len(theirs.rows)) < 2)


def _above(found: tuple[float, float, float] | None, limit: float, alone: bool = False) -> Answer:
    """Confirmed where the whole interval is above the limit, refuted where it is below."""
    if found is None:
        return "untested", "the rows hold no hits to pair"
    middle, low, high = found
    verdict = "confirmed" if low > limit else "refuted" if high < limit else "untested"
    if alone:
        return (
            "untested",
            f"{100 * middle:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f} over images), but one seed",
        )
    more = "" if verdict != "untested" else ": too few images or seeds to tell"
    return verdict, f"{100 * middle:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}){more}"


def _gap(plain: Arm, arm: Arm) -> Answer:
    ours, theirs = (one.each(lambda run: run.gap) for one in (arm, plain))
    if len(ours) < 2 or len(theirs) < 2:
        return "untested", "one seed"
    half = Z95 * hypot(*(stdev(gaps) / sqrt(len(gaps)) for gaps in (ours, theirs)))
    middle = mean(theirs) - mean(ours)
    verdict, words = _above((middle, middle - half, middle + half), 0.0)
    return verdict, f"smaller by {words}"


def _share(run: Arm | None) -> Answer:
    if run is None:
        return "untested", NOTHING
    deep = 100 * (1 - run.tokens[-1] / run.tokens[0])
    words = f"{100 * run.drop:.0f} % over all blocks and all of training, {deep:.0f} % after the last block"
    return "refuted" if run.drop > CLAIMED else "confirmed", words


def _linear(run: Arm, speed: Speed) -> Answer:
    saved, least, most = (1 - 1 / ratio for ratio in speed)
    near = 0.9 * run.drop, 1.1 * run.drop
    verdict = "confirmed" if near[0] <= least and most <= near[1] else "untested"
    verdict = "refuted" if most < near[0] or least > near[1] else verdict
    time = f"{100 * saved:.0f} % ({100 * least:.0f} to {100 * most:.0f}) of the time"
    return verdict, f"{time} for {100 * run.drop:.0f} % of the patch tokens"


def _inference(drops: Sequence[Arm]) -> Answer:
    counts = [row.counts for arm in drops for row in arm.rows if row.counts]
    if not counts:
        return "untested", NOTHING
    same = all(n == count[0] for count in counts for n in count)
    return "confirmed" if same else "refuted", f"tokens at validation in {len(counts)} runs"


def _of_gamma(arms: Sequence[Arm]) -> list[Claim]:
    group = max(ablations(arms, "gamma"), key=len, default=[])
    drops = [arm for arm in group if arm.method is not None]
    words = (
        "a larger gamma is more aggressive",
        "accuracy falls as gamma grows",
        "gamma from 1 to 2 varies by less than 1 point",
    )
    if not drops:
        return [Claim(words[0], "refuted", FORMULA), *(Claim(one, "untested", NOTHING) for one in words[1:])]
    share = [f"{arm.method.gamma:g}: {100 * arm.drop:.1f} %" for arm in drops]  # type: ignore[union-attr]
    falls = all(a.drop > b.drop for a, b in pairwise(drops))
    found = [Claim(words[0], "refuted" if falls else "confirmed", "mean drop by gamma " + ", ".join(share))]
    found.append(Claim(words[1], *_better(drops[0], drops[-1])))
    inner = [arm for arm in drops if 1 <= arm.method.gamma <= 2]  # type: ignore[union-attr]
    return [*found, Claim(words[2], *_robust(inner))]


def _robust(arms: Sequence[Arm]) -> Answer:
    if len(arms) < 2:
        return "untested", NOTHING
    means = [mean(arm.validation) for arm in arms]
    spread = 100 * (max(means) - min(means))
    if min(len(arm.rows) for arm in arms) < 2:
        return "untested", f"{spread:.2f} points, but one seed"
    return "confirmed" if spread < ROBUST else "refuted", f"{spread:.2f} points between means"


def _of_saliency(arms: Sequence[Arm]) -> list[Claim]:
    group = max(ablations(arms, "saliency"), key=len, default=[])
    by = {arm.method.saliency: arm for arm in group if isinstance(arm.method, CurriculumDrop)}
    attention, found = by.get("cls_attention"), []
    for rival in ("gradient", "random"):
        answer = _both(by.get(rival), attention, lambda theirs, ours: _better(ours, theirs))
        found.append(Claim(f"attention is a better saliency than {rival}", *answer))
    slower = _timed(by.get("gradient"), lambda arm, speed: _slower(attention, speed))
    return [*found, Claim(f"gradients cost {100 * (SLOWER - 1):.0f} % more time than attention", *slower)]


def _slower(attention: Arm | None, gradient: Speed) -> Answer:
    if attention is None or attention.speed is None:
        return "untested", "no steps timed in turn with the plain model's"
    (middle, least, most), (theirs, their_least, their_most) = attention.speed, gradient
    ratio, low, high = middle / theirs, least / their_most, most / their_least
    words = f"{ratio:.2f} ({low:.2f} to {high:.2f}) times the time, with running moments of past gradients"
    return "confirmed" if low >= SLOWER else "refuted" if high < SLOWER else "untested", words
