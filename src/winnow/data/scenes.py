"""Scenes: coloured shapes on a dark texture, drawn from a seed; labels, captions, questions and object masks.

Winnow's own. Every answer is in one small object among eight, so averaging all patches cannot answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from .images import Images

SIZE, CELLS = 96, 6
"""Pixels of a side; objects stand in cells of a 6 x 6 grid."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 50),
    "magenta": (220, 60, 210),
    "cyan": (60, 215, 225),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
}
SHAPES = ("triangle", "disc", "ring", "square", "frame", "diamond", "plus", "cross")
NAMES = {"scenes": 8, "scenes1": 1}
"""Data sets of scenes, and how many objects each shows."""
SPLITS = {"train": (0, 5000), "val": (1, 500), "test": (2, 500)}
"""Seed and how many scenes."""


@dataclass(frozen=True)
class Thing:
    """One object: what, which colour, where (pixels), how large (pixels)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One image, its objects, and which object each pixel shows."""

    image: np.ndarray
    """uint8 [96, 96, 3]"""
    things: tuple[Thing, ...]
    mask: np.ndarray
    """uint8 [96, 96]: 0 = background, k = the k-th object, counting from 1."""

    @property
    def label(self) -> int:
        """Index of the triangle's colour; where there is one object, of its shape."""
        return _label(self.things)

    @property
    def caption(self) -> str:
        """All objects, left to right."""
        return _caption(self.things)

    @property
    def questions(self) -> list[tuple[str, str]]:
        """(question, answer) about each object."""
        return _questions(self.things)


@dataclass(frozen=True)
class _Plan:
    """What is drawn at random for one scene, before any pixel is."""

    coarse: np.ndarray
    grain: np.ndarray
    things: tuple[Thing, ...]
    light: tuple[float, ...]


def scene(seed: int, i: int, things: int = 8) -> Scene:
    """Scene i of a seed, whatever else is drawn; ValueError unless 1 <= things <= 12.

    The first eight objects have eight different shapes, the triangle among them; more repeat shapes other than it. One
    alone has any shape.
    """
    plan = _plan(seed, i, things)
    texture = np.stack([np.asarray(Image.fromarray(plan.coarse[..., c]).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
                        for c in range(3)], -1)  # fmt: skip
    image = 15 + 55 * texture.clip(0, 1) + plan.grain
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for number, (thing, light) in enumerate(zip(plan.things, plan.light), 1):
        inside = covers(thing)
        image[inside] = np.array(COLOURS[thing.colour]) * light
        mask[inside] = number
    return Scene(image.clip(0, 255).astype(np.uint8), plan.things, mask)


def _plan(seed: int, i: int, things: int) -> _Plan:
    if not 1 <= things <= 12:
        raise ValueError(f"scene(things={things}): from 1 to 12 objects fit")
    random = np.random.default_rng([seed, i])
    coarse = random.uniform(0, 1, (4, 4, 3)).astype(np.float32)
    grain = random.normal(0, 4, (SIZE, SIZE, 1))
    shapes = [SHAPES[0], *random.permutation(SHAPES[1:])][:things] if things > 1 else [random.choice(SHAPES)]
    shapes += list(random.choice(SHAPES[1:], max(0, things - len(SHAPES))))
    cells = random.choice(CELLS * CELLS, things, replace=False)
    step, placed, light = SIZE / CELLS, [], []
    for shape, cell in zip(shapes, cells):
        row, column = divmod(int(cell), CELLS)
        x, y = ((place + 0.5) * step + random.uniform(-1, 1) for place in (column, row))
        colour, radius = str(random.choice(list(COLOURS))), float(random.uniform(5, 7))
        placed.append(Thing(str(shape), colour, float(x), float(y), radius))
        light.append(random.uniform(0.85, 1.0))
    return _Plan(coarse, grain, tuple(placed), tuple(light))


def _label(things: tuple[Thing, ...]) -> int:
    if len(things) == 1:
        return SHAPES.index(things[0].shape)
    return list(COLOURS).index(next(thing.colour for thing in things if thing.shape == SHAPES[0]))


def _caption(things: tuple[Thing, ...]) -> str:
    ordered = sorted(things, key=lambda thing: thing.x)
    return ", ".join(f"a {thing.colour} {thing.shape}" for thing in ordered)


def _questions(things: tuple[Thing, ...]) -> list[tuple[str, str]]:
    return [(f"what colour is the {thing.shape}?", thing.colour) for thing in things]


def seed_of(split: str) -> int:
    """The seed of a split, test if it is ""; ValueError on an unknown one."""
    if (split or "test") not in SPLITS:
        raise ValueError(f"scenes have the splits {', '.join(SPLITS)}, not {split!r}")
    return SPLITS[split or "test"][0]


@cache
def captions(n: int, split: str, name: str = "scenes") -> list[str]:
    """Captions of the first n scenes of a split; no pixel is drawn."""
    return [_caption(_plan(SPLITS[split][0], i, NAMES[name]).things) for i in range(n)]


@cache
def questions(split: str, things: int = 8) -> list[list[tuple[str, str]]]:
    """(question, answer) about each object of each scene of a split; no pixel is drawn."""
    seed = seed_of(split)
    return [_questions(_plan(seed, i, things).things) for i in range(SPLITS[split or "test"][1])]


@cache
def _labels(seed: int, n: int, things: int) -> list[int]:
    return [_label(_plan(seed, i, things).things) for i in range(n)]


def covers(thing: Thing) -> np.ndarray:
    """bool [96, 96]: the pixels of an object."""
    axis = np.arange(SIZE) + 0.5
    dx, dy = (axis[None, :] - thing.x) / thing.radius, (axis[:, None] - thing.y) / thing.radius
    ax, ay, distance = np.abs(dx), np.abs(dy), np.hypot(dx, dy)
    box = np.maximum(ax, ay)
    if thing.shape == "disc":
        return distance <= 0.95
    if thing.shape == "ring":
        return (distance <= 1.0) & (distance >= 0.55)
    if thing.shape == "square":
        return box <= 0.8
    if thing.shape == "frame":
        return (box <= 0.9) & (box >= 0.5)
    if thing.shape == "diamond":
        return ax + ay <= 1.0
    if thing.shape == "plus":
        return (box <= 1.0) & (np.minimum(ax, ay) <= 0.3)
    if thing.shape == "cross":
        return (box <= 0.9) & (np.abs(ax - ay) <= 0.36)
    assert thing.shape == "triangle"
    return (dy <= 0.8) & (dy >= -1.0) & (ax <= (dy + 1.0) * 0.55)


def open_scenes(n: int | None = None, split: str = "test", name: str = "scenes") -> Images:
    """n scenes (None: all of the split) as image data with masks; the label is `Scene.label`.

    name: one of `NAMES`. ValueError on an unknown split.
    """
    split, things = split or "test", NAMES[name]
    seed, all_there = seed_of(split), SPLITS[split][1]
    n = all_there if n is None else n
    return Images(
        name,
        [f"scene {i}" for i in range(n)],
        lambda i: Image.fromarray(_drawn(seed, i, things)),
        lengths=[things] * n,
        labels=_labels(seed, n, things),
        split=split,
        classes=list(SHAPES if things == 1 else COLOURS),
        mask=lambda i: scene(seed, i, things).mask,
    )


@lru_cache(maxsize=6000)
def _drawn(seed: int, i: int, things: int) -> np.ndarray:
    """uint8 [96, 96, 3]; drawing takes longer than a small network's step on it, so all splits stay (160 MB)."""
    return scene(seed, i, things).image


def patch_objects(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[h*w] object that covers most of each patch, if objects cover at least a tenth of it, else 0; mask uint8 [H, W]."""
    h, w = grid
    cells = mask.reshape(h, mask.shape[0] // h, w, mask.shape[1] // w).transpose(0, 2, 1, 3).reshape(h * w, -1)
    counts = (cells[:, None, :] == np.arange(1, cells.max() + 1)[None, :, None]).sum(2)
    if counts.shape[1] == 0:
        return np.zeros(h * w, int)
    return np.where(counts.sum(1) >= 0.1 * cells.shape[1], counts.argmax(1) + 1, 0)
