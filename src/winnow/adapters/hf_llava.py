"""Hugging Face LLaVA: LlavaForConditionalGeneration with a CLIP, SigLIP or ViT tower.

Liu et al., "Improved Baselines with Visual Instruction Tuning", CVPR 2024; transformers 5, modeling_llava.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.llava import modeling_llava as llava

from .. import _vlm
from .._host import Host
from . import hf_vision


def fits(model: nn.Module) -> bool:
    """A model whose forward this file knows."""
    return type(model).forward is llava.LlavaForConditionalGeneration.forward


def host(model: Any) -> Host:
    """The model's parts; TypeError where the tower is not one Winnow knows."""
    core = model.model
    tower, begin, made = hf_vision.selected(core, model.config)
    return _vlm.host(
        _vlm.Vlm(
            family="Hugging Face LLaVA",
            model=model,
            core=core,
            llm=core.language_model,
            tower=tower,
            begin=begin,
            projector=core.multi_modal_projector,
            made=made,
            place=hf_vision.last_place,
        )
    )
