"""save and load: a reducer's weights with its spelling, in one safetensors file.

Winnow's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from ._parse import parse, parse_way
from ._reduce import reduce, reducer_of, restore, seat_of

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | Path) -> None:
    """Write the model's reducer (weights, method, way) to a safetensors file, atomically."""
    from . import __version__

    reducer = reducer_of(model)
    words = {"winnow": __version__, "method": repr(reducer.method), "way": str(seat_of(model).way)}
    state = {name: value.contiguous().cpu() for name, value in reducer.state_dict().items()}
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(to_bytes(state, metadata=words))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def load(model: Model, path: str | Path) -> Model:
    """Reduce the model as the file says and load the reducer's weights; ValueError if the file is not `save`'s."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file or is cut short ({error})") from None
    if "method" not in words:
        raise ValueError(f"{path} holds no method: it was not written by winnow.save()")
    reduce(model, parse(words["method"]), parse_way(words.get("way", "auto")))
    try:
        reducer_of(model).load_state_dict(state)
    except RuntimeError as error:
        restore(model)
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} does not fit {words['method']} on this model: {first}") from None
    return model
