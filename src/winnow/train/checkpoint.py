"""Checkpoints: a folder per step, written whole or not at all, checked by hash when read.

Winnow's own; weights as safetensors, the rest (optimiser, position, running means) as a tensors-only torch file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

KEPT = 2
"""The last one and the one before it, in case the last is damaged."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from."""

    step: int
    weights: Mapping[str, Mapping[str, Tensor]]
    """State dicts by name: "task", and "ema" where weights are averaged."""
    state: Mapping[str, Any]


def write(folder: Path, found: Checkpoint) -> Path:
    """Save into `folder/step-N`; OSError leaves what was there. Only the newest `KEPT` stay."""
    target = folder / f"step-{found.step:09d}"
    part = folder / f".part-{found.step:09d}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        sums = {}
        for name, tensors in found.weights.items():
            sums[f"{name}.safetensors"] = _put(part / f"{name}.safetensors", save(alone(tensors)))
        buffer = BytesIO()
        torch.save(dict(found.state), buffer)
        sums["state.pt"] = _put(part / "state.pt", buffer.getvalue())
        _put(part / MANIFEST, json.dumps({"step": found.step, "sha256": sums}).encode())
        if target.exists():  # saved at this very step before, by the run that is being resumed
            shutil.rmtree(target)
        os.rename(part, target)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = error.strerror or str(error)
        words = f"the checkpoint of step {found.step} cannot be written ({reason}); earlier ones are kept"
        raise OSError(error.errno, words, str(folder)) from None
    for old in _steps(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read(folder: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """The newest sound checkpoint; a damaged one is named and the one before it used. None where there is none."""
    for path in reversed(_steps(folder)):
        try:
            return _read(path)
        except ValueError as error:
            say(f"{path} is damaged ({error}); trying the one before it")
    return None


def _read(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        data = {name: (path / name).read_bytes() for name in manifest["sha256"]}
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    for name, wanted in manifest["sha256"].items():
        if hashlib.sha256(data[name]).hexdigest() != wanted:
            raise ValueError(f"{name} is not as it was written, {len(data[name])} bytes")
    # sorted, since safetensors gives another order in every process, and sharded weights are scattered one by one
    weights = {
        Path(name).stem: dict(sorted(load(raw).items())) for name, raw in data.items() if name.endswith(".safetensors")
    }
    state = torch.load(BytesIO(data["state.pt"]), map_location="cpu", weights_only=True)
    return Checkpoint(manifest["step"], weights, state)


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them (tied weights are written twice)."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor.clone() if shared else tensor
    return found


def _put(path: Path, data: bytes) -> str:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
