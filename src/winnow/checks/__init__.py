"""The contract, public: every method must pass every check; every check has been seen to fail.

The idea of an executable public contract is scikit-learn's (check_estimator); tests/test_planted_faults.py breaks each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import winnow

from ..reducer import Method
from . import batch, compiled, gradients, ledger, model, values
from .case import Case, Skip

Check = Callable[[Case], None]

CHECKS: dict[str, Check] = {
    check.__name__: check for topic in (ledger, values, batch, gradients, model, compiled) for check in topic.CHECKS
}


@dataclass(frozen=True)
class Result:
    """One check on one method: "ok", "failed", "skipped" or "known" (a declared failure)."""

    check: str
    outcome: str
    message: str = ""


DOCTOR = (
    "nothing_removed_changes_nothing",
    "every_site_is_reached",
    "prefix_never_reaches_the_reducer",
    "executed_tokens_are_promised",
    "ways_agree",
    "restore_is_exact",
)
"""The checks that say something about a model rather than about a method."""


def examine(model: nn.Module, method: Method, images: Tensor) -> list[Result]:
    """Run the checks that concern a model on the user's own, with images [B, 3, H, W]; the model stays as it is.

    TypeError / ValueError where model and method do not fit.
    """
    winnow.restore(winnow.reduce(model, method))
    return [_run(CHECKS[name], name, Case(method, model, images)) for name in DOCTOR]


def check_method(method: Method, *, all: bool = False, only: str | None = None) -> list[Result]:
    """Run the contract on a method; AssertionError at the first failure, or, with all=True, a result per check.

    `only` names one check. A method's `known_failures` {check: reason} must fail, or the check fails.
    """
    if not isinstance(method, Method):
        raise TypeError(f"check_method() needs a method such as ToMe(r=8), got {method!r}")
    if only is not None and only not in CHECKS:
        raise ValueError(f"no check {only!r}; checks: {', '.join(CHECKS)}")
    unknown = sorted(set(getattr(method, "known_failures", {})) - set(CHECKS))
    if unknown:
        raise ValueError(
            f"{method}: known_failures names {unknown[0]!r}, which is no check; checks: {', '.join(CHECKS)}"
        )
    results = []
    for name in [only] if only else CHECKS:
        result = _run(CHECKS[name], name, Case(method))
        if result.outcome == "failed" and not all:
            raise AssertionError(f"{method} breaks the contract: {name}: {result.message}")
        results.append(result)
    return results


def _run(check: Check, name: str, case: Case) -> Result:
    known = getattr(case.method, "known_failures", {}).get(name)
    try:
        check(case)
    except Skip as reason:
        return Result(name, "skipped", str(reason))
    except Exception as error:  # a check that crashes has failed
        if known:
            return Result(name, "known", known)
        return Result(name, "failed", f"{type(error).__name__}: {error}" if not str(error) else str(error))
    return Result(name, "failed", f"declared as failing ({known}) but passes") if known else Result(name, "ok")
