"""SparseVLM: inside the language model, keep the image tokens that the words about the image attend to; recycle some others.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.amount import Amount, Keep
from ..parts.choose import top
from ..parts.cluster import density_peaks
from ..parts.combine import take, total
from ..reducer import Facts, Reducer, Setting, Signals
from ..tokens import Tokens
from ._sites import AtLayers

RECYCLED = 0.3
"""Share of the pruned tokens that are merged rather than dropped (paper, section 3.3)."""
CLUSTERS = 0.1
"""Share of those that are left after merging."""


class SparseVLMReducer(Reducer):
    """Ranks image tokens by the attention of raters: text tokens that resemble the image more than the mean does."""

    method: SparseVLM

    def raters(self, x: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """[B, L] bool: text behind the image whose share of the image's likeness, softmax over text, is above its mean.

        x [B, L, D] input embeddings; image, text [B, L] which tokens are which.
        """
        behind = text & (image.flip(1).cumsum(1).flip(1) == 0) & image.any(1, keepdim=True)
        if not bool(behind.any()):
            return behind
        x = x.detach().float()
        share = (x @ x.transpose(1, 2)).masked_fill(~behind[:, None], -torch.inf).softmax(2).nan_to_num()
        share = (share * image[..., None]).sum(1) / image.sum(1, keepdim=True).clamp_min(1)
        mean = (share * behind).sum(1, keepdim=True) / behind.sum(1, keepdim=True).clamp_min(1)
        return behind & (share > mean)

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        assert signals.text_row is not None
        score, n = signals.text_row.mean(1), tokens.n
        patches = self.patches or tokens.ledger.owner.shape[1]  # how many a sample has is known only now
        kept = self.method.kept(n, layer, patches)
        more = {"score": score} if signals.watched else {}
        if kept == n:
            return tokens
        chosen = top(score, kept)
        group = torch.full_like(score, -1, dtype=torch.long).scatter(1, chosen, chosen)
        merged, left = self.method.recycled(n - kept)
        if left:
            again = top(score.scatter(1, chosen, -torch.inf), merged)
            cluster = density_peaks(take(tokens.x, again), left)
            group = group.scatter(1, again, _first(again, cluster, left))
        return _joined(tokens, group, kept + left, more)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """Distances of the tokens that are recycled."""
        merged, left = self.method.recycled(n - self.method.kept(n, layer, self.patches))
        return float(merged**2 * setting.width) if left else 0.0


def _first(index: Tensor, cluster: Tensor, m: int) -> Tensor:
    """[B, R] the lowest of index [B, R] in the same one of m clusters [B, R]."""
    lowest = index.new_zeros(len(index), m).scatter_reduce(1, cluster, index, "amin", include_self=False)
    return lowest.gather(1, cluster)


def _joined(tokens: Tokens, group: Tensor, m: int, more: dict) -> Tokens:
    """Each group [B, N], named by its first token, becomes its mean; -1 is dropped."""
    here = torch.arange(tokens.n, device=group.device).expand_as(group)
    alive = group >= 0
    size = torch.zeros_like(group).scatter_add(1, group.clamp_min(0), alive.long()).gather(1, group.clamp_min(0))
    place = ((group == here).cumsum(1) - 1).gather(1, group.clamp_min(0))
    weight = torch.where(alive, 1.0 / size.clamp_min(1), 0.0)
    x = total(tokens.x, weight, place.clamp_min(0), m)
    return tokens.moved(x, place.masked_fill(~alive, -1), m, **more)


@dataclass(frozen=True, repr=False)
class SparseVLM(AtLayers):
    """Before each listed block, ranked by the block in front of it; deterministic, positions are counted afresh.

    keep: one amount per block, tokens that stay themselves; recycle adds about 3 in 100 of those that do not. The paper's
    tokens, for averages of 192, 128, 96 and 64: (300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17).
    """

    keep: Amount | tuple[Amount, ...] = tuple(Keep(tokens / 576, of="input") for tokens in (300, 200, 110))
    layers: tuple[int, ...] = (3, 7, 16)
    recycle: bool = True
    reducer = SparseVLMReducer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers[0] < 1:
            raise ValueError('SparseVLM(layers=...): from block 1 on; in front of block 0 use Random(at="tower")')

    @property
    def facts(self) -> Facts:
        combine = "other" if self.recycle else "none"
        return Facts(where="llm", combine=combine, needs=frozenset({"text_attention"}), renumber=True)

    def recycled(self, pruned: int) -> tuple[int, int]:
        """Of so many tokens that are not kept: how many are merged, and into how many."""
        if not self.recycle or pruned == 0:
            return 0, 0
        merged = int(RECYCLED * pruned) + 1
        return merged, int(CLUSTERS * merged) + 1

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """What `keep` says, and the recycled."""
        if layer not in self.layers:
            return n
        kept = self.kept(n, layer, patches)
        return kept + self.recycled(n - kept)[1]
