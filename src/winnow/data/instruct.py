"""Samples for instruction tuning: ids, labels and pixels of each, batches of them, and batches of one modality.

Winnow's own; grouping by modality and length as in LLaVA-1.5 (Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .conversations import Conversations
from .dialogue import IGNORE, encode, spoken
from .images import UnreadableImage
from .sample import Sample

TRIES = 16
"""Stand-ins looked for before an image that cannot be decoded ends the run."""


class Told(NamedTuple):
    """One sample as the model sees it."""

    ids: Tensor
    labels: Tensor
    pixels: list[Tensor]
    """Of each image [3, H, W]."""
    place: int
    failed: int
    """1 where another sample took its place."""


@dataclass(frozen=True)
class Speech:
    """How a sample is put into tokens and pixels."""

    processor: Any
    template: str
    slots: int
    longest: int
    pixels: Callable[[Image.Image], Tensor]

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Ids [L], labels [L], pixels of the images that are left; UnreadableImage where one cannot be decoded."""
        ids, labels, left = self.words(sample)
        return ids, labels, [self.pixels(image) for image in sample.pictures()[:left]]

    def words(self, sample: Sample) -> tuple[Tensor, Tensor, int]:
        """Ids [L], labels [L], images that are left; ValueError where the template does not fit."""
        pieces = spoken(sample, self.template, self.processor)
        return encode(pieces, self.processor.tokenizer, self.processor.image_token, self.slots, self.longest)

    def check(self, conversations: Conversations) -> None:
        """ValueError unless the template fits and leaves something to learn, by the first few samples.

        `plain` is asked of all of them: it costs nothing, and one dialogue among many would end the run on its way.
        """
        for sample in conversations.samples if self.template == "plain" else ():
            spoken(sample, self.template, self.processor)
        first = conversations.samples[:TRIES]
        if not any(bool((self.words(sample)[1] != IGNORE).any()) for sample in first):
            raise ValueError(
                f"{conversations.name}: instruct.max_length={self.longest} cuts every answer off (an image has {self.slots} "
                f"tokens, {first[0].key} {len(replace(self, longest=10**9).words(first[0])[0])} in all); raise it"
            )


class ConversationSet(Dataset):
    """`set[i] -> Told`, a function of (seed, epoch, i) alone; where an image cannot be decoded another sample stands in."""

    def __init__(self, conversations: Conversations, speech: Speech, seed: int) -> None:
        self.conversations, self.speech, self.seed, self.epoch = conversations, speech, seed, 0

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, i: int) -> Told:
        others = np.random.default_rng((self.seed, self.epoch, i)).integers(len(self), size=TRIES).tolist()
        for failed, place in enumerate((i, *others)):
            try:
                return Told(*self.speech(self.conversations[place]), i, min(failed, 1))
            except UnreadableImage as error:
                why = error
        raise why


def joined(pad: int, size: tuple[int, int], samples: Sequence[Told]) -> tuple[Tensor, ...]:
    """Ids, mask, labels [B, L] (padded on the right), pixels [B, most, 3, H, W], images [B], indices [B], failed [B]."""
    ids = pad_sequence([one.ids for one in samples], batch_first=True, padding_value=pad)
    labels = pad_sequence([one.labels for one in samples], batch_first=True, padding_value=IGNORE)
    mask = pad_sequence([torch.ones_like(one.ids) for one in samples], batch_first=True)
    counts = torch.tensor([len(one.pixels) for one in samples])
    pixels = torch.zeros(len(samples), int(counts.max()), 3, *size)
    for row, one in enumerate(samples):
        for place, image in enumerate(one.pixels):
            pixels[row, place] = image
    indices, failed = (torch.tensor(values) for values in zip(*((one.place, one.failed) for one in samples)))
    return ids, mask, labels, pixels, counts, indices, failed


class Grouped:
    """Lists of sample numbers, one per step from `start` on: each global batch of samples with, or without images.

    Within a batch the longest are dealt out first, one to each process, so that they have as much to do. What does not fill
    a batch of its kind fills mixed ones at the end, and the rest is left out, as in `Order`.
    """

    def __init__(
        self, words: Sequence[int], shown: Sequence[bool], *, seed: int, epoch: int, batch: int, rank: int, world: int,
        start: int = 0,
    ) -> None:  # fmt: skip
        self.words, self.shown = np.asarray(words), np.asarray(shown)
        self.batch, self.rank, self.world, self.start = batch, rank, world, start
        self.key = seed, epoch

    def __len__(self) -> int:
        return max(0, len(self.words) // self.batch - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng(self.key)
        order = random.permutation(len(self.words))
        kinds = [order[self.shown[order]], order[~self.shown[order]]]
        whole = [kind[: len(kind) // self.batch * self.batch].reshape(-1, self.batch) for kind in kinds]
        rest = np.concatenate([kind[part.size :] for kind, part in zip(kinds, whole)])
        batches = np.concatenate(whole)[random.permutation(sum(map(len, whole)))]
        last = rest[: len(rest) // self.batch * self.batch].reshape(-1, self.batch)
        for one in np.concatenate([batches, last])[self.start :]:
            one = one[np.argsort(-self.words[one], kind="stable")]
            yield one[self.rank :: self.world].tolist()
