"""The only list of methods in the project: the command, the README, the contract and the benchmarks read it.

One file is one method; to add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

from ..reducer import Method
from .adaptive_keep import AdaptiveKeep
from .cd_pruner import CDPruner
from .curriculum_drop import CurriculumDrop
from .div_prune import DivPrune
from .downsample import Downsample
from .drip import DRIP
from .evit import EViT
from .fastv import FastV
from .grid import Grid
from .norm_threshold import NormThreshold
from .patch_dropout import PatchDropout
from .pitome import PiToMe
from .pool import Pool
from .prumerge import PruMerge
from .pyramid_drop import PyramidDrop
from .random import Random
from .sparse_vlm import SparseVLM
from .tome import ToMe
from .topk import TopK
from .vis_pruner import VisPruner
from .vision_zip import VisionZip

METHODS: tuple[type[Method], ...] = (
    ToMe,
    PiToMe,
    EViT,
    TopK,
    NormThreshold,
    DRIP,
    PatchDropout,
    CurriculumDrop,
    PruMerge,
    VisionZip,
    DivPrune,
    CDPruner,
    VisPruner,
    AdaptiveKeep,
    FastV,
    PyramidDrop,
    SparseVLM,
    Random,
    Grid,
    Pool,
    Downsample,
)
BASELINES = frozenset({Random, Grid, Pool, Downsample})

__all__ = [*(method.__name__ for method in METHODS)]
