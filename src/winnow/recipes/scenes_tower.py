"""The vision tower of the small LLaVA that ships with Winnow learns what each patch shows; the first part of scenes_vlm.py.

Winnow's own. The tower begins with the first blocks of vit_scenes. Every patch learns which object it shows, in the layer
the projector will read, and the class token the colours of all eight objects: patches of vit_scenes itself know colours,
and shapes little (docs/log.md).
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.scenes import COLOURS, SHAPES, SPLITS, Scene, patch_objects, scene
from .scenes_vit import normalise

NOTHING = len(SHAPES) * len(COLOURS)
"""Class of a patch that shows no object; the others are shape x colour."""
GROUND = 0.2
"""Weight of such a patch in the loss: most patches are."""
CLASS = 0.3
"""Weight of the class token's loss."""


class Drawn(NamedTuple):
    """Scenes: images uint8 [n, 3, 96, 96], the colour of each shape [n, 8], the class of each patch [n, P]."""

    images: Tensor
    colours: Tensor
    patches: Tensor


class Tower(nn.Module):
    """The tower and two heads that are thrown away: [B, P, classes] of the patches and [B, 8, 8] of the class token."""

    def __init__(self, tower: Any, layer: int) -> None:
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.layer = tower, layer
        self.dense = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NOTHING + 1))
        self.asked = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NOTHING))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        states = self.states(images)
        asked = self.asked(states[-1][:, 0]).unflatten(1, (len(SHAPES), len(COLOURS)))
        return self.dense(states[self.layer][:, 1:]), asked

    def states(self, images: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [B, 1 + P, C] of images uint8 [B, 3, 96, 96]."""
        return self.tower(normalise(images), output_hidden_states=True).hidden_states


def draw(split: str, n: int, grid: tuple[int, int]) -> Drawn:
    """The first n scenes of a split."""
    found = [scene(SPLITS[split][0], i) for i in range(n)]
    images = np.stack([one.image for one in found]).transpose(0, 3, 1, 2)
    colours = [[dict(_named(one))[shape] for shape in range(len(SHAPES))] for one in found]
    return Drawn(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.tensor(colours),
        torch.from_numpy(np.stack([_classes(one, grid) for one in found])),
    )


def _named(one: Scene) -> list[tuple[int, int]]:
    """(shape, colour) of each object."""
    return [(SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)) for thing in one.things]


def _classes(one: Scene, grid: tuple[int, int]) -> np.ndarray:
    known = [NOTHING, *(shape * len(COLOURS) + colour for shape, colour in _named(one))]
    return np.array(known)[patch_objects(one.mask, grid)]


def fit(module: Tower, data: Drawn, grid: tuple[int, int], steps: int, batch: int, rate: float) -> None:
    """`steps` of AdamW; every second batch is mirrored, which changes no shape's name."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    weight = torch.ones(NOTHING + 1)
    weight[NOTHING] = GROUND
    start = time.monotonic()
    for step in range(steps):
        picked = torch.randint(len(data.images), (batch,))
        images, classes = data.images[picked], data.patches[picked]
        if step % 2:
            images, classes = images.flip(-1), classes.unflatten(1, grid).flip(-1).flatten(1)
        patches, asked = module.train()(images)
        loss = F.cross_entropy(patches.flatten(0, 1), classes.flatten(), weight=weight)
        loss = loss + CLASS * F.cross_entropy(asked.flatten(0, 1), data.colours[picked].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        plan.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{time.monotonic() - start:5.0f} s  step {step}  loss {loss:.3f}", flush=True)


@torch.inference_mode()
def accuracy(module: Tower, data: Drawn) -> tuple[float, float]:
    """Share of patches of objects told right in shape and colour, and of colours the class token tells right."""
    patches, asked = (torch.cat(part) for part in zip(*map(module.eval(), data.images.split(50))))
    shown = data.patches < NOTHING
    told = (patches.argmax(-1) == data.patches)[shown].float().mean()
    return float(told), float((asked.argmax(-1) == data.colours).float().mean())
