"""MACs of a vision-language model by stage, from its configuration alone: no weights, no image, no GPU.

1 MAC = 1 multiply-add; conventions "fastv" (Chen et al., 2024) and "sparsevlm" (Zhang et al., 2025) are those papers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..reducer import Method, Reducer, Setting
from ._vlm_families import shapes_of
from ._vlm_shapes import Decoder, Tower

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

    config: of Hugging Face's LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, SmolVLM or InternVL. keep: image
    tokens that the language model is given, or how many enter each of its blocks, or a method; None is all. grid: (h, w)
    in patches, where the model takes images of any size. convention: "mac", or "fastv" or "sparsevlm" for the figures of
    those papers. dtype: of the cache. kept: tokens that a method at the tower left of this image, where that is for the
    image to say. expand: as in `winnow.reduce`. TypeError for another model; ValueError for amounts that are impossible
    on it.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'convention={convention!r}: "mac", "fastv" or "sparsevlm"')
    if isinstance(text, bool) or not isinstance(text, int) or text < 1:
        raise ValueError(f"text={text!r}: the number of tokens that are not the image's, 1 or more")
    tower, llm = shapes_of(config, grid)
    return prompt_macs((tower,), llm, keep, text, convention=convention, dtype=dtype, kept=kept, expand=expand)


def prompt_macs(
    towers: Sequence[Tower],
    llm: Decoder,
    keep: int | Sequence[int] | Method | None,
    text: int,
    *,
    convention: str = "mac",
    dtype: torch.dtype = torch.float16,
    kept: int | None = None,
    expand: bool = False,
) -> VlmMacs:
    """The same for a prompt with any number of images, a tower for each; `kept` is of all of them together."""
    if isinstance(keep, Method):
        images, entering, ranking = _method(towers, llm, keep, text, kept, expand)
    else:
        images, entering, ranking = _number(towers, llm, keep)
    tokens = [n + text for n in entering]
    kv_bytes = sum(tokens) * 2 * llm.kv_width * dtype.itemsize
    sizes = entering, tokens[0], kv_bytes
    matrices = CONVENTIONS[convention]
    if matrices is not None:
        d, m = llm.width, llm.mlp
        return VlmMacs(0, 0, 0, sum(4 * n * d**2 + 2 * n**2 * d + matrices * n * d * m for n in tokens), 0, *sizes)
    return VlmMacs(
        sum(one.vision for one in images),
        sum(one.reducer for one in images) + ranking,
        sum(one.projector for one in images),
        sum(llm.block(n, n) for n in tokens) + llm.head,
        sum(llm.block(1, n + 1) for n in tokens) + llm.head,
        *sizes,
    )


def vlm_ceiling(config: Any, text: int, *, grid: tuple[int, int] | None = None) -> float:
    """Share of the total that a reducer after the encoder saves at most: where no image token reaches the projector."""
    tower, llm = shapes_of(config, grid)
    full = vlm_macs(config, None, text, grid=grid)
    merged = full.projector if tower.merge > 1 else 0.0
    return 1 - (full.vision + merged + llm.depth * llm.block(text, text) + llm.head) / full.total


@dataclass(frozen=True)
class _Image:
    """MACs of what comes before the language model, and the tokens that it is given."""

    vision: float
    projector: float
    tokens: int
    reducer: float = 0.0


Costs = tuple[list[_Image], tuple[int, ...], float]
"""Of each image; image tokens entering each block of the language model; MACs of ranking them there."""


def _all(tower: Tower, read: int | None = None) -> _Image:
    """An image of which nothing is taken inside the tower, `read` patches reaching the projector."""
    every = (tower.patches,) * (tower.depth + 1)
    read = tower.tiles * tower.patches if read is None else read
    return _Image(tower.tiles * tower.macs(every), tower.project(read), tower.tokens)


def _number(towers: Sequence[Tower], llm: Decoder, keep: int | Sequence[int] | None) -> Costs:
    n = sum(tower.tokens for tower in towers)
    kept = (n,) * llm.depth if keep is None else (keep,) * llm.depth if isinstance(keep, int) else tuple(keep)
    if len(kept) != llm.depth:
        raise ValueError(f"keep has {len(kept)} numbers, the language model {llm.depth} blocks: give one for each")
    if any(isinstance(one, bool) or not isinstance(one, int) for one in kept):
        raise ValueError(f"keep={keep!r}: whole numbers of image tokens, or a method such as FastV(layer=2)")
    if not all(n >= a >= b >= 0 for a, b in zip(kept, (*kept[1:], 0))):
        raise ValueError(f"keep={keep!r}: from {n} image tokens down to 0, and never more than in the block before")
    reads_all = keep is None or any(tower.whole for tower in towers)
    return [_all(tower, None if reads_all else kept[0]) for tower in towers], kept, 0.0


def _method(towers: Sequence[Tower], llm: Decoder, method: Method, text: int, kept: int | None, expand: bool) -> Costs:
    facts = method.facts
    if not facts.static and (kept is None or facts.where != "tower"):
        raise ValueError(f"{method} keeps what the image asks for: give the number of image tokens it kept instead")
    if facts.where == "llm":
        images = [_all(tower) for tower in towers]
        return images, *_within(llm, method, text, sum(one.tokens for one in images))
    if facts.where == "tower":
        grids = sum(tower.tiles for tower in towers)
        each = None if kept is None else (kept - sum(tower.marks for tower in towers)) // max(1, grids)
        images = [_behind(tower, llm, method, text, each) for tower in towers]
    else:
        images = [_inside(tower, method, expand) for tower in towers]
    given = sum(one.tokens for one in images) if kept is None else kept
    return images, (given,) * llm.depth, 0.0


def _reducer(method: Method, setting: Setting) -> Reducer:
    method.check(setting)
    return method.build(setting.depth, setting.width, setting.heads, setting.patches, setting.prefix)


def _behind(tower: Tower, llm: Decoder, method: Method, text: int, each: int | None) -> _Image:
    """A method at the tower, which left `each` of a grid's tokens where that is for the image to say."""
    facts, setting = method.facts, tower.after
    reducer, n = _reducer(method, setting), setting.patches
    assert n is not None
    if "question" in facts.needs:
        reducer.meet(llm.width)
    if tower.cut and each is None:
        raise ValueError(
            f"{method}: how many of its tokens are cut off with the padding of tiles is for the image to say; "
            "give a grid that fills its tiles"
        )
    count = method.count(n, 0, n) if each is None or facts.static else each
    read, wide = (n, tower.widths[-1]) if "projected" in facts.needs else (count, setting.width)
    own = reducer.macs(n, 0, replace(setting, width=wide, prefix=tower.prefix)) + reducer.asking(n, text)
    if facts.needs & {"token", "token_read"}:
        own += tower.beside(read="token_read" in facts.needs)
    all_ = _all(tower, None if tower.merge > 1 else tower.tiles * read)
    return replace(all_, tokens=tower.left(count), reducer=tower.tiles * own)


def _inside(tower: Tower, method: Method, expand: bool) -> _Image:
    """A method in blocks of the tower; with `expand` what is behind it is given everything."""
    if tower.merge > 1 or (tower.whole and not expand):
        raise ValueError(f"{method} acts inside the vision tower, whose blocks need the whole grid here")
    setting, between = tower.setting, method.facts.where == "between"
    reducer, counts = _reducer(method, setting), method.counts(setting)
    before = (tower.patches, *counts) if between else counts
    own = sum(reducer.macs(before[layer], layer, setting) for layer in method.sites(setting.depth))
    kept = tower.patches if expand else counts[tower.made if between else tower.made + 1]
    vision = tower.macs(counts, counts[0] if method.facts.where == "input" else None, between)
    one = _Image(vision, tower.project(kept), 0, own)
    times = {name: tower.tiles * getattr(one, name) for name in ("vision", "projector", "reducer")}
    return _Image(**times, tokens=tower.left(kept))


def _within(llm: Decoder, method: Method, text: int, given: int) -> tuple[tuple[int, ...], float]:
    """Before blocks; tokens are ranked by a row of attention, and where it is the block's own, its queries and keys."""
    reducer = _reducer(method, llm.setting)
    n, kept, own = given, list[int](), 0.0
    for layer in range(llm.depth):
        if layer in method.sites(llm.depth):
            own += reducer.macs(n, layer, llm.setting)
            if "text_attention" in method.facts.needs:
                rows = text if hasattr(reducer, "raters") else 1  # chosen by content: all of the text at most
                own += rows * llm.row(n + text) + (llm.entry(n + text) if method.facts.ahead else 0)
            n = method.count(n, layer, given)
        kept.append(n)
    return tuple(kept), own
