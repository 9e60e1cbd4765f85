"""lmms-eval with reduced models: `lmms-eval --model winnow_hf --model_args 'pretrained=...,method="FastV(layer=2)"'`.

EvolvingLMMs-Lab, lmms-eval 0.7: the entry point group `lmms_eval.models`; its chat interface, any Hugging Face model with a
processor. Unlike its own `llava_hf`, an error ends the run: it is not scored as an empty answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

import winnow

from ._parse import parse, parse_way
from ._question import tell

NAME = "winnow_hf"
MANIFEST = ModelManifest(NAME, chat_class_path=f"{__name__}.WinnowHf")
WISHES = ("max_new_tokens", "temperature", "top_p", "num_beams")
"""Of a task's generation settings, those that `generate` is given."""


class WinnowHf(lmms):
    """A Hugging Face vision-language model, reduced by a method."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        way: str = "auto",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        revision: str = "main",
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"{NAME} takes no {', '.join(unknown)}")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        one = self._world_size == 1 and device is not None
        self._device = torch.device(device) if one else self.accelerator.device  # type: ignore[arg-type]
        self.batch_size = int(batch_size)
        self.processor: Any = AutoProcessor.from_pretrained(pretrained, revision=revision)
        self.processor.tokenizer.padding_side = "left"
        words = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation}
        self.model: Any = AutoModelForImageTextToText.from_pretrained(pretrained, **words).to(self._device).eval()
        if method is not None:
            winnow.reduce(self.model, parse(method.strip().strip("\"'")), parse_way(way))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in its order; requests with the same settings share batches."""
        found: dict[int, str] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc=NAME) as bar:
            for places, chats, wishes in self._batches(requests):
                for place, text in zip(places, self._answers(chats, wishes)):
                    found[place] = text
                bar.update(len(places))
        return [found[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], list[ChatMessages], dict[str, Any]]]:
        """(places, conversations, settings) of up to `batch_size` requests."""

        def settings(place: int) -> str:
            return json.dumps(requests[place].args[2], sort_keys=True, default=str)

        for _, same in groupby(sorted(range(len(requests)), key=settings), settings):
            places = list(same)
            for start in range(0, len(places), self.batch_size):
                chosen = places[start : start + self.batch_size]
                yield chosen, [self._chat(requests[place].args) for place in chosen], requests[chosen[0]].args[2]

    def _chat(self, args: tuple[Any, ...]) -> ChatMessages:
        _, doc_to_messages, _, doc_id, task, split = args
        return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))

    @torch.inference_mode()
    def _answers(self, chats: list[ChatMessages], wishes: dict[str, Any]) -> list[str]:
        prompts = [
            self.processor.apply_chat_template(c.to_hf_messages(), tokenize=False, add_generation_prompt=True)
            for c in chats
        ]
        images = [chat.extract_media()[0] for chat in chats]
        if any(chat.extract_media()[1] or chat.extract_media()[2] for chat in chats):
            raise ValueError(f"{NAME} reads images and text; this task has video or sound")
        given = {"images": images} if any(images) else {}
        inputs = self.processor(text=prompts, padding=True, return_tensors="pt", **given).to(
            self._device, self.model.dtype
        )
        self._ask(chats, [len(several) for several in images])
        chosen = {name: wishes[name] for name in WISHES if wishes.get(name) is not None}
        sampled = chosen.pop("temperature", 0)
        chosen |= {"do_sample": True, "temperature": sampled} if sampled else {"do_sample": False}
        if not sampled:
            chosen.pop("top_p", None)
        made = self.model.generate(**inputs, **({"max_new_tokens": 1024} | chosen))
        texts = self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_cut(text, wishes.get("until")) for text in texts]

    def _ask(self, chats: list[ChatMessages], images: list[int]) -> None:
        """Tell a method that wants to know what is asked about each image."""
        if not hasattr(self.model, "reducer") or not any(images):
            return
        texts = [
            " ".join(part.text for one in chat.messages for part in one.content if part.type == "text")
            for chat in chats
        ]
        tell(self.model, [text for text, several in zip(texts, images) for _ in range(several)])

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused."""
        raise NotImplementedError(
            f"{NAME} answers generate_until tasks; likelihoods of a shortened prompt are not offered"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused."""
        raise NotImplementedError(f"{NAME} answers one round")


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first of the strings it should stop at."""
    stops, text = [until] if isinstance(until, str) else until or [], text.strip()  # many stop at a blank line
    return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)
