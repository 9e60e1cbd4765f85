"""Shared pieces of the tests: small models that are not numb, and the folder of reference outputs where it exists."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.backends.mha.set_fastpath_enabled(False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny LLaVA, and eight conversations about six images: told.json (instruct_vlm.py)."""
    from instruct_vlm import build, write_json

    path = build(tmp_path_factory.mktemp("llava"))
    write_json(path)
    return path


@pytest.fixture(scope="module")
def recipe_file(folder) -> Path:
    """Two steps of them."""
    from instruct_vlm import write_recipe

    return write_recipe(folder)


@pytest.fixture(scope="module")
def llava(folder) -> Any:
    """The model with its processor, opened to be trained."""
    from winnow._llava import load_llava

    return load_llava(f"hf:{folder}")


@pytest.fixture
def no_curves(monkeypatch):
    """Runs draw no curves: test_train.py does."""
    monkeypatch.setattr("winnow.train.loop.save_training", lambda *args: None)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Call the command in this process, in a folder of its own: (exit code, stdout, stderr)."""
    from winnow.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def reference(name: str) -> dict:
    """Cases of one file of reference outputs; skips where the folder is not there."""
    path = SHARED / "reference_outputs" / f"{name}.pt"
    if not path.exists():
        pytest.skip(f"no reference outputs beside the project: {name}.pt")
    return torch.load(path, weights_only=False)["cases"]
