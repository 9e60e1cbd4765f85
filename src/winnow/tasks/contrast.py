"""Contrastive pretraining: which caption belongs to which image, learned by both towers of an open_clip model.

CLIP (Radford et al., 2021), SigLIP (Zhai et al., 2023), losses by open_clip; cached features: Gao et al., GradCache, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import winnow

from .._clip import load_clip
from .._reduce import is_reduced, seat_of
from ..data.images import check_labels
from ..data.pairs import PairSet, groups, open_pairs
from ..data.readers import open_images
from ..measure import record
from ..measure.zero_shot import class_features, classes_of, retrieval, templates_of
from ._reducer import reduce_by, reducer_weights, tied

if TYPE_CHECKING:
    from ..data.images import Images
    from ..train.recipe import Recipe, Source
    from ..train.task import Place, Scores

SHARPEST = math.log(100)
"""Where CLIP stops its logit scale."""
NAMED = 20
"""Samples that were left out and are named when a run begins."""


class Contrast(nn.Module):
    """Both towers with the loss: forward(images, texts) -> {"loss", "contrastive_loss", the reducer's losses, figures}.

    images [B, 3, H, W], texts int64 [B, context], failed [B] marks stand-ins, for the log. In evaluation it returns the
    features {"image_features", "text_features"} [B, D], of length 1, of what it is given, and no loss.
    The negatives are the whole global batch. parts: with more than one the towers see the batch in parts and compute
    them again for the gradient, so that activations of one part are held at a time and the loss is the whole batch's.
    """

    def __init__(self, model: nn.Module, loss: str = "clip", parts: int = 1) -> None:
        super().__init__()
        if loss == "siglip" and getattr(model, "logit_bias", None) is None:
            raise ValueError("the sigmoid loss needs a bias: use a SigLIP, or model.options {init_logit_bias: -10.0}")
        self.model, self.kind, self.parts = model, loss, parts

    def forward(
        self, images: Tensor | None = None, texts: Tensor | None = None, failed: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss while training, features in evaluation."""
        if not self.training:
            found = {} if images is None else {"image_features": self.model.encode_image(images, normalize=True)}
            return found if texts is None else found | {"text_features": self.model.encode_text(texts, normalize=True)}
        assert images is not None and texts is not None, "training takes pairs"
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=SHARPEST)
        image, text, losses, metrics = self._encoded(images, texts)
        contrastive = self._loss(image, text)
        loss = contrastive + sum(losses.values())
        if is_reduced(self.model):
            loss = loss + tied(winnow.reducer_of(self.model).parameters())
        shown = {name: value.detach() for name, value in (losses | metrics).items()}
        shown |= {} if failed is None else {"failed": failed.sum() / len(failed)}
        return {"loss": loss, "contrastive_loss": contrastive, "logit_scale": self.model.logit_scale.exp(), **shown}

    def _encoded(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Features [B, D] of both towers, the reducer's losses and figures (means over the parts)."""
        if self.parts == 1:
            return self._part(images, texts)
        done = [
            checkpoint(self._part, *part, use_reentrant=False)
            for part in zip(images.chunk(self.parts), texts.chunk(self.parts))
        ]
        means = [
            {name: torch.stack([part[which][name] for part in done]).mean(0) for name in done[0][which]}
            for which in (2, 3)
        ]
        return torch.cat([part[0] for part in done]), torch.cat([part[1] for part in done]), means[0], means[1]

    def _part(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        image = self.model.encode_image(images, normalize=True)
        losses, metrics = {}, {}
        if is_reduced(self.model):
            reducer = winnow.reducer_of(self.model)
            losses, metrics = reducer.loss(), reducer.metrics()
        return image, self.model.encode_text(texts, normalize=True), losses, metrics

    def _loss(self, image: Tensor, text: Tensor) -> Tensor:
        """open_clip's, over the features of all processes; each computes the rows of its own share."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        loss = (
            SigLipLoss(rank=rank, world_size=world) if self.kind == "siglip"
            else ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        )  # fmt: skip
        return loss(image.float(), text.float(), self.model.logit_scale.exp(), getattr(self.model, "logit_bias", None))


class Training:
    """Contrastive pretraining as the training loop sees it (`winnow.train.task.Task`)."""

    separable = False

    def __init__(self, recipe: Recipe) -> None:
        _refuse(recipe)
        part, extra = recipe.model, recipe.contrast
        self.recipe = recipe
        self.train_pairs, self.val_pairs = (
            open_pairs(source.path, split=source.split, limit=source.limit, column=extra.column, caption=extra.caption)
            for source in (recipe.data.train, recipe.data.val)
        )
        self.val_pairs = self.val_pairs.sound()
        self.notes = [*_left_out("train", self.train_pairs.failures), *_left_out("val", self.val_pairs.failures)]
        if len(self.train_pairs) < recipe.batch:
            raise ValueError(f"batch={recipe.batch} is more than the {len(self.train_pairs)} training pairs")
        weights = None if part.weights is None else part.weights.expanduser()
        clip = load_clip(
            part.name, pretrained=part.pretrained, weights=weights, seed=recipe.seed, size=recipe.augment.size,
            mean=recipe.data.mean, std=recipe.data.std, options=part.options,
        )  # fmt: skip
        self.spec, self.weights, self.model, self.clip = clip.spec, clip.weights_hash, clip.model, clip
        reduce_by(self.model, recipe)
        reducer_weights(self.model, weights)
        if recipe.optim.checkpoint:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.module = Contrast(self.model, extra.loss, recipe.optim.accumulate)
        transform = recipe.augment.transform(clip.size, clip.mean, clip.std)
        self.set = PairSet(self.train_pairs, clip.tokenize, transform, recipe.seed, extra.phrase, recipe.data.resample)
        self.named = None if extra.zeroshot is None else _labelled(extra.zeroshot)
        scored = self.val_pairs.images
        if self.named is not None:
            self.classes = classes_of(extra.classes, self.named.classes, self.named.name)
            self.templates = templates_of(extra.templates)
            check_labels(self.named, len(self.classes))
            scored = self.named
        self.best = "image_to_text_r1" if self.named is None else "top1"
        self.data = record.Data(name=scored.name, split=scored.split, n=len(scored), hash=scored.hash)

    def steps(self) -> int:
        """Steps per epoch; the rest of the pairs waits for another order."""
        return len(self.train_pairs) // self.recipe.batch

    def batches(self, epoch: int, start: int, place: Place) -> Iterator[Any]:
        """(images, tokens, pairs, failed) of this process, decoded ahead by workers."""
        from ..data.training import Order

        recipe = self.recipe
        self.set.set_epoch(epoch)
        order = Order(
            len(self.train_pairs), seed=recipe.seed, epoch=epoch, batch=recipe.batch, rank=place.rank,
            world=place.world, start=start,
        )  # fmt: skip
        return iter(_loader(self.set, place, recipe.data.workers, batch_sampler=order))

    def inputs(self, batch: Any, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """Images, tokens, and which are stand-ins."""
        images, texts, _, failed = batch
        return tuple(tensor.to(device, non_blocking=True) for tensor in (images, texts, failed))

    def evaluate(self, module: nn.Module, place: Place) -> Scores:
        """Zero-shot top-1 and top-5, retrieval R@1, 5, 10 both ways; each process encodes a share."""
        from ..train.task import Scores

        module.eval()
        with torch.no_grad():
            images, tokens = self._features(module, _Seen(self.val_pairs.images, self.clip.transform), place)
            texts, _ = self._features(module, _Said(self.val_pairs, self.clip.tokenize), place, "text_features")
            metrics = retrieval(images, texts, groups(self.val_pairs).to(place.device))
            if self.named is None:
                return Scores(metrics, tokens)
            classes = class_features(
                lambda tokens: module(None, tokens)["text_features"],
                self.clip.tokenize, self.classes, self.templates, place.device,
            )  # fmt: skip
            if self.named.hash != self.val_pairs.images.hash:
                images, tokens = self._features(module, _Seen(self.named, self.clip.transform), place)
            logits = images @ classes.T
        right = torch.tensor(self.named.labels, device=place.device)
        five = (logits.topk(min(5, len(self.classes)), -1).indices == right[:, None]).any(-1)
        hits = (logits.argmax(-1) == right).cpu().numpy()
        return Scores(metrics | {"top1": float(hits.mean()), "top5": float(five.float().mean())}, tokens, hits)

    def _features(
        self, module: nn.Module, things: Dataset, place: Place, name: str = "image_features"
    ) -> tuple[Tensor, list[float] | None]:
        """[n, D] float32 of all things on every process, and a reduced model's mean patch tokens [depth+1]."""
        inner = next(part for part in module.modules() if isinstance(part, Contrast)).model
        counted = name == "image_features" and is_reduced(inner)
        n, counts = len(things), []  # type: ignore[arg-type]
        # processes take equally many steps, so that none waits for another: the last thing may come twice
        share = -(-n // place.world)
        mine = [min(place.rank + place.world * i, n - 1) for i in range(share)]
        parts = []
        for batch in _loader(things, place, self.recipe.data.workers, batch_size=self.recipe.eval.batch, sampler=mine):
            batch = batch.to(place.device)
            parts.append(module(batch)[name] if name == "image_features" else module(None, batch)[name])
            if counted:
                counts.append(seat_of(inner).run.valid_counts.float())
        features = torch.cat(parts).float()
        if not bool(features.isfinite().all()):
            raise FloatingPointError("the model gives NaN or infinity on the validation data: lower optim.lr")
        found = features.new_zeros(n, features.shape[1])
        real = len(range(place.rank, n, place.world))
        found[mine[:real]] = features[:real]
        tokens = (place.total(torch.cat(counts)[:real].sum(0)) / n).tolist() if counts else None
        return place.total(found), tokens


class _Seen(Dataset):
    def __init__(self, images: Images, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.images[i][0])


class _Said(Dataset):
    def __init__(self, pairs: Any, tokenize: Any) -> None:
        self.pairs, self.tokenize = pairs, tokenize

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Tensor:
        return self.tokenize([self.pairs.caption(i)])[0]


def training(recipe: Recipe) -> Training:
    """The contrastive task of a recipe."""
    return Training(recipe)


def _left_out(which: str, failures: Sequence[str]) -> Iterator[str]:
    """The first of them by name, as LAION has too many to read."""
    yield from (f"left out of {which}: {line}" for line in failures[:NAMED])
    if len(failures) > NAMED:
        yield f"left out of {which}: {len(failures) - NAMED:,} more; winnow data count --failures names all"


def _loader(things: Dataset, place: Place, workers: int, **how: Any) -> DataLoader:
    # a generator of its own: otherwise the loader draws from the one that dropout draws from
    return DataLoader(
        things, num_workers=workers, generator=torch.Generator(), pin_memory=place.device.type == "cuda",
        prefetch_factor=4 if workers else None, **how,
    )  # fmt: skip


def _labelled(source: Source) -> Images:
    images = open_images(source.path, split=source.split, limit=source.limit)
    if images.labels is None:
        raise ValueError(f"{images.name} has no labels, and zero-shot accuracy is counted with them")
    return images


def _refuse(recipe: Recipe) -> None:
    """Keys of classification that would be ignored here."""
    classes = type(recipe.model).model_fields["num_classes"].default  # a run's recipe.yaml says every key
    set_ = {
        "freeze": recipe.freeze != "none", "label_smoothing": recipe.label_smoothing, "model.drop": recipe.model.drop,
        "model.drop_path": recipe.model.drop_path, "augment.mixup": recipe.augment.mixup,
        "augment.cutmix": recipe.augment.cutmix, "augment.repeats": recipe.augment.repeats > 1,
        "model.num_classes": recipe.model.num_classes != classes, "eval.crop_pct": recipe.eval.crop_pct,
        "compile": recipe.compile,
    }  # fmt: skip
    wrong = [key for key, value in set_.items() if value]
    if wrong:
        raise ValueError(f"{wrong[0]} means nothing for task: contrast (or is not known to work with it): leave it out")
