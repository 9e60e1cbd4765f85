"""Instruction tuning: a LLaVA learns what was said about images; stages train its projector, then its language model.

Liu et al., "Visual Instruction Tuning", 2023, and LLaVA-1.5, 2024; Lin et al., VILA, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import winnow

from .._llava import load_llava, parts_of, write_folder
from .._lora import add_lora, merged
from .._reduce import is_reduced, seat_of
from ..data.conversations import Conversations, open_conversations
from ..data.dialogue import IGNORE, VICUNA
from ..data.instruct import ConversationSet, Grouped, Speech, joined
from ..measure import record
from ._reducer import reduce_by, reducer_weights, tied

if TYPE_CHECKING:
    from ..train.recipe import InstructPart, Recipe, Source
    from ..train.task import Place, Scores

MOST_BLOCKS = 1024
"""More than any model has."""


class Instruct(nn.Module):
    """The model with its loss: forward(ids, mask, labels, pixels, images, scale, share) -> {"loss", "lm_loss", ...}.

    ids, mask, labels int64 [B, L], IGNORE where nothing is learned; pixels [B, most, 3, H, W] of which images [B] are
    there; scale and share [B] are global batch size / labelled tokens and / images of the global batch, so that every
    token, and in the reducer's losses every image, counts the same however the batch is split. Of each sample also, for
    evaluation, [B]: `nll` (summed), `tokens`, `right`.
    """

    def __init__(self, model: nn.Module, learning: Mapping[str, bool | str], slots: int) -> None:
        super().__init__()
        self.model, self.learning, self.slots = model, dict(learning), slots
        for name, modules in parts_of(model).items():
            for key, parameter in (named for module in modules for named in module.named_parameters()):
                wish = self.learning[name]
                parameter.requires_grad_("lora_" in key if wish == "lora" else bool(wish))

    def forward(
        self, ids: Tensor, mask: Tensor, labels: Tensor, pixels: Tensor, images: Tensor, scale: Tensor, share: Tensor,
        failed: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Every value without dimensions is for the log; top1 is the share of samples whose every token was right."""
        there = pixels[torch.arange(pixels.shape[1], device=ids.device) < images.unsqueeze(1)]
        n = len(ids)
        if not len(there):
            ids, mask, labels, there = self._with_black(ids, mask, labels, pixels)
        words = {"pixel_values": there}
        if is_reduced(self.model) and seat_of(self.model).facts.needs & {"text_attention", "question"}:
            words["labels"] = labels  # the rows right before each answer ask, and what is answered is not asked
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **words).logits
        wanted = _held(self.model, labels)[:, 1:]
        nll = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORE, reduction="none"
        )
        nll, black = nll.view_as(wanted).sum(1).tensor_split([n])
        tokens = (wanted != IGNORE).sum(1)[:n]
        right = ((logits[:, :-1].argmax(-1) == wanted) & (wanted != IGNORE)).sum(1)[:n]
        lm_loss = (nll * scale).mean()
        found = {"lm_loss": lm_loss, "top1": _whole(right, tokens).float().mean()}
        found |= {} if failed is None else {"failed": failed.float().mean()}
        loss = lm_loss + 0 * black.sum() + tied(self._seldom())
        if is_reduced(self.model):
            reducer = winnow.reducer_of(self.model)
            losses = reducer.loss()
            found |= {name: value.detach() for name, value in (losses | reducer.metrics()).items()}
            loss = loss + sum(losses.values()) * (images * share).mean()
        return {"loss": loss, **found, "nll": nll.detach(), "tokens": tokens, "right": right}

    def train(self, mode: bool = True) -> Instruct:
        """A frozen tower stays in evaluation mode; the language model does not, as it checkpoints only in training."""
        super().train(mode)
        if not self.learning["vision"]:
            parts_of(self.model)["vision"][0].eval()
        return self

    def _with_black(
        self, ids: Tensor, mask: Tensor, labels: Tensor, pixels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text alone with a row more, about a black image: every process runs every part once, and none waits for it."""
        wide = (0, max(0, self.slots + 1 - ids.shape[1]), 0, 1)
        ids, mask, labels = F.pad(ids, wide), F.pad(mask, wide), F.pad(labels, wide, value=IGNORE)
        ids[-1, : self.slots] = self.model.config.image_token_id  # type: ignore[union-attr]
        mask[-1, : self.slots + 1] = 1
        labels[-1, self.slots] = 0  # of no weight, so any token will do
        return ids, mask, labels, pixels.new_zeros(1, *pixels.shape[2:])

    def _seldom(self) -> Iterator[nn.Parameter]:
        if is_reduced(self.model):
            yield from winnow.reducer_of(self.model).parameters()
        yield from parts_of(self.model)["vision"][0].parameters()  # blocks behind the one the projector reads


class Training:
    """Instruction tuning as the training loop sees it (`winnow.train.task.Task`)."""

    separable, best = True, "top1"

    def __init__(self, recipe: Recipe) -> None:
        _refuse(recipe)
        part, extra = recipe.model, recipe.instruct
        self.recipe = recipe
        self.told, self.asked = (_open(source, extra) for source in (recipe.data.train, recipe.data.val))
        self.asked, lost = self.asked.sound()
        if len(self.told) < recipe.batch:
            raise ValueError(f"batch={recipe.batch} is more than the {len(self.told)} training conversations")
        weights = None if part.weights is None else part.weights.expanduser()
        self.llava = llava = load_llava(
            part.name, weights=weights, vision=extra.vision, vision_weights=extra.vision_weights,
            projector=extra.projector, layer=extra.layer, size=extra.size, seed=recipe.seed,
        )  # fmt: skip
        self.spec, self.weights, self.model = llava.spec, llava.weights_hash, llava.model
        reduce_by(self.model, recipe)
        if llava.trained is not None and recipe.method is None:
            raise ValueError(
                f'{part.name} was saved with a reducer: --set "method={llava.trained.method}", or another one'
            )
        if llava.trained is not None and llava.trained.of(winnow.parse(str(recipe.method))):
            llava.trained.fill(self.model)
        reducer_weights(self.model, weights or extra.vision_weights)
        if extra.train.llm == "lora":
            add_lora(self.model, extra.lora_r, extra.lora_alpha, extra.lora_dropout, recipe.seed)
        if recipe.optim.checkpoint:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.module = Instruct(self.model, extra.train.model_dump(), llava.slots)
        self.data = record.Data(name=self.asked.name, split=self.asked.split, n=len(self.asked), hash=self.asked.hash)
        self.notes = [f"{name}: {_counted(one)}" for name, one in (("train", self.told), ("val", self.asked))]
        self.notes += [f"left out of val: {line}" for line in lost]
        speech = Speech(
            llava.processor, extra.template, llava.slots, extra.max_length, partial(llava.pixels, pad=extra.pad)
        )
        self.set, self.val = (ConversationSet(one, speech, recipe.seed) for one in (self.told, self.asked))
        for one in (self.told, self.asked):
            speech.check(one)
        tokenizer = llava.processor.tokenizer
        # padded places are masked, so any id will do where the tokenizer has none for them
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.joined = partial(joined, pad, llava.size)

    def steps(self) -> int:
        """Steps per epoch; the rest of the samples waits for another order."""
        return len(self.told) // self.recipe.batch

    def batches(self, epoch: int, start: int, place: Place) -> Iterator[Any]:
        """What `joined` gives of this process's samples, made ahead by workers; each sample once an epoch."""
        from ..data.training import Order

        recipe = self.recipe
        self.set.epoch = epoch
        where = {"seed": recipe.seed, "epoch": epoch, "batch": recipe.batch, "rank": place.rank, "world": place.world}
        order: Any
        if recipe.instruct.group_by_modality_length:
            samples = self.told.samples
            order = Grouped([one.words for one in samples], [bool(one.images) for one in samples], start=start, **where)
        else:
            order = Order(len(self.told), start=start, **where)
        return iter(self._loader(self.set, place, batch_sampler=order))

    def inputs(self, batch: Any, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """What `Instruct` takes; the labelled tokens and the images of all processes are counted together."""
        ids, mask, labels, pixels, images, _, failed = (tensor.to(device, non_blocking=True) for tensor in batch)
        counts = torch.stack([(labels[:, 1:] != IGNORE).sum(), images.sum(), labels.new_tensor(len(labels))]).float()
        if dist.is_initialized():
            dist.all_reduce(counts)
        scale, share = (counts[2] / counts[:2].clamp_min(1)).unbind()
        return ids, mask, labels, pixels, images, scale.expand(len(ids)), share.expand(len(ids)), failed

    def evaluate(self, module: nn.Module, place: Place) -> Scores:
        """Mean loss and accuracy of answer tokens told the right ones before them, and of whole answers (`top1`)."""
        from ..train.task import Scores

        module.eval()
        n, inner = len(self.val), next(part for part in module.modules() if isinstance(part, Instruct)).model
        found = torch.zeros(3, n, device=place.device, dtype=torch.float64)
        counts: list[Tensor] = []
        executed: list[float] = []
        # processes take equally many steps, so that none waits for another: the last sample may come twice
        share = [min(place.rank + place.world * i, n - 1) for i in range(-(-n // place.world))]
        mine = {at for at in share if at % place.world == place.rank}
        with torch.no_grad():
            for batch in self._loader(self.val, place, batch_size=self.recipe.eval.batch, sampler=share):
                out = module(*self.inputs(batch, 0, place.device))
                indices = batch[5].to(place.device)
                values = torch.stack([out["nll"].double(), out["tokens"].double(), out["right"].double()])
                if not bool(values.isfinite().all()):
                    raise FloatingPointError("the model gives NaN or infinity on the validation data: lower optim.lr")
                fresh = torch.tensor([at in mine for at in batch[5].tolist()], device=place.device)
                found[:, indices[fresh]] = values[:, fresh]
                if is_reduced(inner) and int(batch[4].sum()):
                    run = seat_of(inner).run
                    counts.append(run.valid_counts.float())
                    executed = executed or list(map(float, run.counts))
        nll, tokens, right = place.total(found).unbind()
        kept = _tokens(counts, place) if is_reduced(inner) else None
        return Scores(self._metrics(nll, tokens, right), kept, _whole(right, tokens).cpu().numpy(), executed)

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """The trained model as a Hugging Face folder that `winnow.load_vlm` opens, reducer and all."""
        if self.recipe.instruct.template == "vicuna_v1":
            self.llava.processor.chat_template = VICUNA
        write_folder(self.llava, folder, merged(self.model, state))

    def _metrics(self, nll: Tensor, tokens: Tensor, right: Tensor) -> dict[str, float]:
        metrics = {
            "loss": float(nll.sum() / tokens.sum()),
            "top1": float(_whole(right, tokens).double().mean()),
            "token_top1": float(right.sum() / tokens.sum()),
        }
        text = torch.tensor([not one.images for one in self.asked.samples], device=nll.device)
        if bool(text.any()):
            metrics["text_loss"] = float(nll[text].sum() / tokens[text].sum())
        return metrics

    def _loader(self, samples: ConversationSet, place: Place, **how: Any) -> DataLoader:
        # a generator of its own: otherwise the loader draws from the one that dropout draws from
        workers = self.recipe.data.workers
        return DataLoader(
            samples, num_workers=workers, generator=torch.Generator(), collate_fn=self.joined,
            pin_memory=place.device.type == "cuda", prefetch_factor=4 if workers else None, **how,
        )  # fmt: skip


def training(recipe: Recipe) -> Training:
    """The instruction-tuning task of a recipe."""
    return Training(recipe)


def _whole(right: Tensor, tokens: Tensor) -> Tensor:
    """[n] bool: every token of the answer was right; an answer that was cut off is not."""
    return (right == tokens) & (tokens > 0)


def _held(model: nn.Module, labels: Tensor) -> Tensor:
    """Labels of the columns that the last forward left."""
    columns = seat_of(model).now.columns if is_reduced(model) else None  # type: ignore[attr-defined]
    return labels if columns is None else columns.labels(labels)


def _tokens(counts: list[Tensor], place: Place) -> list[float] | None:
    """Mean tokens [depth+1] of all images, those that came twice included; a process may have seen none."""
    sums = torch.zeros(MOST_BLOCKS + 2, device=place.device)
    for one in counts:
        sums[: one.shape[1]] += one.sum(0)
        sums[-2:] += torch.tensor([one.shape[1] * len(one), len(one)], device=place.device)
    *whole, columns, images = place.total(sums).tolist()
    return [count / images for count in whole[: round(columns / images)]] if images else None


def _open(source: Source, extra: InstructPart) -> Conversations:
    return open_conversations(
        source.path, source.split, source.limit, images=extra.images, mixtures=extra.mixtures
    )  # fmt: skip


def _counted(conversations: Conversations) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in conversations.kinds().items())
    return f"{len(conversations):,} conversations ({kinds})"


def _refuse(recipe: Recipe) -> None:
    """Keys of other tasks that would be ignored here."""
    from ..data.training import Augment

    classes = type(recipe.model).model_fields["num_classes"].default  # a run's recipe.yaml says every key
    set_ = {
        "freeze": recipe.freeze != "none", "label_smoothing": recipe.label_smoothing, "model.drop": recipe.model.drop,
        "model.drop_path": recipe.model.drop_path, "model.num_classes": recipe.model.num_classes != classes,
        "model.options": recipe.model.options, "augment": recipe.augment != Augment(), "eval.crop_pct": recipe.eval.crop_pct,
        "data.mean": recipe.data.mean, "data.std": recipe.data.std, "compile": recipe.compile,
    }  # fmt: skip
    wrong = [key for key, value in set_.items() if value]
    if wrong:
        raise ValueError(f"{wrong[0]} means nothing for task: instruct (or is not known to work with it): leave it out")
