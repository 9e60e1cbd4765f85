"""The page about document 002, made of the rows of its recipe: what it said, what we get, and why.

Winnow's own; figures of document 002 (ECE1512 Project B, part B, 2024) are marked as its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..measure import unpack, verdict, wilson
from ..measure.record import Latency, Macs, Row

COMMAND = "winnow report seed002 --out docs"
EPOCHS = "5 epochs of 63 steps"
THEIRS = {"accuracy": "52.5 %", "macs": ("12.908", "8.874"), "ms": ("12.490", "9.968"), "mb": "72.02"}


@dataclass(frozen=True)
class Arm:
    """The rows of one model, and what the page takes from them."""

    name: str
    row: Row
    fvcore: Macs | None

    @property
    def macs(self) -> Macs:
        """Our own count."""
        assert self.row.macs is not None
        return self.row.macs

    @property
    def kept(self) -> list[float]:
        """Mean tokens entering layer 0, entering layer 1, at the end."""
        assert self.row.counts is not None
        return self.row.counts

    @property
    def latency(self) -> Latency:
        """The comparison with the unpruned twin."""
        return self.row.latency[0]


def page(rows: Sequence[Row], labels: np.ndarray) -> str:
    """Markdown of the rows of one experiment whose test labels [n] were these; ValueError where an arm is missing."""
    arms = [
        _arm(rows, corrected, pruned)
        for corrected in ("as published", "corrected")
        for pruned in ("baseline", "pruned")
    ]
    parts = (_head(arms), _accuracy(arms, labels), _cost(arms), _saved(arms), _reasons(arms), _made(arms))
    return "\n".join(parts)


def _arm(rows: Sequence[Row], way: str, kind: str) -> Arm:
    own = [
        row for row in rows
        if row.model.endswith(f"={way == 'corrected'}") and (row.method is None) == (kind == "baseline")
    ]  # fmt: skip
    full = [row for row in own if row.accuracy is not None]
    if not full:
        raise ValueError(f"no row of the arm {kind}, {way}: run {COMMAND}")
    fvcore = next((row.macs for row in own if row.macs is not None and row.macs.convention == "fvcore"), None)
    return Arm(f"{kind}, {way}", full[-1], fvcore)


def _head(arms: list[Arm]) -> str:
    row = arms[0].row
    assert row.data is not None
    epochs = row.task.removeprefix("seed002, ").replace("1 epochs", "1 epoch")
    fewer = "" if epochs == EPOCHS else f" instead of the document's {EPOCHS} (`{COMMAND}` runs those)"
    return f"""# Document 002, as published and corrected

Made by `{row.command}` from its rows. No figure here is typed by hand except document 002's own,
which are marked "theirs". The experiment: two `torch.nn.TransformerEncoderLayer`, a linear classifier on every token and
the mean over tokens; {row.data.name}; Adam, {epochs}{fewer};
{row.data.n} test samples. Tokens whose L2 norm is not above a threshold go before either layer.

- **As published**: `{arms[1].row.method}`. The layers are called with `batch_first=False` on [batch, tokens, width];
  survivors are padded with zeros to the batch maximum, the padding attends and is averaged.
- **Corrected**: `{arms[3].row.method}` on the same encoder with `batch_first=True`; padding is skipped by the attention
  and by the mean.
"""


def _accuracy(arms: list[Arm], labels: np.ndarray) -> str:
    n = len(labels)
    lines = ["| model | accuracy | 95 % interval | answers 1 | tokens entering layer 0 | layer 1 | at the end |",
             "|:--|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for arm in arms:
        right = arm.row.accuracy
        assert right is not None and right.value is not None and right.low is not None and right.high is not None
        ones = int((unpack(right.hits, n) == labels.astype(bool)).sum())
        tokens = " | ".join(f"{kept:.1f}" for kept in arm.kept)
        lines.append(
            f"| {arm.name} | {100 * right.value:.1f} % | {100 * right.low:.1f}–{100 * right.high:.1f} | "
            f"{ones} of {n} | {tokens} |"
        )
    lines.append(f"| baseline and pruned, theirs | {THEIRS['accuracy']} | not given | not given | – | – | – |")
    low, high = wilson(round(0.525 * 200), 200)
    half = 100 * 1.96 * sqrt(0.25 / n)
    return f"""## Accuracy: chance, whatever is pruned

{chr(10).join(lines)}

The labels are coin flips, independent of the tokens, so no model can be right on more than half of unseen samples but by
luck: {n} samples give {50 - half:.0f} to {50 + half:.0f} % in 95 of 100 runs. Theirs, 105 of 200, has the interval
{100 * low:.1f}–{100 * high:.1f} %. A model that gives every sample one answer scores that answer's share, pruned or
not: two equal accuracies say nothing about pruning.
"""


def _cost(arms: list[Arm]) -> str:
    batch = arms[1].latency.batch
    lines = ["| model | theirs | fvcore, ours | all products | closed form | per sample, mean | memory, MiB | ms |",
             "|:--|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    theirs = [*THEIRS["macs"], "–", "–"]
    for i, arm in enumerate(arms):
        fvcore = "–" if arm.fvcore is None else f"{arm.fvcore.counted * batch / 1e9:.3f}"
        ours = [arm.macs.counted, arm.macs.closed, arm.macs.mean]
        figures = " | ".join("–" if value is None else f"{value * batch / 1e9:.3f}" for value in ours)
        pair = arms[i | 1].latency
        ms = pair.reduced_ms if i % 2 else pair.plain_ms
        lines.append(f"| {arm.name} | {theirs[i]} | {fvcore} | {figures} | {arm.row.memory_mib:.1f} | {ms:.1f} |")
    kept = f"{_left(arms, 'closed'):.0f} of {_tokens(arms[0])}"
    return f"""## Cost of one batch of {batch}

Billions of multiply-adds (MACs; document 002 calls them FLOPs, which would be twice as many) of the {batch} samples that
`torch.manual_seed(0); torch.rand({batch}, ...)` gives: pruned, the longest sample has {kept} tokens, and all are
padded to it.

{chr(10).join(lines)}

- *fvcore* does not know the fused attention operator and leaves it out; the norms it counts instead (at 5 per number).
- *All products* is what is executed: projections, MLP, classifier and attention, padding included. As published,
  attention runs over the {batch} samples at each token's place, which is why it costs next to nothing.
- *Per sample, mean* is what the kept tokens would cost if no sample were padded.
- Memory is the peak of one forward above what was held before. Theirs: {THEIRS["mb"]} MB for baseline and pruned alike.
- Time: {_machine(arms[1])}; {arms[1].latency.pairs} interleaved pairs, torch's fused layer off on both sides. Theirs:
  {THEIRS["ms"][0]} and {THEIRS["ms"][1]} ms on a GPU it does not name, each from one profiled run.
"""


def _saved(arms: list[Arm]) -> str:
    def fell(before: float | None, after: float | None) -> str:
        return "–" if not before or after is None else f"{100 * (1 - after / before):.1f} %"

    def count(pair: list[Arm], what: str) -> str:
        before, after = (getattr(arm.macs, what) for arm in pair)
        return fell(before, after)

    def clock(one: Latency) -> str:
        low, high = sorted((1 - 1 / one.low, 1 - 1 / one.high))
        return f"{100 * (1 - 1 / one.ratio):.1f} % ({100 * low:.1f}–{100 * high:.1f})"

    old, new = arms[:2], arms[2:]
    fvcore = fell(*(arm.fvcore.counted if arm.fvcore else None for arm in old))
    lines = [
        "| reduction | theirs | as published, ours | corrected, ours |", "|:--|--:|--:|--:|",
        f"| MACs by fvcore | 31.2 % | {fvcore} | – |",
        f"| MACs, all products, as executed | – | {count(old, 'counted')} | {count(new, 'counted')} |",
        f"| MACs if no sample were padded | – | {count(old, 'mean')} | {count(new, 'mean')} |",
        f"| time (95 % interval) | 20.2 % | {clock(old[1].latency)} | {clock(new[1].latency)} |",
        f"| memory | 0.0 % | {fell(old[0].row.memory_mib, old[1].row.memory_mib)} | "
        f"{fell(new[0].row.memory_mib, new[1].row.memory_mib)} |",
    ]  # fmt: skip
    nulls = ", ".join(f"{a.latency.null:.3f} ({a.latency.null_low:.3f}–{a.latency.null_high:.3f})" for a in arms[1::2])
    return f"""## What pruning saves

{chr(10).join(lines)}

Against the unpruned model on the same weights: as published {verdict(old[1].latency)}; corrected {verdict(new[1].latency)}.
The unpruned model against itself: {nulls}.
"""


def _reasons(arms: list[Arm]) -> str:
    first, second, end = arms[1].kept
    same = "exactly as many" if first == second == end else f"{second:.1f}"
    new = arms[3].kept
    also = f"{new[1]:.1f} of {new[0]:.1f}"
    n, shares = _tokens(arms[0]), _attention(arms)
    return f"""## What is wrong with the published code

1. **Attention runs across samples.** `batch_first=False`, but dimension 0 is the batch: token i of one sample attends to
   token i of the others, never to its own neighbours. A sample's result depends on its batch, in the baseline as well.
2. **The threshold acts once.** Uniform tokens of width 512 have norms around 13.06 with deviation 0.26, so 13 divides them:
   {first:.1f} of {n} enter layer 0. A post-norm layer ends in a layer norm, which gives every token the norm
   sqrt(512) = 22.6 as long as its gains are near 1: {same} enter layer 1 (corrected: {also}).
   So this is no layer-wise pruning but one cut at the input, the same whatever the weights are.
3. **The batch maximum sets the cost.** In the measured batch {_left(arms, "mean"):.1f} tokens survive on average,
   {_left(arms, "closed"):.0f} are executed.
4. **Padding takes part.** Zero rows leave a post-norm layer with the norm of any other token, attend, and enter the mean.
5. **"Most prominent in the self-attention layers" cannot be seen** by a counter that leaves attention out; as published,
   attention is {shares[0]:.1f} % of the products (corrected: {shares[1]:.1f} %).
6. **The threshold has no gradient**, and `TokenSaliency`, `calculate_dynamic_flops`, `evaluate_pruned_model` and the
   `keep_tokens` of its own layer class are never used.
"""


def _made(arms: list[Arm]) -> str:
    lines = [
        f"- {arm.name}: `{arm.row.model}`, weights {arm.row.weights}, "
        f"trained in {arm.row.environment.get('train_seconds', '?')} s, {arm.row.time}, commit {arm.row.commit}"
        for arm in arms
    ]
    row, found = arms[0].row, arms[0].row.environment
    machine = f"{found.get('cpu', '?')}, {found.get('threads', '?')} threads, torch {found.get('torch', '?')}"
    return f"""## Where the rows were made

{chr(10).join(lines)}

{machine}, {row.dtype}, seed {row.seed}.
`NormThreshold.seed002()` meets the outputs of the published code on seeded weights to 1e-4 (`tests/test_seed002.py`).
"""


def _tokens(plain: Arm) -> int:
    return round(plain.kept[0])


def _left(arms: list[Arm], what: str) -> float:
    """Tokens the published model runs ("closed") or keeps ("mean") on the measured batch: its cost is linear in them."""
    return _tokens(arms[0]) * getattr(arms[1].macs, what) / (arms[0].macs.closed or 1)


def _attention(arms: list[Arm]) -> tuple[float, float]:
    """Percent of attention in the baselines' products: they differ in it alone, by tokens against batch."""
    published, corrected = (arms[i].macs.closed or 1 for i in (0, 2))
    within = (corrected - published) / (1 - arms[1].latency.batch / _tokens(arms[0]))
    return 100 * (published - corrected + within) / published, 100 * within / corrected


def _machine(arm: Arm) -> str:
    found = arm.row.environment
    return f"{found.get('cpu', 'CPU')}, {arm.latency.threads} threads"
