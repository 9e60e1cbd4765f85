"""Sample: one conversation about some images, whatever file it came from, and what kind of conversation it is.

The questions by which kinds are told are those of LLaVA (Liu et al., "Visual Instruction Tuning", 2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .images import upright

IMAGE = "<image>"
"""What stands for an image in the words of every format."""
BRIEF = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
"""What LLaVA asks where the answer is a caption (Liu et al., 2023, table 11)."""
DETAILED = re.compile(
    r"detail|happening|going on|main features|key elements|elements of the|photo about|^describe", re.I
)
"""The questions of LLaVA-Instruct's detailed descriptions."""


@dataclass(frozen=True)
class Sample:
    """What was said about which images."""

    key: str
    turns: tuple[tuple[str, str], ...]
    """("human" | "gpt", words), or one ("text", words) to be learned whole; `IMAGE` stands where an image is seen."""
    images: tuple[Callable[[], Image.Image], ...] = ()
    mask: Callable[[], np.ndarray] | None = None
    """uint8 [H, W] 1 where the only image shows what is asked about, where that is known."""

    @property
    def words(self) -> int:
        """Its length in words."""
        return sum(len(words.split()) for _, words in self.turns)

    @property
    def kind(self) -> str:
        """caption, detailed description, question, conversation, interleaved; with what is unusual about its images."""
        if self.turns[0][0] == "text":
            return "interleaved"
        asked = self.turns[0][1].replace(IMAGE, "").strip()
        many = ", several images" if len(self.images) > 1 else ""
        if len(self.turns) > 2:
            found = "conversation"
        elif asked in BRIEF:
            found = "caption"
        else:
            found = "detailed description" if DETAILED.search(asked) and self.images else "question"
        return found + (many if self.images else ", text only")

    def pictures(self) -> list[Image.Image]:
        """RGB images; UnreadableImage names one that cannot be decoded."""
        return [upright(read, self.key) for read in self.images]
