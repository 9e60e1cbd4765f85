"""winnow generate on a tiny LLaVA with a processor of its own, saved as anyone would save one."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from vlms import IMAGE, llava

from winnow import Exactly, FastV, PruMerge, PyramidDrop, Random
from winnow._vlm_model import load_vlm
from winnow.cli import main
from winnow.cli._answers import Answering
from winnow.view import vlm as kept

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [*SPECIAL, "what", "is", "this", "?", *map(str, range(IMAGE - 8)), "<image>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llava")
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = llava()
    model.generation_config.update(pad_token_id=0, eos_token_id=None, suppress_tokens=[IMAGE])
    model.save_pretrained(path)
    processor.save_pretrained(path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path / "photo.png")
    return path


def test_the_command_answers_and_draws(folder, tmp_path):
    out = tmp_path / "kept.png"
    command = [
        *("generate", "--model", f"hf:{folder}", "--image", str(folder / "photo.png"), "--prompt", "what is this ?"),
        *("--method", "PruMerge(keep=Exactly(6))", "--method", "FastV(layer=1, keep=Exactly(5))"),
        *("--tokens", "4", "--out", str(out), "--json"),
    ]
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "winnow", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["image_tokens"] for row in found["answers"]] == [16, 6, 5]
    assert all(row["answer"] for row in found["answers"]) and found["pictures"] == [str(out)]
    assert Image.open(out).size[0] > 200


def test_what_is_drawn_is_what_was_kept(folder):
    asked = Answering(f"hf:{folder}", [], None, 3, torch.device("cpu"))
    photo = Image.open(folder / "photo.png").convert("RGB")
    prompt = "what is this ?"
    inputs = asked.inputs([photo, photo.rotate(90)], prompt)
    shown, where = kept.seen(asked.processor, inputs, [photo, photo]), kept.places(asked.vlm.config, inputs)
    assert len(shown) == 2 and shown[0].shape == (32, 32, 3)
    stages = {
        Random(keep=Exactly(6), at="tower"): [("after the tower", 12)],
        PruMerge(): [("after the tower", None)],
        FastV(layer=1, keep=Exactly(5)): [("from block 1", 5)],
        PyramidDrop((1, 3), (0.5, 0.25)): [("from block 1", 16), ("from block 3", 8)],
    }
    for method, wanted in stages.items():
        row, layers = asked.reduced(method, inputs, prompt)
        per_picture = [kept.of(layers, place, where, (32, 32)) for place in range(2)]
        for stage, (label, count) in enumerate(wanted):
            counts = [one[stage][2] for one in per_picture]
            assert all(kept.words(one[stage][0]) == label and one[stage][1].shape == (4, 4) for one in per_picture)
            assert sum(counts) == (row["image_tokens"] if count is None else count)
        assert sum(one[-1][2] for one in per_picture) == row["image_tokens"]


def test_a_wrong_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match="hf:ID_OR_PATH"):
        load_vlm("timm:vit_tiny_patch16_224")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_vlm("hf:/nowhere/at/all")


def test_a_file_of_questions_is_answered_and_gone_on_with(folder, tmp_path, capsys):
    asked = [{"question_id": i, "image": "photo.png", "text": "what is this ?"} for i in range(3)]
    asked += [{"question_id": 3, "text": "what ?"}]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("\n".join(map(json.dumps, asked)))
    words = [
        "generate",
        "--model",
        f"hf:{folder}",
        "--questions",
        str(questions),
        "--answers",
        str(answers),
        "--tokens",
        "3",
    ]
    words += ["--images", str(folder)]
    assert cli(*words) == 0
    lines = answers.read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [0, 1, 2, 3]
    assert set(json.loads(lines[0])) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    answers.write_text(lines[0] + "\n")
    assert cli(*words) == 0 and "3 of 4 questions answered now" in capsys.readouterr().out
    assert answers.read_text().splitlines() == lines
    assert cli(*words, "--method", "FastV(layer=1)") == 2 and "of another model" in capsys.readouterr().err
    assert cli(*words[:-1], str(tmp_path)) == 2 and "3 of 4 images are not in" in capsys.readouterr().err
    assert cli(*words, "--prompt", "what ?") == 2 and cli("generate", "--model", f"hf:{folder}") == 2


def test_a_budget_is_for_methods_that_leave_it_open(folder, tmp_path, capsys):
    words = [
        "generate",
        "--model",
        f"hf:{folder}",
        "--image",
        str(folder / "photo.png"),
        "--prompt",
        "what ?",
        "--json",
    ]
    words += ["--out", str(tmp_path / "kept.png"), "--tokens", "1"]
    for method, amount, said in (
        ((), "2", "saved with none: give --method too"),
        (("--method", "Random(at='tower')"), "0", "a share up to 1"),
        (("--method", "Random(Exactly(3), at='tower')"), "2", "says itself how much it keeps"),
    ):
        assert cli(*words, *method, "--budget", amount) == 2 and said in capsys.readouterr().err
    for amount, left in (("2", 2), ("1", 16)):
        assert cli(*words, "--method", "AdaptiveKeep(budget_max=0.75)", "--budget", amount) == 0
        assert json.loads(capsys.readouterr().out)["answers"][1]["image_tokens"] == left


def cli(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["winnow", *words])
        with pytest.raises(SystemExit) as done:
            main()
    return done.value.code
