"""Training images: augmentation, the order of an epoch, Mixup and CutMix, each a function of its seed and place alone.

Transforms: torchvision v2, RandAugment of timm. Repeated augmentation: Hoffer et al., "Augment your batch", 2020.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from .images import Images, UnreadableImage

CACHE_MIB = 1024
"""Decoded images of one size are kept up to this much: all of CIFAR is 147 MiB."""
Range = tuple[float, float]


class Augment(BaseModel):
    """How a training image is changed; nothing is, unless asked for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    size: int | None = Field(None, ge=1, description="pixels of a side; the model's own if left out")
    scale: Range | None = Field(None, description="random resized crop of so much of the area, as in [0.08, 1]")
    crop_padding: int = Field(0, ge=0, description="pad by so many black pixels, then a random crop")
    flip: float = Field(0.0, ge=0, le=1, description="chance of a mirrored image")
    randaugment: str | None = Field(None, description="timm's spelling, as in rand-m9-mstd0.5")
    autoaugment: Literal["imagenet", "cifar10", "svhn"] | None = Field(None, description="the policy learned there")
    mixup: float = Field(0.0, ge=0, description="Mixup's alpha; with cutmix too, one of them for each batch")
    cutmix: float = Field(0.0, ge=0, description="CutMix's alpha")
    random_erasing: float = Field(0.0, ge=0, le=1, description="chance of an erased rectangle")
    repeats: int = Field(1, ge=1, description="differently augmented copies of an image in a batch, fewer images in it")
    interpolation: Literal["bilinear", "bicubic"] = Field("bicubic", description="of every resize and rotation")

    @field_validator("scale")
    @classmethod
    def _share(cls, value: Range | None) -> Range | None:
        if value is not None and not 0 < value[0] <= value[1] <= 1:
            raise ValueError("give two shares of the area, the smaller one first, as in [0.08, 1]")
        return value

    @field_validator("randaugment")
    @classmethod
    def _spelled(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                rand_augment_transform(value, {})
            except (AssertionError, ValueError, KeyError, IndexError):
                raise ValueError("timm spells it rand-m9-mstd0.5 (magnitude 9 of 10, its deviation 0.5)") from None
        return value

    @model_validator(mode="after")
    def _one_of_each(self) -> Augment:
        if self.scale is not None and self.crop_padding:
            raise ValueError("give scale (random resized crop) or crop_padding (pad and crop), not both")
        if self.randaugment is not None and self.autoaugment is not None:
            raise ValueError("give randaugment or autoaugment, not both")
        return self

    def transform(self, size: tuple[int, int], mean: Range | Any, std: Range | Any) -> Callable[[Image.Image], Tensor]:
        """PIL RGB image -> [3, H, W] float32, normalised; draws from the global generators."""
        how = InterpolationMode(self.interpolation)
        steps: list[Callable] = []
        if self.scale is not None:
            steps.append(v2.RandomResizedCrop(size, scale=self.scale, interpolation=how))
        else:  # the size of the data is left alone where it is the wanted one
            steps += [v2.Resize(max(size), interpolation=how), v2.CenterCrop(size)]
        if self.crop_padding:
            steps.append(v2.RandomCrop(size, padding=self.crop_padding))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.randaugment is not None:
            steps.append(_randaugment(self.randaugment, size, mean, how))
        if self.autoaugment is not None:
            steps.append(v2.AutoAugment(AutoAugmentPolicy(self.autoaugment), interpolation=how))
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        if self.random_erasing:
            steps.append(v2.RandomErasing(self.random_erasing))
        return v2.Compose(steps)


class TrainSet(Dataset):
    """`set[k] -> (pixels [3, H, W], label, index)`, a function of (seed, epoch, k) whichever process asks.

    k = index + len(self) * copy, copy > 0 being another augmentation of the same image (see `Order`).
    """

    def __init__(
        self,
        images: Images,
        augment: Augment,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        cache_mib: float = CACHE_MIB,
    ) -> None:
        self.images, self.seed, self.epoch = images, seed, 0
        self.transform = augment.transform(size, mean, std)
        self._kept = Decoded(images, cache_mib)

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """What is asked for from now on belongs to this epoch; loaders made before go on with theirs."""
        self.epoch = epoch

    def __getitem__(self, k: int) -> tuple[Tensor, int | None, int]:
        copy, i = divmod(k, len(self))
        image, label = self._kept[i]
        with drawing(self.seed, self.epoch, copy, i):
            return self.transform(image), label, i


class Order:
    """Lists of `TrainSet` keys, one per step from `start` on: a permutation of each epoch, the rest of it left out.

    Every world size sees the same global batches, in shares that follow each other by rank. With repeats, copies of an
    image are in one batch, as far from each other as they can be: on other processes, and not mixed with each other.
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        epoch: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
        start: int = 0,
    ) -> None:
        if batch % world or not 0 < batch <= n or not 0 <= rank < world or repeats < 1:
            raise ValueError(
                f"Order(n={n}, batch={batch}, rank={rank}, world={world}, repeats={repeats}): give a batch of at most n "
                "that divides into the processes"
            )
        self.n, self.batch, self.rank, self.world, self.repeats, self.start = n, batch, rank, world, repeats, start
        self.key = seed, epoch

    def __len__(self) -> int:
        return max(0, self.n // self.batch - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.world
        order = np.random.default_rng(self.key).permutation(self.n)
        for step in range(self.start, self.n // self.batch):
            place = np.arange(step * self.batch, (step + 1) * self.batch)
            place = np.concatenate([place[first :: self.repeats] for first in range(self.repeats)])
            keys = order[place // self.repeats] + self.n * (place % self.repeats)
            yield keys[self.rank * share : (self.rank + 1) * share].tolist()


def mixer(augment: Augment, classes: int, seed: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """(images [B, 3, H, W], labels [B], step) -> the images mixed and targets [B, classes]; labels [B] if nothing mixes.

    The amount is a function of (seed, step), the same for a whole batch; every process mixes within its share.
    """
    kinds: list[Callable] = []
    if augment.mixup:
        kinds.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        kinds.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    if not kinds:
        return lambda images, labels, step: (images, labels)
    choice = v2.RandomChoice(kinds)

    def mix(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        with drawing(seed, step):
            return choice(images, labels)

    return mix


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """The global CPU generators of Python, NumPy and torch start from `key`, and are as before afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    try:
        random.seed(first)
        np.random.seed(second)
        torch.default_generator.manual_seed(third)  # torch.manual_seed would also seed the accelerators
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _randaugment(text: str, size: tuple[int, int], mean: Any, how: InterpolationMode) -> Callable:
    """timm's, with its own settings for the size and the fill colour (timm.data.transforms_factory)."""
    fill = tuple(min(255, round(255 * channel)) for channel in mean)
    words = {"translate_const": int(min(size) * 0.45), "img_mean": fill, "interpolation": str_to_pil_interp(how.value)}
    return rand_augment_transform(text, words)


class Decoded:
    """`decoded[i] -> (PIL RGB image, label)`, kept as bytes after the first time where all fit into limit_mib.

    The memory is shared with forked loader processes, so that what one of them decodes in an epoch is there in the next.
    """

    def __init__(self, images: Images, limit_mib: float = CACHE_MIB) -> None:
        self.images = images
        self.pixels = None
        try:
            width, height = images[0][0].size
        except UnreadableImage:  # who asks for it is told
            return
        shape = len(images), height, width, 3
        if int(np.prod(shape)) <= limit_mib * 2**20:
            self.pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
            self.done = np.frombuffer(mmap.mmap(-1, len(images)), np.bool_)

    def __getitem__(self, i: int) -> tuple[Image.Image, int | None]:
        if self.pixels is not None and self.done[i]:
            labels = self.images.labels
            return Image.fromarray(self.pixels[i]), None if labels is None else labels[i]
        image, label = self.images[i]
        if self.pixels is not None and image.size == self.pixels.shape[2:0:-1]:
            self.pixels[i] = np.asarray(image)
            self.done[i] = True  # after the pixels: another process may look at once
        return image, label
