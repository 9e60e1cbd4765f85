"""Image classification: the top-1 class of every image with the tokens that were executed, and how it is learned.

Winnow's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import winnow

from .._reduce import is_reduced, seat_of
from ..data.batches import Batch, Cached, cached
from ..data.images import check_labels
from ..data.readers import open_images
from ..measure import record
from ..measure._evaluating import output_of
from ..measure.tally import Tally
from ..models import load_model
from ._reducer import reduce_by, reducer_weights, tied

if TYPE_CHECKING:
    from ..train.recipe import Recipe, Source
    from ..train.task import Place, Scores


@dataclass(frozen=True)
class Answers:
    """What a model said about every image."""

    top: np.ndarray
    """[n] class with the highest logit."""
    counts: Tensor
    """[n, depth+1] real patch tokens: entering block 0, then after each block; empty for a plain model."""
    executed: list[int]
    """depth+1 tokens executed on the first batch, padding included."""
    owners: np.ndarray
    """[n, P] int16 token that holds each patch at the end, -1 where dropped; empty for a plain model."""
    grid: tuple[int, int] | None = None


@torch.inference_mode()
def classify(model: nn.Module, batches: Iterable[Batch], watched: bool = True) -> Answers:
    """Run the model over all batches; FloatingPointError where its output is not finite."""
    top: list[Tensor] = []
    counts: list[Tensor] = []
    executed: list[int] = []
    owners: list[Tensor] = []
    grid = None
    model.eval()
    for batch in batches:
        if watched:
            with winnow.watch(model) as run:
                logits = output_of(model(batch.images))
            counts.append(run.valid_counts.cpu())
            owners.append(run.ledger.owner.to(torch.int16).cpu())
            executed, grid = executed or run.counts, run.grid
        else:
            logits = output_of(model(batch.images))
        if not bool(logits.isfinite().all()):
            raise FloatingPointError(
                f"the model gives NaN or infinity on images {batch.indices[0]} to {batch.indices[-1]}"
            )
        top.append(logits.argmax(-1).cpu())
    if not top:
        raise ValueError("there are no images")
    if not watched:
        return Answers(torch.cat(top).numpy(), torch.empty(0, 0), [], np.empty((0, 0)))
    return Answers(torch.cat(top).numpy(), torch.cat(counts), executed, torch.cat(owners).numpy(), grid)


class Classify(nn.Module):
    """The model with its loss: forward(images, targets) -> {"loss", "task_loss", "top1", "logits", the reducer's}.

    targets: classes [B] or soft targets [B, classes]. Label smoothing only while training.
    freeze: "none"; "backbone" leaves head and reducer to learn; "probe" the head alone, on features as in evaluation.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, freeze: str = "none") -> None:
        super().__init__()
        self.model, self.label_smoothing, self.freeze = model, label_smoothing, freeze
        if freeze != "none":
            model.requires_grad_(False)
            for part in self._learning():
                part.requires_grad_(True)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W]; every value without dimensions is for the log."""
        logits = self.model(images)
        smoothing = self.label_smoothing if self.training else 0.0
        loss = task_loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        wanted = targets if targets.ndim == 1 else targets.argmax(-1)
        found = {"task_loss": task_loss, "top1": (logits.argmax(-1) == wanted).float().mean(), "logits": logits}
        if is_reduced(self.model):
            reducer = winnow.reducer_of(self.model)
            losses = reducer.loss()
            found |= {name: value.detach() for name, value in (losses | reducer.metrics()).items()}
            loss = loss + sum(losses.values()) + tied(reducer.parameters())
        return {"loss": loss, **found}

    def train(self, mode: bool = True) -> Classify:
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        if self.freeze != "none":
            self.model.eval()
            for part in self._learning():
                part.train(mode)
        return self

    def _learning(self) -> list[nn.Module]:
        """What learns even where the backbone does not."""
        reducer = [winnow.reducer_of(self.model)] if is_reduced(self.model) and self.freeze == "backbone" else []
        return [self.model.get_classifier(), *reducer]  # type: ignore[operator, list-item]


class Training:
    """Classification as the training loop sees it (`winnow.train.task.Task`)."""

    best, separable, notes = "top1", True, ()

    def __init__(self, recipe: Recipe) -> None:
        from ..data.training import TrainSet, mixer  # needs torchvision, which inference does not

        self.recipe = recipe
        self.train_images, self.val_images = (_open(source) for source in (recipe.data.train, recipe.data.val))
        part, size = recipe.model, recipe.augment.size
        loaded = load_model(
            part.name, weights=part.weights, pretrained=part.pretrained, num_classes=part.num_classes, seed=recipe.seed,
            size=size, mean=recipe.data.mean, std=recipe.data.std, crop_pct=recipe.eval.crop_pct, new_head=True, bare=True,
            options={"drop_rate": part.drop, "drop_path_rate": part.drop_path} | part.options,
        )  # fmt: skip
        for images in (self.train_images, self.val_images):
            if images.labels is None:
                raise ValueError(f"{images.name} has no labels, and classification learns from them")
            check_labels(images, part.num_classes)
        if len(self.train_images) < recipe.batch:
            raise ValueError(f"batch={recipe.batch} is more than the {len(self.train_images)} training images")
        self.spec, self.weights, self.model = loaded.spec, loaded.weights_hash, loaded.model
        reduce_by(self.model, recipe)
        reducer_weights(self.model, part.weights)
        if recipe.optim.checkpoint:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.module = Classify(self.model, recipe.label_smoothing, recipe.freeze)
        if recipe.compile:
            self.model.compile()
        self.data = record.Data(
            name=self.val_images.name, split=self.val_images.split, n=len(self.val_images), hash=self.val_images.hash
        )
        self.mix = mixer(recipe.augment, part.num_classes, recipe.seed)
        self.set = TrainSet(self.train_images, recipe.augment, loaded.size, loaded.mean, loaded.std, recipe.seed)
        self.transform = loaded.transform
        self.val: tuple[int, Cached] | None = None

    def steps(self) -> int:
        """Steps per epoch; the rest of the images waits for another order."""
        return len(self.train_images) // self.recipe.batch

    def batches(self, epoch: int, start: int, place: Place) -> Iterator[Any]:
        """(images, labels, indices) of this process, decoded ahead by workers."""
        from ..data.training import Order

        recipe = self.recipe
        self.set.set_epoch(epoch)
        order = Order(
            len(self.train_images), seed=recipe.seed, epoch=epoch, batch=recipe.batch, rank=place.rank,
            world=place.world, repeats=recipe.augment.repeats, start=start,
        )  # fmt: skip
        # a generator of its own: otherwise the loader draws from the one that dropout draws from
        return iter(DataLoader(
            self.set, batch_sampler=order, num_workers=recipe.data.workers, generator=torch.Generator(),
            pin_memory=place.device.type == "cuda", prefetch_factor=4 if recipe.data.workers else None,
        ))  # fmt: skip

    def inputs(self, batch: Any, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """Images and targets, mixed where the recipe says so."""
        images, targets = (tensor.to(device, non_blocking=True) for tensor in batch[:2])
        return self.mix(images, targets, step)

    def evaluate(self, module: nn.Module, place: Place) -> Scores:
        """Loss, top-1, top-5, macro F1 of the whole validation set, each process a share of it."""
        from ..train.task import Scores

        mine, batches = self._share(place)
        tally = Tally(self.recipe.model.num_classes, len(self.val_images), place.device)
        inner = next(part for part in module.modules() if isinstance(part, Classify)).model
        module.eval()
        with torch.no_grad():
            for batch in batches:
                assert batch.labels is not None, "the constructor refused images without labels"
                images, labels = batch.images.to(place.device), batch.labels.to(place.device)
                logits = module(images, labels)["logits"].float()
                if not bool(logits.isfinite().all()):
                    raise FloatingPointError("the model gives NaN or infinity on the validation images: lower optim.lr")
                # processes take equally many steps, so that none waits for another: the last image may come twice
                at = torch.tensor(batch.indices, device=place.device)
                fresh = at < mine
                tally.add(logits[fresh], labels[fresh], (at * place.world + place.rank)[fresh])
                if is_reduced(inner):
                    run = seat_of(inner).run
                    tally.add_tokens(run.valid_counts[fresh], run.counts)
        metrics, hits, tokens = tally.done(place.total)
        if tokens is None:
            return Scores(metrics, hits=hits)
        return Scores(metrics, tokens[0], hits, executed=tokens[1])

    def _share(self, place: Place) -> tuple[int, Cached]:
        """Images of this process that no other has, and their batches (kept in memory if they are few)."""
        if self.val is None:
            n = len(self.val_images)
            rows = list(range(place.rank, n, place.world))
            mine = len(rows)
            rows += [n - 1] * (-(-n // place.world) - mine)
            images = self.val_images.subset(rows) if place.world > 1 else self.val_images
            self.val = mine, cached(images, self.transform, self.recipe.eval.batch, workers=self.recipe.data.workers)
        return self.val


def training(recipe: Recipe) -> Training:
    """The classification task of a recipe."""
    return Training(recipe)


def _open(source: Source):
    return open_images(source.path, split=source.split, limit=source.limit)
