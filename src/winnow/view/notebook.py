"""Text and pictures that a notebook shows, without needing one: plain objects with the display methods Jupyter asks for.

Winnow's own.
"""

from __future__ import annotations

from typing import Any

from . import files


class Text(str):
    """Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)


class Picture:
    """A matplotlib figure."""

    def __init__(self, figure: Any) -> None:
        self.png = files.encode(figure, "png", dpi=110)

    def _repr_png_(self) -> bytes:
        return self.png
