"""answer: ask a vision-language model questions about images, and note what it says and what that took.

Winnow's own; an answer is right where it equals the one that is known, case, edges and a full stop apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import winnow

from .._question import tell
from .._vlm_model import ask
from ..data.conversations import IMAGE, Conversations, Sample
from ..tokens import Tokens


class Asked(NamedTuple):
    """A batch: what the model is given, and what is asked about each image."""

    inputs: dict[str, Any]
    questions: list[str]


@dataclass
class Prompts:
    """Questions of one turn as batches of what the processor makes of them; kept after the first pass."""

    processor: Any
    samples: Conversations
    batch: int
    device: Any = "cpu"
    progress: Callable[[int], object] = lambda done: None

    def __post_init__(self) -> None:
        several = next((one.key for one in self.samples if len(one.turns) != 2 or not one.images), None)  # type: ignore[attr-defined]
        if several is not None:
            raise ValueError(f"{several}: a question about an image and its answer are needed, and nothing else")
        self._kept: list[Asked] = []

    @property
    def answers(self) -> np.ndarray:
        """[n] what is right."""
        return np.array([plain(sample.turns[1][1]) for sample in self.samples])  # type: ignore[attr-defined]

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(
            len(ids) for ids in self.processor.tokenizer(self.answers.tolist(), add_special_tokens=False).input_ids
        )

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch)

    def __iter__(self) -> Iterator[Asked]:
        for number in range(len(self)):
            first, last = number * self.batch, min((number + 1) * self.batch, len(self.samples))
            if number == len(self._kept):
                self._kept.append(self.batch_of([self.samples[i] for i in range(first, last)]))
            self.progress(last)
            yield self._kept[number]

    def question(self, sample: Sample) -> str:
        """The words that are asked, the images' places apart."""
        return sample.turns[0][1].replace(IMAGE, "").strip()

    def batch_of(self, samples: Sequence[Sample]) -> Asked:
        """These questions as one batch."""
        pictures = [sample.pictures() for sample in samples]
        asked = [self.question(sample) for sample in samples]
        inputs = ask(self.processor, pictures, asked)
        there = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return Asked(there, [words for words, several in zip(asked, pictures) for _ in several])


def plain(words: str) -> str:
    """An answer as it is compared."""
    return words.strip().removesuffix(".").lower()


@dataclass(frozen=True)
class Said:
    """What a model answered."""

    top: np.ndarray
    """[n] answers."""
    tokens: Tensor
    """[n, depth] image tokens entering each block of the language model."""
    owners: np.ndarray
    """[n, P] token that holds each patch at the end, -1 where dropped; empty for a plain model or several sizes."""
    grid: tuple[int, int] | None = None


@torch.inference_mode()
def answer(model: Any, prompts: Prompts, watched: bool = True) -> Said:
    """Greedy answers to all questions, as long as the longest right one."""
    depth = model.config.get_text_config().num_hidden_layers
    found: list[str] = []
    tokens, owners, grid = [], [], None
    many = prompts.longest
    model.eval()
    for inputs, questions in prompts:
        placed = (inputs["input_ids"] == model.config.image_token_id).sum(1).cpu()
        words = {"max_new_tokens": many, "do_sample": False}
        if watched:
            tell(model, questions)
            with winnow.watch(model) as run:
                made = model.generate(**inputs, **words)
            tokens.append(entering(model, run, placed, depth))
            owners.append(_held(model, run).ledger.owner.to(torch.int16).cpu())
            grid = next((one.grid for one in run.tokens.values() if one.grid), None) or _square(model, owners[-1])
        else:
            made = model.generate(**inputs, **words)
            tokens.append(placed[:, None].expand(-1, depth))
        new = made[:, inputs["input_ids"].shape[1] :]
        found += [plain(one) for one in prompts.processor.batch_decode(new, skip_special_tokens=True)]
    same = len({one.shape[1] for one in owners}) == 1 and sum(map(len, owners)) == len(found)
    held = torch.cat(owners).numpy() if same else np.empty((0, 0))
    return Said(np.array(found), torch.cat(tokens), held, grid)


def entering(model: nn.Module, run: Any, placed: Tensor, depth: int) -> Tensor:
    """[B, depth] image tokens entering each block of the language model; `placed` [B] came in."""
    if winnow.reducer_of(model).method.facts.where != "llm":
        left = placed - (0 if run.columns is None else run.columns.total[:, 0].cpu())
        return left[:, None].expand(-1, depth)
    found, n = [], placed
    for layer in range(depth):
        n = run.tokens[layer - 1].ledger.counts().cpu() if layer and layer - 1 in run.tokens else n
        found.append(n)
    return torch.stack(found, 1)


def _square(model: nn.Module, owner: Tensor) -> tuple[int, int] | None:
    """The tower's grid, where each prompt has the patches of one image; inside the language model nobody says it."""
    tower = winnow.reducer_of(model).seat.vlm.tower
    whole = tower is not None and tower.setting.patches == owner.shape[1]
    return tower.setting.grid if whole else None


def _held(model: nn.Module, run: Any) -> Tokens:
    """The tokens that the language model's last block is given; what a tower's later blocks do is not read."""
    seat = winnow.reducer_of(model).seat
    inside = seat.facts.where not in ("tower", "llm")
    return run.tokens[seat.vlm.made if inside else max(run.tokens)]


__all__ = ["Prompts", "Said", "answer"]
