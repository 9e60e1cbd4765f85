"""compare for vision-language models: the same questions, plain and reduced, answers right or wrong, costs by stage.

Winnow's own; the protocol is that of compare.py, and so are rows, paired tests and reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

import winnow

from .baselines import Prompt, equal_cost_vlm
from .compare import Comparison
from .measure import VlmMacs, count_macs, peak_memory
from .measure import record as rec
from .measure._vlm_families import decoder_of, towers_of
from .measure._vlm_shapes import Tower
from .measure.closed_form import check_counted
from .measure.vlm import prompt_macs
from .measure.vlm_time import compare_vlm_latency, first_token
from .parts.amount import Exactly, Keep
from .reducer import Method
from .tasks.answer import Said, answer
from .twin import twin

STAGES = ("vision", "reducer", "projector", "prefill", "decode")


@dataclass
class VlmComparison(Comparison):
    """`batches` are `Prompts`, `labels` their answers; times are to the first token."""

    task: str = "compare-vlm"
    waits: dict[str | None, list[rec.Latency]] = field(default_factory=dict)
    """Timed answers of the configuration that was timed last."""

    @cached_property
    def asked(self) -> list[Prompt]:
        """The images and the other tokens of each question."""
        config: Any = self.model.config
        found: list[Prompt] = []
        for inputs, _ in self.batches:
            other = inputs["attention_mask"].bool() & (inputs["input_ids"] != config.image_token_id)
            found += zip(towers_of(config, inputs), other.sum(1).tolist(), strict=True)
        return found

    def _check(self, methods: Sequence[Method]) -> None:
        super()._check(methods)
        config: Any = self.model.config
        llm, towers = decoder_of(config), towers_of(config, _first(self.batches))[0]
        for method in (None, *methods):  # a cost that nobody can tell is refused before the first answer
            apart = method is not None and method.facts.where == "tower"
            prompt_macs(towers, llm, method, 1, kept=sum(one.tokens for one in towers) if apart else None)

    def _answers(self, model: nn.Module, watched: bool) -> Said:
        return answer(model, self.batches, watched)  # type: ignore[arg-type]

    def _cost(self, method: Method | None, answers: Any) -> dict[str, Any]:
        """Closed form sample by sample; counted on the first, which must agree with it."""
        llm = decoder_of(self.model.config)
        apart = method is not None and method.facts.where == "tower"

        @cache
        def said(towers: tuple[Tower, ...], tokens: tuple[int, ...], text: int) -> VlmMacs:
            return prompt_macs(towers, llm, method, text, kept=tokens[0] if apart else None)

        each = [
            said(images, tuple(n), text) for (images, text), n in zip(self.asked, answers.tokens.tolist(), strict=True)
        ]
        totals = np.array([one.total for one in each])
        first = _first(self.batches)  # counted per row of its first tensor, and pixels have a row per tile
        counted = count_macs(self.model, {"input_ids": first["input_ids"], **first, "logits_to_keep": 1})
        check_counted(counted, each[0].total, repr(method) if method else self.name)
        tokens = answers.tokens.double().mean(0)
        return {
            "counts": [round(float(n), 2) for n in tokens],
            "macs": rec.Macs(counted=counted, closed=each[0].total, mean=float(totals.mean()), max=float(totals.max())),
            "vlm": rec.Vlm(
                stages={stage: float(np.mean([getattr(one, stage) for one in each])) for stage in STAGES},
                image_tokens=[round(float(n)) for n in tokens],
                prompt_tokens=round(float(np.mean([one.prompt_tokens for one in each]))),
                kv_bytes=round(float(np.mean([one.kv_bytes for one in each]))),
                answer=self.waits.pop(repr(method) if method else None, []),
            ),
        }

    def _latency(self, method: Method | None, size: int) -> rec.Latency:
        """Plain and reduced in turn, to the first token; the whole answer beside it."""
        inputs = _of(self.batches, size)
        plain = winnow.restore(twin(self.model))
        first, whole = compare_vlm_latency(plain, self.model, inputs, pairs=self.pairs, device=self._where())
        self.waits.setdefault(repr(method) if method else None, []).append(whole)
        return first.model_copy(update={"threads": torch.get_num_threads()})

    def _memory(self) -> float:
        run = first_token(self.model, next(iter(self.batches)).inputs)
        with torch.inference_mode():
            return peak_memory(run, self._where())

    def _where(self) -> torch.device:
        return next(self.model.parameters()).device

    def _equal_cost(self, macs: float) -> Iterator[Method]:
        return equal_cost_vlm(self.model, macs, self.asked)


def _first(prompts: Any) -> dict[str, Any]:
    """The first question alone, without padding."""
    return prompts.batch_of([prompts.samples[0]]).inputs


def _of(prompts: Any, size: int) -> dict[str, Any]:
    """`size` questions, repeated where there are too few."""
    several = [prompts.samples[i % len(prompts.samples)] for i in range(size)]
    return prompts.batch_of(several).inputs


def at_budgets(methods: Sequence[Method], budgets: Sequence[float], tokens: int | None = None) -> list[Method]:
    """Each method once for each budget, if it is `open_to` one; else as it is.

    budgets: shares of the image tokens up to 1, whole numbers above. At 1, and at `tokens` or more where every image has so
    many, nothing is removed: that is the plain row.
    """
    amounts = [amount_of(budget) for budget in budgets if budget != 1 and (tokens is None or budget < tokens)]
    out: list[Method] = []
    for method in methods:
        out += [method.leaving(amount) for amount in amounts] if budgets and open_to(method) else [method]
    return list(dict.fromkeys(out))


def open_to(method: Method) -> bool:
    """Whether the method's spelling leaves the amount to others: `keep` is its default, or its budgets are a range."""
    if method.facts.budgeted:
        return method.budget_min != method.budget_max  # type: ignore[attr-defined]
    keep = method.__dataclass_fields__.get("keep")  # type: ignore[attr-defined]
    return keep is not None and method.keep == keep.default  # type: ignore[attr-defined]


def amount_of(budget: float) -> Keep | Exactly:
    """A share up to 1, a whole number of image tokens above; ValueError otherwise."""
    if budget <= 1:
        return Keep(budget)
    if budget != int(budget):
        raise ValueError(f"budget {budget:g}: a share up to 1, or a whole number of image tokens")
    return Exactly(int(budget))


__all__ = ["VlmComparison", "amount_of", "at_budgets", "open_to"]
