"""What a language model is told of a conversation, and which tokens of it are learned: the answers and what ends them.

Templates `plain` and `vicuna_v1` as in LLaVA (Liu et al., 2023; Zheng et al., Vicuna, 2023), `chat` is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sample import IMAGE, Sample

Piece = tuple[str, bool]
"""Words, and whether they are learned."""
IGNORE = -100
"""Label of a token that is not learned."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA = (
    SYSTEM + "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ' ' if loop.first else '' }}USER: {% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} ASSISTANT:"
    "{% else %}{% for part in message['content'] %} {{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""`vicuna_v1` as a chat template, so that a model that learned from it is asked as it was taught."""


def plain(sample: Sample, processor: Any) -> list[Piece]:
    """The images, then the answer alone, as where a projector is aligned; what was asked is left out."""
    if len(sample.turns) != 2:
        raise ValueError(
            f"{sample.key}: template plain takes one question and one answer, not {len(sample.turns)} turns; "
            "use vicuna_v1 or chat"
        )
    return [(IMAGE * len(sample.images), False), (sample.turns[1][1].strip() + "\n", True)]


def vicuna_v1(sample: Sample, processor: Any) -> list[Piece]:
    """SYSTEM USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT: ...</s>"""
    pieces: list[Piece] = [(SYSTEM + " ", False)]
    for (_, asked), (_, said) in _rounds(sample):
        pieces += [(f"USER: {fronted(asked)} ASSISTANT: ", False), (said.strip() + processor.tokenizer.eos_token, True)]
    return pieces


def chat(sample: Sample, processor: Any) -> list[Piece]:
    """The model's own chat template; an end token is added to an answer that it leaves without one."""
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            "the model's processor has no chat template: use vicuna_v1, which is then written beside the weights"
        )
    messages: list[dict[str, Any]] = []
    pieces: list[Piece] = []
    told, ends = "", processor.tokenizer
    for (_, asked), (_, said) in _rounds(sample):
        messages.append({"role": "user", "content": _content(asked)})
        prompt = _render(processor, messages, True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said.strip()}]})
        whole = _render(processor, messages, False)
        if not prompt.startswith(told) or not whole.startswith(prompt):
            raise ValueError(
                f"{sample.key}: the model's chat template rewrites what was said before, so answers cannot be told from "
                "questions; use vicuna_v1"
            )
        answer = whole[len(prompt) :].rstrip()
        pieces += [(prompt[len(told) :], False), (answer, True)]
        if not answer.endswith(tuple(ends.all_special_tokens)):
            pieces.append((ends.eos_token, True))
        pieces.append((whole[len(prompt) + len(answer) :], False))
        told = whole
    return pieces


TEMPLATES: dict[str, Callable[[Sample, Any], list[Piece]]] = {"plain": plain, "vicuna_v1": vicuna_v1, "chat": chat}


def spoken(sample: Sample, template: str, processor: Any) -> list[Piece]:
    """What is told of a sample, in order; interleaved text is learned whole, whatever the template."""
    if sample.turns[0][0] == "text":
        return [(sample.turns[0][1] + processor.tokenizer.eos_token, True)]
    return TEMPLATES[template](sample, processor)


def fronted(words: str) -> str:
    """One image stands in front of what is said about it, as in LLaVA; several stay where they are, as in VILA."""
    return f"{IMAGE}\n{words.replace(IMAGE, '').strip()}" if words.count(IMAGE) == 1 else words.strip()


def encode(
    pieces: Sequence[Piece], tokenizer: Any, image_token: str, slots: int, longest: int
) -> tuple[Tensor, Tensor, int]:
    """Ids and labels, int64 [L], and how many images are left: each takes `slots` tokens, and at most `longest` remain.

    The text is tokenised as a whole, and a token is learned where it overlaps learned words. What is cut is cut behind the
    image features, which count in full whatever a reducer leaves of them; an image that is cut goes altogether.
    """
    text, learned = "", []
    for words, known in pieces:
        words = words.replace(image_token, IMAGE).replace(IMAGE, image_token * slots)
        learned += [(len(text), len(text) + len(words))] if known else []
        text += words
    # a template that writes the first token itself must not get another one
    own = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not own)
    ids = torch.tensor(found["input_ids"])
    labels = torch.full_like(ids, IGNORE)
    for first, last in learned:
        inside = torch.tensor([start < last and end > first for start, end in found["offset_mapping"]])
        labels[inside] = ids[inside]
    image = ids == tokenizer.convert_tokens_to_ids(image_token)
    labels[image] = IGNORE
    keep = _cut(image, slots, longest)
    return ids[:keep], labels[:keep], int(image[:keep].sum()) // slots


def _cut(image: Tensor, slots: int, longest: int) -> int:
    """Tokens that remain: at most `longest`, and not a part of an image."""
    if len(image) <= longest:
        return len(image)
    over = int(image[:longest].sum()) % slots
    if not over:
        return longest
    return int(image[:longest].nonzero()[-over])


def _rounds(sample: Sample) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    return list(zip(sample.turns[::2], sample.turns[1::2]))


def _content(words: str) -> list[dict[str, str]]:
    """Parts of a message: an image stands where the words say, a single one in front."""
    parts: list[dict[str, str]] = []
    for at, text in enumerate(fronted(words).split(IMAGE)):
        parts += [{"type": "image"}] if at else []
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return parts


def _render(processor: Any, messages: list[dict[str, Any]], ask: bool) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
