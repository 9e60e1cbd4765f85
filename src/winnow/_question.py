"""How much each patch has to do with a question: CLIP's text tower and its two projections.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021; transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._reduce import reducer_of

EDGE = 1e-6
"""Least relevance, so that no token is worth nothing."""


def tell(model: nn.Module, questions: Sequence[str]) -> None:
    """Say what is asked, one question for all images or one for each, where the reduced model's method goes by it."""
    reducer = reducer_of(model)
    if getattr(reducer, "asked", False):
        reducer.ask(questions)  # type: ignore[operator]


class Question:
    """A CLIP model whose image tower is the host's own; not part of the host: its weights are neither saved nor trained."""

    def __init__(self, clip: str, width: int) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            self.clip: Any = CLIPModel.from_pretrained(clip).eval().requires_grad_(False)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(clip)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"clip={clip!r} is no CLIP model with its tokenizer: {str(error).splitlines()[0]}"
            ) from None
        wide = self.clip.config.vision_config.hidden_size
        if wide != width:
            raise ValueError(f"clip={clip!r} sees {wide} channels, the vision tower has {width}: name the tower's CLIP")
        self.width, self.joint = wide, self.clip.config.projection_dim

    @torch.no_grad()
    def embed(self, questions: Sequence[str]) -> Tensor:
        """[Q, E] mean of the unit vectors of each question's pieces, as long as the text tower reads at once."""
        room = self.clip.config.text_config.max_position_embeddings
        pieces, owner = [], []
        for number, question in enumerate(questions):
            ids = self.tokenizer(question, return_tensors="pt", truncation=False).input_ids[0]
            split = ids.split(room)
            pieces += [F.pad(piece, (0, room - len(piece))) for piece in split]
            owner += [(number, len(piece)) for piece in split]
        device = self.clip.visual_projection.weight.device
        real = torch.arange(room) < torch.tensor([length for _, length in owner])[:, None]
        words = {"input_ids": torch.stack(pieces).to(device), "attention_mask": real.long().to(device)}
        unit = F.normalize(self.clip.get_text_features(**words).pooler_output.float(), dim=-1)
        of = torch.tensor([number for number, _ in owner], device=device)
        sums = unit.new_zeros(len(questions), unit.shape[1]).index_add(0, of, unit)
        return sums / torch.bincount(of, minlength=len(questions))[:, None]

    @torch.no_grad()
    def relevance(self, features: Tensor, question: Tensor) -> Tensor:
        """[B, N] from just above 0 to 1: how far the tower's features [B, N, C] point away from questions [B, E].

        CLIP's patches point away from the words they match (CDPruner, section 3.2).
        """
        self.clip.to(features.device)
        seen = self.clip.visual_projection(self.clip.vision_model.post_layernorm(features.float()))
        away = -(F.normalize(seen, dim=-1) @ question.to(seen)[..., None])[..., 0]
        low, high = away.amin(1, keepdim=True), away.amax(1, keepdim=True)
        return (away - low + EDGE) / (high - low).clamp_min(EDGE)
