"""open_images: one function for CSV lists, image folders, CIFAR folders, parquet files and the built-in photographs.

Winnow's own; the folder layout is torchvision's ImageFolder, the split slices (`train[-5000:]`) are Hugging Face's.
"""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from winnow.data.cifar import cifar_folder, open_cifar
from winnow.data.images import Images
from winnow.data.parquet import open_parquet
from winnow.data.photographs import open_photographs
from winnow.data.scenes import NAMES, open_scenes
from winnow.data.split import rows_of, split_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_KINDS = (
    "a .csv file (columns file, label), a folder of class folders, a folder of images, "
    "a CIFAR folder, a .parquet file or folder, or one of the names scenes, scenes1 and photographs"
)


BUILT_IN: dict[str, Callable[[str], Images]] = {
    **{name: partial(open_scenes, None, name=name) for name in NAMES},
    "photographs": open_photographs,
}


@dataclass(frozen=True)
class _Files:
    """Opens the i-th path; a value, so that it travels to worker processes."""

    paths: Sequence[Path]

    def __call__(self, i: int) -> Image.Image:
        return Image.open(self.paths[i])


def open_images(
    spec: str,
    *,
    split: str = "",
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
) -> Images:
    """Open labelled or unlabelled images; nothing is decoded yet.

    split: `test`, `train[-5000:]` or `[:100]`; a name picks the CSV rows, sub-folder or files of that split.
    label_column="" opens a table without labels. limit: at most so many, evenly spaced (a folder is sorted by class).
    ValueError or FileNotFoundError, one line each, if anything is missing, empty or malformed.
    """
    name, part = split_of(split)
    images = _open(str(spec), name, image_column, label_column)
    total = len(images)
    rows = rows_of(total, part, limit)
    if not rows:
        raise ValueError(f"split {split!r} selects none of the {total} images of {images.name}")
    if len(rows) < total:
        images = images.subset(rows)
    images.split += split[len(name) :]
    return images


def _open(spec: str, split: str, image_column: str | None, label_column: str | None) -> Images:
    """Choose the reader; columns asked of something without columns are refused."""
    path = Path(spec).expanduser()
    named = spec in BUILT_IN  # the name wins; a folder called so is ./photographs
    if path.suffix.lower() == ".csv" and path.is_file():
        return _open_csv(path, split, image_column or "file", "label" if label_column is None else label_column)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return open_parquet([path], path.stem, split, image_column, label_column)
    tables = [] if named else sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if tables:
        return open_parquet(tables, _name(path), split, image_column, label_column)
    if image_column is not None:
        raise ValueError(f"{spec} has no columns: image_column is for .csv and .parquet")
    cifar = None if named else cifar_folder(path)
    if cifar:
        return open_cifar(cifar, split, label_column)
    if label_column is not None:
        raise ValueError(f"{spec} has no columns: label_column is for .csv, .parquet and CIFAR")
    if named:
        return BUILT_IN[spec](split)
    if path.is_dir():
        return _open_folder(path, split)
    if path.exists():
        raise ValueError(f"{spec} is not images that Winnow reads: give {_KINDS}")
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"no such file or folder: {spec}")
    raise ValueError(f"unknown data {spec!r}: give {_KINDS}")


def _name(path: Path) -> str:
    return path.resolve().name


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = list(reader)
            return list(reader.fieldnames or ()), rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error}): save it again as one") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def _open_csv(path: Path, split: str, image_column: str, label_column: str) -> Images:
    columns, rows = _read_table(path)
    for what, column in (("image_column", image_column), ("label_column", label_column)):
        if column and column not in columns:
            there = ", ".join(columns) or "none"
            raise ValueError(f"{path} has no column {column!r} (there are: {there}); name the right one as {what}")
    if split:
        if "split" not in columns:
            raise ValueError(f"{path} has no column 'split' to pick {split!r} from; leave split out")
        known = sorted({row["split"] or "" for row in rows})
        rows = [row for row in rows if row["split"] == split]
        if not rows:
            raise ValueError(f"{path} has no rows of split {split!r} (there are: {', '.join(known)})")
    if not rows:
        raise ValueError(f"{path} has no rows below its header: list at least one image")
    labels = [_label(path, row, label_column) for row in rows] if label_column else None
    names = [row[image_column] or "" for row in rows]
    files = [path.parent / name for name in names]
    return Images(
        path.stem,
        [file.name if Path(name).is_absolute() else name for name, file in zip(names, files)],
        _Files(files),
        lengths=_lengths(path, files),
        labels=labels,
        split=split,
        classes=_class_names(rows, labels),
        credits=[_credit(row) for row in rows],
    )


def _label(path: Path, row: dict[str, str], column: str) -> int:
    try:
        return int(row[column])
    except (ValueError, TypeError):
        first = next(iter(row.values()))
        raise ValueError(
            f"{path}: {column} {row[column]!r} in the row of {first!r} is not an integer; "
            "labels are class numbers from 0, in the model's order"
        ) from None


def _lengths(path: Path, files: Sequence[Path]) -> list[int]:
    """Bytes of every file listed; FileNotFoundError says how many are absent."""
    lengths, absent = [], []
    for file in files:
        try:
            found = os.stat(file)
            lengths.append(found.st_size)
            if not stat.S_ISREG(found.st_mode):
                absent.append(file)
        except (OSError, ValueError):  # ValueError: a null character in the name
            absent.append(file)
    if absent:
        raise FileNotFoundError(
            f"{path} lists {len(absent)} of {len(files)} files that are not there, the first is {absent[0]}; "
            "relative names start at the CSV's own folder"
        )
    return lengths


def _class_names(rows: list[dict[str, str]], labels: list[int] | None) -> list[str] | None:
    """Names by label, empty for labels that do not occur."""
    if labels is None or "class_name" not in rows[0] or min(labels) < 0:
        return None
    names = [""] * (max(labels) + 1)
    for row, label in zip(rows, labels):
        names[label] = row["class_name"] or ""
    return names


def _credit(row: dict[str, str]) -> str:
    wanted = ("author", "license", "licence", "source")
    return ", ".join(row[column].strip() for column in wanted if row.get(column))


def _open_folder(root: Path, split: str) -> Images:
    """Class folders in sorted order are labels 0, 1, ...; a folder of bare images has no labels."""
    folder = root / split
    if not folder.is_dir():
        there = ", ".join(_folders(root)) or "none"
        raise FileNotFoundError(f"{root} has no folder for split {split!r} (there are: {there})")
    classes = _folders(folder)
    files = [(name, _images_under(folder / name)) for name in classes]
    flat = sorted(Path(entry.path) for entry in os.scandir(folder) if _is_image(entry.name) and entry.is_file())
    if flat and any(found for _, found in files):
        raise ValueError(f"{folder} has images both beside and inside its sub-folders: move them into class folders")
    if classes and set(map(str.lower, classes)) <= _SPLITS:
        raise ValueError(f"{folder} holds the splits {', '.join(classes)}: choose one with split")
    tables = sorted(file.name for file in folder.glob("*.csv"))
    if len(classes) == 1 and tables:  # one "class" beside a list: the labels are in the list
        raise ValueError(f"{folder} has one sub-folder and the list {tables[0]}: open {folder / tables[0]}")
    paths = flat or [file for _, found in files for file in found]
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)}): give {_KINDS}")
    return Images(
        _name(root),
        [file.relative_to(folder).as_posix() for file in paths],
        _Files(paths),
        lengths=_lengths(folder, paths),
        labels=None if flat else [label for label, (_, found) in enumerate(files) for _ in found],
        split=split,
        classes=None if flat else classes,
    )


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _images_under(folder: Path) -> list[Path]:
    walked = os.walk(folder, followlinks=True)
    return sorted(Path(where, name) for where, _, names in walked for name in names if _is_image(name))
