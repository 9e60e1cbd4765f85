"""What became of the objects: patches of objects that still have an owner, purity of tokens, boundaries met, coverage.

Overlap: Arbeláez et al., "Contour detection and hierarchical image segmentation", 2011 (segmentation covering); the rest is
Winnow's own. Needs images with object masks, such as the built-in scenes.
"""

from __future__ import annotations

import numpy as np

from .record import Objects

Share = tuple[np.ndarray, np.ndarray]
"""Per image, how much of how much [n]: the sum of the first over the sum of the second is the figure."""


def objects_of(owners: np.ndarray, objects: np.ndarray) -> Objects:
    """Figures over n images from owners [n, P] (-1 dropped) and the object of each patch [n, P] (0 none)."""
    found = {name: value(share) for name, share in shares(owners, objects).items()}
    return Objects(kept=found["kept"], purity=found["purity"], boundary_f1=found["boundary_f1"])


def value(share: Share) -> float:
    """The figure of all images."""
    return float(share[0].sum() / max(1, share[1].sum()))


def shares(owners: np.ndarray, objects: np.ndarray) -> dict[str, Share]:
    """kept: share of object patches that some token holds. purity: share of held patches whose token holds only patches
    of objects or only background. boundary_f1: changes of owner against changes of object, along the raster. coverage:
    share of object patches whose token holds that one object and nothing else. overlap: intersection over union of each
    object with the token that fits it best, mean over objects by their patches.
    """
    assert owners.shape == objects.shape, f"{owners.shape} owners for {objects.shape} patches"
    n, held = len(owners), owners >= 0
    tokens, things = int(owners.max(initial=-1)) + 1, int(objects.max(initial=0)) + 1
    cell = (np.arange(n)[:, None] * things + objects) * tokens + owners
    both = np.bincount(cell[held], minlength=n * things * tokens).reshape(n, things, tokens)
    sizes = np.stack([(objects == k).sum(1) for k in range(things)], 1)
    token = both.sum(1)
    thing = token - both[:, 0]
    pure = (thing == 0) | (thing == token)
    own = both[:, 1:] * (both[:, 1:] == token[:, None])
    overlap = both / np.maximum(1, sizes[:, :, None] + token[:, None] - both)
    found, there = (np.diff(each, axis=1) != 0 for each in (owners, objects))
    return {
        "kept": (thing.sum(1), sizes[:, 1:].sum(1)),
        "purity": ((token * pure).sum(1), token.sum(1)),
        "boundary_f1": (2 * (found & there).sum(1), found.sum(1) + there.sum(1)),
        "coverage": (own.sum((1, 2)), sizes[:, 1:].sum(1)),
        "overlap": ((sizes * overlap.max(2, initial=0))[:, 1:].sum(1), sizes[:, 1:].sum(1)),
    }
