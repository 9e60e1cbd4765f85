"""photographs: colour photographs that come with scikit-image, whole and in fixed crops, to try things on without data.

Photographs: scikit-image (van der Walt et al., 2014), each with its own credit; the crops are Winnow's own.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from winnow.data.images import Images

_CREDITS = {
    "astronaut.png": "NASA, public domain",
    "chelsea.png": "Stefan van der Walt, CC0",
    "coffee.png": "Rachel Michetti, CC0",
    "hubble_deep_field.jpg": "NASA, public domain",
    "motorcycle_left.png": "Middlebury stereo 2014, Nesic et al., no licence stated",
    "rocket.jpg": "SpaceX, public domain",
}
# places of the crops' free room, left to right and top to bottom; None is the whole photograph
_PLACES = (None, (0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0))
_SIDE = 0.6


@dataclass(frozen=True)
class _Crops:
    folder: Path

    def __call__(self, i: int) -> Image.Image:
        file, place = list(_CREDITS)[i // len(_PLACES)], _PLACES[i % len(_PLACES)]
        image = Image.open(self.folder / file)
        if place is None:
            return image
        side = int(_SIDE * min(image.size))
        left, top = (int(room * (size - side)) for room, size in zip(place, image.size))
        return image.crop((left, top, left + side, top + side))


def open_photographs(split: str = "") -> Images:
    """42 images without labels: 6 photographs, each whole and in 6 square crops of 0.6 of its shorter side."""
    if split:
        raise ValueError(f"photographs has no split {split!r}: leave the name out")
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise ValueError('photographs needs scikit-image: pip install "winnow-vision[demo]"')
    folder = Path(found.submodule_search_locations[0], "data")
    absent = [name for name in _CREDITS if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f'this scikit-image lacks {absent[0]}: pip install --upgrade "winnow-vision[demo]"')
    every = [(name, place) for name in _CREDITS for place in range(len(_PLACES))]
    return Images(
        "photographs",
        [f"{Path(name).stem}-{place}" for name, place in every],
        _Crops(folder),
        lengths=[(folder / name).stat().st_size for name, _ in every],
        credits=[f"{_CREDITS[name]}, from scikit-image" for name, _ in every],
    )
