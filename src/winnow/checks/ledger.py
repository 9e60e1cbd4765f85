"""The ledger is sound, the count is as promised, survivors stand in raster order.

Winnow's own.
"""

from __future__ import annotations

import torch

from .case import Case


def ledger_is_sound(case: Case) -> None:
    """Owners are tokens or -1, every real token holds a patch, padding holds none, merging drops nothing."""
    reducer = case.reducer()
    tokens = case.step(reducer, case.tokens())
    for _ in range(2):
        ledger = tokens.ledger
        assert ledger.owner.dtype == torch.long, f"owners are {ledger.owner.dtype}, not int64"
        assert tokens.x.shape[1] == ledger.n, f"{tokens.x.shape[1]} tokens, the ledger says {ledger.n}"
        assert int(ledger.owner.min()) >= -1 and int(ledger.owner.max()) < ledger.n, "an owner is not a token"
        real = torch.ones_like(ledger.size(), dtype=torch.bool) if ledger.valid is None else ledger.valid
        assert bool(((ledger.size() > 0) == real).all()), "a real token holds no patch, or padding holds one"
        if case.facts.combine == "mean":
            assert int(ledger.owner.min()) >= 0, "a merging method dropped a patch"
        tokens = case.step(reducer, tokens)


def count_is_as_promised(case: Case) -> None:
    """What leaves is what `count` says, also for 1, 17 and 63 tokens; never 0, never more than entered."""
    for n in (1, 2, 17, 63, 64):
        reducer = case.reducer(64)
        out = case.step(reducer, case.tokens(2, n))
        wanted = reducer.count(n, case.layer)
        if case.facts.static:
            assert out.n == wanted, f"{n} tokens became {out.n}, promised {wanted}"
        real = out.ledger.counts()
        assert int(real.min()) >= 1, f"of {n} tokens none is left"
        assert int(real.max()) <= wanted <= n, f"{n} tokens became {int(real.max())}, promised at most {wanted}"


def survivors_in_raster_order(case: Case) -> None:
    """Tokens stand in the order of their first patches."""
    reducer = case.reducer()
    tokens = case.tokens()
    for _ in range(2):
        tokens = case.step(reducer, tokens)
        first = tokens.ledger.first()
        for row, valid in zip(first, tokens.ledger.valid if tokens.ledger.valid is not None else [None] * len(first)):
            row = row if valid is None else row[valid]
            assert bool((row.diff() > 0).all()), "tokens are not in the order of their first patches"


CHECKS = (ledger_is_sound, count_is_as_promised, survivors_in_raster_order)
