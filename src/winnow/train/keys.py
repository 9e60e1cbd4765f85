"""The keys of a recipe, typed, with their defaults and what they mean.

Winnow's own; document 003 trained with 0.5 instead of 0.35 because its configuration ignored a key in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .._parse import parse
from ..data.training import Augment


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelPart(_Part):
    """The network that is trained."""

    name: str = Field(description="timm:NAME, open_clip:NAME[/TAG], or a LLaVA as hf:ID_OR_PATH")
    pretrained: bool = Field(False, description="start from the model's own weights (a download)")
    weights: Path | None = Field(None, description="start from this file; another number of classes gets a new head")
    num_classes: int = Field(1000, ge=1, description="classes")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth")
    drop: float = Field(0.0, ge=0, lt=1, description="dropout (timm's drop_rate)")
    options: dict[str, Any] = Field({}, description="more of timm.create_model, or sections of open_clip's config")


class Source(_Part):
    """Images as `winnow.data.open_images` finds them."""

    path: str = Field(
        description="folder, CSV, parquet, CIFAR folder, or scenes / photographs; with captions for contrast, "
        "conversations or a mixture of them for instruct"
    )
    split: str = Field("", description="train, test, train[-5000:], ...")
    limit: int | None = Field(None, ge=1, description="at most so many, evenly spaced")


class DataPart(_Part):
    """What is trained and validated on."""

    train: Source
    val: Source
    workers: int = Field(0, ge=0, description="processes that decode ahead")
    resample: bool = Field(
        False, description="for contrast: shards drawn with replacement; every pair once an epoch if not"
    )
    mean: tuple[float, float, float] | None = Field(None, description="normalisation; the model's own if left out")
    std: tuple[float, float, float] | None = Field(None, description="normalisation; the model's own if left out")


class ContrastPart(_Part):
    """What `task: contrast` needs beside images with captions."""

    loss: Literal["clip", "siglip"] = Field("clip", description="softmax over the global batch, or a sigmoid per pair")
    column: str | None = Field(None, description="the table's column of captions; found by its usual names if left out")
    caption: str = Field(
        "a photo of a {}.", pattern=r"^[^{}]*\{\}[^{}]*$", description="said of images that have a class and no caption"
    )
    phrase: float = Field(0.0, ge=0, le=1, description="share of the training captions of which one phrase is told")
    zeroshot: Source | None = Field(None, description="labelled images for zero-shot accuracy; retrieval alone without")
    classes: str | None = Field(None, description="their names: imagenet, or a file; the data's own if left out")
    templates: str | list[str] = Field(
        "openai", description="openai, simple, a file, or a list, as in [a photo of a {}.]"
    )


class LearningPart(_Part):
    """Which parts of a vision-language model learn."""

    vision: bool = Field(False, description="the vision tower")
    projector: bool = Field(True, description="what turns its features into tokens")
    llm: Literal["lora"] | bool = Field(True, description="the language model; lora: small matrices beside its own")
    reducer: bool = Field(True, description="the method's own weights, where it has any")


class InstructPart(_Part):
    """What `task: instruct` needs beside conversations."""

    template: Literal["plain", "vicuna_v1", "chat"] = Field(
        "vicuna_v1", description="plain: image and answer alone; chat: the model's own chat template"
    )
    train: LearningPart = LearningPart()
    max_length: int = Field(
        2048, ge=1, description="tokens of a sample, image features counted in full; the rest is cut"
    )
    pad: bool = Field(True, description="images are made square with the mean colour, not cropped")
    group_by_modality_length: bool = Field(False, description="batches of samples with, or without images")
    images: Path | None = Field(None, description="folder that image names start at; their file's own if left out")
    mixtures: dict[str, str] = Field({}, description="names for mixtures, as in {sft: a.json+b.json*2+c.json@0.5}")
    vision: str | None = Field(
        None, description="make a LLaVA of this tower (hf:ID_OR_PATH, open_clip:NAME) and the language model model.name"
    )
    vision_weights: Path | None = Field(None, description="weights of the open_clip tower, as winnow train leaves them")
    layer: int = Field(-2, description="hidden state of a new LLaVA's tower that its projector reads")
    projector: str | None = Field(
        None, description="a new LLaVA's: mlp, linear or downsample; or a file of one, Hugging Face's names or LLaVA's"
    )
    size: int | None = Field(None, ge=1, description="pixels of an image's side; the tower's own if left out")
    lora_r: int = Field(128, ge=1, description="rank of LoRA's matrices")
    lora_alpha: float = Field(256, gt=0, description="LoRA's scale, as a multiple of its rank's inverse")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout in front of LoRA's matrices")


class OptimPart(_Part):
    """The optimiser and what surrounds a step."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="optimiser")
    lr: float = Field(1e-3, gt=0, description="highest learning rate")
    mm_projector_lr: float | None = Field(
        None, gt=0, description="of task: instruct's projector, in proportion to the others'; optim.lr if left out"
    )
    weight_decay: float = Field(0.05, ge=0, description="not on norms, biases, positions and class tokens")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's; the first is SGD's momentum")
    clip: float | None = Field(None, gt=0, description="largest gradient norm")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of averaged weights, which are then the evaluated ones"
    )
    accumulate: int = Field(1, ge=1, description="parts a process's batch is taken in")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="automatic mixed precision")
    checkpoint: bool = Field(False, description="gradient checkpointing: less memory, one more forward")

    @field_validator("precision", mode="before")
    @classmethod
    def _not_a_bool(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads `no` as false


class SchedulePart(_Part):
    """The learning rate over training, per step."""

    kind: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="linear from 0; may be a fraction")
    warmup_steps: int = Field(0, ge=0, description="the same, in steps")
    min_lr: float = Field(0.0, ge=0, description="where the cosine ends")

    @model_validator(mode="after")
    def _one_warmup(self) -> SchedulePart:
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("give warmup_epochs or warmup_steps, not both")
        return self


class EvalPart(_Part):
    """Evaluation on the whole validation set."""

    batch: int = Field(256, ge=1, description="images at a time, per process")
    every: int = Field(1, ge=1, description="epochs between evaluations; the last epoch always has one")
    crop_pct: float | None = Field(None, gt=0, le=1, description="centre crop; the model's own if left out")
    before: bool = Field(False, description="also before the first step, to see what training changes")


class LogPart(_Part):
    """What is written down while training."""

    every: int = Field(50, ge=1, description="steps between log lines")
    save: int | None = Field(None, ge=1, description="steps between checkpoints within an epoch; each ends with one")
    tensorboard: bool = Field(False, description="also write tensorboard events into OUT/tensorboard")


class Recipe(_Part):
    """One training run."""

    task: Literal["classify", "contrast", "instruct"] = Field(
        "classify", description="what is learned: classes, which caption is whose, or answers about images"
    )
    model: ModelPart
    method: str | None = Field(None, description="a reduction method as in DRIP(rate=0.25); null for the plain model")
    freeze: Literal["none", "backbone", "probe"] = Field(
        "none", description="backbone: only head and reducer learn; probe: only the head (a linear probe)"
    )
    data: DataPart
    contrast: ContrastPart = ContrastPart()
    instruct: InstructPart = InstructPart()
    augment: Augment = Augment()
    optim: OptimPart = OptimPart()
    schedule: SchedulePart = SchedulePart()
    epochs: int = Field(ge=1, description="passes over the training data")
    batch: int = Field(ge=1, description="images per step over all processes")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    seed: int = Field(0, ge=0, description="of weights, order, augmentation, dropout and noise")
    eval: EvalPart = EvalPart()
    log: LogPart = LogPart()
    compile: bool = Field(False, description="torch.compile the model")

    @model_validator(mode="after")
    def _its_own_keys(self) -> Recipe:
        if self.task != "contrast" and self.contrast != ContrastPart():
            raise ValueError("keys of contrast need task: contrast")
        if self.task != "instruct" and self.instruct != InstructPart():
            raise ValueError("keys of instruct need task: instruct")
        if self.optim.mm_projector_lr is not None and not (self.task == "instruct" and self.instruct.train.projector):
            raise ValueError("optim.mm_projector_lr needs task: instruct and instruct.train.projector=true")
        if self.task != "contrast" and self.data.resample:
            raise ValueError("data.resample needs task: contrast")
        return self

    @field_validator("method")
    @classmethod
    def _spelled(cls, value: str | None) -> str | None:
        return None if value is None else repr(parse(value))
