"""Contrastive pretraining: shards counted exactly and gone on with exactly, many processes and parts as one, zero-shot."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SHARED
from PIL import Image

from winnow._weights import read_weights
from winnow.cli import main as cli_main
from winnow.data.pairs import drawn, open_pairs
from winnow.data.scenes import scene
from winnow.measure import record
from winnow.measure.zero_shot import retrieval, templates_of
from winnow.models import load_model
from winnow.tasks.contrast import Contrast, Training, _left_out
from winnow.train import load_recipe
from winnow.train.loop import train
from winnow.train.progress import read_log

pytest.importorskip("open_clip")
TINY = {
    "task": "contrast",
    "model": {"name": "open_clip:ViT-B-32", "options": {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 16, "layers": 1, "width": 16, "heads": 2}}},
    "contrast": {"zeroshot": {"path": "scenes", "split": "val[:8]"}, "templates": ["a {} triangle"]},
    "augment": {"size": 32}, "epochs": 1, "batch": 8, "eval": {"batch": 4}, "log": {"every": 1, "save": 2},
}  # fmt: skip
"""Of 48 whole samples: six steps an epoch."""


def picture(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene(0, i).image).resize((32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two shards of 25: one sample lacks its caption, one its image; a third shard is cut in its second sample."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(25 * number, 25 * number + 25):
                if i != 3:
                    put(tar, f"{i:09d}.jpg", picture(i))
                if i != 30:
                    put(tar, f"{i:09d}.txt", f"scene {i}, {scene(0, i).caption}".encode())
                put(tar, f"{i:09d}.json", json.dumps({"key": i}).encode())
    with tarfile.open(folder / "00002.tar", "w") as tar:
        for i in (50, 51):
            put(tar, f"{i:09d}.jpg", picture(i))
            put(tar, f"{i:09d}.txt", b"a scene")
    whole = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(whole[: whole.index(b"000000051.txt")])
    return folder


@pytest.fixture(scope="module")
def recipe_file(shards) -> Path:
    data = {"train": {"path": str(shards), "limit": 48}, "val": {"path": str(shards), "split": "[:8]"}}
    path = shards.parent / f"{shards.name}.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": data}))
    return path


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("winnow.train.loop.save_training", lambda *args: None)  # drawn in test_train.py


def run(recipe_file: Path, out: Path, *sets: str, **words):
    return train(load_recipe(recipe_file, sets), out, device="cpu", **words)


def cli(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["winnow", *words])
        with pytest.raises(SystemExit) as done:
            cli_main()
    return done.value.code


def steps(out: Path) -> list[dict]:
    return [line for line in read_log(out / "log.jsonl") if line["event"] == "step"]


def test_shards_are_counted_with_their_failures(shards, capsys):
    pairs = open_pairs(str(shards))
    assert len(pairs) == 49 and pairs.images.key(0) == "00000/000000000"
    assert pairs.caption(0) == f"scene 0, {scene(0, 0).caption}" and pairs.images[0][0].size == (32, 32)
    said = "\n".join(pairs.failures)
    assert len(pairs.failures) == 4 and "000000003 has no image" in said and "000000030 has no caption" in said
    assert "000000051 has no caption" in said and "00002.tar ends early" in said
    assert cli("data", "count", str(shards)) == 0
    assert "49 samples, 4 failed, of 53" in capsys.readouterr().out


def test_shards_are_listed_as_open_clip_lists_them(shards, capsys):
    both = str(shards / "{00000..00001}.tar")
    assert len(open_pairs(both)) == 48 and len(open_pairs(f"{both}::{shards / '00002.tar'}")) == 49
    assert cli("data", "count", str(shards / "00000.tar"), str(shards / "00001.tar"), "--headers") == 0
    assert "48 samples, 2 failed, of 50" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"00003\.tar \(1 of 4 are missing\)"):
        open_pairs(str(shards / "{00000..00003}.tar"))


def test_an_image_that_cannot_be_decoded_is_replaced_counted_and_named(shards, tmp_path, capsys):
    broken = (shards / "00000.tar").read_bytes()
    at = broken.index(picture(5))
    (tmp_path / "a.tar").write_bytes(broken[:at] + b"x" * 100 + broken[at + 100 :])
    data = {"train": {"path": str(tmp_path / "a.tar")}, "val": {"path": str(tmp_path / "a.tar")}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY | {"data": data, "contrast": {}}))
    run(recipe, tmp_path / "run")
    assert sum(8 * line["failed"] for line in steps(tmp_path / "run")) in (0, 1), "its step may be the epoch's rest"
    assert "left out of val: a: a/000000005 cannot be decoded" in capsys.readouterr().err
    task = Training(load_recipe(tmp_path / "run" / "recipe.yaml"))  # the one it leaves trains as well
    assert len(task.train_pairs) == 24 and len(task.val_pairs) == 23
    found = [task.set[i] for i in range(24)]
    assert [i for _, _, i, failed in found if failed] == [4]
    assert list(_left_out("x", "a" * 22))[20] == "left out of x: 2 more; winnow data count --failures names all"
    assert torch.equal(found[4][0], task.set[4][0]), "the same stand-in every time"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_of_files(kind, tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    rows = [("a.jpg", "a scene"), ("gone.jpg", "nothing"), ("a.jpg", "")]
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        path.write_text("filepath,title\n" + "".join(f"{file},{text}\n" for file, text in rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"file": file, "caption": text}) + "\n" for file, text in rows))
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pa.table({"image": [row[0] for row in rows], "text": [row[1] for row in rows]}), path)
    pairs = open_pairs(str(path))
    assert (len(pairs), pairs.caption(0), len(pairs.failures)) == (1, "a scene", 2)
    with pytest.raises(ValueError, match="has no column words"):
        open_pairs(str(path), column="words")
    if kind != "parquet":
        path.write_bytes(b"\xff")
        with pytest.raises(ValueError, match=f"table.{kind} is not UTF-8 text"):
            open_pairs(str(path))


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_with_the_images_in_it(as_struct, tmp_path, capsys):
    """As img2dataset's parquet output and as Hugging Face's image columns are."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    data = [picture(0), picture(1), None, picture(3)]
    pictures = [{"bytes": one, "path": "../x/same"} for one in data] if as_struct else data
    captions = (
        [["a scene", "the same"], [""], ["lost"], ["another"]] if as_struct else ["a scene", None, "lost", "another"]
    )
    write_table(pa.table({"image" if as_struct else "jpg": pictures, "caption": captions}), tmp_path / "00000.parquet")
    for where in (tmp_path, tmp_path / "00000.parquet"):
        pairs = open_pairs(str(where))
        assert [pairs.caption(i) for i in range(len(pairs))] == ["a scene", "lost", "another"]
        assert pairs.images[0][0].size == (32, 32) and "has no caption" in pairs.failures[0]
        assert cli("data", "count", str(where)) == 0
        assert "2 samples, 2 failed, of 4" in capsys.readouterr().out
    assert cli("data", "captions2llava", str(tmp_path), str(tmp_path / "told.json")) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert [one["conversations"][1]["value"] for one in told] == ["a scene", "another"]
    kept = [(tmp_path / "told_images" / "x" / f"same{name}.jpg") for name in ("", "-2")] if as_struct else []
    assert [path.read_bytes() for path in kept] == ([picture(0), picture(3)] if as_struct else [])


def test_shards_may_lie_in_folders_of_splits_and_samples_in_folders_of_a_shard(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        for name in ("./a/0", "b/0", "../c/0"):
            put(tar, f"{name}.jpg", picture(0))
            put(tar, f"{name}.txt", name.encode())
    pairs = open_pairs(str(tmp_path), split="train[:3]")
    assert [pairs.images.key(i) for i in range(3)] == ["0/a/0", "0/b/0", "0/c/0"]
    assert [pairs.caption(i) for i in range(3)] == ["./a/0", "b/0", "../c/0"]


def test_scenes_bring_their_captions():
    pairs = open_pairs("scenes", split="val[:5]")
    assert [pairs.caption(i) for i in range(5)] == [scene(1, i).caption for i in range(5)]
    one = open_pairs("scenes1", split="val[:6]")
    said = [one.caption(i).split() for i in range(6)]
    assert one.images.name == "scenes1" and {len(words) for words in said} == {3}
    assert [one.images.mask(i).max() for i in range(6)] == [1] * 6
    assert [one.images.classes[label] for label in one.images.labels] == [words[-1] for words in said]
    assert len({words[-1] for words in said}) > 1, "one alone has any shape"


def test_classes_and_cocos_files_have_captions(tmp_path):
    for split, names in {"train": ("red_fox", "owl"), "val": ("owl",)}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.jpg").write_bytes(picture(0))
    pairs = open_pairs(str(tmp_path), split="train", caption="one {} here")
    assert sorted(pairs.caption(i) for i in range(2)) == ["one owl here", "one red fox here"]
    said = {"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}], "annotations": [
        {"image_id": 7, "caption": "first"}, {"image_id": 7, "caption": "second"}]}  # fmt: skip
    (tmp_path / "val" / "a.jpg").write_bytes(picture(1))
    (tmp_path / "captions_val.json").write_text(json.dumps(said))
    pairs = open_pairs(str(tmp_path / "captions_val.json"))
    assert (len(pairs), pairs.caption(0), len(pairs.failures)) == (1, "first", 1)
    (tmp_path / "captions_x.json").write_text("[]")
    with pytest.raises(ValueError, match="not COCO's captions"):
        open_pairs(str(tmp_path / "captions_x.json"))


def test_cocos_photographs_load():
    path = SHARED / "data" / "coco_captions" / "captions_train2017.json"
    if not path.is_file():
        pytest.skip("COCO's captions are not here")
    pairs = open_pairs(str(path))
    named = {image["file_name"]: image["id"] for image in json.loads(path.read_text())["images"]}
    assert len(pairs) == len(named) and not pairs.failures and len(pairs.sound()) == len(pairs)
    first = {each["image_id"]: each["caption"] for each in reversed(json.loads(path.read_text())["annotations"])}
    assert all(pairs.caption(i) == first[named[pairs.images.key(i)]].strip() for i in range(len(pairs)))


def test_a_phrase_stands_for_its_caption(recipe_file):
    task = Training(load_recipe(recipe_file, ("contrast.phrase=0.5",)))
    whole = [task.train_pairs.caption(i) for i in range(48)]
    said = [task.set._said(i, i) for i in range(48)]
    parts = [one for one, caption in zip(said, whole) if one != caption]
    assert 10 < len(parts) < 38 and all(
        one in caption.split(", ") for one, caption in zip(said, whole) if one != caption
    )
    task.set.set_epoch(1)
    assert said != [task.set._said(i, i) for i in range(48)], "others in another epoch"


def test_shards_drawn_with_replacement(shards, recipe_file, tmp_path):
    shard = np.repeat([0, 1, 2, 3], [5, 7, 3, 5])
    rows = [drawn(shard, 0, epoch) for epoch in range(50)]
    assert all(len(one) == 20 for one in rows) and any((a != b).any() for a, b in pairwise(rows))
    for one in rows:  # whole shards after each other; the last may be cut
        starts = [row for before, row in zip([-1, *one], one) if row != before + 1 or row in (0, 5, 12, 15)]
        assert set(starts) <= {0, 5, 12, 15}
    drawn_once = np.bincount(np.concatenate(rows), minlength=20)
    assert drawn_once.min() > 20 and drawn_once.max() < 90 and len({len(set(one)) for one in rows}) > 1
    run(recipe_file, tmp_path / "run", "data.resample=true")
    assert len(steps(tmp_path / "run")) == 6
    with pytest.raises(ValueError, match=r"data\.resample draws shards"):
        Training(load_recipe(recipe_file, ("data.resample=true", "data.train={path: scenes, limit: 48}")))
    with pytest.raises(ValueError, match=r"data\.resample needs task: contrast"):
        load_recipe("scenes_plain", ("data.resample=true",))


# ---- the loss


def test_a_batch_in_parts_is_the_whole_batch(recipe_file, tmp_path):
    method = "method=DRIP(rate=0.5, after=1)"
    for name, sets in {"one": (), "parts": ("optim.accumulate=4",), "again": ("optim.checkpoint=true",)}.items():
        run(recipe_file, tmp_path / name, method, *sets)
    for a, b, c in zip(*(steps(tmp_path / name) for name in ("one", "parts", "again")), strict=True):
        assert b["contrastive_loss"] == pytest.approx(a["contrastive_loss"], abs=1e-5)
        assert c["loss"] == pytest.approx(a["loss"], abs=1e-6) and {"boundaries", "boundary_ratio"} <= set(a)
        assert a["loss"] > a["contrastive_loss"]


SETS = ("model.options.init_logit_bias=-1.0", "method=PatchDropout(rate=0.5)", "log.save=null")


def with_siglip(recipe_file: str, out: str) -> None:
    """Train with CLIP's loss; each process's share of a batch also gets SigLIP's, with its gradient, logged as scores."""
    evaluate = Training.evaluate

    def scoring(self, module, place):
        found = evaluate(self, module, place)
        share = 8 // place.world
        mine = [self.set[i] for i in range(place.rank * share, (place.rank + 1) * share)]
        images, texts = (torch.stack([one[part] for one in mine]) for part in (0, 1))
        # CLIP's loss does not see the bias: its gradient is rounding's alone, of which Adam makes whole steps
        torch.nn.init.constant_(self.model.logit_bias, -1.0)
        loss = Contrast(self.model, "siglip").train()(images, texts)["loss"]
        gradient = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True, materialize_grads=True)
        mean = place.total(torch.cat([loss.detach().view(1), *(each.flatten() for each in gradient)])) / place.world
        scores = {"siglip": float(mean[0]), "siglip_gradient": float(mean[1:].norm()), "some": float(mean[1:].sum())}
        return replace(found, metrics=found.metrics | scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("winnow.train.loop.save_training", lambda *args: None)
        patch.setattr(Training, "evaluate", scoring)
        train(load_recipe(recipe_file, SETS), Path(out), device="cpu")


def test_two_processes_are_one_with_either_loss(recipe_file, tmp_path):
    """The global batch's negatives, gathered: loss and gradient are one process's, CLIP's softmax and SigLIP's sigmoid."""
    here = Path(__file__)
    script = tmp_path / "both.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(here.parent)!r})\nfrom {here.stem} import with_siglip\n"
                      "with_siglip(*sys.argv[1:])\n")  # fmt: skip
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(recipe_file), str(tmp_path / "both")], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with_siglip(str(recipe_file), str(tmp_path / "alone"))
    alone, both = (read_log(tmp_path / where / "log.jsonl") for where in ("alone", "both"))
    assert both[-1]["processes"] == 2
    for a, b in zip(alone, both, strict=True):
        if a["event"] == "step":
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        if a["event"] == "epoch":
            assert b["val"] == pytest.approx(a["val"], rel=1e-4, abs=1e-5) and a["val"]["siglip_gradient"] > 0.1


KILLED = """
import os, signal, sys
from pathlib import Path
from winnow.tasks.contrast import Contrast, Training, _left_out
from winnow.train import load_recipe
from winnow.train.loop import train

inputs = Training.inputs
def recording(self, batch, step, device):
    with open(sys.argv[3], "a") as file:
        file.write(f"{step} {' '.join(map(str, batch[2].tolist()))}\\n")
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return inputs(self, batch, step, device)
Training.inputs = recording
train(load_recipe(sys.argv[1]), Path(sys.argv[2]), device="cpu")
"""


def test_killed_in_the_middle_of_a_shard_every_sample_is_seen_once(recipe_file, tmp_path, monkeypatch):
    out, seen = tmp_path / "run", tmp_path / "seen.txt"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", KILLED, str(recipe_file), str(out), str(seen)], env=env, timeout=600)
    assert done.returncode == -signal.SIGKILL
    lines = [list(map(int, line.split())) for line in seen.read_text().splitlines()]
    assert [step for step, *_ in lines] == [0, 1, 2, 3]
    inputs = Training.inputs

    def recording(self, batch, step, device):
        lines.append([step, *batch[2].tolist()])
        return inputs(self, batch, step, device)

    monkeypatch.setattr(Training, "inputs", recording)
    run(recipe_file, out, resume=True)
    replayed = lines[4:]
    assert [step for step, *_ in replayed] == [2, 3, 4, 5], "from the checkpoint after the second step on"
    assert replayed[:2] == lines[2:4], "what came after the checkpoint is replayed as it was"
    surviving = Counter(i for _, *rows in lines[:2] + replayed for i in rows)
    assert surviving == Counter(range(48))
    assert [line["step"] for line in steps(out)] == [1, 2, 3, 4, 5, 6]


# ---- what becomes of a tower


@pytest.mark.parametrize("method", [None, "DRIP(rate=0.5, after=1)"])
def test_a_tower_goes_on_as_a_classifier(method, recipe_file, tmp_path):
    run(recipe_file, tmp_path / "clip", f"method={method or 'null'}", "epochs=1", "log.save=null")
    weights = tmp_path / "clip" / "last.safetensors"
    options = {key: TINY["model"]["options"][key] for key in ("embed_dim", "vision_cfg")}
    recipe = tmp_path / "tuned.yaml"
    recipe.write_text(yaml.safe_dump({
        "model": {"name": "open_clip:ViT-B-32", "num_classes": 8, "options": options, "weights": str(weights)},
        "method": method, "data": {"train": {"path": "scenes", "limit": 8}, "val": {"path": "scenes", "split": "val[:4]"}},
        "augment": {"size": 32}, "epochs": 1, "batch": 4,
    }))  # fmt: skip
    clip = {key: value for key, value in read_weights(weights).items() if key.startswith(("visual.", "reducer."))}
    for freeze in ("probe", "none"):
        out = tmp_path / freeze
        train(load_recipe(recipe, (f"freeze={freeze}",)), out, device="cpu")
        tuned = read_weights(out / "last.safetensors")
        assert set(tuned) == set(clip) - {"visual.proj"} | {"head.weight", "head.bias"}
        same = {key: torch.equal(tuned[key], clip[key]) for key in clip if key in tuned}
        assert all(same.values()) if freeze == "probe" else not any(same[key] for key in same if "mlp" in key)
    again = load_model("open_clip:ViT-B-32", weights=out / "last.safetensors", num_classes=8, options=options, size=32,
                       bare=True)  # fmt: skip
    assert torch.equal(again.model.head.weight, tuned["head.weight"]), "a classifier comes back with its head"
    with pytest.raises(ValueError, match="does not fit"):
        load_model(
            "open_clip:ViT-B-32", weights=out / "last.safetensors", num_classes=5, options=options, size=32, bare=True
        )


# ---- evaluation


def test_the_guides_commands_are_of_recipes_and_keys_that_exist():
    page = Path(__file__).resolve().parents[1] / "docs" / "laion.md"
    found = re.findall(r"^winnow train (.*[^\\])$", page.read_text(encoding="utf-8"), re.M)
    tasks = []
    for line in found:
        name, *words = shlex.split(line)
        tasks.append(load_recipe(name, [text for flag, text in pairwise(words) if flag == "--set"]).task)
    assert tasks == ["contrast"] * 2 + ["classify"] * 2


def test_retrieval_knows_its_own_and_takes_no_credit_for_ties():
    features = torch.eye(12)
    right = retrieval(features, features, torch.arange(12))
    assert set(right.values()) == {1.0} and "text_to_image_r10" in right
    flat = retrieval(torch.ones(12, 2), torch.ones(12, 2), torch.arange(12))
    assert set(flat.values()) == {0.0}
    one_off = retrieval(features, features.roll(1, 0), torch.arange(12))
    assert one_off["image_to_text_r1"] == 0
    assert retrieval(torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2))["image_to_text_r1"] == 1, "the same text"


def test_templates_by_name_and_by_hand(tmp_path):
    assert len(templates_of("openai")) == 80 and templates_of(["a {}."])[0]("cat") == "a cat."
    with pytest.raises(ValueError, match="needs one"):
        templates_of(["a photo"])
    with pytest.raises(FileNotFoundError, match="openai, simple"):
        templates_of(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(("text", "said"), [
    ("label_smoothing=0.1", "label_smoothing means nothing"),
    ("contrast.loss=siglip", "init_logit_bias"),
    ("model.name=timm:vit_tiny_patch16_224", "has no text tower"),
    ("contrast.colunm=x", "did you mean contrast.column?"),
    ("contrast.templates=[nothing]", "needs one"),
    ("data.train.path=nowhere", "no images with captions in nowhere"),
    ("task=classify", "need task: contrast"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(recipe_file, text, said):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Training(load_recipe(recipe_file, (text,)))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_trained_tower_is_judged_from_the_command_line(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("winnow._clip._configured", lambda *_: TINY["model"]["options"])  # no small CLIP has a name
    run(recipe_file, tmp_path / "run", "method=DRIP(rate=0.5, after=1)")
    scored = read_log(tmp_path / "run" / "log.jsonl")[-2]["val"]
    words = ["--model", "open_clip:ViT-B-32", "--weights", str(tmp_path / "run" / "last.safetensors")]
    words += ["--data", "scenes", "--split", "val[:8]", "--method", "DRIP(rate=0.5, after=1)"]
    (tmp_path / "templates.txt").write_text("a {} triangle\n")
    asked = [*words, "--templates", str(tmp_path / "templates.txt"), "--results", str(tmp_path / "rows.jsonl")]
    assert cli("eval", "zeroshot", *asked) == 0
    (row,) = record.read(tmp_path / "rows.jsonl")
    assert row.accuracy.value == pytest.approx(scored["top1"]) and row.counts[-1] < row.counts[0]
    assert row.top5.value >= row.accuracy.value
    assert "top-5: " in capsys.readouterr().out
    assert cli("eval", "retrieval", *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text_to_image_r10"][0] > 0
    assert cli("eval", "retrieval", *words) == 0
    assert "text_to_image_r10: " in capsys.readouterr().out
    assert cli("eval", "zeroshot", *asked[:-6], "--templates", "none") == 2
    monkeypatch.undo()
    assert cli("eval", "zeroshot", "--model", str(tmp_path / "run"), *words[4:8], *asked[-4:]) == 0
    assert record.read(tmp_path / "rows.jsonl")[-1].accuracy == row.accuracy, "a run's folder says all the rest"
