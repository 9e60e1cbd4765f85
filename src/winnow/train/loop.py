"""The training loop of every task: epochs of steps, checkpoints, evaluation, the log, and one result row at the end.

Winnow's own; document 000's log lines, and the summary fields of Hugging Face's Trainer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save as to_bytes
from torch.distributed.checkpoint import state_dict as dcp

from .. import __version__
from .._weights import state_hash
from ..measure import record
from ..view import files
from ..view.training import save_training
from . import checkpoint
from .optim import rate
from .progress import Line, Log, Meter, epoch_sentence, read_log, sentence, summary_sentence
from .recipe import Recipe, check_same
from .step import Outcome, Stepper, accelerator_of, place_of
from .stop import Stopped, Wish, signals
from .summary import line_of, memory_mib, row_of
from .task import Scores, Task, task_of

WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
"""State dicts under the model's own names, whatever wraps it."""
LEARNED = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
"""The same without what does not learn: a frozen language model is not written at every checkpoint."""


def train(
    recipe: Recipe,
    out: Path,
    *,
    name: str = "",
    device: str | None = None,
    resume: bool = False,
    results: Path | None = None,
    after: Callable[[Task, int], object] | None = None,
) -> record.Row:
    """Train as the recipe says; checkpoints, log.jsonl, best and last weights and curves go into `out`.
    `after` is called with the task and the number of epochs done after each epoch, on the first process.

    ValueError where `out` holds another run, `Stopped` after SIGTERM or Ctrl-C (saved), FloatingPointError at a loss
    that is not finite (the batch is saved beside the log).
    """
    name = name or out.name
    with accelerator_of(device, recipe) as accelerator, signals() as wish:
        main = accelerator.is_main_process
        if main:
            _check_out(out, resume)
        accelerator.wait_for_everyone()
        with Log(out / "log.jsonl", recipe.epochs, quiet=not main, tensorboard=recipe.log.tensorboard) as log:
            task = task_of(recipe)
            if main:
                files.write(
                    out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode()
                )
            loop = Loop(recipe, task, accelerator, out, log, wish)
            loop.after = after
            if resume:
                loop.resume()
            row = loop.run(name)
            if main and results is not None:
                record.append(results, row)
            accelerator.wait_for_everyone()
            return row


class Loop:
    """One run; `step` optimiser steps are done."""

    def __init__(self, recipe: Recipe, task: Task, accelerator: Any, out: Path, log: Log, wish: Wish) -> None:
        self.recipe, self.task, self.accelerator, self.out, self.log, self.wish = (
            recipe, task, accelerator, out, log, wish
        )  # fmt: skip
        self.per_epoch = task.steps()
        self.total = self.per_epoch * recipe.epochs
        # a lambda that held the loop would keep each run's data in memory until the garbage collector comes
        lr = partial(rate, total=self.total, per_epoch=self.per_epoch, lr=recipe.optim.lr, part=recipe.schedule)
        self.stepper = Stepper(recipe, task, accelerator, lr)
        self.place = place_of(accelerator)
        self.step, self.meter, self.tokens, self.seconds = 0, Meter(), Meter(), 0.0
        self.pending: Outcome | None = None
        self.history: list[Line] = []
        """Lines of log.jsonl up to here."""
        self.after: Callable[[Task, int], object] | None = None
        self.scores: Scores | None = None
        log.bar.update(log.task, total=self.total)

    def run(self, name: str) -> record.Row:
        """All epochs that are left, then the row."""
        self._introduce()
        if self.recipe.eval.before and not self.step:
            self._before()
        done = self.step // self.per_epoch
        if self.step and self.step % self.per_epoch == 0:  # saved after an epoch's last step, before its evaluation
            self.finish(done - 1)
        for epoch in range(done, self.recipe.epochs):
            self.epoch(epoch)
            self.save()
            self.finish(epoch)
        return self.conclude(name)

    def epoch(self, epoch: int) -> None:
        """The steps of an epoch that are left."""
        start = self.step % self.per_epoch
        if start == 0:
            self.meter, self.tokens, self.seconds = Meter(), Meter(), 0.0
        if self.place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.stepper.wrapped.train()
        clock = time.monotonic()
        for batch in self.task.batches(epoch, start, self.place):
            outcome = self.stepper.advance(self.step, self.total, batch, self.wish.signum > 0)
            self.step += 1
            stop, self.pending = self._settle(), outcome
            # several processes agree through what they logged; one need not wait for that
            if stop or (self.place.world == 1 and self.wish.signum):
                self._settle()
                self.seconds += time.monotonic() - clock
                self._stop()
            if (every := self.recipe.log.save) and self.step % every == 0 and self.step % self.per_epoch:
                self._settle()
                self.seconds += time.monotonic() - clock
                self.save()
                clock = time.monotonic()
        self._settle()
        self.seconds += time.monotonic() - clock

    def _settle(self) -> bool:
        """Read and log the step before; FloatingPointError where its loss is not finite; True to stop."""
        if (outcome := self.pending) is None:
            return False
        values, stop = outcome.values()
        self.pending = None
        if not math.isfinite(values["loss"]):
            path = self.out / f"bad-batch-{outcome.step}-{self.place.rank}.pt"
            torch.save(outcome.batch, path)
            kept = (
                f"the checkpoint before it in {self.out}"
                if (self.out / "checkpoints").exists()
                else "no checkpoint yet"
            )
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {outcome.step} (epoch {outcome.step // self.per_epoch + 1}); its "
                f"batch is in {path}, {kept}: lower optim.lr or set optim.clip"
            )
        self.meter.add(values)
        self.tokens.add({str(layer): n for layer, n in enumerate(outcome.tokens)})
        step = outcome.step + 1
        line = {"event": "step", "step": step, "epoch": (step - 1) // self.per_epoch + 1,
                "samples": step * self.recipe.batch, "learning_rate": outcome.lr, **values}  # fmt: skip
        means = self.meter.means()
        self.log.done(step, f"epoch {line['epoch']}/{self.recipe.epochs}  loss {means['loss']:.3f}")
        if step % self.recipe.log.every == 0 or step % self.per_epoch == 0:
            self._note(line)
            self.log.say(sentence(line, means, self.total * self.recipe.batch))
        return stop

    def finish(self, epoch: int) -> None:
        """Evaluate, write the epoch's line, keep the best weights."""
        train, steps = self.meter.means(), self.meter.steps
        line: Line = {"event": "epoch", "epoch": epoch + 1, "step": self.step, "samples": self.step * self.recipe.batch,
                      "learning_rate": self.stepper.rate(self.step - 1), "train": train, "seconds": self.seconds,
                      "step_s": self.seconds / steps, "samples_per_s": steps * self.recipe.batch / self.seconds,
                      "memory_mib": memory_mib(self.place.device)}  # fmt: skip
        if self.tokens.sums:
            line["tokens"] = list(self.tokens.means().values())
        if (epoch + 1) % self.recipe.eval.every == 0 or epoch + 1 == self.recipe.epochs:
            with self.accelerator.autocast():
                self.scores = self.task.evaluate(self.stepper.evaluated, self.place)
            line["val"] = self.scores.metrics
            if self.scores.executed:
                line["val_tokens"] = self.scores.executed
            if self.task.best in train:
                line["gap"] = train[self.task.best] - line["val"][self.task.best]
            before = [one["val"][self.task.best] for one in self.history if one["event"] == "epoch" and "val" in one]
            if line["val"][self.task.best] > max(before, default=-math.inf):
                self._export("best")
        self._note(line, sync=True)
        self.log.say(epoch_sentence(line))
        if self.after is not None and self.place.rank == 0:
            self.after(self.task, epoch + 1)

    def conclude(self, name: str) -> record.Row:
        """Last weights, curves and the summary row."""
        row = row_of(self, name, self._export("last"))
        assert row.train is not None
        if self.place.rank == 0:
            for suffix in files.SUFFIXES:
                save_training({name: self.history}, self.out / f"curves{suffix}")
        self._note({"event": "summary", "step": self.step, **line_of(row.train)}, sync=True)
        self.log.say(summary_sentence(row.train))
        return row

    def _introduce(self) -> None:
        recipe, place = self.recipe, self.place
        count = sum(p.numel() for p in self.task.module.parameters())
        learning = sum(p.numel() for p in self.task.module.parameters() if p.requires_grad)
        self.log.say(
            f"{self.task.spec}, {recipe.method or 'plain'}: {learning:,} of {count:,} weights learn, {recipe.epochs} epochs "
            f"of {self.per_epoch} steps, batch {recipe.batch} on {place.world} x {place.device.type}, "
            f"precision {recipe.optim.precision if recipe.optim.precision != 'no' else 'float32'}"
        )
        for note in self.task.notes:
            self.log.say(note)

    def _before(self) -> None:
        with self.accelerator.autocast():
            scores = self.task.evaluate(self.stepper.evaluated, self.place)
        self._note({"event": "before", "epoch": 0, "step": 0, "val": scores.metrics}, sync=True)
        self.log.say(
            "before training: " + "  ".join(f"val {name} {value:.4g}" for name, value in scores.metrics.items())
        )

    def _note(self, line: Line, sync: bool = False) -> None:
        self.history.append(line)
        self.log.write(line, sync)

    # ---- saving and resuming

    def save(self) -> None:
        """A checkpoint of now."""
        stepper = self.stepper
        weights: dict[str, Any] = {"task": dcp.get_model_state_dict(stepper.wrapped, options=LEARNED)}
        if stepper.ema is not None:
            weights["ema"] = stepper.ema.state_dict()
        state = {
            "recipe": self.recipe.model_dump(mode="json"), "processes": self.place.world, "seconds": self.seconds,
            "optimizer": dcp.get_optimizer_state_dict(stepper.wrapped, stepper.optimizer, options=WHOLE),
            "scaler": {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "meter": (self.meter.sums, self.meter.steps), "tokens": (self.tokens.sums, self.tokens.steps),
        }  # fmt: skip
        if self.place.rank == 0:
            checkpoint.write(self.out / "checkpoints", checkpoint.Checkpoint(self.step, weights, state))
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest sound checkpoint; ValueError where there is none or it is another recipe's."""
        found = checkpoint.read(self.out / "checkpoints", self.log.say)
        if found is None:
            raise ValueError(f"{self.out} has no sound checkpoint: start without --resume, into another --out")
        check_same(found.state["recipe"], self.recipe)
        stepper = self.stepper
        dcp.set_model_state_dict(stepper.wrapped, dict(found.weights["task"]), options=LEARNED)
        dcp.set_optimizer_state_dict(stepper.wrapped, stepper.optimizer, found.state["optimizer"], options=WHOLE)
        if stepper.ema is not None:
            stepper.ema.load_state_dict(found.weights["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        self.step, self.seconds = found.step, found.state["seconds"]
        self.meter, self.tokens = Meter(*found.state["meter"]), Meter(*found.state["tokens"])
        # an epoch's line is written after its checkpoint: the epoch that ended there is evaluated again
        self.history = [
            line for line in read_log(self.out / "log.jsonl")
            if line["step"] < self.step or (line["event"] == "step" and line["step"] == self.step)
        ]  # fmt: skip
        if self.place.rank == 0:
            files.write(self.log.path, "".join(json.dumps(one) + "\n" for one in self.history).encode())
        self.log.say(f"resumed after step {self.step} of {self.total}")

    def _export(self, which: str) -> str:
        """Write the evaluated weights under the model's own names, with the method's spelling; their hash."""
        ema = self.stepper.ema
        whole = (
            dcp.get_model_state_dict(self.stepper.wrapped, options=WHOLE) if ema is None else ema.module.state_dict()
        )
        state = {key.removeprefix("model."): value for key, value in whole.items() if key.startswith("model.")}
        if self.place.rank != 0:
            return ""
        state = checkpoint.alone(state)
        words = {
            "winnow": __version__,
            "model": self.task.spec,
            "method": self.recipe.method or "",
            "step": str(self.step),
        }
        files.write(self.out / f"{which}.safetensors", to_bytes(state, metadata=words))
        if (export := getattr(self.task, "export", None)) is not None:
            export(self.out / which, state)
        return state_hash(state)

    def _stop(self) -> None:
        self.save()
        signum = self.wish.signum or 15  # another process may have been the one that was asked
        raise Stopped(f"stopped after step {self.step} of {self.total} and saved; --resume goes on from there", signum)


def _check_out(out: Path, resume: bool) -> None:
    lines = read_log(out / "log.jsonl")
    if resume and lines and lines[-1]["event"] == "summary":
        raise ValueError(f"the run in {out} is finished: start another with another --out")
    if not resume and (lines or (out / "checkpoints").exists()):
        raise ValueError(f"{out} holds a run already: --resume goes on with it, another --out starts anew")
