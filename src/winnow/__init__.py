"""Winnow: vision transformers that read fewer tokens, and say honestly what that costs and saves."""

import sys

from ._budget import budget
from ._calibrate import calibrate
from ._parse import list_methods, parse
from ._reduce import reduce, reduced, reducer_of, restore, watch
from ._save import load, save
from ._vlm_model import load_vlm
from .checks import check_method
from .methods import *  # noqa: F403
from .methods import METHODS
from .methods import __all__ as _methods
from .parts import BudgetEmbedding, VisionEncoderWithBudgetToken, VisionTokenController
from .parts.amount import Below, Exactly, Keep, Remove
from .ways import Padded

if "timm" in sys.modules:  # or whoever names one of ours imports winnow.backbones: timm takes longer than all of this
    from . import backbones  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Below",
    "BudgetEmbedding",
    "Exactly",
    "Keep",
    "Padded",
    "Remove",
    "VisionEncoderWithBudgetToken",
    "VisionTokenController",
    "budget",
    "calibrate",
    "check_method",
    "list_methods",
    "load",
    "load_vlm",
    "parse",
    "reduce",
    "reduced",
    "reducer_of",
    "restore",
    "save",
    "watch",
    *_methods,
]
