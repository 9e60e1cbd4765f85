"""Images in parquet tables (one file or a folder of shards), fetched one row group at a time.

The column layout is Hugging Face datasets': a struct with `bytes` and `path`, beside an integer label.
"""

from __future__ import annotations

import json
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from winnow.data.images import Images

_IMAGE_NAMES = ("image", "img", "images", "picture", "jpg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")


class _Rows:
    """Opens row i; keeps the encoded row groups used last, up to 256 MiB."""

    def __init__(self, column: str, groups: Sequence[tuple[Path, int, int]]) -> None:
        self.column, self.groups = column, list(groups)
        self.starts = [0]
        for _, _, rows in groups:
            self.starts.append(self.starts[-1] + rows)
        self._fresh()

    def _fresh(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"column": self.column, "groups": self.groups, "starts": self.starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def __call__(self, i: int) -> Image.Image:
        group = bisect_right(self.starts, i) - 1
        value = self._group(group)[i - self.starts[group]].as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not encoded:
            raise ValueError("the row holds no image bytes, and paths are not followed")
        return Image.open(BytesIO(encoded))

    def _group(self, number: int) -> Any:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            path, group, _ = self.groups[number]
            with _parquet_file(path) as file:  # opened anew each time: safe after a fork
                found = _guarded(path, lambda: file.read_row_group(group, columns=[self.column])).column(0)
            self._kept[number] = found
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > 256 * 2**20:
                self._kept.popitem(last=False)
            return found


def open_parquet(
    files: Sequence[Path], name: str, split: str, image_column: str | None, label_column: str | None
) -> Images:
    """Rows of all files in name order; columns are found by their usual names unless named; label_column="": none."""
    files, split = _pick_split(files, name, split)
    groups, labels, keys, lengths = [], [], [], []
    for path in files:
        with _parquet_file(path) as file:
            image, label = _columns(path, file.schema_arrow, image_column, label_column)
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                groups.append((path, group, meta.num_rows))
                lengths += [meta.total_byte_size] * meta.num_rows
            n = file.metadata.num_rows
            keys += _keys(path, file, image, n)
            labels += _labels(path, file, label) if label else []
            found = _class_names(path, file.schema_arrow, label)
    if not keys:
        raise ValueError(f"{name} has no rows in {len(files)} parquet file(s)")
    classes = found if labels and found and len(found) > max(labels) else None
    rows = _Rows(_leaf(image), groups)
    return Images(name, keys, rows, lengths=lengths, labels=labels if label else None, split=split, classes=classes)


def holds_images(path: Path) -> bool:
    """Whether a column of this parquet file that is named as images are has them, not the names of files."""
    with _parquet_file(path) as file:
        return any(_has_bytes(field) for field in file.schema_arrow if field.name in _IMAGE_NAMES)


def open_captions(
    files: Sequence[Path], name: str, split: str, columns: Sequence[str]
) -> tuple[Images, list[str]] | None:
    """The images of `open_parquet` with their captions, from the first of `columns` that is there; None if none is.

    Of several captions the first counts; an empty one stands for none.
    """
    files, split = _pick_split(files, name, split)
    texts: list[str] = []
    for path in files:
        with _parquet_file(path) as file:
            column = next((one for one in columns if one in file.schema_arrow.names), None)
            if column is None:
                return None
            values = _guarded(path, partial(file.read, columns=[column])).column(0).to_pylist()
        firsts = (next(iter(value), None) if isinstance(value, list) else value for value in values)
        texts += [str(first or "").strip() for first in firsts]
    return open_parquet(files, name, split, None, ""), texts


def _parquet_file(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f'{path} needs pyarrow: pip install "winnow-vision[data]"') from None
    return _guarded(path, lambda: ParquetFile(path))


def _guarded(path: Path, act: Any) -> Any:
    try:
        return act()
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors derive from these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a readable parquet file ({reason}): download it again") from None


def _pick_split(files: Sequence[Path], name: str, split: str) -> tuple[list[Path], str]:
    """The files of one split and its name, told by their names: `train-00000-of-00002.parquet`."""

    def split_of(path: Path) -> str:
        found = re.match(r"(train|test|val(?:idation)?|[a-z_]+(?=-\d+-of-\d+))(?![a-z])", path.name.lower())
        return found[1] if found else ""

    there = sorted({split_of(path) for path in files})
    named = ", ".join(filter(None, there)) or "none"
    if split:
        picked = [path for path in files if split_of(path) == split.lower()]
        if not picked:
            raise ValueError(f"{name} has no parquet files of split {split!r} (there are: {named})")
        return picked, split
    if len(there) > 1:
        raise ValueError(f"{name} holds several splits ({named}): choose one with split")
    return list(files), there[0]


def _columns(path: Path, schema: Any, image: str | None, label: str | None) -> tuple[Any, str]:
    """The image field and the label column's name ("" for none)."""
    import pyarrow.types as types

    there = ", ".join(schema.names) or "none"
    image = image.removesuffix(".bytes") if image else image
    usual = [n for n in _IMAGE_NAMES if n in schema.names and _has_bytes(schema.field(n))]
    others = [n for n in schema.names if _has_bytes(schema.field(n))]
    image = image or next(iter(usual + others), None)
    if image is None or image not in schema.names or not _has_bytes(schema.field(image)):
        what = f"no image column {image!r}" if image else "no column of image bytes"
        raise ValueError(f"{path} has {what} (there are: {there}); name the right one as image_column")
    if label is None:
        label = next((n for n in _LABEL_NAMES if n in schema.names), None)
    if label is None or (label and label not in schema.names):
        what = f"no column {label!r}" if label else "no label column"
        raise ValueError(f"{path} has {what} (there are: {there}); name the right one as label_column")
    if label and not types.is_integer(schema.field(label).type):
        raise ValueError(f"{path}: column {label!r} is {schema.field(label).type}, and labels are integers")
    return schema.field(image), label


def _has_bytes(field: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(field.type):
        return field.type.get_field_index("bytes") >= 0
    return types.is_binary(field.type) or types.is_large_binary(field.type)


def _leaf(image: Any) -> str:
    import pyarrow.types as types

    return f"{image.name}.bytes" if types.is_struct(image.type) else image.name


def _labels(path: Path, file: Any, column: str) -> list[int]:
    labels = _guarded(path, lambda: file.read(columns=[column])).column(0).to_pylist()
    if None in labels:
        raise ValueError(f"{path}: {column} of row {labels.index(None)} is empty, and labels are integers")
    return labels


def _keys(path: Path, file: Any, image: Any, n: int) -> list[str]:
    """The `path` beside the bytes where every row has one, else file and row."""
    import pyarrow.types as types

    if types.is_struct(image.type) and image.type.get_field_index("path") >= 0:
        column = _guarded(path, lambda: file.read(columns=[f"{image.name}.path"])).column(0)
        named: list[str] = [row["path"] if row else "" for row in column.to_pylist()]
        if all(named):
            return [Path(key).name if Path(key).is_absolute() else key for key in named]
    return [f"{path.stem}:{row}" for row in range(n)]


def _class_names(path: Path, schema: Any, label: str) -> list[str] | None:
    """From the table's Hugging Face metadata, else from `classes.txt` beside it, one name a line."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][label]["names"]]
    except (KeyError, TypeError, ValueError):
        listed = path.parent / "classes.txt"
        return listed.read_text(encoding="utf-8").split("\n")[:-1] if listed.is_file() else None
