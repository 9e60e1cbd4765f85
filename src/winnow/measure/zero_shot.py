"""What a contrastive model is judged by: classes named in words (zero-shot), and finding the other half of a pair.

Radford et al., CLIP, 2021; class names and templates are open_clip's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
PROMPTS = 512
"""Texts encoded at a time."""


def templates_of(name: str | Sequence[str]) -> list[Callable[[str], str]]:
    """The words openai (80 templates) or simple (7), a text file with one a line, or templates; {} is the class."""
    import open_clip

    if name == "openai":
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    if name == "simple":
        return list(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    texts = lines_of(Path(name), "openai, simple") if isinstance(name, str) else list(name)
    wrong = [text for text in texts if text.count("{}") != 1]
    if wrong or not texts:
        raise ValueError(
            f"template {wrong[0] if wrong else ''!r} needs one {{}} where the class goes: a photo of a {{}}."
        )
    return [text.format for text in texts]


def classes_of(name: str | None, own: Sequence[str] | None, data: str) -> list[str]:
    """The data's class names, or "imagenet" (open_clip's, for the 1,000 folders in order), or a file with one a line."""
    if name == "imagenet":
        import open_clip

        return list(open_clip.IMAGENET_CLASSNAMES)
    if name is not None:
        return lines_of(Path(name), "imagenet")
    if not own:
        raise ValueError(f"{data} has no class names: give classes, imagenet or a text file with one name a line")
    return list(own)


def lines_of(path: Path, words: str) -> list[str]:
    """Lines of a text file that are not empty; FileNotFoundError says which words would do instead."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; give a text file or one of: {words}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def class_features(
    encode: Callable[[Tensor], Tensor],
    tokenize: Callable[[Sequence[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    device: torch.device,
) -> Tensor:
    """[classes, D], length 1: mean over the templates of `encode(tokens)` [n, D], whose rows have length 1."""
    texts = [template(name.replace("_", " ")) for name in classes for template in templates]
    parts = [encode(tokenize(texts[i : i + PROMPTS]).to(device)) for i in range(0, len(texts), PROMPTS)]
    means = torch.cat(parts).float().unflatten(0, (len(classes), len(templates))).mean(1)
    return torch.nn.functional.normalize(means, dim=-1)


def retrieval(images: Tensor, texts: Tensor, group: Tensor, chunk: int = 1024) -> dict[str, float]:
    """Recall at 1, 5, 10 of pairs images[i], texts[i] [n, D], both ways; a tie counts as a miss.

    group [n]: pairs of one number have the same text, and whichever of them is found is right.
    """
    found: dict[str, float] = {}
    for name, queries, others in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        ranks = torch.cat([_ranks(queries, others, group, i, i + chunk) for i in range(0, len(queries), chunk)])
        found |= {f"{name}_r{k}": float((ranks < k).float().mean()) for k in RECALLS}
    return found


def _ranks(queries: Tensor, others: Tensor, group: Tensor, start: int, end: int) -> Tensor:
    """How many others are at least as near as the right one, for queries start to end."""
    near = queries[start:end] @ others.T
    mine = group[start:end, None] == group[None, :]
    right = near.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
    return ((near >= right) & ~mine).sum(1)
