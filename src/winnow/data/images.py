"""Images: a sequence of RGB pictures with labels, names and credits, decoded one at a time when asked for.

Winnow's own.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

# everything PIL's decoders are known to raise on broken input
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, Image.DecompressionBombError)


class UnreadableImage(ValueError):
    """A file is there and cannot be decoded; the message names it."""


class Images(Dataset):
    """`images[i] -> (PIL RGB image, label or None)`, upright by its EXIF tag; UnreadableImage names a broken file."""

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        read: Callable[[int], Image.Image],
        *,
        lengths: Sequence[int],
        labels: Sequence[int] | None = None,
        split: str = "",
        classes: list[str] | None = None,
        credits: Sequence[str] | None = None,
        mask: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        """`read(i)` opens image i; `lengths` are bytes (they enter the hash); `labels` are all there or None.

        `mask(i)` is uint8 [H, W]: which object each pixel of image i shows, 0 for none.
        """
        assert {len(values) for values in (lengths, labels, credits) if values is not None} == {len(keys)}
        self.name, self.split, self.classes = name, split, classes
        self.labels: list[int] | None = None if labels is None else [int(label) for label in labels]
        self._keys, self._lengths = list(keys), list(lengths)
        self._credits = None if credits is None else list(credits)
        self._read, self._mask = read, mask
        self._places: Sequence[int] = range(len(keys))

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> tuple[Image.Image, int | None]:
        label = None if self.labels is None else self.labels[i]
        return upright(partial(self._read, self._places[i]), f"{self.name}: {self._keys[i]}"), label

    @property
    def label_range(self) -> tuple[int, int] | None:
        """Lowest and highest label; None without labels."""
        return (min(self.labels), max(self.labels)) if self.labels else None

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over keys, byte lengths and labels in order; no pixels are read."""
        digest = hashlib.sha256()
        for i, (key, length) in enumerate(zip(self._keys, self._lengths)):
            digest.update(f"{key}\0{length}\0{'' if self.labels is None else self.labels[i]}\n".encode())
        return digest.hexdigest()[:16]

    def key(self, i: int) -> str:
        """Short id of image i, such as its file name."""
        return self._keys[i]

    def raw(self, i: int) -> Path | bytes:
        """The file image i is in, or its bytes where it is in none of its own; UnreadableImage names a broken one."""
        try:
            with self._read(self._places[i]) as image:
                opened: Any = image
                return Path(opened.filename) if getattr(opened, "filename", "") else opened.fp.getvalue()
        except _BROKEN as error:
            raise _unreadable(f"{self.name}: {self._keys[i]}", error) from None

    def credit(self, i: int) -> str:
        """Author and licence of image i; empty where the data does not say."""
        return "" if self._credits is None else self._credits[i]

    def mask(self, i: int) -> np.ndarray | None:
        """uint8 [H, W]: which object each pixel of image i shows, 0 for none; None where the data has no masks."""
        return None if self._mask is None else self._mask(self._places[i])

    def subset(self, indices: Sequence[int]) -> Images:
        """The same images, only these, in this order."""

        def pick(values: Sequence) -> list:
            return [values[i] for i in indices]

        part = Images(
            self.name,
            pick(self._keys),
            self._read,
            lengths=pick(self._lengths),
            labels=None if self.labels is None else pick(self.labels),
            split=self.split,
            classes=self.classes,
            credits=None if self._credits is None else pick(self._credits),
            mask=self._mask,
        )
        part._places = pick(self._places)
        return part


def upright(read: Callable[[], Image.Image], what: str) -> Image.Image:
    """The RGB image that `read` opens, turned as its EXIF tag says; UnreadableImage says that `what` is broken."""
    try:
        with read() as image:
            return _rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        raise _unreadable(what, error) from None


def _unreadable(what: str, error: BaseException) -> UnreadableImage:
    reason = " ".join(re.sub(r" <_io\.BytesIO[^>]*>", "", str(error)).split()) or type(error).__name__
    return UnreadableImage(f"{what} cannot be decoded ({reason}); replace the file or leave it out")


def check_labels(images: Images, num_classes: int) -> None:
    """ValueError naming the first label that a model with `num_classes` classes cannot give; unlabelled images pass."""
    for i, label in enumerate(images.labels or ()):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"{images.name}: label {label} of {images.key(i)} is not one of the model's {num_classes} classes "
                f"(0 to {num_classes - 1}); use a model with these classes, or relabel the data"
            )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: convert it to 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips nearly everything to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")
