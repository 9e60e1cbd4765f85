"""One result row, in types: what was measured, on what, how, by which command.

Winnow's own; the wish for results with their environment is peft's (method comparison, 2025).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


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
