"""Result rows in a JSON-lines file, appended one by one, and what every row says of where and how it was made.

Winnow's own; the wish for results with their environment is peft's (method comparison, 2025).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from pydantic import ValidationError

from .row import Accuracy, Data, Latency, Macs, Objects, Paired, Row, Step, Top1, Training, Vlm

__all__ = [
    "Accuracy", "Data", "Latency", "Macs", "Objects", "Paired", "Row", "Step", "Top1", "Training", "Vlm",
    "append", "command", "commit", "environment", "now", "read", "ready", "upgrade",
]  # fmt: skip
SCHEMA = 1
START = b'{"schema":'
"""Of every row that is written."""


def ready(path: Path) -> None:
    """OSError now, where a row could not be appended after the work; what is left of an interrupted write goes now, too."""
    _check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b") if path.exists() else TemporaryFile(dir=path.parent) as file:
        _end(file, path)


def append(path: Path, row: Row) -> None:
    """Append one row and force it to disk; OSError if the disk is full, and the rows there were stay."""
    _check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = row.model_dump_json(by_alias=True, exclude_none=False).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        data = _end(file, path) + data
        end = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _check_file(path: Path) -> None:
    """ValueError for a folder, and for a device, which may never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that rows are kept in: give a path such as results/{path.stem}.jsonl")


def _end(file: IO[bytes], path: Path) -> bytes:
    """What a new row must begin with; the beginning of a row, as a full disk or a kill leaves it, is cut off with a warning.

    Another last line without an end is not ours to cut: it stays a line of its own.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return b""
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    if not (tail.startswith(START) or START.startswith(tail)) or _is_json(tail):
        return b"\n"
    file.truncate(size - len(tail))
    warnings.warn(
        f"{path} ended in an interrupted row, which is gone: {tail[:60].decode(errors='replace')}...", stacklevel=3
    )
    return b""


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read(path: Path) -> list[Row]:
    """All rows of a JSON-lines file; ValueError names the line that is not a row or is from a newer Winnow."""
    _check_file(path := Path(path))
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.model_validate(upgrade(json.loads(line))))
        except json.JSONDecodeError:
            raise ValueError(f"{path}:{number} is not JSON (an interrupted write?): delete that line") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}:{number} is not a result row: {where}: {first['msg']}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return rows


def upgrade(raw: dict) -> dict:
    """Bring an older row to today's schema; ValueError on a newer one."""
    found = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(found, int):
        raise ValueError("no `schema` number, so this is not a result row")
    if found > SCHEMA:
        raise ValueError(f"row of schema {found}, this Winnow reads up to {SCHEMA}: upgrade Winnow")
    return raw


@cache
def environment() -> dict[str, str]:
    """Versions and machine, as recorded in every row."""
    import torch

    found = {"python": platform.python_version(), "platform": platform.machine(), "cpu": _cpu_name()}
    found["threads"] = str(torch.get_num_threads())
    for name in (
        "winnow-vision",
        "torch",
        "timm",
        "open_clip_torch",
        "transformers",
        "torchvision",
        "accelerate",
        "numpy",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


@cache
def commit() -> str | None:
    """The git commit of the working directory, with `+` where it is dirty (rows in results/ apart); None outside git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    but = ("--", ":/", ":(top,exclude)results")  # a run that appends its rows does not soil its own commit
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno", *but) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """UTC time, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def command() -> str:
    """The command line as typed, without this machine's path to the program."""
    import shlex

    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    program = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
