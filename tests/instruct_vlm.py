"""A tiny LLaVA with a word tokenizer, saved as anyone would save one, and conversations for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from winnow import load_vlm
from winnow._llava import load_llava
from winnow.data.dialogue import SYSTEM
from winnow.data.scenes import COLOURS, SHAPES
from winnow.train import load_recipe
from winnow.train.loop import train
from winnow.train.progress import read_log

pytest.importorskip("transformers")

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SAID = "USER: ASSISTANT: what colour is the this ? red blue a it and then Describe image concisely. hello there"
WORDS = list(dict.fromkeys([*SPECIAL, *SYSTEM.split(), *SAID.split(), *COLOURS, *(f"{one}?" for one in SHAPES)]))
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Ends an answer with a space, as llava-hf's does."""
SLOTS = 4


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def build(path: Path) -> Path:
    """Images of 16 pixels, 2 x 2 patches; vocabulary `WORDS`."""
    import transformers as hf

    size = {"height": 16, "width": 16}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer(), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(WORDS),
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=WORDS.index("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlavaForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=0, eos_token_id=2, suppress_tokens=[WORDS.index("<image>")])
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def halves(folder: Path) -> None:
    """The model of `folder` as a tower and a language model in folders of their own, as a first stage finds them."""
    import transformers as hf

    processor, model = load_vlm(f"hf:{folder}")
    model.model.vision_tower.save_pretrained(folder / "tower")
    processor.image_processor.save_pretrained(folder / "tower")
    text = hf.LlamaForCausalLM(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.save_pretrained(folder / "llm")
    tokenizer().save_pretrained(folder / "llm")


def write_json(folder: Path, images: int = 6, text: int = 2, name: str = "told.json", rounds: int = 2) -> Path:
    """Questions about images (`rounds` about every other one) and some without; `images` differ, so do the answers."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(images):
        Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [("human", "<image>\nwhat colour is this ?"), ("gpt", ("red", "blue", "red and blue")[i % 3])]
        turns += [("human", "what is the image ?"), ("gpt", "it is red")] if i % 2 and rounds > 1 else []
        rows.append({"id": f"i{i}", "image": f"{i}.png", "conversations": said(turns)})
    for i in range(text):
        rows.append({"id": f"t{i}", "conversations": said([("human", "hello there"), ("gpt", "hello " * (i + 1))])})
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


def said(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA's turns."""
    return [{"from": role, "value": words} for role, words in turns]


TINY = {
    "task": "instruct", "epochs": 1, "batch": 4, "optim": {"lr": 1e-3, "weight_decay": 0.0}, "eval": {"batch": 3},
    "log": {"every": 1, "save": 1}, "schedule": {"kind": "constant"},
}  # fmt: skip


def write_recipe(folder: Path) -> Path:
    """Two steps on the eight conversations of `write_json`, five of them asked."""
    path = folder / "tiny.yaml"
    data = {"train": {"path": str(folder / "told.json")}, "val": {"path": str(folder / "told.json"), "split": "[:5]"}}
    path.write_text(yaml.safe_dump(TINY | {"model": {"name": f"hf:{folder}"}, "data": data}))
    return path


def run(recipe_file: Path, out: Path, *sets: str, **words: Any):
    """Train on the CPU."""
    return train(load_recipe(recipe_file, sets), out, device="cpu", **words)


def lines(out: Path, event: str = "step") -> list[dict]:
    """What the run's log says."""
    return [line for line in read_log(out / "log.jsonl") if line["event"] == event]


def changed(before: Path, after: Path) -> set[str]:
    """Parts whose weights differ."""
    one, other = (load_llava(f"hf:{path}").model.state_dict() for path in (before, after))
    differ = {key for key in one if not torch.equal(one[key], other[key])}
    names = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "llm", "lm_head": "llm"}
    return {part for name, part in names.items() if any(name in key for key in differ)}
