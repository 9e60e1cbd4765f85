"""Spellings to methods and ways: `ToMe(r=8)`, read with ast, never evaluated.

Winnow's own.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from .methods import METHODS
from .parts.amount import Below, Exactly, Keep, Remove
from .reducer import Method
from .ways import Padded

_METHODS = {method.__name__: method for method in METHODS}
_AMOUNTS = {amount.__name__: amount for amount in (Keep, Remove, Exactly, Below)}


def list_methods() -> list[str]:
    """Names of all methods."""
    return list(_METHODS)


def parse(text: str) -> Method:
    """The method a spelling names, keyword or positional; ValueError says what would work."""
    value = _parse(text, _METHODS | _AMOUNTS)
    if isinstance(value, type) and issubclass(value, Method):
        return value()
    if not isinstance(value, Method):
        raise ValueError(f"{text!r} is not a method; methods: {', '.join(_METHODS)}")
    return value


def parse_way(text: str) -> str | Padded:
    """A way to run: "auto", "static", "masked" or "Padded(16)"."""
    return _parse(text, {"Padded": Padded}) if text.startswith("Padded") else text


def _parse(text: str, names: dict[str, type]) -> Any:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"cannot read {text!r}; a method is written like ToMe(r=8) or EViT(keep=Keep(0.7))") from None
    return _value(tree.body, names, text)


def _value(node: ast.expr, names: dict[str, type], text: str) -> Any:
    if isinstance(node, ast.Name):
        return _known(node.id, names, text)
    if isinstance(node, ast.Attribute):
        return _preset(node, names, text)()
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            return _call(_preset(node.func, names, text), node, names, text)
        if not isinstance(node.func, ast.Name):
            raise ValueError(f"cannot read {text!r}: only plain names may be called")
        return _call(_known(node.func.id, names, text), node, names, text)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(one, names, text) for one in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"cannot read {ast.unparse(node)!r} in {text!r}: numbers, strings, tuples and amounts only"
        ) from None


def _known(name: str, names: dict[str, type], text: str) -> type:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
        raise ValueError(f"unknown name {name!r} in {text!r}{hint}")
    return names[name]


def _preset(node: ast.Attribute, names: dict[str, type], text: str) -> Callable[..., Any]:
    """The class method a dotted name means, where the class lists it among its presets."""
    if not isinstance(node.value, ast.Name):
        raise ValueError(f"cannot read {text!r}: only plain names may be called")
    cls = _known(node.value.id, names, text)
    presets: tuple[str, ...] = getattr(cls, "presets", ())
    if node.attr not in presets:
        raise ValueError(f"{cls.__name__} has no preset {node.attr!r}; presets: {', '.join(presets) or 'none'}")
    return getattr(cls, node.attr)


def _call(cls: Callable[..., Any], node: ast.Call, names: dict[str, type], text: str) -> Any:
    fields = list(inspect.signature(cls).parameters)
    if any(isinstance(arg, ast.Starred) for arg in node.args) or any(word.arg is None for word in node.keywords):
        raise ValueError(f"cannot read {text!r}: no * or ** here")
    words = {str(word.arg): _value(word.value, names, text) for word in node.keywords}
    wrong = [word for word in words if word not in fields]
    if wrong:
        raise ValueError(f"{cls.__qualname__} has no field {wrong[0]!r}; fields: {', '.join(fields)}")
    if len(node.args) > len(fields):
        raise ValueError(f"{cls.__qualname__} takes at most {len(fields)} values: {', '.join(fields)}")
    given = [*fields[: len(node.args)], *(str(word.arg) for word in node.keywords)]
    twice = [name for name in words if given.count(name) > 1]
    if twice:
        raise ValueError(f"{cls.__qualname__}: {twice[0]} is given twice in {text!r}")
    try:
        return cls(*(_value(arg, names, text) for arg in node.args), **words)
    except TypeError as error:
        raise ValueError(f"{error} (in {text!r})") from None
