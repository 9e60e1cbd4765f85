"""Images with captions: webdataset shards, tables of files, COCO's captions, classes named in words, the built-in scenes.

Winnow's own; columns are named as img2dataset and Hugging Face datasets do. Phrases: Zheng et al., DreamLIP, 2024.
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
from .parquet import holds_images, open_captions
from .readers import _Files, _lengths, open_images
from .scenes import NAMES, captions, open_scenes
from .shards import is_shards, listed, open_shards
from .split import rows_of, split_of
from .training import Decoded, drawing

FILES = ("file", "filepath", "file_name", "image", "image_path", "path")
TEXTS = ("caption", "text", "title", "TEXT")
KINDS = (
    "a folder of .tar shards (KEY.jpg, KEY.txt), one .tar, {00000..00041}.tar, a .csv, .jsonl or .parquet table with a "
    "column of files and one of captions, parquet with the images in it, COCO's captions_NAME.json, a folder of labelled "
    "images, or scenes"
)
CAPTION = "a photo of a {}."
"""Of an image that has a class and no caption."""
TRIES = 16
"""Stand-ins looked for before an image that cannot be decoded ends the run."""


@dataclass
class Pairs:
    """`images[i]` and `caption(i)` belong together; `failures` are what was left out, one line each."""

    images: Images
    caption: Callable[[int], str]
    failures: Sequence[str] = ()
    shard: np.ndarray | None = None
    """[n] number of the shard each lies in, where they lie in shards."""

    def __len__(self) -> int:
        return len(self.images)

    def sound(self, done: Callable[[int], object] | None = None) -> Pairs:
        """Only pairs whose image can be decoded (each is, once); the others become failures. `done` is told how many."""
        good, failures = [], list(self.failures)
        for i in range(len(self)):
            if done is not None:
                done(i)
            try:
                _ = self.images[i]
                good.append(i)
            except UnreadableImage as error:
                failures.append(str(error))
        return self if len(good) == len(self) else replace(self.subset(good), failures=failures)

    def subset(self, rows: Sequence[int]) -> Pairs:
        """Only these, in this order."""
        shard = None if self.shard is None else self.shard[list(rows)]
        return Pairs(self.images.subset(rows), _Picked(self.caption, list(rows)), self.failures, shard)


@dataclass(frozen=True)
class _Picked:
    caption: Callable[[int], str]
    rows: list[int]

    def __call__(self, i: int) -> str:
        return self.caption(self.rows[i])


def open_pairs(
    spec: str, *, split: str = "", limit: int | None = None, column: str | None = None, caption: str = CAPTION
) -> Pairs:
    """Open images with captions; split: a name, [100:] or both as in train[-500:]; limit: at most so many, evenly spaced.

    column: of captions, where a table does not name it as usual. caption: what is said of an image with a class only.

    ValueError or FileNotFoundError, one line, where nothing usable is there; single bad samples are `failures`.
    """
    name, part = split_of(split)
    path = Path(spec).expanduser()
    if spec in NAMES:
        found = _scenes(spec, name)
    elif files := listed(spec):
        found = _shards(files[0].parent, files, name)
    elif is_shards(path) or is_shards(path / name):
        files = [path] if path.is_file() else sorted((path / name).glob("*.tar"))
        found = _shards(path, files, name)
    elif tables := _parquets(path):
        found = _stored(path, tables, name, column) or _labelled(spec, name, caption)
    elif path.is_file():
        found = _table(path, name, column)
    elif path.is_dir():
        found = _labelled(spec, name, caption)
    else:
        raise FileNotFoundError(f"no images with captions in {spec}: give {KINDS}")
    rows = rows_of(len(found), part, limit)
    if not rows:
        first = f", the first: {found.failures[0]}" if found.failures else ""
        where = f"{spec} {split}".strip()
        raise ValueError(f"{where}: none of {len(found)} pairs is left, {len(found.failures)} failed{first}")
    if len(rows) < len(found):
        found = found.subset(rows)
    found.images.split = split
    return found


def _scenes(name: str, split: str) -> Pairs:
    images = open_scenes(split=split, name=name)
    return Pairs(images, captions(len(images), images.split, name).__getitem__)


def _labelled(spec: str, split: str, caption: str) -> Pairs:
    """The class in words is the caption."""
    images = open_images(spec, split=split)
    if images.labels is None or not images.classes:
        raise ValueError(f"{spec} has neither captions nor named classes: give {KINDS}")
    said = [caption.format(name.replace("_", " ")) for name in images.classes]
    return Pairs(images, [said[label] for label in images.labels].__getitem__)


def _shards(path: Path, files: Sequence[Path], split: str) -> Pairs:
    if not files:
        raise FileNotFoundError(f"{path / split} holds no .tar shards")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"no such shard: {missing[0]} ({len(missing)} of {len(files)} are missing)")
    shards = open_shards(files)
    lengths = shards.places[:, 2].tolist()
    images = Images(path.resolve().stem, shards.keys, shards.image, lengths=lengths, split=split)
    return Pairs(images, shards.caption, shards.failures, shards.places[:, 0])


def _parquets(path: Path) -> list[Path]:
    """The parquet files of this file or folder, if they hold the images themselves."""
    files = [path] if path.suffix.lower() == ".parquet" else sorted(path.glob("*.parquet"))
    files = files or sorted(path.glob("data/*.parquet"))
    return files if files and files[0].is_file() and holds_images(files[0]) else []


def _stored(path: Path, files: Sequence[Path], split: str, column: str | None) -> Pairs | None:
    """Images and captions in parquet files, as img2dataset and Hugging Face datasets write them; None without captions."""
    found = open_captions(files, path.resolve().stem, split, [column] if column else TEXTS)
    if found is None and column:
        raise ValueError(f"{path} has no column {column} in all of its parquet files")
    if found is None:
        return None
    images, texts = found
    failures = [f"{path.name}: {images.key(i)} has no caption" for i, text in enumerate(texts) if not text]
    pairs = Pairs(images, texts.__getitem__, failures)
    return pairs.subset([i for i, text in enumerate(texts) if text]) if failures else pairs


def _table(path: Path, split: str, column: str | None) -> Pairs:
    """Rows with a file and a caption; relative names start at the table's own folder."""
    try:
        rows = READERS.get(path.suffix.lower(), _unknown)(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
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


def _coco(path: Path) -> list[dict[str, Any]]:
    """COCO's captions_NAME.json: images lie in the folder NAME beside it or beside its folder, the first caption counts."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        said = {each["image_id"]: each["caption"] for each in reversed(found["annotations"])}
        names = {each["id"]: each["file_name"] for each in found["images"]}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is not COCO's captions: it needs images and annotations with captions") from None
    name = path.stem.removeprefix("captions_")
    folder = next((here / name for here in (Path(), Path("..")) if (path.parent / here / name).is_dir()), Path())
    return [{"file": str(folder / file), "caption": said.get(number, "")} for number, file in names.items()]


READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet, ".json": _coco}


class PairSet(Dataset):
    """`set[i] -> (pixels [3, H, W], tokens [context], pair, failed 0 or 1)`, a function of (seed, epoch, i) alone.

    Where image i cannot be decoded another pair drawn from the same key takes its place, and `failed` says so.
    phrase: share of the captions of which one phrase, between commas, is told. resample: i is a place in shards that
    are drawn with replacement, another draw in every epoch.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenize: Callable[[Sequence[str]], Tensor],
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        phrase: float = 0.0,
        resample: bool = False,
    ) -> None:
        if resample and pairs.shard is None:
            raise ValueError(f"data.resample draws shards, and {pairs.images.name} has none: leave it out")
        self.pairs, self.tokenize, self.transform, self.phrase = pairs, tokenize, transform, phrase
        self.seed, self.resample = seed, resample
        self._kept = Decoded(pairs.images)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """What is asked for from now on belongs to this epoch; loaders made before go on with theirs."""
        self.epoch = epoch
        self.rows: Sequence[int] | np.ndarray = range(len(self.pairs))
        if self.resample:
            assert self.pairs.shard is not None
            self.rows = drawn(self.pairs.shard, self.seed, epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int, int]:
        others = np.random.default_rng((self.seed, self.epoch, i)).integers(len(self), size=TRIES).tolist()
        row = int(self.rows[i])
        for failed, place in enumerate((row, *others)):
            try:
                image, _ = self._kept[place]
            except UnreadableImage as error:
                why = error
                continue
            with drawing(self.seed, self.epoch, 0, i):
                pixels = self.transform(image)
            return pixels, self.tokenize([self._said(place, i)])[0], row, min(failed, 1)
        raise why

    def _said(self, place: int, i: int) -> str:
        """The caption, or one of its phrases."""
        caption = self.pairs.caption(place)
        random = np.random.default_rng((self.seed, self.epoch, i, 1))
        if random.random() >= self.phrase:
            return caption
        return str(random.choice(caption.split(", ")))


def drawn(shard: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """[n] rows of `shard` [n]: shards drawn with replacement, each whole, as long as there is room."""
    whole = np.split(np.argsort(shard, kind="stable"), np.cumsum(np.unique(shard, return_counts=True)[1])[:-1])
    random, rows, n = np.random.default_rng((seed, epoch, 2)), [], 0
    while n < len(shard):
        rows.append(whole[random.integers(len(whole))])
        n += len(rows[-1])
    return np.concatenate(rows)[: len(shard)]


def groups(pairs: Pairs) -> Tensor:
    """[n] int64: pairs with the same caption have the same number."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(pairs.caption(i), len(numbers)) for i in range(len(pairs))])
