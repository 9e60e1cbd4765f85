"""Who asks the patches: a budget by attention, a question by likeness to its words.

Document 004 (cross-attention with the budget as query); likeness in the language model's own space is Winnow's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend

GAIN = 20.0
"""How much likeness to the question counts at first: half of full likeness outweighs an untrained head and the noise."""


class Cross(nn.Module):
    """One attention to all patches, added to what asks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.pair, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, asking: Tensor, patches: Tensor, valid: Tensor | None) -> Tensor:
        """[B, M, C] and [B, N, C] -> [B, M, C]"""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        asking, patches = (F.layer_norm(x, x.shape[-1:]) for x in (asking, patches))
        k, v = self.pair(patches).chunk(2, -1)
        bias = None if valid is None else valid.float().log()
        found = attend(split(self.query(asking)), split(k), split(v), bias)
        return asking + self.out(found.transpose(1, 2).flatten(2))

    def macs(self, m: int, n: int) -> float:
        """Of m that ask n patches."""
        width = self.out.out_features
        return 2 * (m + n) * width**2 + 2 * m * n * width


class Question(nn.Module):
    """How alike each patch, as the language model gets it, is to the word of the prompt that it is most alike.

    It starts from the projector having put what a patch shows near the words for it, as that of hf:scenes was taught to;
    which channels tell, and which words never do (those that all prompts have), is learned.
    """

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.channels, self.gain = nn.Parameter(torch.ones(wide)), nn.Parameter(torch.tensor([GAIN]))
        self.word = nn.Linear(wide, 1)
        nn.init.zeros_(self.word.weight)
        self.register_load_state_dict_pre_hook(_with_dimension)

    def forward(self, patches: Tensor, words: Tensor, real: Tensor, valid: Tensor | None) -> Tensor:
        """[B, N, D] of which some are `valid` [B, N], words [B, L, D] of which some are `real` [B, L] -> [B, N] float32"""
        patches, words = (F.layer_norm(x.float(), x.shape[-1:]) for x in (patches, words))
        alike = (patches * self.channels.float()) @ words.transpose(1, 2) / patches.shape[-1]
        share = torch.ones_like(alike[..., :1]) if valid is None else valid[..., None].to(alike.dtype)
        # what all patches show tells nothing
        alike = alike - (alike * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        found = alike * self.gain.float() + self.word(words.to(self.word.weight.dtype)).float().transpose(1, 2)
        # a smooth maximum, of which one more is "no word": there is always that
        return F.pad(found.masked_fill(~real[:, None], float("-inf")), (0, 1)).logsumexp(2)

    def macs(self, n: int, text: int) -> float:
        """Of n patches and `text` words."""
        return (n + 1) * text * len(self.channels)


def _with_dimension(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Weights saved before they could be sharded, which takes a dimension to shard."""
    if (gain := state.get(f"{prefix}gain")) is not None:
        state[f"{prefix}gain"] = gain.reshape(1)
