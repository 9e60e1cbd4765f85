"""MACs of a vision-language model by stage, from its configuration alone: no weights, no image, no GPU.

1 MAC = 1 multiply-add; conventions "fastv" (Chen et al., 2024) and "sparsevlm" (Zhang et al., 2025) are those papers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..reducer import Method
from ._vlm_shapes import Decoder, Tower, shapes_of

CONVENTIONS = {"mac": None, "fastv": 2, "sparsevlm": 3}
"""Papers count the blocks of the language model on the prompt and nothing else, FastV two of LLaMA's three MLP matrices."""


@dataclass(frozen=True)
class VlmMacs:
    """MACs of one sample, by stage; x 2 = FLOP."""

    vision: float
    reducer: float
    projector: float
    prefill: float
    """The language model on the prompt; its head on the last token."""
    decode: float
    """The first token after the prompt; each further one attends to one more."""
    image_tokens: tuple[int, ...]
    """Image tokens entering each block of the language model."""
    prompt_tokens: int
    """All tokens entering block 0 of the language model."""
    kv_bytes: int
    """The cache after the prompt."""

    @property
    def total(self) -> float:
        """Everything up to the first token's logits."""
        return self.vision + self.reducer + self.projector + self.prefill


def vlm_macs(
    config: Any,
    keep: int | Sequence[int] | Method | None,
    text: int,
    *,
    grid: tuple[int, int] | None = None,
    convention: str = "mac",
    dtype: torch.dtype = torch.float16,
    kept: int | None = None,
    expand: bool = False,
) -> VlmMacs:
    """MACs of one image and `text` other tokens, by stage, equal to what is counted when the model runs.

    config: of Hugging Face's LLaVA or Qwen2.5-VL. keep: image tokens that the language model is given, or how many
    enter each of its blocks, or a method; None is all. grid: (h, w) in patches, where the model takes images of any
    size. convention: "mac", or "fastv" or "sparsevlm" for the figures of those papers. dtype: of the cache. kept: tokens
    that a method at the tower left of this image, where that is for the image to say. expand: as in `winnow.reduce`.
    TypeError for another model; ValueError for amounts that are impossible on it.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'convention={convention!r}: "mac", "fastv" or "sparsevlm"')
    if isinstance(text, bool) or not isinstance(text, int) or text < 1:
        raise ValueError(f"text={text!r}: the number of tokens that are not the image's, 1 or more")
    tower, llm = shapes_of(config, grid)
    plan = _plan(tower, llm, keep, text, kept)
    if expand:
        plan = replace(plan, projected=tower.patches, llm=(tower.tokens,) * llm.depth)
    tokens = [n + text for n in plan.llm]
    kv_bytes = sum(tokens) * 2 * llm.kv_width * dtype.itemsize
    sizes = plan.llm, tokens[0], kv_bytes
    matrices = CONVENTIONS[convention]
    if matrices is not None:
        d, m = llm.width, llm.mlp
        return VlmMacs(0, 0, 0, sum(4 * n * d**2 + 2 * n**2 * d + matrices * n * d * m for n in tokens), 0, *sizes)
    return VlmMacs(
        tower.macs(plan.tower, plan.cut),
        plan.reducer,
        tower.project(plan.projected),
        sum(llm.block(n, n) for n in tokens) + llm.head,
        sum(llm.block(1, n + 1) for n in tokens) + llm.head,
        *sizes,
    )


def vlm_ceiling(config: Any, text: int, *, grid: tuple[int, int] | None = None) -> float:
    """Share of the total that a reducer after the encoder saves at most: where no image token reaches the projector."""
    tower, llm = shapes_of(config, grid)
    full = vlm_macs(config, None, text, grid=grid)
    merged = tower.project(tower.patches) if tower.merge > 1 else 0.0
    return 1 - (full.vision + merged + llm.depth * llm.block(text, text) + llm.head) / full.total


@dataclass(frozen=True)
class _Plan:
    tower: tuple[int, ...]
    """Patches entering each block of the tower, then leaving the last."""
    projected: int
    """What the projector reads."""
    llm: tuple[int, ...]
    """Image tokens entering each block of the language model."""
    reducer: float = 0.0
    cut: int | None = None
    """Patches of the image, where it was made smaller."""


def _plan(
    tower: Tower, llm: Decoder, keep: int | Sequence[int] | Method | None, text: int, left: int | None = None
) -> _Plan:
    every, n = (tower.patches,) * (tower.depth + 1), tower.tokens
    if isinstance(keep, Method):
        return _method_plan(tower, llm, keep, text, left)
    assert left is None, "of a method"
    kept = (n,) * llm.depth if keep is None else (keep,) * llm.depth if isinstance(keep, int) else tuple(keep)
    if len(kept) != llm.depth:
        raise ValueError(f"keep has {len(kept)} numbers, the language model {llm.depth} blocks: give one for each")
    if any(isinstance(one, bool) or not isinstance(one, int) for one in kept):
        raise ValueError(f"keep={keep!r}: whole numbers of image tokens, or a method such as FastV(layer=2)")
    if not all(n >= a >= b >= 0 for a, b in zip(kept, (*kept[1:], 0))):
        raise ValueError(f"keep={keep!r}: from {n} image tokens down to 0, and never more than in the block before")
    return _Plan(every, _read(tower, kept[0]), kept)


def _method_plan(tower: Tower, llm: Decoder, method: Method, text: int, left: int | None) -> _Plan:
    facts, every = method.facts, (tower.patches,) * (tower.depth + 1)
    if not facts.static and (left is None or facts.where != "tower"):
        raise ValueError(f"{method} keeps what the image asks for: give the number of image tokens it kept instead")
    if facts.where == "llm":
        return _llm_plan(tower, llm, method, text)
    setting = tower.setting if facts.where != "tower" else tower.after
    if setting is None:
        raise ValueError(f"{method} acts inside the vision tower, whose blocks need the whole grid here")
    method.check(setting)
    reducer = method.build(setting.depth, setting.width, setting.heads, setting.patches, setting.prefix)
    if "question" in facts.needs:
        reducer.meet(llm.width)
    if facts.where == "tower":
        n = setting.patches
        assert n is not None
        kept = method.count(n, 0, n) if left is None else left
        read, wide = (n, tower.widths[-1]) if "projected" in facts.needs else (kept, setting.width)
        own = reducer.macs(n, 0, replace(setting, width=wide, prefix=tower.prefix)) + reducer.asking(n, text)
        if facts.needs & {"token", "token_read"}:
            own += tower.beside(read="token_read" in facts.needs)
        return _Plan(every, _read(tower, read), (kept,) * llm.depth, own)
    counts = method.counts(setting)
    between = facts.where == "between"
    before = (tower.patches, *counts) if between else counts
    own = sum(reducer.macs(before[layer], layer, setting) for layer in method.sites(setting.depth))
    kept = counts[tower.made if between else tower.made + 1]
    return _Plan(counts, kept, (kept,) * llm.depth, own, counts[0] if facts.where == "input" else None)


def _llm_plan(tower: Tower, llm: Decoder, method: Method, text: int) -> _Plan:
    """Before blocks; tokens are ranked by a row of attention, and where it is the block's own, its queries and keys."""
    method.check(llm.setting)
    reducer = method.build(llm.depth, llm.width, llm.heads, None, 0)
    n, kept, own = tower.tokens, list[int](), 0.0
    for layer in range(llm.depth):
        if layer in method.sites(llm.depth):
            own += reducer.macs(n, layer, llm.setting)
            if "text_attention" in method.facts.needs:
                rows = (
                    text if hasattr(reducer, "raters") else 1
                )  # raters are chosen by content: all of the text at most
                own += rows * llm.row(n + text) + (llm.entry(n + text) if method.facts.ahead else 0)
            n = method.count(n, layer, tower.tokens)
        kept.append(n)
    every = (tower.patches,) * (tower.depth + 1)
    return _Plan(every, _read(tower, tower.tokens), tuple(kept), own)


def _read(tower: Tower, kept: int) -> int:
    """What the projector reads where `kept` tokens are left."""
    return tower.patches if tower.merge > 1 else kept
