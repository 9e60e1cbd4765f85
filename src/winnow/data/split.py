"""A split as it is written, `train[-5000:]`: a name and a part; read here for every reader.

Winnow's own, after the spelling of TensorFlow Datasets and Hugging Face's datasets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def split_of(text: str) -> tuple[str, slice]:
    """The name ("" for none) and the part of it; ValueError where it is not of that form."""
    found = re.fullmatch(r"([^\[\]]*)(?:\[(-?\d+)?:(-?\d+)?\])?", text)
    if not found:
        raise ValueError(f"split {text!r} is not understood: write test, train[-5000:] or [:100]")
    return found[1], slice(*(None if end is None else int(end) for end in found.groups()[1:]))


def rows_of(n: int, part: slice, limit: int | None) -> Sequence[int]:
    """The part of n rows; of more than `limit` that many, evenly spaced (a folder is sorted by class)."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give at least 1, or leave it out for all")
    rows = range(n)[part]
    return rows if limit is None or limit >= len(rows) else [rows[i * len(rows) // limit] for i in range(limit)]
