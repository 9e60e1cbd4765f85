"""Images to measure and train on: one function opens what people have, and refuses what it cannot read.

Winnow's own. Batches are in `winnow.data.batches` (not repeated here: a function would shadow its module).
"""

from __future__ import annotations

from winnow.data.images import Images, UnreadableImage, check_labels
from winnow.data.readers import open_images

__all__ = ["Images", "UnreadableImage", "check_labels", "open_images"]
