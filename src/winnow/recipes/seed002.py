"""Document 002's experiment, as published and corrected: four models trained on random labels, and the page made of it.

ECE1512 Project B, part B (document 002), 2024. `winnow report seed002 --out docs`: half an hour on 2 cores, with
`--epochs 1` under 10 minutes. Expected: accuracies within 43-57 % (labels are coin flips), 12.908 and 8.874 G by fvcore.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import winnow

from .._weights import state_hash
from ..measure import accuracy_of, compare_latency, count_macs, fvcore_macs, peak_memory, record, unpack
from ..measure._evaluating import mha_fastpath
from ..measure.closed_form import check_counted
from ..methods import NormThreshold
from ..parts.amount import Below
from ..reducer import Method
from ..twin import twin
from ..view import files
from ..ways import Padded
from ._seed002_page import page

Say = Callable[[str], object]


@dataclass(frozen=True)
class Wish:
    """The experiment's sizes; the defaults are the document's."""

    train: int = 1000
    test: int = 200
    tokens: int = 128
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    batch: int = 16
    epochs: int = 5
    steps: int | None = None
    """Steps per epoch; None = all."""
    rate: float = 1e-3
    threshold: float = 13.0
    pairs: int = 15
    seed: int = 0

    @property
    def task(self) -> str:
        """What rows of one experiment share."""
        steps = -(-self.train // self.batch) if self.steps is None else self.steps
        return f"seed002, {self.epochs} epochs of {steps} steps"


@dataclass(frozen=True)
class Arm:
    """One of the four models: attention across the samples of a batch as published, or within each sample."""

    corrected: bool
    pruned: bool

    @property
    def name(self) -> str:
        """In words."""
        return f"{'pruned' if self.pruned else 'baseline'}, {'corrected' if self.corrected else 'as published'}"

    def method(self, wish: Wish) -> Method | None:
        """What is put into the encoder."""
        if not self.pruned:
            return None
        if self.corrected:
            return NormThreshold(below=Below(wish.threshold), before=(0, 1))
        return NormThreshold.seed002(wish.threshold)

    def model(self, wish: Wish) -> str:
        """The model's name in the rows."""
        return f"torch:TransformerEncoder({wish.width}, {wish.heads}) x 2, batch_first={self.corrected}"


ARMS = tuple(Arm(corrected, pruned) for corrected in (False, True) for pruned in (False, True))


class Toy(nn.Module):
    """Document 002's model: two post-norm layers, a classifier on every token, the mean of its logits.

    With batch_first=False the layers take [B, N, C] for [N, B, C]: attention runs across the samples of a batch.
    """

    def __init__(self, wish: Wish, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(wish.width, wish.heads, wish.hidden, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(wish.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 2] of tokens [B, N, C]; the mean skips the padding that the ledger knows of."""
        if not hasattr(self.encoder, "reducer"):
            return self.fc(self.encoder(x)).mean(1)
        with winnow.watch(self.encoder) as run:
            logits = self.fc(self.encoder(x))
        real = run.ledger.valid
        if real is None:  # as published: nobody knows of any padding
            return logits.mean(1)
        share = real.to(logits.dtype) / real.sum(1, keepdim=True)
        return (logits * share.unsqueeze(-1)).sum(1)


def build(arm: Arm, wish: Wish) -> Toy:
    """The arm's model before training; all arms start from the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wish.seed)
        model = Toy(wish, batch_first=arm.corrected)
    method = arm.method(wish)
    if method is not None and arm.corrected:
        winnow.reduce(model.encoder, method, Padded(1))
    elif method is not None:
        winnow.reduce(model.encoder, method, blocks="layers")  # between the blocks, which stay as they are
    return model


def draw(wish: Wish, split: str) -> tuple[Tensor, Tensor]:
    """Tokens [n, N, C] uniform in [0, 1) and labels [n] by coin."""
    n = wish.train if split == "train" else wish.test
    generator = torch.Generator().manual_seed(2 * wish.seed + 1 + (split == "train"))
    labels = torch.randint(0, 2, (n,), generator=generator)
    return torch.rand(n, wish.tokens, wish.width, generator=generator), labels


def coins(wish: Wish) -> np.ndarray:
    """The labels [n] of the test samples."""
    return draw(wish, "test")[1].numpy()


def probe(wish: Wish) -> Tensor:
    """The batch that costs are measured on, as `torch.manual_seed(0); torch.rand(16, 128, 512)` gives it."""
    return torch.rand(wish.batch, wish.tokens, wish.width, generator=torch.Generator().manual_seed(wish.seed))


def train(model: Toy, wish: Wish, saved: Path, say: Say) -> float:
    """Seconds of Adam on cross-entropy; after each epoch everything is saved, and a later call goes on from there."""
    optimizer = torch.optim.Adam(model.parameters(), lr=wish.rate)
    done, seconds = _resume(saved, wish, model, optimizer)
    tokens, labels = draw(wish, "train")
    for epoch in range(done, wish.epochs):
        start = time.monotonic()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(wish.seed * 1_000 + epoch)  # order and dropout, the same after a resume
            parts = torch.randperm(wish.train).split(wish.batch)[: wish.steps]
            losses = [_step(model.train(), optimizer, tokens[part], labels[part]) for part in parts]
        seconds += time.monotonic() - start
        say(f"  epoch {epoch + 1} of {wish.epochs}: mean loss {np.mean(losses):.3f}")
        state = {"wish": asdict(wish), "done": epoch + 1, "seconds": seconds}
        fresh = saved.with_name(saved.name + ".part")
        torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, fresh)
        os.replace(fresh, saved)
    return seconds


def _step(model: Toy, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(tokens), labels)
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    loss.backward()
    optimizer.step()
    return loss.item()


def _resume(saved: Path, wish: Wish, model: Toy, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Epochs done before and their seconds; 0 where nothing fitting was saved."""
    state: dict[str, Any] = torch.load(saved, weights_only=True) if saved.is_file() else {}
    if state.get("wish") != asdict(wish):
        return 0, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["done"], state["seconds"]


@torch.no_grad()
def ask(model: Toy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, 2], and the tokens [B, 3] that hold something: entering layer 0, entering layer 1, at the end."""
    if not hasattr(model.encoder, "reducer"):
        return model(x), torch.full((x.shape[0], 3), x.shape[1])
    with winnow.watch(model.encoder) as run:
        logits = model(x)
    return logits, torch.stack([(ledger.size() > 0).sum(1) for ledger in run.ledgers.values()], 1)


def answers(model: Toy, wish: Wish) -> tuple[np.ndarray, Tensor]:
    """Hits [n] on the test samples, and the tokens [n, 3] each had."""
    tokens, labels = draw(wish, "test")
    logits, kept = zip(*(ask(model.eval(), part) for part in tokens.split(wish.batch)))
    return (torch.cat(logits).argmax(1) == labels).numpy(), torch.cat(kept)


def closed(arm: Arm, wish: Wish, n: Tensor) -> Tensor:
    """[B] MACs per sample by closed form for n [B, 3] tokens, attention within or, as published, across samples."""
    n = n.double()
    linear = 4 * wish.width**2 + 2 * wish.width * wish.hidden
    partners = n[:, :2] if arm.corrected else torch.full_like(n[:, :2], wish.batch)
    return (linear * n[:, :2] + 2 * wish.width * n[:, :2] * partners).sum(1) + 2 * wish.width * n[:, 2]


def costs(arm: Arm, model: Toy, wish: Wish) -> record.Macs:
    """Counted on the probe as it runs, padding included; mean and max as if no sample were padded."""
    x = probe(wish)
    own = ask(model, x)[1]
    ran = own.max(0).values.expand_as(own)
    counted, form = count_macs(model, x), float(closed(arm, wish, ran).mean())
    check_counted(counted, form, arm.name)
    alone = closed(arm, wish, own)
    return record.Macs(counted=counted, closed=form, mean=float(alone.mean()), max=float(alone.max()))


def rows_of(arm: Arm, model: Toy, wish: Wish, seconds: float, plain: record.Row | None) -> list[record.Row]:
    """The arm's row; as published also one with fvcore's figure, where fvcore is installed."""
    hits, kept = answers(model, wish)
    x, method = probe(wish), arm.method(wish)
    latency = []
    with mha_fastpath(False), torch.no_grad():  # the same kernels on both sides
        if method is not None:
            unpruned = twin(model)
            winnow.restore(unpruned.encoder)
            latency = [compare_latency(lambda: unpruned(x), lambda: model(x), batch=wish.batch, pairs=wish.pairs)]
        memory = peak_memory(lambda: model(x))
    theirs = unpack(plain.accuracy.hits, wish.test) if plain is not None and plain.accuracy is not None else None
    row = record.Row(
        task=wish.task, model=arm.model(wish), weights=state_hash(model.state_dict()),
        data=record.Data(name=f"random [{wish.tokens}, {wish.width}], labels by coin", split="test", n=wish.test),
        method=None if method is None else repr(method), role="plain" if method is None else "method",
        way="static" if method is None else "Padded(1)", counts=kept.double().mean(0).tolist(),
        accuracy=accuracy_of(hits, plain=theirs), macs=costs(arm, model, wish), latency=latency, memory_mib=memory,
        seed=wish.seed, environment=record.environment() | {"train_seconds": f"{seconds:.0f}"},
        commit=record.commit(), command=record.command(), time=record.now(),
    )  # fmt: skip
    if arm.corrected:  # torch's fused layer, which batch_first=True allows, would be left out by fvcore altogether
        return [row]
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # fvcore scripts, which torch gives up
            value, left_out = fvcore_macs(model, x)
    except ImportError:
        return [row]
    macs = record.Macs(counted=value, convention="fvcore", left_out=left_out)
    return [row, row.model_copy(update={"macs": macs, "accuracy": None, "latency": [], "memory_mib": None})]


def run(wish: Wish, results: Path, say: Say = lambda words: None) -> list[record.Row]:
    """Rows of all four arms, each trained and measured once: what the results file holds is not made again."""
    record.ready(results)
    for number, arm in enumerate(ARMS):
        rows = _own(wish, results)
        method = arm.method(wish)
        spelling = None if method is None else repr(method)
        if any(row.model == arm.model(wish) and row.method == spelling for row in rows):
            continue
        say(f"{arm.name}: {wish.task[9:]}")
        model, saved = build(arm, wish), results.with_name(f".seed002-{number}.pt")
        seconds = train(model, wish, saved, say)
        plain = next((row for row in rows if row.model == arm.model(wish) and row.method is None), None)
        for row in rows_of(arm, model.eval(), wish, seconds, plain):
            record.append(results, row)
        saved.unlink(missing_ok=True)
    return _own(wish, results)


def _own(wish: Wish, results: Path) -> list[record.Row]:
    rows = record.read(results) if results.is_file() else []
    return [row for row in rows if row.task == wish.task and row.seed == wish.seed]


def write(wish: Wish, results: Path, out: Path, say: Say = lambda words: None) -> list[Path]:
    """Run what is missing and write the page, OUT/seed002.md."""
    text = page(run(wish, results, say), coins(wish))
    return [files.write(out / "seed002.md", text.encode())]
