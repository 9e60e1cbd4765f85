"""The training loop keeps its promises: exact resume, many processes as one, checkpoints that survive, strict recipes."""

from __future__ import annotations

import errno
import gc
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import winnow
from winnow.cli import main as cli_main
from winnow.cli.report import write as write_report
from winnow.data.scenes import scene
from winnow.measure import record
from winnow.measure.accuracy import macro_f1
from winnow.tasks.classify import Classify
from winnow.train import Recipe, load_recipe
from winnow.train.checkpoint import Checkpoint, read, write
from winnow.train.finder import steepest
from winnow.train.loop import train
from winnow.train.optim import optimizer_of, rate
from winnow.train.progress import read_log
from winnow.train.recipe import SchedulePart, describe
from winnow.train.step import Stepper, check_sharding, check_shards
from winnow.train.stop import Stopped

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "model": {"name": "timm:vit_tiny_patch16_224", "num_classes": 8,
              "options": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}},
    "augment": {"size": 32}, "epochs": 2, "batch": 8, "optim": {"lr": 1e-3}, "eval": {"batch": 4, "crop_pct": 1.0},
    "log": {"every": 1},
}  # fmt: skip
"""Three steps an epoch, six in all."""
NOISY = (
    "method=PatchDropout(rate=0.5)", "model.drop_path=0.3", "model.drop=0.1", "optim.ema=0.9", "optim.clip=1.0",
    "schedule.warmup_steps=2", "label_smoothing=0.1", "augment.mixup=0.8", "augment.randaugment=rand-m9-mstd0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """The recipe, with 24 images to train on and 10 to validate, of 8 classes."""
    folder = tmp_path_factory.mktemp("recipe")
    for i in range(34):
        image = Image.fromarray(scene(0, i).image).resize((32, 32))
        path = folder / "images" / ("train" if i < 24 else "val") / f"class{i % 8}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    data = {split: {"path": str(folder / "images"), "split": split} for split in ("train", "val")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": data}))
    return path


def tiny(recipe_file: Path, *sets: str) -> Recipe:
    return load_recipe(recipe_file, sets)


def run(recipe: Recipe, out: Path, **words) -> record.Row:
    return train(recipe, out, device="cpu", **words)


def steps(out: Path) -> list[dict]:
    return [line for line in read_log(out / "log.jsonl") if line["event"] == "step"]


def scores(out: Path) -> list[dict]:
    return [line["val"] for line in read_log(out / "log.jsonl") if line["event"] == "epoch"]


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def cut_after(monkeypatch, steps: int, signum: int = signal.SIGTERM) -> None:
    """A signal arrives during that step, as it would from outside."""
    advance, done = Stepper.advance, []

    def advancing(self, *args):
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signum)
        return advance(self, *args)

    monkeypatch.setattr(Stepper, "advance", advancing)


# ---- recipes


@pytest.mark.parametrize(("text", "said"), [
    ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
    ("final_drop_ratio=0.35", "unknown key final_drop_ratio; keys there:"),
    ("weight_decay=0.1", "did you mean optim.weight_decay?"),
    ("optim.lr=fast", "optim.lr"),
    ("optim.lr", "write KEY=VALUE"),
    ("epochs.x=1", "epochs holds a value"),
    ("method=ToMee(r=8)", "did you mean ToMe?"),
    ("data.val=null", "data.val"),
    ("augment.mixupp=1", "did you mean augment.mixup?"),
])  # fmt: skip
def test_a_wrong_key_or_value_is_an_error_that_helps(recipe_file, text, said):
    with pytest.raises(ValueError) as error:
        tiny(recipe_file, text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_settings_are_read_as_yaml(recipe_file):
    recipe = tiny(
        recipe_file, "optim.lr=1e-4", "optim.precision=no", "method=ToMe(8, )", "schedule.kind=constant", "optim.clip=1"
    )
    assert (recipe.optim.lr, recipe.optim.precision, recipe.method) == (1e-4, "no", "ToMe()")
    assert (recipe.schedule.kind, recipe.optim.clip) == ("constant", 1.0)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="no recipe no_such_thing"):
        load_recipe("no_such_thing")


# ---- optimiser and schedule


def test_the_rate_warms_up_falls_as_a_cosine_and_ends_at_the_lowest():
    part = SchedulePart(kind="cosine", warmup_epochs=2, min_lr=0.1)
    rates = [rate(step, 100, 10, 1.0, part) for step in range(101)]
    assert rates[:20] == sorted(rates[:20]) and 0 < rates[0] < 0.06
    assert rates[20] == 1.0 and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rate(50, 100, 10, 0.3, SchedulePart(kind="constant")) == 0.3


def test_norms_biases_positions_and_class_tokens_do_not_decay(recipe_file):
    import timm

    module = Classify(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3))
    plain, decayed = optimizer_of(module, tiny(recipe_file).optim).param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert {"model.pos_embed", "model.cls_token", "model.norm.weight", "model.head.bias"} <= {
        names[id(p)] for p in plain["params"]
    }
    assert len(plain["params"]) + len(decayed["params"]) == len(names)


def test_the_finder_takes_the_steepest_fall():
    assert steepest([1e-4, 1e-3, 1e-2, 1e-1, 1.0], [2.0, 1.9, 1.0, 0.8, 4.0]) == 1e-2
    with pytest.raises(ValueError, match="never falls"):
        steepest([1e-4, 1e-3, 1e-2], [1.0, 2.0, 3.0])


# ---- a run, and what it leaves


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory):
    """A noisy run of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    before = torch.get_rng_state()
    row = run(tiny(recipe_file, *NOISY), folder / "run", results=folder / "rows.jsonl", name="tiny")
    assert torch.equal(torch.get_rng_state(), before), "training leaves the generators as they were"
    return folder, row


def test_a_run_leaves_lines_weights_curves_and_a_row(whole):
    folder, row = whole
    out, lines = folder / "run", read_log(folder / "run" / "log.jsonl")
    assert [line["event"] for line in lines] == ["step"] * 3 + ["epoch"] + ["step"] * 3 + ["epoch", "summary"]
    assert [line["samples"] for line in lines if line["event"] == "step"] == [8, 16, 24, 32, 40, 48]
    epoch = lines[-2]
    assert {"loss", "top1", "top5", "f1"} <= set(epoch["val"])
    assert epoch["gap"] == epoch["train"]["top1"] - epoch["val"]["top1"]
    assert epoch["tokens"] == [8, 8, 8] and epoch["val_tokens"] == [16, 16, 16]
    assert epoch["memory_mib"] > 10 and epoch["step_s"] > 0 and epoch["train"]["grad_norm"] > 0
    assert (out / "curves.png").stat().st_size > 5_000 and (out / "curves.svg").stat().st_size > 5_000
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-000000003", "step-000000006"]
    (kept,) = record.read(folder / "rows.jsonl")
    assert kept == row and kept.train is not None and kept.train.steps == 6 and kept.data.n == 10
    assert kept.train.loss == pytest.approx(sum(line["loss"] for line in steps(out)) / 6)
    norms = [line["grad_norm"] for line in steps(out)]
    wanted = {
        "train_loss": kept.train.loss,
        "grad_norm": pytest.approx(sum(norms) / 6),
        "learning_rate": epoch["learning_rate"],
    }
    assert lines[-1].items() >= wanted.items() and epoch["learning_rate"] == steps(out)[-1]["learning_rate"]
    rates = "train_runtime", "train_samples_per_second", "train_steps_per_second"
    assert all(lines[-1][name] > 0 for name in rates), "document 000's fields"
    assert kept.train.last == kept.accuracy.value == epoch["val"]["top1"] and kept.train.settings["optim.ema"] == 0.9


def test_a_finished_run_leaves_its_data_at_once(recipe_file, tmp_path):
    """An experiment trains many models in one process; 200 MB of images each once waited for the garbage collector."""
    found = []
    gc.disable()
    try:
        run(tiny(recipe_file, "epochs=1"), tmp_path, after=lambda task, epoch: found.append(weakref.ref(task)))
        assert [one() for one in found] == [None]
    finally:
        gc.enable()


def test_a_table_of_runs_is_made_of_rows(whole, tmp_path):
    folder, row = whole
    made = write_report(record.read(folder / "rows.jsonl"), [], tmp_path)
    head, _, line = made[0].read_text().splitlines()
    cells = dict(zip(head.split("|"), line.split("|"), strict=True))
    assert [path.name for path in made] == ["training.md"] and cells[" recipe "] == " tiny "
    assert (
        cells[" method "] == " `PatchDropout()` "
        and cells[" from "] == " scratch "
        and cells[" tokens in training "] == " 8.0 "
    )
    assert cells[" top-1 % "].startswith(f" {100 * row.train.last:.1f} (") and cells[" batch "] == " 8 "


def test_the_weights_it_leaves_are_the_averaged_ones_and_load_into_the_plain_model(whole):
    folder, _ = whole
    last = load_file(folder / "run" / "last.safetensors")
    ema = load_file(folder / "run" / "checkpoints" / "step-000000006" / "ema.safetensors")
    task = load_file(folder / "run" / "checkpoints" / "step-000000006" / "task.safetensors")
    assert all(torch.equal(value, ema[f"module.model.{key}"]) for key, value in last.items())
    assert not torch.equal(last["head.weight"], task["model.head.weight"])


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_run_cut_at_any_step_goes_on_to_the_bit(whole, recipe_file, tmp_path, monkeypatch, cut):
    folder, _ = whole
    recipe, out = tiny(recipe_file, *NOISY), tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_after(patch, cut)
        with pytest.raises(Stopped, match="stopped after step") as stopped:
            run(recipe, out)
    assert stopped.value.code == 143 and 0 < len(steps(out)) < 6
    torch.manual_seed(99)
    run(recipe, out, resume=True)
    assert steps(out) == steps(folder / "run") and scores(out) == scores(folder / "run")
    for name in ("best", "last"):
        assert same_weights(out / f"{name}.safetensors", folder / "run" / f"{name}.safetensors")


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(whole, recipe_file, tmp_path, capsys):
    folder, _ = whole
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:-1]) + '{"event": "st')
    broken = out / "checkpoints" / "step-000000006" / "task.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    run(tiny(recipe_file, *NOISY), out, resume=True)
    said = capsys.readouterr().err
    assert "step-000000006 is damaged (task.safetensors" in said and "resumed after step 3 of 6" in said
    assert steps(out) == steps(folder / "run") and scores(out) == scores(folder / "run")


def test_a_finished_run_another_recipe_and_a_folder_in_use_are_refused(whole, recipe_file, tmp_path):
    folder, _ = whole
    recipe = tiny(recipe_file, *NOISY)
    with pytest.raises(ValueError, match="is finished"):
        run(recipe, folder / "run", resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        run(recipe, folder / "run")
    with pytest.raises(ValueError, match="no sound checkpoint"):
        run(recipe, tmp_path / "empty", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to(folder / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"started with optim.lr=0.001, the recipe says 0.002"):
        run(tiny(recipe_file, *NOISY, "optim.lr=0.002"), tmp_path / "other", resume=True)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_batch(recipe_file, tmp_path, monkeypatch):
    forward, calls = Classify.forward, []

    def exploding(self, images, targets):
        calls.append(1)
        found = forward(self, images, targets)
        return found | {"loss": found["loss"] * float("inf")} if len(calls) == 5 else found

    monkeypatch.setattr(Classify, "forward", exploding)
    with pytest.raises(FloatingPointError, match=r"the loss is inf at step 4 .*, the checkpoint before it in"):
        run(tiny(recipe_file, "eval.every=2"), tmp_path / "run")
    images, labels, indices = torch.load(tmp_path / "run" / "bad-batch-4-0.pt", weights_only=True)
    assert images.shape == (8, 3, 32, 32) and len(set(indices.tolist())) == 8 and labels.max() < 8


def test_a_full_disk_leaves_the_checkpoints_there_were(tmp_path, monkeypatch):
    def found(step):
        return Checkpoint(step, {"task": {"x": torch.ones(3)}}, {})

    write(tmp_path, found(1))
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        )
        with pytest.raises(OSError, match=r"step 2 cannot be written .No space left on device.; earlier ones are kept"):
            write(tmp_path, found(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    write(tmp_path, found(2)), write(tmp_path, found(3))
    assert read(tmp_path, print).step == 3 and len(list(tmp_path.iterdir())) == 2


# ---- variants of a step


def test_parts_of_a_batch_and_recomputed_blocks_give_the_same_losses(recipe_file, tmp_path):
    run(tiny(recipe_file, "epochs=1", "method=PatchDropout()"), tmp_path / "one")
    run(tiny(recipe_file, "epochs=1", "method=PatchDropout()", "optim.accumulate=2"), tmp_path / "parts")
    run(tiny(recipe_file, "epochs=1", "method=PatchDropout()", "optim.checkpoint=true"), tmp_path / "again")
    one, parts, again = (steps(tmp_path / name) for name in ("one", "parts", "again"))
    for a, b in chain(zip(one, parts), zip(one, again)):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )
    with pytest.raises(ValueError, match="batch=8 does not divide into 1 processes x accumulate=3"):
        run(tiny(recipe_file, "optim.accumulate=3"), tmp_path / "three")


def test_only_the_head_of_a_frozen_backbone_learns_and_a_checkpoint_gets_a_new_head(recipe_file, tmp_path):
    run(tiny(recipe_file, "epochs=1"), tmp_path / "from")
    weights = tmp_path / "from" / "last.safetensors"
    run(
        tiny(recipe_file, "epochs=1", "freeze=backbone", f"model.weights={weights}", "model.num_classes=9"),
        tmp_path / "to",
    )
    before, after = load_file(weights), load_file(tmp_path / "to" / "last.safetensors")
    assert after["head.weight"].shape == (9, 32)
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("head."))


def test_a_frozen_backbone_stays_in_evaluation_mode_and_the_reducer_does_not():
    import timm

    model = winnow.reduce(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3), winnow.PatchDropout())
    task = Classify(model, freeze="backbone").train()
    assert not model.training and not model.blocks[0].training and model.head.training and model.reducer.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert not any(part.training for part in task.eval().modules())


def test_smoothing_is_for_training_and_soft_targets_are_understood():
    task = Classify(torch.nn.Flatten(), label_smoothing=0.5)
    logits, targets = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
    soft = task.train()(logits, targets)["loss"]
    hard = task.eval()(logits, targets)["loss"]
    assert hard == pytest.approx(float(-logits.log_softmax(-1)[0, 0])) and soft > hard
    mixed = task.eval()(logits, torch.tensor([[0.5, 0.5, 0.0]]))
    assert mixed["loss"] == pytest.approx(float(-logits.log_softmax(-1)[0, :2].mean())) and mixed["top1"] == 1


# ---- from outside: the command, a signal, two processes


def command(*args: str, **words) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, timeout=300, **words)


def launched(script: tuple[str, ...], out: Path, rows: Path, recipe_file: Path, *args: str) -> record.Row:
    """The row of a run on two processes, started by torchrun."""
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *script)
    where = ("--out", str(out), "--results", str(rows), "--device", "cpu", "--json")
    done = command(*launch, "train", str(recipe_file), *where, *args)
    assert done.returncode == 0, done.stderr[-2000:]
    return record.Row.model_validate(json.loads(done.stdout))


def near(one: Path, two: Path) -> None:
    """Both runs have the same losses to 1e-6, and the same scores and weights to 1e-5."""
    for a, b in zip(steps(one), steps(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )
    for a, b in zip(scores(one), scores(two), strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    first, second = (load_file(out / "last.safetensors") for out in (one, two))
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


def test_two_processes_are_one(recipe_file, tmp_path):
    sets = ("method=PatchDropout(rate=0.5)", "optim.clip=1.0", "optim.ema=0.9")
    alone = run(tiny(recipe_file, *sets), tmp_path / "alone")
    asked = chain.from_iterable(("--set", text) for text in sets)
    row = launched(("-m", "winnow"), tmp_path / "both", tmp_path / "rows.jsonl", recipe_file, *asked)
    assert row.train.processes == 2 and alone.train.processes == 1, "the launcher really ran two"
    near(tmp_path / "alone", tmp_path / "both")
    assert row.accuracy.hits == alone.accuracy.hits and row.counts == alone.counts


SHARDING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from sharded import shard
from winnow.cli import main
shard("Block")
main()
"""


@pytest.mark.parametrize(("kind", "fsdp2"), [("DEEPSPEED", False), ("FSDP", False)])
def test_other_shards_are_refused_with_what_does_the_same(kind, fsdp2):
    with pytest.raises(ValueError, match="fsdp_version: 2 does what DeepSpeed's ZeRO-3 does"):
        check_sharding(kind, fsdp2)
    check_sharding("FSDP", True)
    check_sharding("MULTI_GPU", False)


def test_what_cannot_be_sharded_is_refused(recipe_file):
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"optim\.ema needs whole weights"):
        check_shards(layer, tiny(recipe_file, "optim.ema=0.9"))
    check_shards(layer, tiny(recipe_file))
    layer.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="cannot shard logit_scale, which has no dimensions"):
        check_shards(layer, tiny(recipe_file))


@pytest.mark.slow
def test_sharded_weights_train_save_and_resume_as_whole_ones(recipe_file, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDING)
    sets = ("method=PatchDropout(rate=0.5)", "optim.clip=1.0")
    run(tiny(recipe_file, *sets), tmp_path / "alone")
    asked = tuple(chain.from_iterable(("--set", text) for text in sets))
    rows, out = tmp_path / "rows.jsonl", tmp_path / "both"
    assert launched((str(script),), out, rows, recipe_file, *asked).train.processes == 2
    near(tmp_path / "alone", out)
    shutil.rmtree(out / "checkpoints" / "step-000000006")
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:-1]))
    launched((str(script),), out, rows, recipe_file, "--resume", *asked)
    near(tmp_path / "alone", out)


@pytest.mark.slow
def test_a_compiled_run_has_few_graphs_and_the_same_losses(recipe_file, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: whole(self, backend="aot_eager"))
    sets = ("method=PatchDropout(rate=0.5)", "epochs=4")
    run(tiny(recipe_file, *sets), tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    run(tiny(recipe_file, *sets, "compile=true"), tmp_path / "compiled")
    near(tmp_path / "plain", tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] <= 5, "12 steps and 12 evaluations of two sizes"


def told(monkeypatch, capsys, *args: str) -> tuple[int, str]:
    """Exit code and stderr of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["winnow", *args])
    with pytest.raises(SystemExit) as ended:
        cli_main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(recipe_file, tmp_path, monkeypatch, capsys, signum, code):
    rows, where = tmp_path / "rows.jsonl", ("--device", "cpu", "--out", str(tmp_path / "run"))
    args = ("train", str(recipe_file), *where, "--results", str(rows))
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        cut_after(patch, 2, signum)
        ended, said = told(patch, capsys, *args)
    assert ended == code and "stopped after step 2 of 6 and saved; --resume goes on from there" in said
    assert signal.getsignal(signum) is before and not rows.exists()
    ended, said = told(monkeypatch, capsys, *args, "--resume")
    assert ended == 0 and "resumed after step 2 of 6" in said and len(record.read(rows)) == 1


def test_refusals_are_one_line(recipe_file, tmp_path, monkeypatch, capsys):
    code, said = told(monkeypatch, capsys, "train", str(recipe_file), "--set", "optim.lrr=1")
    assert code == 2 and said.count("\n") == 1 and "did you mean optim.lr?" in said
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    code, said = told(monkeypatch, capsys, "train", str(recipe_file), "--device", "cpu", "--out", str(tmp_path / "run"))
    assert code == 2 and said.splitlines()[-1].startswith("winnow: ") and "No space left on device" in said


def test_the_finder_draws_its_plot(recipe_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "lr.png"
    args = ("--steps", "20", "--low", "1e-4", "--high", "1", "--device", "cpu", "--out", str(out), "--json")
    monkeypatch.setattr(sys, "argv", ["winnow", "lr-find", str(recipe_file), *args])
    with pytest.raises(SystemExit) as ended:
        cli_main()
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and found["suggested"] in found["rates"] and out.stat().st_size > 5_000
    assert found["rates"][0] == pytest.approx(1e-4) and found["rates"] == sorted(found["rates"])


# ---- scores and the page


def test_macro_f1_is_the_mean_over_classes_that_occur():
    table = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    f1 = [2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4), 2 * (2 / 3) * 1 / (2 / 3 + 1), 0.0]
    assert macro_f1(table) == pytest.approx(sum(f1) / 3)


def test_the_table_of_keys_is_up_to_date():
    spec = importlib.util.spec_from_file_location("training_page", ROOT / "docs" / "training.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.page() == made.PAGE.read_text(encoding="utf-8"), "run: python docs/training.py"
    assert all(words for _, _, words in describe()), "every key says what it does"


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_commands_of_the_pages_name_recipes_and_keys_that_exist(page):
    found = re.findall(r"winnow (?:train|lr-find) (.*)", "\n".join(fenced((ROOT / page).read_text(encoding="utf-8"))))
    assert len(found) >= 3
    for line in found:
        name, *options = shlex.split(line)
        load_recipe(name, [text for flag, text in pairwise(options) if flag == "--set"])


def fenced(text: str) -> list[str]:
    return re.findall(r"^```\w+\n(.*?)^```", text, re.S | re.M)
