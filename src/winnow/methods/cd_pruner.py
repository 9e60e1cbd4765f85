"""CDPruner: keep the image tokens that are unlike each other and matter to the question: a determinantal point process.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .._question import Question
from ..parts.amount import Amount, Keep
from ..parts.combine import drop
from ..parts.diverse import determinantal, likeness
from ..reducer import Facts, Reducer, Setting, Signals
from ..tokens import Tokens
from ._at_tower import NINTH, AtTower


class CDPrunerReducer(Reducer):
    """Greedy picks of most gain; relevance is scaled image by image, where the authors' code scales over the batch."""

    def __init__(self, method: CDPruner, width: int, patches: int | None, prefix: int) -> None:
        super().__init__(method, patches, prefix)
        # in a tuple, so that the text tower is no part of the model's own weights
        self.asked = (Question(method.clip, width),) if method.clip else ()
        self.question: Tensor | None = None

    def ask(self, questions: Sequence[str]) -> None:
        """The questions of the calls that follow: one for all images, or one for each, in their order."""
        if not self.asked:
            raise ValueError(
                'CDPruner() looks at diversity alone; for questions give CDPruner(clip="openai/clip-vit-...")'
            )
        several = [questions] if isinstance(questions, str) else list(questions)
        if not several:
            raise ValueError("ask(questions): one question or more")
        self.question = self.asked[0].embed(several)

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        m = self.count(tokens.n, layer)
        if m == tokens.n:
            return tokens
        kernel, more = likeness(tokens.x), {}
        if self.asked:
            assert signals.features is not None
            relevance = self.asked[0].relevance(signals.features, self._question(len(kernel)))
            kernel = relevance[:, :, None] * kernel * relevance[:, None]
            more = {"score": relevance} if signals.watched else {}
        return drop(tokens, determinantal(kernel, m).sort(1).values, **more)

    def _question(self, images: int) -> Tensor:
        """[B, E]; beams repeat images, so they repeat questions."""
        if self.question is None:
            raise ValueError(
                'CDPruner needs the question: winnow.reducer_of(model).ask(["..."]) before the model is called'
            )
        several = len(self.question)
        if images % several:
            raise ValueError(
                f"{several} questions were asked, the model is given {images} images: ask one, or one for each"
            )
        return self.question.repeat_interleave(images // several, 0)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """Similarities and picks; with a question also its relevance, the text tower apart."""
        m = self.count(n, layer)
        if m == n:
            return 0.0
        relevance = sum(n * one.joint * (one.width + 1) for one in self.asked)
        return n * n * setting.width + m * (m - 1) // 2 * n + relevance


@dataclass(frozen=True, repr=False)
class CDPruner(AtTower):
    """`clip`: name or folder of the CLIP model whose image tower the host has; without it, diversity alone.

    With it, `winnow.reducer_of(model).ask(questions)` says before each call what is asked about the images.
    """

    keep: Amount = Keep(NINTH)
    clip: str | None = None
    reducer = CDPrunerReducer

    @property
    def facts(self) -> Facts:
        return Facts(where="tower", needs=frozenset({"projected"}))

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return CDPrunerReducer(self, width, patches, prefix)
