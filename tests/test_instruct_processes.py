"""Instruction tuning in two processes is that in one, with whole weights (DDP) and with sharded ones (FSDP2)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruct_vlm import lines, run, write_json
from safetensors.torch import load_file

import winnow
from winnow.data.conversations import IMAGE, open_conversations
from winnow.tasks.instruct import Training
from winnow.train import load_recipe
from winnow.train.progress import read_log
from winnow.train.task import Place

pytestmark = [pytest.mark.usefixtures("no_curves"), pytest.mark.slow]
BLENDED = ("epochs=2", "eval.batch=1", "seed=3")
RUNS = {
    "stage two": (),
    "DRIP, everything": ("method=DRIP(rate=0.5, after=1)", "instruct.train.vision=true", "optim.mm_projector_lr=1e-4"),
    "AdaptiveKeep, in parts, blocks recomputed": (
        "method=AdaptiveKeep()", "instruct.train.vision=true", "optim.accumulate=2", "optim.checkpoint=true",
    ),
    "AdaptiveKeep, alone": (
        "method=AdaptiveKeep(train='zero')", "instruct.train.llm=false", "instruct.train.projector=false",
        "instruct.group_by_modality_length=true",
    ),
    "AdaptiveKeep, jointly": ("method=AdaptiveKeep(fuse='after', text=True)",),
    "LoRA": (
        "instruct.train.llm=lora", "instruct.lora_r=2", "instruct.lora_alpha=4", "instruct.lora_dropout=0",
    ),
}  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
if "--sharded" in sys.argv:
    from sharded import shard
    shard("CLIPEncoderLayer", "LlamaDecoderLayer")
from instruct_vlm import run
recipe, out, *sets = (word for word in sys.argv[1:] if not word.startswith("--"))
run(Path(recipe), Path(out), *sets, resume="--resume" in sys.argv)
"""


@pytest.fixture(scope="module")
def blended(folder, recipe_file) -> tuple[str, ...]:
    """As many conversations without images as with them; the settings that read them."""
    path = write_json(folder, images=4, text=4, name="blended.json")
    return (*BLENDED, f"data.train.path={path}", f"data.val.path={path}", "data.val.split='[1:6]'")


def launched(tmp_path: Path, *words: str | Path) -> None:
    """The run on two processes, started by torchrun."""
    script = tmp_path / "launched.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *map(str, words)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def same_losses(alone: Path, both: Path) -> None:
    """To 1e-5, and the scores to 1e-4."""
    one, two = (read_log(where / "log.jsonl") for where in (alone, both))
    assert two[-1]["processes"] == 2
    for a, b in zip(one, two, strict=True):
        if a["event"] == "step":
            assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4) and b["top1"] == a["top1"]
        if a["event"] == "epoch":
            assert b["val"] == pytest.approx(a["val"], rel=1e-4) and b.get("val_tokens") == a.get("val_tokens")


def test_one_process_has_text_alone_where_the_other_has_images(recipe_file, blended):
    """What the runs below are about: otherwise they would say nothing of it."""
    training = Training(load_recipe(recipe_file, blended))
    places = [Place(rank, 2, torch.device("cpu"), lambda tensor: tensor) for rank in (0, 1)]
    shown = [
        [bool(batch[4].sum()) for batch in training.batches(epoch, 0, place)] for place in places for epoch in (0, 1)
    ]
    first, second = shown[0] + shown[1], shown[2] + shown[3]
    assert any(one != other for one, other in zip(first, second, strict=True)) and any(map(all, zip(first, second)))


@pytest.mark.parametrize("sets", RUNS.values(), ids=RUNS)
def test_whole_weights(recipe_file, blended, tmp_path, sets):
    run(recipe_file, tmp_path / "alone", *blended, *sets)
    launched(tmp_path, recipe_file, tmp_path / "both", *blended, *sets)
    same_losses(tmp_path / "alone", tmp_path / "both")


@pytest.mark.parametrize("sets", RUNS.values(), ids=RUNS)
def test_sharded_weights_come_back_whole_and_resume_to_the_bit(recipe_file, folder, blended, tmp_path, sets):
    out, words = tmp_path / "both", (recipe_file, tmp_path / "both", *blended, *sets, "--sharded")
    run(recipe_file, tmp_path / "alone", *blended, *sets)
    launched(tmp_path, *words)
    same_losses(tmp_path / "alone", out)
    assert answer(out / "last", folder) == answer(tmp_path / "alone" / "last", folder)

    steps, weights = lines(out), load_file(out / "last.safetensors")
    shutil.rmtree(out / "checkpoints" / "step-000000004")
    text = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(text[:-1]))
    launched(tmp_path, *words, "--resume")
    again = load_file(out / "last.safetensors")
    assert lines(out) == steps and list(again) == list(weights)
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def answer(trained: Path, folder: Path) -> list[int]:
    """What the model of a folder says about the first image."""
    processor, model = winnow.load_vlm(f"hf:{trained}")
    image = open_conversations(str(folder / "told.json"))[0].pictures()[0]
    asked = processor(images=[image], text=[f"USER: {IMAGE} what is it ? ASSISTANT:"], return_tensors="pt")
    return model.generate(**asked, max_new_tokens=8, do_sample=False)[0].tolist()
