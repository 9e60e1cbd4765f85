"""What a host's own attention sees: queries, keys and values of one block, through transformers' registered attention.

transformers 5, AttentionInterface. The block runs as it always does, with the function it always calls; nothing is computed
twice, no matrix of attention is made, and no name inside the block needs to be known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "winnow"


@dataclass(frozen=True)
class Seen:
    """What one attention was called with; without gradient, unless `graph` is asked for."""

    q: Tensor
    """[B, H, Q, D], after norms and rotation, before scaling."""
    k: Tensor
    """[B, Hk, K, D], Hk a divisor of H."""
    v: Tensor
    mask: Tensor | None
    scale: float | None

    def rows(self, asking: Tensor) -> Tensor:
        """[B, H, R, K] softmax rows, in float32, of the queries at places `asking` [B, R]; causal where no mask says."""
        groups, size = self.q.shape[1] // self.k.shape[1], self.q.shape[-1]
        q = self.q.gather(2, asking[:, None, :, None].expand(-1, self.q.shape[1], -1, size))
        q = (q * (size**-0.5 if self.scale is None else self.scale)).unflatten(1, (-1, groups)).flatten(2, 3)
        logits = (q @ self.k.transpose(-2, -1)).unflatten(2, (groups, -1)).flatten(1, 2).float()
        if self.mask is None or self.mask.ndim == 2:
            last = asking + self.k.shape[2] - self.q.shape[2]
            hidden = torch.arange(self.k.shape[2], device=asking.device) > last.unsqueeze(-1)
            logits = logits.masked_fill(hidden.unsqueeze(1), -torch.inf)
            if self.mask is not None:
                logits = logits.masked_fill(~self.mask[:, None, None].bool(), -torch.inf)
            return logits.softmax(-1)
        mask = self.mask.expand(len(asking), -1, -1, -1)
        mask = mask.gather(2, asking[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1)


class Enough(Exception):
    """Raised to leave a block once its queries and keys are known: the rest of it is not wanted."""


Reader = Callable[[Seen], None]
_now: ContextVar[tuple[Reader, str, bool]] = ContextVar("winnow_reading")


@contextmanager
def reading(block: nn.Module, reader: Reader, graph: bool = False) -> Iterator[None]:
    """While inside, the block's attention shows the reader what it is called with; then its config is as it was."""
    config: Any = next(part.config for part in block.modules() if hasattr(part, "config"))
    own = config._attn_implementation
    token = _now.set((reader, own, graph))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _now.reset(token)


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **words: Any) -> Any:
    reader, own, graph = _now.get()
    shown = (q, k, v) if graph else (q.detach(), k.detach(), v.detach())
    reader(Seen(*shown, mask, words.get("scaling")))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)(module, q, k, v, mask, *args, **words)


AttentionInterface.register(NAME, _attend)
