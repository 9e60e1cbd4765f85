"""VILA's three stages in small, on the scenes: what each does to a language model's text, with and without text blended in.

Lin et al., "VILA: On Pre-training for Visual Language Models", CVPR 2024; document 002, 1.2 and 1.3.
Cost: three minutes on one core. Expected: with the language model frozen its text-only loss does not move; the second stage
trains it and the loss rises; the third, as many steps with half of them on text, brings most of it back, without text less.
Command: python -m winnow.recipes.vila runs/vila results/vila.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbones.llava_scenes import WORDS
from ..data.scenes import SIZE
from ..measure import record
from ..train.loop import train
from ..train.recipe import check

CHAT = (
    "{% for message in messages %}{{ 'USER ' if message['role'] == 'user' else 'ASSISTANT ' }}"
    "{% for part in message['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
    "{{ '' if message['role'] == 'user' else eos_token + ' ' }}{% endfor %}"
    "{{ 'ASSISTANT ' if add_generation_prompt else '' }}"
)
WIDTH, PATCH = 48, 16
FROZEN = {"llm": False}
STAGES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "text": ("start", "scene_texts", {"projector": False}, 400),
    "align": ("text", "scene_captions", FROZEN, 30),
    "interleaved, frozen": ("align", "scene_pages + scene_captions", FROZEN, 30),
    "interleaved": ("align", "scene_pages + scene_captions", {}, 30),
    "sft": ("interleaved", "scenes", {}, 60),
    "sft, blended": ("interleaved", "scenes + scene_texts", {}, 60),
}
"""By name: the stage before it, what is read, what learns, and steps of 32."""


def start(folder: Path, words: Sequence[str] = WORDS, size: int = SIZE, patch: int = PATCH, depth: int = 2) -> None:
    """A LLaVA with random weights: `depth` blocks of tower and of language model; if not told, 36 patches and scenes' words.

    `words` begin as `WORDS` do.
    """
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    split = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    maker = hf.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = hf.LlavaProcessor(
        maker, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip
    blocks = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
    }
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**blocks, image_size=size, patch_size=patch),
        text_config=hf.LlamaConfig(**blocks, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        image_token_id=words.index("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = hf.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def run(out: Path, results: Path) -> list[record.Row]:
    """Every stage that `results` has no row of yet; the rows of all."""
    record.ready(results)
    if not (out / "start").exists():
        start(out / "start")
    there = {row.train.recipe: row for row in (record.read(results) if results.exists() else []) if row.train}
    rows = []
    for name, (before, read, learns, steps) in STAGES.items():
        if f"vila: {name}" in there:
            rows.append(there[f"vila: {name}"])
            continue
        source = out / before if before == "start" else out / before / "last"
        raw: dict[str, Any] = {
            "task": "instruct", "model": {"name": f"hf:{source}"},
            "data": {"train": {"path": read, "split": "train", "limit": 32 * steps},
                     "val": {"path": "scenes + scene_texts", "split": "val", "limit": 400}},
            "instruct": {"template": "chat", "train": learns, "pad": False},
            "optim": {"lr": 3e-3, "weight_decay": 0.0, "clip": 1.0}, "schedule": {"warmup_steps": 5},
            "eval": {"batch": 100, "before": True}, "epochs": 1, "batch": 32,
        }  # fmt: skip
        resume = (out / name / "checkpoints").exists()
        recipe = check(raw, name)
        rows.append(train(recipe, out / name, name=f"vila: {name}", device="cpu", resume=resume, results=results))
    return rows


def table(rows: Sequence[record.Row]) -> Iterator[str]:
    """A Markdown table of the stages: the loss on text alone before and after each."""
    yield "| stage | reads | learns | text-only loss before | after |"
    yield "|:--|:--|:--|--:|--:|"
    for row in rows:
        assert row.train is not None
        name = row.train.recipe.removeprefix("vila: ")
        _, read, learns, _ = STAGES[name]
        parts = [part for part in ("projector", "llm") if learns.get(part, True)]
        before, after = row.train.figures["before_text_loss"], row.train.figures["text_loss"]
        yield f"| {name} | {read.replace('_', ' ')} | {', '.join(parts)} | {before:.3f} | {after:.3f} |"


if __name__ == "__main__":
    print("\n".join(table(run(Path(sys.argv[1]), Path(sys.argv[2])))))
