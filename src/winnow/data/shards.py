"""Shards in img2dataset's webdataset layout (tar files of KEY.jpg, KEY.txt, KEY.json), read at any place.

Beaumont, img2dataset, 2021. Headers are read once, so a sample is a place in a file and an order of samples is exact.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTION = "txt"


class Piece(NamedTuple):
    """Where a file lies in its shard, in bytes."""

    offset: int
    length: int


@dataclass
class Shards:
    """Samples of many shards in order, and what could not be used; `image(i)` and `caption(i)` read sample i."""

    paths: list[Path]
    keys: list[str] = field(default_factory=list)
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 5), np.int64))
    """[n, 5] shard, offset and length of the image, offset and length of the caption."""
    failures: list[str] = field(default_factory=list)
    """One line for every sample or shard that is not whole."""

    def image(self, i: int) -> Image.Image:
        """The image of sample i, not decoded yet."""
        shard, offset, length = self.places[i, :3].tolist()
        return Image.open(BytesIO(self._read(shard, offset, length)))

    def caption(self, i: int) -> str:
        """The caption of sample i."""
        shard, offset, length = self.places[i, [0, 3, 4]].tolist()
        return self._read(shard, offset, length).decode("utf-8", errors="replace").strip()

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        with open(self.paths[shard], "rb") as file:  # opened anew each time: safe after a fork
            file.seek(offset)
            return file.read(length)


def listed(spec: str) -> list[Path]:
    """The files of `laion/{00000..00041}.tar` or `a.tar::b.tar`, as webdataset and open_clip write them; [] of others."""
    if "::" in spec:
        return [file for part in spec.split("::") for file in listed(part) or [Path(part).expanduser()]]
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)", spec)
    if match is None:
        return []
    numbers = range(int(match[2]), int(match[3]) + 1)
    return [Path(f"{match[1]}{number:0{len(match[2])}}{match[4]}").expanduser() for number in numbers]


def is_shards(path: Path) -> bool:
    """Whether this is a tar file, or a folder with some."""
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def open_shards(paths: Sequence[Path]) -> Shards:
    """Look up every sample of these tar files; a damaged one is a failure, never an error."""
    found = Shards(list(paths))
    rows: list[tuple[int, ...]] = []
    for number, path in enumerate(found.paths):
        samples, wrong = _look_up(path)
        found.failures += wrong
        for key, pieces in samples.items():
            picture = next((pieces[kind] for kind in PICTURES if kind in pieces), None)
            reason = _lacking(picture, pieces.get(CAPTION))
            if reason:
                found.failures.append(f"{path.name}: {key} {reason}")
            else:
                assert picture is not None
                found.keys.append(f"{path.stem}/{key}")
                rows.append((number, *picture, *pieces[CAPTION]))
    found.places = np.array(rows, np.int64).reshape(-1, 5)
    return found


def _look_up(path: Path) -> tuple[dict[str, dict[str, Piece]], list[str]]:
    """Samples by key in the shard's order, and what is wrong with the shard."""
    samples: dict[str, dict[str, Piece]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                *folders, name = (part for part in PurePosixPath(member.name).parts if part not in ("/", ".."))
                key, _, kind = name.partition(".")
                pieces = samples.setdefault("/".join((*folders, key)), {})
                if member.offset_data + member.size <= size:
                    pieces[kind.lower()] = Piece(member.offset_data, member.size)
            if size < tar.offset + tarfile.BLOCKSIZE:  # a whole one ends with empty blocks
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError, ValueError) as error:
        return samples, [f"{path.name} ends early or is damaged ({error})"]
    return samples, []


def _lacking(picture: Piece | None, caption: Piece | None) -> str:
    if picture is None or not picture.length:
        return "has no image"
    return "has no caption" if caption is None or not caption.length else ""
