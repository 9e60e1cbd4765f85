"""save and load: a reducer's weights with its spelling, in one safetensors file; `Trained`: those inside a checkpoint.

Winnow's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ._parse import parse, parse_way
from ._reduce import SIGNED, reduce, reducer_of, restore, seat_of
from ._weights import REDUCER, fit, read_weights, read_words, reducer_in
from .reducer import Method
from .ways import Way

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | Path) -> None:
    """Write the model's reducer (weights, method, way) to a safetensors file, atomically."""
    from . import __version__

    reducer = reducer_of(model)
    seat = seat_of(model)
    words = {"winnow": __version__, "method": repr(reducer.method), "way": str(seat.way)}
    words |= {name: str(value) for name, value in seat.told.items()}
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
    """Reduce the model as the file says and load the reducer's weights, and the model's own where `winnow train` wrote it.

    path: a file, or the folder that `save_pretrained` made of a reduced Hugging Face model. ValueError if it is neither,
    or does not fit.
    """
    path = Path(path)
    words, state = _folder(path) if path.is_dir() else _file(path)
    method, way = parse(words["method"]), parse_way(words.get("way", "auto"))
    reduce(model, method, way, words.get("blocks"), words.get("expand") == "True")
    try:
        if "model" in words:
            fit(model, state, path, type(model).__name__)
        else:
            reducer_of(model).load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        restore(model)
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} does not fit {words['method']} on this model: {first}") from None
    return model


def _file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file says of itself, and its tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file or is cut short ({error})") from None
    if not words.get("method"):
        raise ValueError(f"{path} holds no method: it was not written by winnow.save()")
    return words, state


def _folder(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The same of a Hugging Face folder: its configuration's words, and the reducer's tensors."""
    config = path / "config.json"
    signed = json.loads(config.read_text(encoding="utf-8")).get(SIGNED) if config.is_file() else None
    if not signed:
        raise ValueError(f"{path} holds no reduced model: save_pretrained() writes one while it is reduced")
    return {name: str(value) for name, value in signed.items()}, reducer_in(path)


@dataclass(frozen=True)
class Trained:
    """The reducer's part of a checkpoint: its weights, and the method they were trained with (None: it does not say)."""

    path: Path
    method: Method | None
    state: Mapping[str, Tensor]

    def fill(self, model: Model) -> Model:
        """Load them into the model's reducer; ValueError where they do not fit."""
        reducer = reducer_of(model)
        try:
            reducer.load_state_dict(dict(self.state))
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(f"the reducer's weights in {self.path} do not fit {reducer.method}: {first}") from None
        return model

    def check(self, methods: Sequence[Method]) -> None:
        """ValueError unless they are one of these methods' and no other of these has to be trained."""
        if self.method is None:
            raise ValueError(f"{self.path} holds a reducer's weights but not its method: give a file of winnow train")
        if self.method.facts.training_only:
            return
        says = f'{self.path.name} was trained with {self.method}: give --method "{self.method}"'
        for method in methods:
            if method.facts.learned and not self.of(method):
                raise ValueError(f"{says} instead of {method}, whose weights it does not hold")
        if not any(map(self.of, methods)):
            raise ValueError(f"{says} too, or weights trained without a reducer")

    def of(self, method: Method) -> bool:
        """They were trained for this method."""
        return self.method is not None and method.trained == self.method.trained

    def reduce(self, model: Model, method: Method, way: Way = "auto", **words: Any) -> Model:
        """`winnow.reduce`, with these weights where they are the method's."""
        reduce(model, method, way, **words)
        try:
            return self.fill(model) if self.of(method) else model
        except ValueError:
            restore(model)
            raise


def trained_reducer(path: Path) -> Trained | None:
    """The reducer's part of a checkpoint; None where it has none."""
    state = {key.removeprefix(REDUCER): value for key, value in read_weights(path).items() if key.startswith(REDUCER)}
    spelled = read_words(path).get("method") if state else None
    return Trained(path, parse(spelled) if spelled else None, state) if state else None
