"""Conversations about images: LLaVA's JSON, interleaved JSON lines, the built-in scenes' questions, and mixtures of them.

Formats: Liu et al., "Visual Instruction Tuning", 2023; Zhu et al., Multimodal C4, 2023. Mixtures: Lin et al., VILA, 2024.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import UnreadableImage
from .llava_eval.answers import whole
from .sample import IMAGE, Sample
from .scene_talk import BUILT_IN
from .split import rows_of, split_of

KINDS = (
    f"a .json or .jsonl file of LLaVA's conversations or of interleaved texts, {', '.join(BUILT_IN)}, "
    "or a mixture as in a+b*2+c@0.5"
)
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
MOST_IMAGES = 6
"""Images of an interleaved sample, as VILA takes them."""


@dataclass
class Conversations:
    """A sequence of samples."""

    name: str
    samples: Sequence[Sample]
    split: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over keys and words in order; no pixels are read."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.key}\0{sample.turns}\0{len(sample.images)}\n".encode())
        return digest.hexdigest()[:16]

    def sound(self) -> tuple[Conversations, list[str]]:
        """Only samples whose images can be decoded (each is, once), and what is wrong with the others."""
        good, wrong = [], list[str]()
        for sample in self.samples:
            try:
                sample.pictures()
                good.append(sample)
            except UnreadableImage as error:
                wrong.append(str(error))
        if not good:
            raise ValueError(
                f"{self.name}: none of {len(self)} conversations has images that can be decoded: {wrong[0]}"
            )
        return (replace(self, samples=good) if wrong else self), wrong

    def kinds(self) -> dict[str, int]:
        """Samples by kind, most first."""
        return dict(Counter(sample.kind for sample in self.samples).most_common())


def open_conversations(
    path: str,
    split: str = "",
    limit: int | None = None,
    *,
    images: str | Path | None = None,
    mixtures: Mapping[str, str] | None = None,
) -> Conversations:
    """Open a data set or a mixture; split: a name, [100:] or both as in train[-500:]; limit: at most so many, evenly spaced.

    images: the folder that file names start at, the file's own if left out. mixtures: names that stand for mixtures.
    ValueError or FileNotFoundError, one line, before anything is trained, where a single sample is not as it must be.
    """
    name, part = split_of(split)
    if name and not re.search(rf"\b({'|'.join(BUILT_IN)})\b", " ".join((path, *(mixtures or {}).values()))):
        raise ValueError(f"{path} has no split {name!r}: give train, val or test for scenes, [:100] for files")
    found = mixed(path, partial(_open, split=name, images=images), mixtures or {})
    rows = rows_of(len(found), part, limit)
    if not rows:
        raise ValueError(f"{path} {split}: none of {len(found)} conversations is left")
    return Conversations(_name(path), [found[i] for i in rows], split)


def are_conversations(spec: str) -> bool:
    """`spec` names a file of conversations or of interleaved texts, or a mixture."""
    path = Path(spec).expanduser()
    if not path.is_file():
        return bool(set(spec) & set("+*@"))
    if path.suffix not in (".json", ".jsonl"):
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return re.search(r'"(conversations|text_list)"\s*:', file.read(2**16)) is not None


def mixed(text: str, read: Callable[[str], list[Sample]], names: Mapping[str, str]) -> list[Sample]:
    """The samples of `a+b*2+c@0.5`: all of a, those of b twice, half of those of c; names stand for mixtures themselves."""
    found: list[Sample] = []
    for part in text.split("+"):
        match = re.fullmatch(
            r"\s*(?P<name>[^*@]+?)\s*(?:\*(?P<times>[1-9]\d*)|@(?P<share>0?\.\d+|1(?:\.0*)?))?\s*", part
        )
        if match is None:
            raise ValueError(
                f"mixture {text!r}: {part!r} is not understood; write NAME, NAME*2 (twice) or NAME@0.5 (half of it), "
                "joined by +"
            )
        name = match["name"]
        if name in names:
            others = {
                key: value for key, value in names.items() if key != name
            }  # so that a circle ends as a missing file
            samples = mixed(names[name], read, others)
        else:
            samples = read(name)
        if match["share"]:
            keep = round(len(samples) * float(match["share"]))
            chosen = np.random.default_rng(len(samples)).permutation(len(samples))[:keep]
            samples = [samples[i] for i in sorted(chosen.tolist())]
        found += samples * int(match["times"] or 1)
    return found


def _open(spec: str, split: str, images: str | Path | None) -> list[Sample]:
    if spec in BUILT_IN:
        return BUILT_IN[spec](split)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no conversations in {spec}: give {KINDS}")
    rows = whole(path)
    rows = rows if isinstance(rows, list) else [rows]
    root = path.parent if images is None else Path(images).expanduser()
    found, wrong = [], []
    for number, row in enumerate(rows, 1):
        try:
            found.append(_sample(row, f"{path.stem} {number}", root))
        except (ValueError, FileNotFoundError) as error:
            wrong.append(f"sample {number}: {error}")
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of {len(rows)} samples cannot be used, the first is {wrong[0]}")
    return found


def _sample(row: Any, key: str, root: Path) -> Sample:
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    if "text_list" in row:
        return _interleaved(row, key, root)
    if "conversations" not in row:
        raise ValueError(f"it has neither conversations nor text_list (its keys: {', '.join(row) or 'none'})")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    turns = _turns(row["conversations"])
    shown = sum(words.count(IMAGE) for _, words in turns)
    if shown != len(names):
        raise ValueError(
            f"{len(names)} images and {shown} times {IMAGE}: each image needs one, in the words of a human turn"
        )
    return Sample(str(row.get("id", key)), turns, tuple(_file(root, name) for name in names))


def _turns(rows: Any) -> tuple[tuple[str, str], ...]:
    """Human and gpt in turn; what gpt says before anybody asked is left out, as LLaVA does."""
    if not isinstance(rows, list) or not all(isinstance(one, dict) and {"from", "value"} <= set(one) for one in rows):
        raise ValueError('conversations must be a list of {"from": "human" or "gpt", "value": words}')
    unknown = [one["from"] for one in rows if one["from"] not in ROLES]
    if unknown:
        raise ValueError(f"nobody knows who {unknown[0]!r} is: from is human or gpt")
    turns = [(ROLES[one["from"]], str(one["value"])) for one in rows]
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    if not turns or len(turns) % 2 or any(role != ("human", "gpt")[i % 2] for i, (role, _) in enumerate(turns)):
        raise ValueError("human and gpt must speak in turn, and gpt last")
    return tuple(turns)


def _interleaved(row: dict[str, Any], key: str, root: Path) -> Sample:
    """Sentences, each image in front of the one it was matched with; the first six images, in the text's order."""
    if not isinstance(row["text_list"], list) or not isinstance(row.get("image_info") or [], list):
        raise ValueError("text_list must be a list of sentences, image_info one of objects")
    sentences = [str(text).replace(IMAGE, IMAGE.upper()) for text in row["text_list"]]
    infos = row.get("image_info") or []
    if any(not isinstance(info, dict) or info.get("matched_text_index") not in range(len(sentences)) for info in infos):
        raise ValueError(f"each of image_info needs a matched_text_index, one of its {len(sentences)} sentences")
    infos = sorted(infos, key=lambda info: info["matched_text_index"])[:MOST_IMAGES]
    for info in infos:
        sentences[info["matched_text_index"]] = f"{IMAGE}\n{sentences[info['matched_text_index']]}"
    text = re.sub(rf" *{IMAGE} *", IMAGE, " ".join(sentences))
    while text.rstrip().endswith(IMAGE):  # nothing is said after it
        text, infos = text.rstrip().removesuffix(IMAGE), infos[:-1]
    if not text.strip():
        raise ValueError("it says nothing")
    return Sample(key, (("text", text),), tuple(_matched(info, root) for info in infos))


def _matched(info: dict[str, Any], root: Path) -> Callable[[], Image.Image]:
    if "image_base64" in info:
        return partial(_decoded, info["image_base64"])
    if "image_name" not in info:
        raise ValueError(f"image_info needs image_base64 or image_name (its keys: {', '.join(info)})")
    return _file(root, info["image_name"])


def _file(root: Path, name: Any) -> Callable[[], Image.Image]:
    path = root / str(name)
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}; `images` is the folder that the names start at")
    return partial(Image.open, path)


def _decoded(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text)))


def _name(path: str) -> str:
    return path if path in BUILT_IN or set(path) & set("+*@") else Path(path).stem
