"""One result row: what was measured, on what, how, by which command; appended to a JSON-lines file, one by one.

Winnow's own; the wish for results with their environment is peft's (method comparison, 2025).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Data(_Part):
    """The images: name, split, how many, and a hash of what came first to last."""

    name: str
    split: str = ""
    n: int
    hash: str = ""


class Paired(_Part):
    """Exact McNemar test on the same images: wins = ours right and theirs wrong."""

    against: str
    wins: int
    losses: int
    p: float


class Accuracy(_Part):
    """Top-1 with its 95 % Wilson interval; `hits` is one bit per image, hexadecimal, so that any two rows can be paired."""

    value: float | None = None
    """None where the images have no labels."""
    low: float | None = None
    high: float | None = None
    agreement: float | None = None
    """Share of images whose top-1 equals the plain model's."""
    hits: str = ""
    vs_plain: Paired | None = None
    vs_baseline: Paired | None = None


class Top1(Accuracy):
    """An accuracy on images that have labels."""

    value: float
    low: float
    high: float


class Objects(_Part):
    """What became of the objects, where the data has masks; shares from 0 to 1 (see measure/objects.py)."""

    kept: float
    purity: float
    boundary_f1: float
    boundaries: dict[str, dict[str, tuple[float, float, float]]] = {}
    """2.5 %, value and 97.5 % over images by figure, of learned boundaries and of as many random and even ones."""
    segments: list[list[int]] = []
    """Of the first few images, the segment of each patch, for a picture."""


class Macs(_Part):
    """Multiply-adds per image: counted on executed (padded) tokens; closed form per image, mean and max over the data."""

    counted: float
    closed: float | None = None
    mean: float | None = None
    max: float | None = None
    convention: str = "mac"
    left_out: dict[str, int] = {}

    @property
    def per_image(self) -> float:
        """What one image costs: as counted, or the mean over the images where the count depends on them."""
        depends = self.mean is not None and self.max is not None and self.max > self.mean * (1 + 1e-9)
        return self.mean if depends and self.mean is not None else self.counted


class Latency(_Part):
    """One interleaved comparison at one batch size: ms per batch, ratio = plain / reduced, 95 % interval, A/A null run."""

    batch: int
    plain_ms: float
    reduced_ms: float
    ratio: float
    low: float
    high: float
    null: float
    null_low: float
    null_high: float
    pairs: int
    reducer_share: float | None = None
    threads: int | None = None


class Step(_Part):
    """One training step beside the plain model's; MiB above weights, gradients and optimiser; forward MACs per image."""

    latency: Latency
    tokens: list[int]
    """Patch tokens executed while training: entering block 0 and after each block."""
    progress: float = 1.0
    """Share of training done, for methods that go by it."""
    plain_mib: float
    mib: float
    plain_macs: float | None = None
    macs: float | None = None
    parts_ms: dict[str, tuple[float, float]] = {}
    """Parts of a pair's step, plain and reduced; loss and what waits between them is the rest."""

    @property
    def promised(self) -> float | None:
        """Plain MACs / reduced MACs: what time can reach."""
        return self.plain_macs / self.macs if self.plain_macs and self.macs else None


class Training(_Part):
    """How the model of this row was trained, and what that cost; `winnow train` writes it."""

    recipe: str
    settings: dict[str, str | int | float | bool | None] = {}
    """Every key of the recipe that is not its default, dotted."""
    epochs: int
    steps: int
    batch: int
    processes: int = 1
    runtime_s: float
    """Seconds of training steps; evaluation and saving apart."""
    samples_per_s: float
    steps_per_s: float
    loss: float
    """Mean over all steps."""
    grad_norm: float | None = None
    """Before clipping, mean over all steps."""
    learning_rate: float | None = None
    """Of the last step."""
    best: float | None = None
    """Highest validation top-1 of any epoch, and which epoch."""
    best_epoch: int | None = None
    last: float | None = None
    """Validation top-1, top-5, macro F1 and loss of the last epoch."""
    top5: float | None = None
    f1: float | None = None
    val_loss: float | None = None
    train_top1: float | None = None
    """Of the last epoch's own steps, augmentation included."""
    gap: float | None = None
    tokens: list[float] | None = None
    """Patch tokens executed per block in training, mean over all steps."""
    figures: dict[str, float] = {}
    """What the method reported in the last epoch, mean over its steps: boundaries, losses, ..."""


class Vlm(_Part):
    """A vision-language model, per sample of one image: MACs by stage in closed form, tokens, cache, a timed answer."""

    stages: dict[str, float]
    """vision, reducer, projector, prefill, decode (one token)."""
    image_tokens: list[int]
    """Entering each block of the language model."""
    prompt_tokens: int
    kv_bytes: int
    """Of a cache in half precision, after the prompt."""
    answer: list[Latency] = []
    """A whole answer, by batch; `Row.latency` is the first token."""


class Row(_Part):
    """One measured configuration."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    task: str
    model: str
    weights: str | None
    """First 16 hex digits of the SHA-256 of the weights; None = random initialisation."""
    data: Data | None = None
    method: str | None
    """The method's spelling; None = the plain model."""
    role: Literal["plain", "method", "baseline"] = "method"
    way: str = "static"
    counts: list[float] | None = None
    """Patch tokens entering block 0 and after each block, mean over the images."""
    accuracy: Accuracy | None = None
    top5: Accuracy | None = None
    """The same of the right answer among the first five, where `winnow eval zeroshot` counts it."""
    macs: Macs | None = None
    objects: Objects | None = None
    latency: list[Latency] = []
    memory_mib: float | None = None
    step: Step | None = None
    train: Training | None = None
    vlm: Vlm | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    environment: dict[str, str] = {}
    commit: str | None = None
    command: str = ""
    time: str = ""


def check_writable(path: Path) -> None:
    """OSError now, where a row could not be appended after the work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") if path.exists() else TemporaryFile(dir=path.parent):
        pass


def append(path: Path, row: Row) -> None:
    """Append one row and force it to disk; OSError if the disk is full, and the file stays as it was.

    A half-written last line stays a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = row.model_dump_json(by_alias=True, exclude_none=False).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        data = b"\n" + data if end and not _ends_a_line(path) else data
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def read(path: Path) -> list[Row]:
    """All rows of a JSON-lines file; ValueError names the line that is not a row or is from a newer Winnow."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
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


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


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
