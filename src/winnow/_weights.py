"""Weights files: read one safely, say exactly how it does not fit, and hash it.

Winnow's own.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

_PICKLED = (".pth", ".pt", ".bin", ".tar")
REDUCER = "reducer."
"""What the names of a reducer's weights begin with."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors, .pth, .pt or .bin file, on the CPU; ValueError if it is damaged or holds none."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in _PICKLED:
            raise ValueError(f"{path} is not a weights file that Winnow reads: give .safetensors, .pth, .pt or .bin")
        return _state(path, torch.load(path, map_location="cpu", weights_only=True))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): download it again") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged, or holds Python objects beside its tensors, which are not loaded for safety: "
            "save the state dict alone"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, AttributeError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is damaged or no weights file ({reason}): download it again") from None


def read_words(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself; {} for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def reducer_in(folder: Path) -> dict[str, Tensor]:
    """The reducer's weights among those of a Hugging Face model, whatever files of the folder they are in."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [key for key in file.keys() if key.startswith(REDUCER)]  # noqa: SIM118
            found |= {key.removeprefix(REDUCER): file.get_tensor(key) for key in names}
    return found


def _state(path: Path, found: Any) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: bare, or under `model` or `state_dict`; DDP's `module.` is taken off."""
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"{path} holds no state dict (bare, or under 'model' or 'state_dict'): save model.state_dict()"
        )
    wrapped = all(key.startswith("module.") for key in found)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in found.items()}


def fit(model: nn.Module, state: Mapping[str, Tensor], path: Path, spec: str) -> None:
    """Load `state` into `model`, every key, every shape; else ValueError with counts and the first offenders."""
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if not (missing or surplus or shapes):
        model.load_state_dict(state)
        return
    said = ((missing, "missing"), (surplus, "unexpected"), (shapes, "of another shape"))
    wrong = ", ".join(f"{len(keys)} {what} ({_first(keys)})" for keys, what in said if keys)
    raise ValueError(f"{path.name} does not fit {spec}: {wrong}: {_advice(missing, surplus, state, own)}")


def transferred(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the model's own head where its number of classes is another."""
    own = model.state_dict()
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    names = [name for name, module in model.named_modules() if module is head]
    mine = {key for key in own if any(key.startswith(f"{name}.") for name in names)}
    differ = any(key not in state or state[key].shape != own[key].shape for key in mine)
    return dict(state) | {key: own[key] for key in mine} if differ else dict(state)


def without_reducer(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the weights of a reducer that the model does not have."""
    own = model.state_dict()
    return {key: value for key, value in state.items() if key in own or not key.startswith(REDUCER)}


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:2]) + (", ..." if len(keys) > 2 else "")


def _advice(
    missing: Sequence[str], surplus: Sequence[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> str:
    if surplus and not missing and all(key.startswith(REDUCER) for key in surplus):
        return "it was saved from a reduced model; winnow.load(model, FILE) reduces the model as it says and loads both"
    differ = [key for key in own if key in state and state[key].shape != own[key].shape]
    rows = {state[key].shape[0] for key in differ if state[key].shape[1:] == own[key].shape[1:]}
    if differ and not missing and not surplus and len(rows) == 1 and len(differ) <= 2:
        return f"weights of another model, or num_classes={rows.pop()}?"
    return "weights of another model?"


def file_hash(path: Path) -> str:
    """First 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def state_hash(state: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
