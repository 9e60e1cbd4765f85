"""What a token is worth: class-token attention, received attention, norm.

Class attention: EViT (Liang et al., 2022); norm: document 002; received attention: for models without class token.
"""

from __future__ import annotations

from torch import Tensor

from ..reducer import Facts, Signals

ATTENTION = {"cls": "cls_attention", "received": "received"}


def check_attention(owner: str, kind: str) -> None:
    """ValueError unless `kind` is a known attention score."""
    if kind not in ATTENTION:
        raise ValueError(f'{owner}(attention={kind!r}): attention must be "cls" or "received"')


def attention_facts(kind: str, **more) -> Facts:
    """Facts of a method that scores by attention of this kind."""
    return Facts(needs=frozenset({ATTENTION[kind]}), **more)


def attention(signals: Signals, kind: str) -> Tensor:
    """[B, N] attention a token gets: from the class token (mean over heads), or from all queries."""
    score = signals.cls_row if kind == "cls" else signals.received
    assert score is not None, "the core fills what Facts.needs asks for"
    return score.mean(1) if score.ndim == 3 else score


def norm(x: Tensor) -> Tensor:
    """[B, N] L2 norm of each token [B, N, C], in float32."""
    return x.detach().float().norm(dim=-1)
