"""A recipe: every setting of one training run, read from YAML and checked; an unknown key is an error.

Winnow's own; document 003 trained with 0.5 instead of 0.35 because its configuration ignored a key in silence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .keys import InstructPart, LearningPart, OptimPart, Recipe, SchedulePart, Source

__all__ = [
    "InstructPart", "LearningPart", "OptimPart", "Recipe", "SchedulePart", "Source",
    "check", "check_same", "describe", "find", "flat", "load_recipe", "put",
]  # fmt: skip

SHIPPED = files("winnow") / "recipes"
LOOSE = ("log.", "eval.", "data.workers")
"""Keys that may change between a run and its resumption."""


def load_recipe(name: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML file, with `a.b=c` settings put in.

    FileNotFoundError / ValueError, one line, where there is none, or a key is unknown or has a wrong value.
    """
    path = find(name)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no recipe: write keys and values, as in model: {{name: ...}}")
    for text in sets:
        put(raw, text)
    return check(raw, str(path))


def find(name: str | Path) -> Path:
    """The file of a recipe: a path that exists, or a name among the shipped ones."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = sorted(one.name.removesuffix(".yaml") for one in SHIPPED.iterdir() if one.name.endswith(".yaml"))
    if str(name) in shipped:
        return Path(str(SHIPPED / f"{name}.yaml"))
    near = difflib.get_close_matches(str(name), shipped, 1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped) or 'none'}"
    raise FileNotFoundError(f"no recipe {name}: give a YAML file or a shipped name; {hint}")


def check(raw: dict[str, Any], where: str) -> Recipe:
    """The typed recipe; ValueError names the first wrong key and the nearest right one."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{where}: unknown key {key}; {_nearest(key)}") from None
        if first["type"] == "missing":
            raise ValueError(f"{where}: {key} is missing") from None
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {key}: {said} (got {first['input']!r})") from None


def put(raw: dict[str, Any], text: str) -> None:
    """Set one `a.b=c` in the raw recipe; the value is read as YAML. ValueError where it is not of that form."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text}: write KEY=VALUE, as in optim.lr=1e-3")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        found = value
    *parents, last = key.strip().split(".")
    here = raw
    for depth, name in enumerate(parents, 1):
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise ValueError(f"--set {text}: {'.'.join(parents[:depth])} holds a value, not keys")
    here[last] = found


def check_same(saved: dict[str, Any], recipe: Recipe) -> None:
    """ValueError names the first key in which a run to be resumed differs from its recipe now."""
    now = dict(flat(recipe.model_dump(mode="json")))
    before = dict(flat(saved))
    for key in before | now:
        if not key.startswith(LOOSE) and before.get(key) != now.get(key):
            raise ValueError(
                f"the run was started with {key}={before.get(key)}, the recipe says {now.get(key)}: "
                "resume with the recipe it was started with (recipe.yaml beside its checkpoints)"
            )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def describe(part: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every key, in order."""
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from describe(kind, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _plain(field.get_default(call_default_factory=True))
        yield prefix + name, default, field.description or ""


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _nearest(key: str) -> str:
    known = [name for name, _, _ in describe()]
    parent, _, leaf = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[0] == parent]
    leaves = {name.rpartition(".")[2]: name for name in [*known, *beside]}
    near = difflib.get_close_matches(leaf, leaves, 1, cutoff=0.6)
    if near:
        return f"did you mean {leaves[near[0]]}?"
    return f"keys there: {', '.join(name.rpartition('.')[2] for name in beside) or ', '.join(known)}"
