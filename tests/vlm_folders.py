"""Folders as `save_pretrained` leaves them: a tiny model of every family and its processor, whose words are numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vlms import IMAGE, tiny

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "?", *map(str, range(IMAGE - 11))]
MARKS = ["<|vision_end|>", "<|vision_start|>", "<video>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}BEFORE<image>AFTER {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
TILES = [[32, 64], [64, 32], [64, 64]]


def tokenizer(**marks: str) -> Any:
    """Word by word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*WORDS, *MARKS]
    assert len(vocabulary) == IMAGE + 1 and vocabulary[IMAGE] == "<image>"
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>", **marks},
    )  # fmt: skip


def processor(family: str) -> Any:
    """The family's own processor, for images of 32 pixels, or tiles of 32."""
    import transformers as t

    side, words = {"height": 32, "width": 32}, tokenizer()
    around = ("<|vision_start|>", "<|vision_end|>") if family.startswith("qwen") else ("", "")
    told = {"chat_template": TEMPLATE.replace("BEFORE", around[0]).replace("AFTER", around[1])}
    clip = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
        return t.LlavaProcessor(images, words, **clip, **told)
    if family == "llava_next":
        images = t.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=TILES)
        return t.LlavaNextProcessor(images, words, **clip, **told)
    if family == "llava_onevision":
        images = t.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=TILES)
        more = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        return t.LlavaOnevisionProcessor(images, words, t.LlavaOnevisionVideoProcessor(), **more, **told)
    if family.startswith("qwen"):
        images = t.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
        )
        if family == "qwen3_vl":
            return t.Qwen3VLProcessor(images, words, t.Qwen3VLVideoProcessor(), **told)
        return t.Qwen2_5_VLProcessor(images, words, t.Qwen2VLVideoProcessor(), **told)
    if family == "smolvlm":
        images = t.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        return t.SmolVLMProcessor(images, words, t.SmolVLMVideoProcessor(), image_seq_len=4, **told)
    marks = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>"}
    words = tokenizer(context_image_token="<image>", **marks)
    images = t.GotOcr2ImageProcessor(size=side, max_patches=4)
    return t.InternVLProcessor(images, words, t.InternVLVideoProcessor(), image_seq_length=4, **told)


def folder(family: str, path: Path) -> Path:
    """Model, processor, three photographs and a file of a question about each."""
    processor(family).save_pretrained(path)
    tiny(family).save_pretrained(path)
    noise, asked = np.random.default_rng(0), []
    for at, size in enumerate([(48, 64), (64, 30), (40, 40)]):
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path / f"{at}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": str(at)}]
        asked.append({"id": str(at), "image": f"{at}.png", "conversations": turns})
    (path / "asked.json").write_text(json.dumps(asked))
    return path
