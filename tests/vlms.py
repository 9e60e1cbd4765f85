"""Tiny vision-language models with random weights that are not numb, and prompts with no, one and two images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

    build: Callable[[], nn.Module]
    pixels: Callable[[int], tuple[dict[str, Any], list[int]]]
    """n images: model inputs and placeholders of each."""
    spelled: Callable[[Tensor], dict[str, Any]] = lambda ids: {}
    """What else goes with the ids."""
    tower: bool = True
    """Signals of the tower, and methods inside it."""


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


def square(n: int) -> tuple[dict[str, Any], list[int]]:
    """n images of 4 x 4 patches."""
    return {"pixel_values": torch.randn(n, 3, 32, 32) * torch.linspace(0.5, 2, n).view(-1, 1, 1, 1)}, [16] * n


FAMILIES: dict[str, Family] = {"llava": Family(llava, square)}


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


def prompts(
    family: str, images: tuple[int, ...], dtype: torch.dtype = torch.float32, side: str = "left"
) -> dict[str, Any]:
    """A padded batch: sample b has images[b] images among its text."""
    pixels, sizes = FAMILIES[family].pixels(sum(images)) if sum(images) else ({}, [])
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
