"""CIFAR-10 and CIFAR-100 as distributed: Python pickles, opened with an unpickler that can build arrays and no more.

Data and format: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from winnow.data.images import Images

_ALLOWED = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (core, name)
        for core in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    *((core, "_frombuffer") for core in ("numpy.core.numeric", "numpy._core.numeric")),
    *(("builtins", name) for name in ("bytearray", "bytes", "dict", "list", "tuple", "int", "str")),
}
_TRAIN_10 = [f"data_batch_{i}" for i in range(1, 6)]


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return super().find_class(module, name)


@dataclass(frozen=True)
class _Pixels:
    """[n, 3072] uint8, channel first."""

    data: np.ndarray

    def __call__(self, i: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.data[i].reshape(3, 32, 32).transpose(1, 2, 0)))


def cifar_folder(path: Path) -> Path | None:
    """The folder with the CIFAR pickles: `path` or its usual sub-folder; None if there are none."""
    for folder in (path, path / "cifar-100-python", path / "cifar-10-batches-py"):
        if _splits(folder):
            return folder
    return None


def open_cifar(folder: Path, split: str, label_column: str | None = None) -> Images:
    """`train` or `test` (default: test where it is there); labels are `fine_labels`, or what label_column names."""
    splits = _splits(folder)
    split = split or ("test" if "test" in splits else "train")
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r} (there are: {', '.join(splits)})")
    data, labels, keys = [], [], []
    for name in splits[split]:
        part = _load(folder / name)
        data.append(_pixels(folder / name, part))
        labels += _labels(folder / name, part, label_column, len(data[-1]))
        named = part.get("filenames") or [f"{name}/{i}" for i in range(len(data[-1]))]
        keys += [key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key) for key in named]
    pixels = np.concatenate(data)
    if not len(pixels):
        raise ValueError(f"{folder} has no images in split {split!r}")
    classes = _class_names(folder, label_column)
    name = folder.resolve().name
    lengths = [pixels.shape[1]] * len(pixels)
    return Images(name, keys, _Pixels(pixels), lengths=lengths, labels=labels, split=split, classes=classes)


def _splits(folder: Path) -> dict[str, list[str]]:
    """Which files make up which split, of those that are there."""
    known = {"train": [["train"], _TRAIN_10], "test": [["test"], ["test_batch"]]}
    found = {}
    for split, options in known.items():
        for names in options:
            there = [name for name in names if (folder / name).is_file()]
            if there and len(there) < len(names):
                raise FileNotFoundError(f"{folder} has {len(there)} of the {len(names)} files data_batch_1 to 5")
            if there:
                found[split] = there
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            found = _ArraysOnly(file, encoding="bytes").load()
    except Exception as error:  # a broken pickle may raise anything at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a CIFAR pickle ({reason}): download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a CIFAR pickle (no dictionary): download it again")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}


def _pixels(path: Path, part: dict[str, Any]) -> np.ndarray:
    data = part.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise ValueError(f"{path} has no data of n x 3072 bytes (there are: {', '.join(part)}); is it CIFAR?")
    return data


def _labels(path: Path, part: dict[str, Any], column: str | None, n: int) -> list[int]:
    column = column or ("fine_labels" if "fine_labels" in part else "labels")
    if column not in part:
        raise ValueError(f"{path} has no {column!r} (there are: {', '.join(part)})")
    try:
        labels = [int(label) for label in part[column]]
    except (TypeError, ValueError):
        raise ValueError(f"{path}: {column!r} is not a list of integers") from None
    if len(labels) != n:
        raise ValueError(f"{path} has {len(labels)} labels for {n} images: download it again")
    return labels


def _class_names(folder: Path, column: str | None) -> list[str] | None:
    for file in ("meta", "batches.meta"):
        if (folder / file).is_file():
            meta = _load(folder / file)
            wanted = f"{(column or 'fine_labels').removesuffix('s')}_names"
            names = meta.get(wanted) or meta.get("label_names")
            return [name.decode() if isinstance(name, bytes) else str(name) for name in names] if names else None
    return None
