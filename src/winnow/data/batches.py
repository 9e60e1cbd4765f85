"""Batches of transformed images, decoded ahead by a few threads, once or on every pass.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

Transform = Callable[[Any], Tensor]
Progress = Callable[[int], object]


class Batch(NamedTuple):
    """Pixels [B, 3, H, W], labels [B] int64 (None where an image has none), and the images' indices."""

    images: Tensor
    labels: Tensor | None
    indices: list[int]


def batches(
    images: Any,
    transform: Transform,
    batch_size: int,
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[Batch]:
    """Batches in order, the last may be smaller; `workers` threads decode one batch ahead (0: none).

    progress is called with the number of images done. ValueError on bad settings, at once; UnreadableImage on the way.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size={batch_size}, workers={workers}: give at least 1 and 0")
    return _batches(images, transform, batch_size, workers, device, progress, 0)


def cached(
    images: Any,
    transform: Transform,
    batch_size: int,
    limit_mib: float = 2048,
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Cached:
    """The same batches, to go through many times; kept in memory after the first pass if they need at most limit_mib.

    The tensors of a kept batch are the same on every pass: do not write into them.
    """
    if batch_size < 1 or workers < 0 or limit_mib < 0:
        raise ValueError(f"batch_size={batch_size}, workers={workers}, limit_mib={limit_mib}: give at least 1, 0 and 0")
    return Cached(images, transform, batch_size, limit_mib, workers, device, progress)


class Cached:
    """Iterable of Batch, `len` = batches; `kept` says how many are held in memory."""

    def __init__(
        self,
        images: Any,
        transform: Transform,
        batch_size: int,
        limit_mib: float,
        workers: int,
        device: torch.device | str,
        progress: Progress | None,
    ) -> None:
        self.images, self.transform, self.batch_size = images, transform, batch_size
        self.limit_mib, self.workers, self.device, self.progress = limit_mib, workers, device, progress
        self._kept: list[Batch] = []

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    @property
    def kept(self) -> int:
        """Batches held in memory now."""
        return len(self._kept)

    def __iter__(self) -> Iterator[Batch]:
        fresh: Iterator[Batch] | None = None
        for number in range(len(self)):
            if fresh is None and number < len(self._kept):
                batch = self._kept[number]
            else:
                # once decoding, stay with it: another pass may fill the cache meanwhile
                fresh = fresh or self._decode_from(number)
                batch = next(fresh)
                if number == len(self._kept) and self._fits(batch):
                    self._kept.append(batch)
            if self.progress is not None:
                self.progress(batch.indices[-1] + 1)
            yield _on(batch, self.device)

    def _decode_from(self, number: int) -> Iterator[Batch]:
        first = number * self.batch_size
        return _batches(self.images, self.transform, self.batch_size, self.workers, "cpu", None, first)

    def _fits(self, batch: Batch) -> bool:
        one = batch.images.nbytes / len(batch.indices)
        return one * len(self.images) <= self.limit_mib * 2**20


def _batches(
    images: Any,
    transform: Transform,
    batch_size: int,
    workers: int,
    device: torch.device | str,
    progress: Progress | None,
    start: int,
) -> Iterator[Batch]:
    def load(i: int) -> tuple[Tensor, int | None]:
        image, label = images[i]
        return transform(image), label

    groups = [range(i, min(i + batch_size, len(images))) for i in range(start, len(images), batch_size)]
    pool = ThreadPoolExecutor(workers) if workers else None
    ahead: list[Future] = []
    try:
        for number, group in enumerate(groups):
            if pool is None:
                loaded = [load(i) for i in group]
            else:
                now = ahead or [pool.submit(load, i) for i in group]
                ahead = [pool.submit(load, i) for following in groups[number + 1 : number + 2] for i in following]
                loaded = [future.result() for future in now]
            batch = _on(_stack(loaded, group, images), device)
            if progress is not None:
                progress(group[-1] + 1)
            yield batch
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _stack(loaded: Sequence[tuple[Tensor, int | None]], group: range, images: Any) -> Batch:
    pixels = [image for image, _ in loaded]
    other = next((i for i, image in zip(group, pixels) if image.shape != pixels[0].shape), None)
    if other is not None:
        shapes = list(pixels[0].shape), list(pixels[other - group[0]].shape)
        raise ValueError(
            f"the transform gives {shapes[0]} for image {group[0]} and {shapes[1]} for image {other}: "
            "use one that resizes and crops to one size"
        )
    labels = [label for _, label in loaded if label is not None]
    return Batch(torch.stack(pixels), torch.tensor(labels) if len(labels) == len(loaded) else None, list(group))


def _on(batch: Batch, device: torch.device | str) -> Batch:
    labels = None if batch.labels is None else batch.labels.to(device)
    return Batch(batch.images.to(device), labels, batch.indices)
