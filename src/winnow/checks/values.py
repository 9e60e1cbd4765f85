"""What tokens carry: unchanged features or size-weighted means, finite numbers, the dtype that came in.

Winnow's own; the oracle is a dense one-hot matrix, nothing the methods use.
"""

from __future__ import annotations

import torch

from .case import WIDTH, Case, Skip, close


def features_are_kept_or_averaged(case: Case) -> None:
    """Each token equals its first patch's token ("none") or the mean of its patches ("mean"), over two steps."""
    if case.facts.combine == "other":
        raise Skip('combines tokens in a way of its own ("other")')
    reducer, fresh = case.reducer(), case.tokens()
    tokens = fresh
    for _ in range(2):
        tokens = case.step(reducer, tokens)
        holds = (tokens.ledger.owner.unsqueeze(1) == torch.arange(tokens.n).view(1, -1, 1)).double()
        if case.facts.combine == "none":
            holds = holds * (holds.cumsum(2) == 1)
        share = holds / holds.sum(2, keepdim=True).clamp_min(1)
        real = holds.sum(2) > 0
        close(tokens.x[real], (share @ fresh.x.double())[real], 1e-5, f'features are not "{case.facts.combine}"')


def identical_tokens_stay_finite(case: Case) -> None:
    """Tokens that are all the same, or all zero, give finite numbers."""
    for value in (1.0, 0.0):
        out = case.step(case.reducer(), case.tokens(x=torch.full((2, 64, WIDTH), value)))
        assert bool(out.x.isfinite().all()), f"tokens all {value} become infinite or NaN"


def dtype_is_kept(case: Case) -> None:
    """bfloat16 in, bfloat16 out; float64 in, float64 out."""
    for dtype in (torch.bfloat16, torch.float64):
        out = case.step(case.reducer().to(dtype), case.tokens(x=case.rand(2, 64, WIDTH).to(dtype)))
        assert out.x.dtype == dtype, f"{dtype} became {out.x.dtype}"


CHECKS = (features_are_kept_or_averaged, identical_tokens_stay_finite, dtype_is_kept)
