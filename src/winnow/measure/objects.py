"""What became of the objects: patches of objects that still have an owner, purity of tokens, boundaries met.

Winnow's own; needs images with object masks, such as the built-in scenes.
"""

from __future__ import annotations

import numpy as np

from .record import Objects


def objects_of(owners: np.ndarray, objects: np.ndarray) -> Objects:
    """Figures over n images from owners [n, P] (-1 dropped) and the object of each patch [n, P] (0 none).

    kept: share of object patches that some token holds. purity: share of held patches whose token holds only patches of
    objects or only background. boundary_f1: changes of owner against changes of object, along the raster.
    """
    assert owners.shape == objects.shape, f"{owners.shape} owners for {objects.shape} patches"
    thing = objects > 0
    held = owners >= 0
    kept = float((held & thing).sum() / max(1, thing.sum()))
    return Objects(kept=kept, purity=_purity(owners, thing, held), boundary_f1=_boundary(owners, objects))


def _purity(owners: np.ndarray, thing: np.ndarray, held: np.ndarray) -> float:
    n, p = owners.shape
    token = np.where(held, owners + np.arange(n)[:, None] * p, n * p).reshape(-1)
    size = np.bincount(token, minlength=n * p + 1)[: n * p]
    things = np.bincount(token, weights=thing.reshape(-1), minlength=n * p + 1)[: n * p]
    pure = (things == 0) | (things == size)
    return float(size[pure].sum() / max(1, size.sum()))


def _boundary(owners: np.ndarray, objects: np.ndarray) -> float:
    found, there = (np.diff(each, axis=1) != 0 for each in (owners, objects))
    both = int((found & there).sum())
    return 2 * both / max(1, int(found.sum()) + int(there.sum()))
