"""Images with captions: webdataset shards, tables of files (CSV, JSON lines, parquet) and the built-in scenes.

Winnow's own; column names are those that img2dataset and Hugging Face datasets use.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .images import Images, UnreadableImage
from .readers import _Files, _lengths
from .scenes import SPLITS, captions, open_scenes
from .shards import is_shards, open_shards
from .training import drawing

FILES = ("file", "filepath", "file_name", "image", "image_path", "path")
TEXTS = ("caption", "text", "title", "TEXT")
KINDS = (
    "a folder of .tar shards (KEY.jpg, KEY.txt), one .tar, a .csv, .jsonl or .parquet table with a column of files and "
    "one of captions, or scenes"
)
TRIES = 16
"""Stand-ins looked for before an image that cannot be decoded ends the run."""


@dataclass
class Pairs:
    """`images[i]` and `caption(i)` belong together; `failures` are what was left out, one line each."""

    images: Images
    caption: Callable[[int], str]
    failures: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def sound(self) -> Pairs:
        """Only pairs whose image can be decoded (each is, once); the others become failures."""
        good, failures = [], list(self.failures)
        for i in range(len(self)):
            try:
                _ = self.images[i]
                good.append(i)
            except UnreadableImage as error:
                failures.append(str(error))
        return self if len(good) == len(self) else replace(self.subset(good), failures=failures)

    def subset(self, rows: Sequence[int]) -> Pairs:
        """Only these, in this order."""
        return Pairs(self.images.subset(rows), _Picked(self.caption, list(rows)), self.failures)


@dataclass(frozen=True)
class _Picked:
    caption: Callable[[int], str]
    rows: list[int]

    def __call__(self, i: int) -> str:
        return self.caption(self.rows[i])


def open_pairs(spec: str, *, split: str = "", limit: int | None = None, column: str | None = None) -> Pairs:
    """Open images with captions; split: a name, [100:] or both as in train[-500:]; limit: at most so many, evenly spaced.

    ValueError or FileNotFoundError, one line, where nothing usable is there; single bad samples are `failures`.
    """
    name, _, rest = split.partition("[")
    path = Path(spec).expanduser()
    if spec == "scenes":
        found = _scenes(name)
    elif is_shards(path):
        found = _shards(path, name)
    elif path.is_file():
        found = _table(path, name, column)
    else:
        raise FileNotFoundError(f"no images with captions in {spec}: give {KINDS}")
    rows: Sequence[int] = range(len(found))
    if rest:
        try:
            first, last = (int(end) if end else None for end in rest.removesuffix("]").split(":"))
        except ValueError:
            raise ValueError(f"split {split!r} is not understood: write train, train[-500:] or [:100]") from None
        rows = rows[first:last]
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    if not rows:
        raise ValueError(f"{spec} {split}: none of {len(found)} pairs is left, {len(found.failures)} failed")
    if len(rows) < len(found):
        found = found.subset(rows)
    found.images.split = split
    return found


def _scenes(split: str) -> Pairs:
    images = open_scenes(split=split)
    return Pairs(images, captions(SPLITS[images.split][1], images.split).__getitem__)


def _shards(path: Path, split: str) -> Pairs:
    """All shards of the folder, or of its sub-folder `split`."""
    folder = path / split if split else path
    files = [path] if path.is_file() else sorted(folder.glob("*.tar"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .tar shards")
    if not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no such shard: {path}")
    shards = open_shards(files)
    lengths = shards.places[:, 2].tolist()
    images = Images(path.resolve().stem, shards.keys, shards.image, lengths=lengths, split=split)
    return Pairs(images, shards.caption, shards.failures)


def _table(path: Path, split: str, column: str | None) -> Pairs:
    """Rows with a file and a caption; relative names start at the table's own folder."""
    rows = READERS.get(path.suffix.lower(), _unknown)(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    image, text = _column(path, rows[0], FILES, None), _column(path, rows[0], TEXTS, column)
    if split:
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise ValueError(f"{path} has no rows whose column split says {split!r}")
    paths, texts, failures = [], [], []
    for number, row in enumerate(rows, 1):
        file, caption = path.parent / str(row[image] or ""), str(row[text] or "").strip()
        if not row[image] or not file.is_file():
            failures.append(f"{path.name}: row {number} has no file, or {row[image]} is not there")
        elif not caption:
            failures.append(f"{path.name}: row {number} has no caption")
        else:
            paths.append(file)
            texts.append(caption)
    images = Images(path.stem, [file.name for file in paths], _Files(paths), lengths=_lengths(path, paths), split=split)
    return Pairs(images, texts.__getitem__, failures)


def _column(path: Path, row: dict[str, Any], usual: Sequence[str], asked: str | None) -> str:
    found = next((name for name in ([asked] if asked else usual) if name in row), None)
    if found is None:
        raise ValueError(f"{path} has no column {asked or ' or '.join(usual)} (there are: {', '.join(row)})")
    return found


def _csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines ({error})") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise ValueError(f'{path} needs pyarrow: pip install "winnow-vision[data]"') from None
    return read_table(path).to_pylist()


def _unknown(path: Path) -> list[dict[str, Any]]:
    raise ValueError(f"{path} is not a table of images with captions: give {KINDS}")


READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


class PairSet(Dataset):
    """`set[i] -> (pixels [3, H, W], tokens [context], i, failed 0 or 1)`, a function of (seed, epoch, i) alone.

    Where image i cannot be decoded another pair drawn from the same key takes its place, and `failed` says so.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenize: Callable[[Sequence[str]], Tensor],
        transform: Callable[[Image.Image], Tensor],
        seed: int,
    ) -> None:
        self.pairs, self.tokenize, self.transform, self.seed, self.epoch = pairs, tokenize, transform, seed, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int, int]:
        others = np.random.default_rng((self.seed, self.epoch, i)).integers(len(self), size=TRIES).tolist()
        for failed, place in enumerate((i, *others)):
            try:
                image, _ = self.pairs.images[place]
            except UnreadableImage as error:
                why = error
                continue
            with drawing(self.seed, self.epoch, 0, i):
                pixels = self.transform(image)
            return pixels, self.tokenize([self.pairs.caption(place)])[0], i, min(failed, 1)
        raise why


def groups(pairs: Pairs) -> Tensor:
    """[n] int64: pairs with the same caption have the same number."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(pairs.caption(i), len(numbers)) for i in range(len(pairs))])
