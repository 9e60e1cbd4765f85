"""Tiny vision-language models with random weights that are not numb, and prompts with no, one and two images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

IMAGE = 98
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """How to build one family, and what its processor would give."""

    build: Callable[..., nn.Module]
    pixels: Callable[[tuple[int, ...]], dict[str, Any]]
    """What goes with so many images per sample."""
    signals: bool = True
    """Its tower offers attention, and methods inside it work."""
    spelled: Callable[[Tensor], dict[str, Any]] = lambda ids: {}
    """What else goes with the ids."""


def llava(vision: str = "clip", layer: int = -2) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    kind = CLIPVisionConfig if vision == "clip" else SiglipVisionConfig
    config = LlavaConfig(
        vision_config=kind(**VISION, image_size=32, patch_size=8),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    return LlavaForConditionalGeneration(config)


def square(images: tuple[int, ...]) -> dict[str, Any]:
    """Images of 4 x 4 patches, of different contrast."""
    n = sum(images)
    return {"pixel_values": torch.randn(n, 3, 32, 32) * torch.linspace(0.5, 2, n).view(-1, 1, 1, 1)}


def next_(kind: str = "LlavaNext") -> nn.Module:
    import transformers

    words: dict[str, Any] = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    vision: Any = transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8)
    if kind == "LlavaOnevision":
        words = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "video_token_id": IMAGE - 1}
        vision = transformers.SiglipVisionConfig(**VISION, image_size=32, patch_size=8)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        **words,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def tiles(images: tuple[int, ...]) -> dict[str, Any]:
    """Images of different shapes, cut into 2 or 4 tiles beside the whole; padding of a tile is cut off again."""
    shapes = [(48, 64), (20, 60), (64, 30)]
    sizes = [shapes[i % 3] for i in range(sum(images))]
    return {"pixel_values": torch.randn(len(sizes), 5, 3, 32, 32), "image_sizes": torch.tensor(sizes)}


def qwen(kind: str) -> nn.Module:
    import transformers

    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
    vision: dict[str, Any] = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    if kind == "Qwen2_5_VL":
        vision |= {"out_hidden_size": 48, "fullatt_block_indexes": [1, 3], "window_size": 16, "temporal_patch_size": 1}
    else:
        vision |= {"out_hidden_size": 48, "deepstack_visual_indexes": [0, 2], "temporal_patch_size": 1}
        vision |= {"num_position_embeddings": 64}
        text |= {"head_dim": 12}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=IMAGE - 2,
        vision_end_token_id=IMAGE - 3,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def grids(images: tuple[int, ...]) -> dict[str, Any]:
    """Images of 4 x 6, 8 x 4 and 4 x 4 patches, merged by twos."""
    found = torch.tensor([[(1, 4, 6), (1, 8, 4), (1, 4, 4)][i % 3] for i in range(sum(images))])
    return {"pixel_values": torch.randn(int(found.prod(1).sum()), 3 * 16), "image_grid_thw": found}


def internvl() -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**VISION, image_size=[32, 32], patch_size=[8, 8]),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    vision = {**VISION, "image_size": 32, "patch_size": 8, "model_type": "smolvlm_vision"}
    config = SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return SmolVLMForConditionalGeneration(config)


def padded(images: tuple[int, ...]) -> dict[str, Any]:
    """One row per sample: its images, then blank ones."""
    pixels = torch.randn(len(images), max(images), 3, 32, 32)
    for sample, count in enumerate(images):
        pixels[sample, count:] = 0
    return {"pixel_values": pixels}


def marked(ids: Tensor) -> dict[str, Any]:
    """Which ids stand for images."""
    return {"mm_token_type_ids": (ids == IMAGE).int()}


FAMILIES: dict[str, Family] = {
    "llava": Family(llava, square),
    "llava_next": Family(next_, tiles),
    "llava_onevision": Family(partial(next_, "LlavaOnevision"), tiles, signals=False),
    "qwen2_5_vl": Family(partial(qwen, "Qwen2_5_VL"), grids, signals=False, spelled=marked),
    "qwen3_vl": Family(partial(qwen, "Qwen3VL"), grids, signals=False, spelled=marked),
    "smolvlm": Family(smolvlm, padded, signals=False),
    "internvl": Family(internvl, square, signals=False),
}


def tiny(family: str = "llava", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **words: Any) -> nn.Module:
    """A model in evaluation mode whose weights are far from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = FAMILIES[family].build(**words).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    model.set_attn_implementation(attention)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, suppress_tokens=[IMAGE])
    return model.to(dtype)


@cache
def _plain(family: str) -> Any:
    return tiny(family)


def prompts(
    family: str, images: tuple[int, ...], dtype: torch.dtype = torch.float32, side: str = "left"
) -> dict[str, Any]:
    """A padded batch: sample b has images[b] images among its text."""
    pixels = FAMILIES[family].pixels(images) if sum(images) else {}
    sizes = []
    if pixels:
        with torch.no_grad():
            sizes = [len(one) for one in _plain(family).get_image_features(**pixels).pooler_output]
    if family == "smolvlm":  # its features are those of a sample
        sizes = [size // max(1, count) for size, count in zip(sizes, images, strict=True) for _ in range(count)]
    left, rows = iter(sizes), []
    for b, count in enumerate(images):
        row = [torch.randint(3, 90, (3 + b,))]
        for _ in range(count):
            row += [torch.full((next(left),), IMAGE), torch.randint(3, 90, (2,))]
        rows.append(torch.cat([*row, torch.randint(3, 90, (4,))]))
    width = max(map(len, rows))
    pad = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids = torch.stack([nn.functional.pad(row, one) for row, one in zip(rows, pad)])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), one) for row, one in zip(rows, pad)])
    pixels = {name: value.to(dtype) if value.is_floating_point() else value for name, value in pixels.items()}
    return {"input_ids": ids, "attention_mask": mask, **pixels, **FAMILIES[family].spelled(ids)}


def only(inputs: dict[str, Any], images: tuple[int, ...], b: int) -> dict[str, Any]:
    """Sample b of a batch alone, without its padding (families with one row of pixels per image)."""
    real = inputs["attention_mask"][b].bool()
    start = sum(images[:b])
    found = {name: inputs[name][b, real][None] for name in ("input_ids", "attention_mask")}
    if images[b]:
        found["pixel_values"] = inputs["pixel_values"][start : start + images[b]]
    return found
