"""docs/documents.md names only what is there, leaves nothing of the documents out; docs/families.md is its generator's."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import SHARED

import winnow
from winnow.adapters import REFUSED
from winnow.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "documents.md").read_text(encoding="utf-8")
STATES = ("done", "planned", "refused")
FOLDERS = ("src/", "docs/", "results/", "tests/")
FILES = ("README.md", "CONTRIBUTING.md", "pyproject.toml", "Makefile")


def rows() -> list[tuple[str, list[str]]]:
    """(document, [item, where, ours, state]) of every table row."""
    found, document = [], ""
    for line in PAGE.splitlines():
        if line.startswith("## Document "):
            document = line.split()[2].rstrip(":")
        if line.startswith("| ") and not line.startswith("| item |"):
            found.append((document, [cell.strip() for cell in line.strip().strip("|").split(" | ")]))
    return found


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# ---- is there what a code span names? None = the span names nothing of ours


def exists(span: str) -> bool | None:
    if span.startswith("winnow "):
        return command_exists(span)
    if span.startswith("--"):
        return any(has_option(verb, span.split()[0]) for verb in verbs())
    if span.startswith("make "):
        return bool(re.search(rf"^{span.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    if span.startswith(FOLDERS) or span in FILES:
        path, _, name = span.partition("::")
        there = (ROOT / path).exists()
        return there and (not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"))
    if re.match(r"winnow\.[\w.]+", span):
        return python_exists(re.match(r"winnow\.[\w.]+", span)[0])
    if re.fullmatch(r"[A-Z]\w+(\.\w+)?\(.*\)", span):
        return spelling_exists(span)
    if match := re.match(r"timm:(\w+)$", span):
        import timm

        import winnow.backbones  # noqa: F401

        return timm.is_model(match[1])
    return None


@cache
def verbs() -> dict[str, Any]:
    """The command's verbs; no type is named, since typer brings its own copy of click or none."""
    return typer.main.get_command(app).commands


def has_option(verb: str, option: str) -> bool:
    command = verbs()[verb]
    inner = getattr(command, "commands", {}).values()
    return any(option in parameter.opts for one in (command, *inner) for parameter in one.params)


def command_exists(span: str) -> bool:
    _, verb, *words = shlex.split(span)
    if verb not in verbs():
        return False
    options = [word for word in words if word.startswith("--")]
    values = {i + 1 for i, word in enumerate(words) if word.startswith("--")}
    subjects = [word for i, word in enumerate(words) if i not in values and re.fullmatch(r"[a-z][a-z0-9_-]*", word)]
    return all(has_option(verb, option) for option in options) and all(subject_exists(word) for word in subjects)


def subject_exists(word: str) -> bool:
    """A report, recipe or benchmark named on the command line: a recipe of that name, or a word of the command's code."""
    if list((ROOT / "src/winnow/recipes").glob(f"{word}.*")):
        return True
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/winnow/cli").glob("*.py"))
    return f'"{word}"' in code


def python_exists(name: str) -> bool:
    module, parts = winnow, name.split(".")[1:]
    for i, part in enumerate(parts):
        if not hasattr(module, part):
            try:
                importlib.import_module(".".join(["winnow", *parts[: i + 1]]))
            except ImportError:
                return False
        module = getattr(module, part)
    return True


def spelling_exists(span: str) -> bool:
    name, attribute = re.match(r"(\w+)(?:\.(\w+))?\(", span).groups()
    if name not in winnow.__all__ or issubclass(getattr(winnow, name), torch.nn.Module):
        return any(re.search(rf"^class {name}\b", code, re.M) for code in sources())
    if attribute:
        return hasattr(getattr(winnow, name), attribute)
    holder = "NormThreshold(below={})" if name == "Below" else "TopK(keep={})"
    try:
        winnow.parse(span if name in winnow.list_methods() else holder.format(span))
    except ValueError:
        return False
    return True


@cache
def sources() -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8") for path in (ROOT / "src/winnow").rglob("*.py"))


# ---- the page


def test_rows_are_whole():
    assert {document for document, _ in rows()} == {"000", "001", "002", "003", "004"}
    for _, cells in rows():
        assert len(cells) == 4, cells
        item, where, ours, state = cells
        assert item and where, cells
        assert state.startswith(STATES), cells
        assert state in ("done", "planned") or re.match(r"refused( for now)?: \w", state), f"no reason: {cells}"
        assert ours or state.startswith("refused"), cells


@pytest.mark.parametrize("state", ["done", "planned"])
def test_names_are_there_where_they_should_be(state):
    """What a done row names is there; of what a planned row names, something is not, or it would be done."""
    wrong = []
    for document, (item, _, ours, is_) in rows():
        found = {span: there for span in spans(ours) if (there := exists(span)) is not None}
        if is_ == "done" == state:
            wrong += [f"{document}, {item}: {span} does not exist" for span, there in found.items() if not there]
        elif is_ == "planned" == state and found and all(found.values()):
            wrong.append(f"{document}, {item}: planned, but all of it exists: {', '.join(found)}")
    assert not wrong, "\n".join(wrong)


def test_the_check_can_fail():
    gone = ("winnow tarin", "winnow list --nope", "winnow report nothing-of-the-kind", "src/winnow/none.py", "make tea",
            "winnow.measure.none", "winnow.none.none", "ToMe(q=8)", "Nonesuch(1)", "NormThreshold.seed999()",
            "timm:none", "tests/test_documents.py::test_none", "Keep(2.0)")  # fmt: skip
    assert [span for span in gone if exists(span)] == []
    here = ("winnow list", "winnow measure MODEL --profile", "src/winnow/cli", "make test", "winnow.measure.count_macs",
            "ToMe(r=8)", "Keep(0.5)", "Below(13.0)", "tests/test_documents.py::test_the_check_can_fail")  # fmt: skip
    assert [span for span in here if not exists(span)] == []
    assert exists("run.counts") is None


DOCUMENTS = sorted((SHARED / "seeds").glob("*.txt"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name[:3])
def test_nothing_of_a_document_is_left_out(path):
    """Headings, files, options, settings, classes and functions of a document are in its table."""
    text, part = path.read_text(encoding="utf-8"), section(path.name[:3])
    names = set(re.findall(r"\b[\w./-]+\.(?:py|png|PNG|ipynb|csv|pth|txt)\b", text))
    names |= set(re.findall(r"(?<!\w)--[a-z][\w-]+", text))
    names |= set(re.findall(r'^    "(\w+)":', text, re.M))
    names |= set(re.findall(r"\b(?:class|def) ([A-Z]\w+|[a-z]\w+_\w+)\(", text))
    names -= {name for name in names if name.startswith("--") and len(name) < 4}
    missing = sorted(name for name in names if Path(name).name not in part)
    heads = re.findall(r"^#+ \**(?:\d[\d.]*\s+)?(.+?)\**:?$", text, re.M)
    missing += [head for head in heads if not head_of(head) & words(part) and head_of(head)]
    assert not missing, f"document {path.name[:3]}: {missing}"


def section(document: str) -> str:
    return PAGE.split(f"## Document {document}")[1].split("\n## ")[0]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def head_of(text: str) -> set[str]:
    return words(text) - {"document", "with", "report", "code", "table", "contents", "project"}


# ---- docs/families.md


@cache
def families():
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("families", ROOT / "docs" / "families.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def test_families_page_is_up_to_date():
    made = families()
    assert made.page() == made.PAGE.read_text(encoding="utf-8"), "run: python docs/families.py"


def test_every_refused_class_is_tried():
    kinds = reduce(
        set.union, ({kind.__name__ for kind in type(one.build()).__mro__} for one in families().looked_at().values())
    )
    assert {name for name, _ in REFUSED} <= kinds
