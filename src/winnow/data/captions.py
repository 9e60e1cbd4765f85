"""Images with captions turned into LLaVA's JSON: a question drawn from a seed, the caption as its answer.

Liu et al., "Visual Instruction Tuning", 2023 (LAION-CC-SBU, 558K); the questions are theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from ..view import files
from .images import UnreadableImage
from .pairs import open_pairs
from .sample import BRIEF, IMAGE


def to_llava(
    source: str,
    out: Path,
    *,
    split: str = "",
    limit: int | None = None,
    column: str | None = None,
    seed: int = 0,
    done: Callable[[int], object] | None = None,
) -> tuple[int, list[str]]:
    """Write `out`, one conversation per pair of `open_pairs(source)`; (how many, what was left out, one line each).

    Image names are relative to out's folder. Images that are no files of their own (shards) are put into a folder beside it,
    as they are. Question and place of the image depend on (seed, number of the pair). `done` is told how many are.
    """
    pairs = open_pairs(source, split=split, limit=limit, column=column)
    failures, records, taken = list(pairs.failures), [], set[str]()
    for i in range(len(pairs)):
        if done is not None:
            done(i)
        key = pairs.images.key(i)
        try:
            raw = pairs.images.raw(i)
        except UnreadableImage as error:
            failures.append(str(error))
            continue
        path = _kept(raw, out, key if key not in taken else f"{key}-{i}") if isinstance(raw, bytes) else raw
        taken.add(key)
        random = np.random.default_rng((seed, i))
        question = BRIEF[random.integers(len(BRIEF))]
        asked = f"{IMAGE}\n{question}" if random.integers(2) else f"{question}\n{IMAGE}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": pairs.caption(i)}]
        name = Path(os.path.relpath(path, out.parent)).as_posix()
        records.append({"id": key, "image": name, "conversations": turns})
    if not records:
        raise ValueError(f"{source}: none of {len(pairs)} images can be read; the first: {failures[0]}")
    files.write(out, json.dumps(records, ensure_ascii=False, indent=1).encode())
    return len(records), failures


def _kept(raw: bytes, out: Path, key: str) -> Path:
    """The file that now holds these bytes."""
    kind = ".png" if raw.startswith(b"\x89PNG") else ".webp" if raw[8:12] == b"WEBP" else ".jpg"
    inside = "/".join(part for part in PurePosixPath(key).parts if part not in ("/", ".."))
    return files.write(out.parent / f"{out.stem}_images" / f"{inside}{kind}", raw)
