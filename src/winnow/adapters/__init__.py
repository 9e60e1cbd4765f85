"""One file is one model family; the table below is the only list of them. To add one, see CONTRIBUTING.md.

Winnow's own.
"""

from __future__ import annotations

import sys
from importlib import import_module

from torch import nn

from .._run import Host

FAMILIES: tuple[tuple[str, str], ...] = (("timm", "timm_vit"),)
"""(package the family's models come from, module of this folder)."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, torch.compile and peft wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def host_of(model: nn.Module, blocks: str | None = None) -> Host:
    """The model as its family's adapter sees it; TypeError names what would work."""
    if blocks is not None:
        from . import any_blocks

        return any_blocks.host(model, blocks)
    for package, name in FAMILIES:
        # a model of a package that was never imported cannot exist, so hosts are not imported to look
        if package in sys.modules:
            adapter = import_module(f"{__name__}.{name}")
            if adapter.fits(model):
                return adapter.host(model)
    raise TypeError(
        f"{type(model).__name__} is no vision transformer Winnow knows. Works: timm VisionTransformer models "
        '(vit_*, deit*, ...); or name its list of blocks, e.g. reduce(model, method, blocks="encoder.layers")'
    )
