"""Winnow: vision transformers that read fewer tokens, and say honestly what that costs and saves."""

from ._calibrate import calibrate
from ._parse import list_methods, parse
from ._reduce import reduce, reduced, reducer_of, restore, watch
from ._save import load, save
from .methods import *  # noqa: F403
from .methods import METHODS
from .methods import __all__ as _methods
from .parts.amount import Below, Exactly, Keep, Remove
from .ways import Padded

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Below",
    "Exactly",
    "Keep",
    "Padded",
    "Remove",
    "calibrate",
    "list_methods",
    "load",
    "parse",
    "reduce",
    "reduced",
    "reducer_of",
    "restore",
    "save",
    "watch",
    *_methods,
]
