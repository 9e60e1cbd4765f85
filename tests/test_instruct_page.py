"""docs/instruct.md keeps its word: its commands run in their order, on a tiny model and a few conversations."""

from __future__ import annotations

import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from instruct_vlm import build, halves, said, write_json
from PIL import Image

import winnow
from winnow.cli import app, main
from winnow.measure import record
from winnow.recipes import easy_vqa, vila
from winnow.train import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "instruct.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
SMALL = [
    "batch=4",
    "eval.batch=4",
    "optim.precision=no",
    "data.workers=0",
    "log.every=1",
    "instruct.max_length=128",
    "epochs=1",
]
SWAPPED = {"llava-hf/llava-1.5-7b-hf": "tiny", "1,0.75,0.5,0.25,0.125,0.0625": "1,0.5"}


def smaller(line: str) -> list[str]:
    """The same command for what is here."""
    for theirs, ours in SWAPPED.items():
        line = line.replace(theirs, ours)
    words = shlex.split(line)[1:]
    if words[0] == "compare":
        words += ["--pictures", "1"]
    if words[0] == "train":
        sets = [*SMALL, "data.train.split=''", "data.val.split='[:4]'"]
        sets += ["model.name=hf:tiny/llm", "instruct.vision=hf:tiny/tower"] if "align" in words[1] else []
        words += [part for text in sets for part in ("--set", text)]
    return words


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The files the page speaks of."""
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "tiny")
    halves(tmp_path / "tiny")
    images = tmp_path / "coco" / "train2017"
    images.mkdir(parents=True)
    write_json(images).rename("llava_instruct_150k.json")
    for folder in ("annotations", "held_out", "llava-bench/images", "val2017"):
        Path(folder).mkdir(parents=True)
    for name in (
        "held_out/0.png",
        "held_out/1.png",
        "llava-bench/images/0.png",
        "photo.jpg",
        *(f"val2017/{i}.png" for i in range(5)),
    ):
        with Image.open(images / "0.png") as image:
            image.save(name)
    turns = said([("human", "<image>\nwhat colour is this ?"), ("gpt", "red")])
    Path("held_out/questions.json").write_text(
        json.dumps([{"image": f"{i}.png", "conversations": turns} for i in range(2)])
    )
    Path("llava-bench/questions.jsonl").write_text(json.dumps({"question_id": 0, "image": "0.png", "text": "what ?"}))
    coco = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(5)],
            "annotations": [{"image_id": i, "caption": "a red image"} for i in range(5)]}  # fmt: skip
    Path("annotations/captions_val2017.json").write_text(json.dumps(coco))
    return tmp_path


def test_the_commands_are_of_recipes_keys_and_options_that_exist():
    assert len(LINES) == 9 and all(line.startswith("winnow ") for line in LINES)
    for verb, *words in (shlex.split(line)[1:] for line in LINES):
        known = typer.main.get_command(app).commands[verb]
        known = known.commands[words[0]] if hasattr(known, "commands") else known
        options = {name for parameter in known.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, (verb, words)
        if verb == "train":
            load_recipe(words[0], [text for flag, text in pairwise(words) if flag == "--set"])


@pytest.mark.slow
def test_every_command_of_the_page_runs(here, monkeypatch):
    for line in LINES:
        monkeypatch.setattr(sys, "argv", ["winnow", *smaller(line)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, line
    methods = {row.method for row in record.read(Path("results/compare.jsonl"))}
    assert {None, "Random(keep=Keep(0.5), at='tower')"} < methods and any("Adaptive" in str(one) for one in methods)
    assert Path("curve/report.html").stat().st_size > 10_000 and Path("kept.png").exists()
    assert len(Path("answers.jsonl").read_text().splitlines()) == 1


def test_the_python_of_the_page_runs(here, monkeypatch):
    _, model = winnow.load_vlm("hf:tiny")
    processor = winnow.load_vlm("hf:tiny")[0]
    winnow.reduce(model, winnow.parse("AdaptiveKeep()"))
    for part in (model, processor):
        part.save_pretrained("runs/adaptive/last")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    with Image.open("photo.jpg") as image:
        exec(code, {"winnow": winnow, "image": image.convert("RGB"), "prompt": "<image> what ?", "torch": torch})


def test_the_table_of_stages_is_that_of_the_rows():
    rows = record.read(ROOT / "results" / "vila.jsonl")
    (shown,) = re.findall(r"<!-- vila -->\n(.*?)<!-- /vila -->", PAGE, re.S)
    assert shown.strip() == "\n".join(vila.table(rows)) and len(rows) == len(vila.STAGES)
    after = {row.train.recipe.removeprefix("vila: "): row.train.figures for row in rows}
    assert all(after[name]["text_loss"] == after[name]["before_text_loss"] for name in ("align", "interleaved, frozen"))


def test_a_row_says_how_its_recipe_was_run(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", vila.__spec__, raising=False)
    monkeypatch.setattr(sys, "argv", ["/somewhere/vila.py", "runs/vila", "results/vila.jsonl"])
    assert record.command() == "python -m winnow.recipes.vila runs/vila results/vila.jsonl"
    assert {row.command for row in record.read(ROOT / "results" / "vila.jsonl")} == {record.command()}


def test_the_stages_run(tmp_path, monkeypatch):
    monkeypatch.setattr(vila, "STAGES", {name: (*stage[:3], 1) for name, stage in list(vila.STAGES.items())[:2]})
    monkeypatch.setattr("winnow.train.loop.save_training", lambda *args: None)
    rows = vila.run(tmp_path / "runs", tmp_path / "rows.jsonl")
    assert [row.train.steps for row in rows] == [1, 1] and len(list(vila.table(rows))) == 4


def test_easy_vqa_is_read_and_learned(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("RGB", (64, 64), (6 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    asked = [["what color is the shape?", "red", i] for i in range(40)]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    monkeypatch.setattr("winnow.train.loop.save_training", lambda *args: None)
    short = {name: (*stage[:3], stage[3] | {"epochs": 1}) for name, stage in easy_vqa.STAGES.items()}
    monkeypatch.setattr(easy_vqa, "STAGES", short)
    rows = easy_vqa.run(tmp_path, tmp_path / "out", tmp_path / "rows.jsonl")
    assert [(row.data.n, row.train.steps) for row in rows] == [(4, 1), (4, 2)] and rows[1].method is not None
    assert winnow.load_vlm(f"hf:{tmp_path / 'out' / 'adaptive' / 'last'}")[1].reducer.method == winnow.parse(
        rows[1].method
    )
