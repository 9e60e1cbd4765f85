"""Classification scores summed batch by batch, over one process or many: loss, top-1, top-5, macro F1, tokens.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .accuracy import macro_f1


class Tally:
    """Sums over the validation images; `done` adds those of other processes."""

    def __init__(self, classes: int, n: int, device: torch.device) -> None:
        self.classes, self.n = classes, n
        self.confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self.hits = torch.zeros(n, dtype=torch.int64, device=device)
        self.sums = torch.zeros(3, device=device)
        """Images, loss, top-5."""
        self.tokens: Tensor | None = None
        """[2, depth+1] patch tokens: real, executed."""

    def add(self, logits: Tensor, labels: Tensor, where: Tensor) -> None:
        """Logits [B, classes] and labels [B] of the images numbered `where` [B]."""
        answer = logits.argmax(-1)
        self.confusion.index_add_(0, labels * self.classes + answer, torch.ones_like(labels))
        self.hits[where] = (answer == labels).long()
        five = (logits.topk(min(5, self.classes), -1).indices == labels[:, None]).any(-1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.sums += torch.stack([loss.new_tensor(len(labels)), loss, five.sum().to(loss)])

    def add_tokens(self, real: Tensor, executed: list[int]) -> None:
        """Patch tokens of the images just added: real ones [B, depth+1], and what was executed [depth+1]."""
        ran = torch.tensor(executed, device=real.device).expand_as(real)
        found = torch.stack([real, ran]).sum(1).float()
        self.tokens = found if self.tokens is None else self.tokens + found

    def done(self, total: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], np.ndarray, list[list[float]] | None]:
        """Metrics, hits (bool [n]) and mean tokens [2][depth+1]; `total` sums a tensor over all processes."""
        images, loss, five = total(self.sums).tolist()
        assert images == self.n, f"{images:g} of {self.n} images were scored"
        hits = total(self.hits).cpu().numpy().astype(bool)
        table = total(self.confusion).view(self.classes, self.classes).cpu().numpy()
        metrics = {"loss": loss / images, "top1": float(hits.mean()), "top5": five / images, "f1": macro_f1(table)}
        tokens = None if self.tokens is None else (total(self.tokens) / images).tolist()
        return metrics, hits, tokens
