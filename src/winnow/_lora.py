"""LoRA on a language model: small matrices beside those of its linear layers, which are added in when it is written.

Hu et al., "LoRA", 2022; the layers are peft's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._llava import parts_of


def add_lora(model: Any, rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Put them beside every linear layer of the language model, its head apart; in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError('instruct.train.llm=lora needs peft: pip install "winnow-vision[hf]"') from None
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, parts_of(model)["llm"][0])


def merged(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of a model under the names it had before `add_lora`, the small matrices added to the large ones."""
    found = {}
    scales = {name: module.scaling for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        layer, base, kind = key.rpartition(".base_layer.")
        if base and kind == "weight":
            for name, scale in scales[layer].items():
                down, up = (state[f"{layer}.lora_{which}.{name}.weight"] for which in "AB")
                value = value + scale * (up @ down).to(value)
        found[f"{layer}.{kind}" if base else key] = value
    return found
