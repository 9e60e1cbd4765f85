"""One file is one model family; the table below is the only list of them. To add one, see CONTRIBUTING.md.

Winnow's own.
"""

from __future__ import annotations

import sys
from importlib import import_module

from torch import nn

from .._host import Host

FAMILIES: tuple[tuple[str, str], ...] = (
    ("timm", "timm_vit"),
    ("timm", "timm_eva"),
    ("timm", "timm_beit"),
    ("open_clip", "open_clip_vit"),
    ("transformers.models.vit.modeling_vit", "hf_vit"),
    ("transformers.models.clip.modeling_clip", "hf_clip"),
    ("transformers.models.siglip.modeling_siglip", "hf_siglip"),
    ("transformers.models.dinov2.modeling_dinov2", "hf_dino"),
    ("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers", "hf_dino"),
    ("transformers.models.dinov3_vit.modeling_dinov3_vit", "hf_dino"),
    ("transformers.models.llava.modeling_llava", "hf_llava"),
    ("transformers.models.llava_next.modeling_llava_next", "hf_llava_next"),
    ("transformers.models.llava_onevision.modeling_llava_onevision", "hf_llava_next"),
    ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "hf_qwen_vl"),
    ("transformers.models.qwen3_vl.modeling_qwen3_vl", "hf_qwen_vl"),
    ("transformers.models.internvl.modeling_internvl", "hf_internvl"),
    ("transformers.models.smolvlm.modeling_smolvlm", "hf_internvl"),
    ("torch", "torch_encoder"),
)
"""(module the family's models come from, module of this folder)."""

REFUSED: tuple[tuple[str, str], ...] = (
    ("Cait", "its talking heads mix the heads' whole attention matrices, which are never held here"),
    ("SwinTransformer", "its windows and its merging of patches need the whole grid"),
    ("SwinTransformerV2", "its windows and its merging of patches need the whole grid"),
    ("SwinTransformerV2Cr", "its windows and its merging of patches need the whole grid"),
    ("Hiera", "its mask units and its pooling need the whole grid"),
    ("Levit", "its attention biases and its down-sampling need the whole grid"),
    ("MaxxVit", "its windows and convolutions need the whole grid"),
    ("MultiScaleVit", "its pooling attention needs the whole grid"),
    ("PyramidVisionTransformerV2", "its down-sampling attention needs the whole grid"),
    ("Xcit", "its attention is between channels, and its convolutions need the whole grid"),
    ("NaFlexVit", "it takes packed patches with their own coordinates and mask"),
    ("ResNet", "it has no tokens"),
    ("ModifiedResNet", "it has no tokens"),
    ("TNT", "its inner blocks need every patch"),
    ("VisionTransformerRelPos", "its position biases are made for the whole grid; Beit's are known"),
    ("VisionTransformerSAM", "its windows need the whole grid"),
    ("ViTForMaskedImageModeling", "its decoder needs the whole grid; reduce model.vit"),
)
"""(class, why it cannot be reduced): families that were looked at, their subclasses included."""


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
    kinds = [kind.__name__ for kind in type(model).__mro__]
    reason = next((f": {why}" for name, why in REFUSED if name in kinds), "")
    raise TypeError(
        f"{type(model).__name__} is no vision transformer Winnow can reduce{reason}. Works: timm VisionTransformer, Eva "
        "and Beit models (vit_*, deit*, eva02_*, *_dinov3, ...), open_clip towers, Hugging Face ViT, CLIP, SigLIP, DINOv2 "
        'and DINOv3, torch TransformerEncoder; or name its list of blocks, e.g. blocks="encoder.layers"'
    )
