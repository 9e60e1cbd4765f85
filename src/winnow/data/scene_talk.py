"""What is said about the built-in scenes: questions, dialogues, captions, pages of several, and scenes in words alone.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from . import scenes
from .sample import BRIEF, IMAGE, Sample

DRAWN = 8192
"""Scenes kept as pixels: each has eight questions."""


def _scenes(split: str) -> list[Sample]:
    """Eight questions about each scene, each about one object; all scenes are asked one before any is asked a second."""
    seed, asked = scenes.seed_of(split), scenes.questions(split)
    found = []
    for turn in range(len(asked[0])):
        for i, pairs in enumerate(asked):
            at = (i + turn) % len(pairs)  # the first pair of each scene is about its triangle
            one = _asked(f"scene {i}: {pairs[at][0]}", seed, i, [pairs[at]])
            found.append(replace(one, mask=partial(_mask, seed, i, at)))
    return found


def _dialogues(split: str) -> list[Sample]:
    """The same questions, those about one scene in one conversation, in an order of its own."""
    seed, asked = scenes.seed_of(split), scenes.questions(split)
    orders = [np.random.default_rng((seed, i)).permutation(len(pairs)) for i, pairs in enumerate(asked)]
    return [_asked(f"scene {i}", seed, i, [pairs[at] for at in orders[i]]) for i, pairs in enumerate(asked)]


def _asked(key: str, seed: int, i: int, pairs: Sequence[tuple[str, str]]) -> Sample:
    """Questions and answers about scene i, the image in front of the first."""
    turns = [turn for question, answer in pairs for turn in (("human", question), ("gpt", answer))]
    turns[0] = ("human", f"{IMAGE}\n{turns[0][1]}")
    return Sample(key, tuple(turns), (partial(_drawn, seed, i),))


def _captions(split: str) -> list[Sample]:
    """Each scene and its caption, all objects from left to right."""
    seed = scenes.seed_of(split)
    asked = ("human", f"{IMAGE}\n{BRIEF[0]}")
    return [Sample(f"scene {i}", (asked, ("gpt", said)), (partial(_drawn, seed, i),)) for i, said in _said(split)]


def _pages(split: str) -> list[Sample]:
    """Two scenes and their captions in one text."""
    seed, said = scenes.seed_of(split), _said(split)
    return [
        Sample(
            f"scenes {i} and {j}",
            (("text", f"{IMAGE} {one} {IMAGE} {other}"),),
            (partial(_drawn, seed, i), partial(_drawn, seed, j)),
        )
        for (i, one), (j, other) in zip(said[::2], said[1::2])
    ]


def _texts(split: str) -> list[Sample]:
    """The same questions about scenes that are told in words and not shown."""
    return [
        Sample(f"text {i}: {question}", (("human", f"{said}, {question}"), ("gpt", answer)))
        for (i, said), asked in zip(_said(split), scenes.questions(split))
        for question, answer in asked
    ]


def _said(split: str) -> list[tuple[int, str]]:
    return list(enumerate(scenes.captions(scenes.SPLITS[split or "test"][1], split or "test")))


BUILT_IN: dict[str, Callable[[str], list[Sample]]] = {
    "scenes": _scenes, "scene_dialogues": _dialogues, "scene_captions": _captions, "scene_pages": _pages,
    "scene_texts": _texts,
}  # fmt: skip


def _mask(seed: int, i: int, thing: int) -> np.ndarray:
    return (scenes.scene(seed, i).mask == thing + 1).astype(np.uint8)


def _drawn(seed: int, i: int) -> Image.Image:
    return Image.fromarray(_pixels(seed, i))


@lru_cache(DRAWN)
def _pixels(seed: int, i: int) -> np.ndarray:
    return scenes.scene(seed, i).image
