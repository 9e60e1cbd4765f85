"""The README keeps its word: its code runs, its commands run, its tables are those of the rows and the registry."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from winnow.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {lang: re.findall(rf"```{lang}\n(.*?)```", README, re.S) for lang in ("python", "sh")}
COMMANDS = [line for block in BLOCKS["sh"] for line in block.splitlines() if line.startswith("winnow ")]
# the same commands on a model that is small and untrained; it has 6 blocks
SMALL = {"timm:vit_tiny_patch16_224": "timm:test_vit", "EViT()": "EViT(layers=(1,3))",
         "EViT(keep=Keep(0.7))": "EViT(layers=(1,3))", "--batch 25": "--batch 2"}  # fmt: skip


def test_generated_parts_are_up_to_date():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.fill(README) == README, "run: python docs/readme.py"


def test_python_block_runs():
    assert len(BLOCKS["python"]) == 1
    code = BLOCKS["python"][0].replace("pretrained=True", "pretrained=False")
    names = {"images": torch.randn(1, 3, 224, 224)}
    exec(code, names)
    assert names["run"].counts == [196 - 13 * i for i in range(13)]
    assert not hasattr(names["model"], "reducer")


def test_readme_names_the_two_commands():
    assert "make demo" in README
    assert "make test" in README


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that holds the files README speaks of."""
    import timm
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 255, (40, 40, 3), dtype=np.uint8) for _ in range(4)]
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(f"{i}.png")
    Image.fromarray(pixels[0]).save("cat.jpg")
    Path("photos.csv").write_text("file,label\n" + "".join(f"{i}.png,{i}\n" for i in range(4)))
    save_file(timm.create_model("test_vit").state_dict(), "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs(line, folder, monkeypatch):
    if "results/photos.jsonl" in line:
        (folder / "results").mkdir()
        (folder / "results" / "photos.jsonl").write_bytes((ROOT / "results" / "photos.jsonl").read_bytes())
    if "fvcore" in line:
        pytest.importorskip("fvcore")
    for theirs, ours in SMALL.items():
        line = line.replace(theirs, ours)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
