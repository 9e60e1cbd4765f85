"""ToMe: merge the r most similar pairs of tokens inside every block.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023; written from its formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.combine import merge, places
from ..parts.settings import check_number
from ..reducer import Facts, Method, Reducer, Setting, Signals
from ..tokens import Tokens


@dataclass(frozen=True, repr=False)
class ToMe(Method):
    """Bipartite soft matching on keys; r tokens fewer per block, merged into size-weighted means."""

    r: int | tuple[int, ...] = 8
    inflect: float = 0.0
    """-1: twice as many in the first block and none in the last; +1: the reverse; 0: constant."""
    proportional: bool = True
    """Log-size on the attention logits; right off the shelf, off for MAE models (paper, section 4.1)."""

    def __post_init__(self) -> None:
        several = self.r if isinstance(self.r, tuple) else (self.r,)
        if not several or any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in several):
            raise ValueError(f"ToMe(r={self.r!r}): r is a whole number >= 0, or a tuple of them, one per block")
        check_number("ToMe", "inflect", self.inflect, -1, 1)
        if self.inflect and isinstance(self.r, tuple):
            raise ValueError("ToMe: inflect bends a scalar r; give either a tuple r or inflect")

    @property
    def facts(self) -> Facts:
        return Facts(combine="mean", sizes=self.proportional, needs=frozenset({"keys"}))

    def amounts(self, depth: int) -> tuple[int, ...]:
        """r of each block; truncated as in the paper's code, so that (13, +1) over 24 blocks ends at 25, not 26."""
        if isinstance(self.r, tuple):
            return (self.r + (0,) * depth)[:depth]
        low = int(self.r * (1 - self.inflect))
        step = (2 * self.r - 2 * low) / max(1, depth - 1)
        return tuple(int(low + step * i) for i in range(depth))

    def sites(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def count(self, n: int, layer: int, patches: int | None = None, depth: int = 0) -> int:
        """n - r, at most half of the tokens at once; `depth` matters only where inflect is not 0."""
        if self.inflect and not depth:
            raise ValueError(f"{self} needs the depth of the model to count")
        return n - min(self.amounts(max(depth, layer + 1))[layer], n // 2)

    def check(self, setting: Setting) -> None:
        if isinstance(self.r, tuple) and len(self.r) > setting.depth:
            raise ValueError(f"{self} gives r for {len(self.r)} blocks, the model has {setting.depth}")
        first = self.amounts(setting.depth)[0]
        if setting.patches and first > setting.patches // 2:
            raise ValueError(
                f"{self} cannot merge {first} of {setting.patches} tokens in block 0: "
                f"at most half of them find a partner, r <= {setting.patches // 2}"
            )

    def counts(self, setting: Setting) -> tuple[int, ...]:
        if setting.patches is None:
            raise ValueError("the counts need the model's own grid, which it does not say")
        counts = [setting.patches]
        for layer in range(setting.depth):
            counts.append(self.count(counts[-1], layer, depth=setting.depth))
        return tuple(counts)

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return ToMeReducer(self, depth, patches, prefix)


class ToMeReducer(Reducer):
    """Matches tokens at even places of the paper's sequence (prefix included) with those at odd places."""

    def __init__(self, method: ToMe, depth: int, patches: int | None, prefix: int) -> None:
        super().__init__(method, patches, prefix)
        self.depth = depth

    def count(self, n: int, layer: int) -> int:
        assert isinstance(self.method, ToMe)
        return self.method.count(n, layer, depth=self.depth)

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        n = tokens.n
        m = self.count(n, layer)
        if m == n:
            return tokens
        assert signals.k is not None
        b, device = tokens.x.shape[0], tokens.x.device
        order = torch.arange(n, device=device).expand(b, n) if tokens.order is None else tokens.order
        left, right = order[:, self.prefix % 2 :: 2], order[:, 1 - self.prefix % 2 :: 2]
        best, partner = match(signals.k.detach().mean(1), left, right)

        rank = best.argsort(dim=1, descending=True)
        sources, rest = rank[:, : n - m], rank[:, n - m :]
        if self.prefix:  # the paper re-sorts the unmerged only to bring the class token back to the front
            rest = rest.sort(dim=1).values
        source, target = left.gather(1, sources), right.gather(1, partner.gather(1, sources))
        group = torch.arange(n, device=device).expand(b, n).scatter(1, source, target)
        emitted = places(group).gather(1, torch.cat([left.gather(1, rest), right], 1))
        score = torch.zeros_like(best.new_zeros(b, n)).scatter(1, left, best) if signals.watched else None
        return merge(tokens, group, m, order=emitted, score=score)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        if self.count(n, layer) == n:
            return 0.0
        head = setting.width // setting.heads
        return (n // 2) * (n - n // 2) * head


def match(keys: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Best cosine similarity [B, L] of each left token and its partner's place [B, L] in `right`; keys [B, N, D]."""
    unit = F.normalize(keys, dim=-1)
    width = keys.shape[-1]
    a, b = (unit.gather(1, side.unsqueeze(-1).expand(-1, -1, width)) for side in (left, right))
    return (a @ b.transpose(1, 2)).max(dim=-1)
