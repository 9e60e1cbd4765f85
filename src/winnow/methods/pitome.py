"""PiToMe: merge inside dense groups of similar tokens, protect the tokens that stand alone.

Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024; written from its formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.amount import Keep
from ..parts.combine import merge
from ..parts.settings import check_number
from ..reducer import Facts, Method, Reducer, Setting, Signals
from ..tokens import Tokens


@dataclass(frozen=True, repr=False)
class PiToMe(Method):
    """Every block keeps the same share; the paper's range is Keep(0.9) to Keep(0.95)."""

    keep: Keep = Keep(0.925)
    margin: float = 0.75
    """Similarity from which tokens count as a group in the first block; falls linearly towards 0 over the depth."""
    proportional: bool = False
    """Log-size on the attention logits; the paper's code computes sizes and never passes them on."""

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Keep):
            raise TypeError(f"PiToMe(keep={self.keep!r}): Keep is needed, e.g. keep=Keep(0.925)")
        check_number("PiToMe", "margin", self.margin, -1, 1)

    @property
    def facts(self) -> Facts:
        return Facts(combine="mean", sizes=self.proportional, needs=frozenset({"keys"}))

    def sites(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """n - floor(n - keep * n), at most half of the tokens at once."""
        return max(self.keep.count(n, patches), n - n // 2)

    def check(self, setting: Setting) -> None:
        if (
            setting.patches
            and self.keep.count(setting.patches, setting.patches) < setting.patches - setting.patches // 2
        ):
            raise ValueError(f"{self} would merge more than half of the tokens in block 0: keep at least Keep(0.5)")

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return PiToMeReducer(self, depth, patches, prefix)


class PiToMeReducer(Reducer):
    """In the first half of the blocks the best pairs of all tokens merge, later only pairs within the densest 2r tokens."""

    def __init__(self, method: PiToMe, depth: int, patches: int | None, prefix: int) -> None:
        super().__init__(method, patches, prefix)
        self.depth = depth

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        n = tokens.n
        r = n - self.count(n, layer)
        if r == 0:
            return tokens
        assert signals.k is not None
        assert isinstance(self.method, PiToMe)
        unit = F.normalize(signals.k.detach().mean(1), dim=-1)
        similar = unit @ unit.transpose(1, 2)
        energy = F.elu(similar - self.method.margin * (1 - layer / self.depth)).mean(-1)
        dense = energy.argsort(dim=1, descending=True)
        early = layer < (self.depth + 1) // 2
        left, right = (dense[:, ::2], dense[:, 1::2]) if early else (dense[:, : 2 * r : 2], dense[:, 1 : 2 * r : 2])
        best, partner = _between(similar, left, right).max(dim=-1)
        chosen = best.argsort(dim=1, descending=True)[:, :r]  # late, there are just r of them
        source, target = left.gather(1, chosen), right.gather(1, partner.gather(1, chosen))
        group = torch.arange(n, device=energy.device).expand(energy.shape).scatter(1, source, target)
        return merge(tokens, group, n - r, score=energy if signals.watched else None)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        return float(n * n * (setting.width // setting.heads)) if self.count(n, layer) < n else 0.0


def _between(similar: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[B, L, R] entries of similar [B, N, N] at rows `left` [B, L] and columns `right` [B, R]."""
    rows = similar.gather(1, left.unsqueeze(-1).expand(-1, -1, similar.shape[-1]))
    return rows.gather(2, right.unsqueeze(1).expand(-1, left.shape[1], -1))
