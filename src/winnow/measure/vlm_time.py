"""Run a vision-language model on random images and text: time to the first token, time per further token, peak memory.

Winnow's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._vlm_families import tower_of
from .latency import Device, Run, compare_latency
from .record import Latency

ANSWER = 16
"""Tokens of a timed answer."""


def vlm_inputs(
    model: nn.Module, batch: int, text: int, grid: tuple[int, int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of `batch` samples, one image and `text` other tokens each, on the model's device, in its dtype."""
    config: Any = model.config
    noise, where = torch.Generator().manual_seed(seed), next(model.parameters())
    image = config.image_token_id
    ids = torch.randint(0, config.get_text_config().vocab_size - 1, (batch, text), generator=noise)
    ids = ids + (ids >= image)  # any token but the image's
    before = text // 2
    ids = torch.cat([ids[:, :before], ids.new_full((batch, tower_of(config, grid).tokens), image), ids[:, before:]], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_pixels(config, batch, grid, noise)}
    if "image_grid_thw" in found:
        found["mm_token_type_ids"] = (ids == image).int()
    pixels = found.pop("pixel_values").to(where)
    return {name: value.to(where.device) for name, value in found.items()} | {"pixel_values": pixels}


def _pixels(config: Any, batch: int, grid: tuple[int, int] | None, noise: torch.Generator) -> dict[str, Tensor]:
    """Random images as a processor would give them."""
    tower, vision = tower_of(config, grid), config.vision_config
    if hasattr(vision, "temporal_patch_size"):
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(batch * tower.patches, channels, generator=noise)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *tower.grid]] * batch)}
    size = [cells * side for cells, side in zip(tower.grid, tower.patch)]
    pixels = torch.randn(batch, tower.tiles, vision.num_channels, *size, generator=noise)
    if hasattr(config, "image_grid_pinpoints"):
        assert grid is not None
        whole = [cells * side for cells, side in zip(grid, tower.patch)]
        return {"pixel_values": pixels, "image_sizes": torch.tensor([whole] * batch)}
    return {"pixel_values": pixels if hasattr(config, "scale_factor") else pixels.flatten(0, 1)}


def first_token(model: Any, inputs: dict[str, Tensor]) -> Run:
    """A run of all that comes before the first token: tower, projector, the language model on the prompt."""
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1)


def answer(model: Any, inputs: dict[str, Tensor], tokens: int = ANSWER) -> Run:
    """A run of a whole answer of so many tokens, greedy."""
    words = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(**inputs, **words)


def compare_vlm_latency(
    plain: nn.Module, reduced: nn.Module, inputs: dict[str, Tensor], *, pairs: int = 15, device: Device = "cpu"
) -> tuple[Latency, Latency]:
    """(first token, whole answer of ANSWER tokens), ms per batch, plain against reduced."""
    batch = len(inputs["input_ids"])
    first, whole = (
        compare_latency(make(plain, inputs), make(reduced, inputs), batch=batch, pairs=pairs, warmup=1, device=device)
        for make in (first_token, answer)
    )
    return first, whole


def per_token(first: Latency, whole: Latency) -> tuple[float, float]:
    """ms per token after the first, plain and reduced."""
    return (whole.plain_ms - first.plain_ms) / (ANSWER - 1), (whole.reduced_ms - first.reduced_ms) / (ANSWER - 1)
