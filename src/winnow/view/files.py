"""Files that are written whole or not at all.

Winnow's own.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")


def kind(path: str | Path) -> str:
    """`png` or `svg`, by the path's suffix; ValueError on any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: pictures are saved as .png or .svg, not {suffix or 'without a suffix'}")
    return suffix[1:]


def write(path: str | Path, data: bytes) -> Path:
    """Put `data` at `path` through a temporary file beside it; what was there stays if anything fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def encode(figure: Figure, form: str, dpi: int = 150) -> bytes:
    """A matplotlib figure as PNG or SVG bytes, the same for the same figure (no dates, no random ids)."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "winnow"}):
        figure.savefig(out, format=form, dpi=dpi, metadata={"Date": None} if form == "svg" else {})
    return out.getvalue()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
