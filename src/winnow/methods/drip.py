"""DRIP: a learned predictor draws boundaries along the raster; each run of patches becomes its mean.

Peng and Kumar, "DRIP: Dynamic patch Reduction via Interpretable Pooling", 2025, after Nawrot et al., ACL 2023.

Written from their formulas, with the published faults set right (docs/log.md); how they look: backbones/drip_seed001.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import loss as losses
from ..parts.amount import check_layers
from ..parts.choose import evenly, most_likely, relaxed
from ..parts.combine import segments
from ..parts.score import entropy, per_token, spikes
from ..parts.settings import check_choice, check_number
from ..reducer import Facts, Method, Reducer, Setting, Signals
from ..tokens import Tokens
from ..ways import compact

CHOICES = {
    "predictor": ("mlp", "hnet", "entropy", "spikes"),
    "loss": ("prior", "lower_bound", "interval"),
    "inference": ("exact", "threshold", "sample", "even"),
}


@dataclass(frozen=True, repr=False)
class DRIP(Method):
    """Boundaries before block `after`; a boundary ends a segment, the last patch always does, a segment is its mean.

    In training boundaries are drawn (Gumbel-Sigmoid), at most `capacity` times the rate: the least likely are given up.
    """

    rate: float | tuple[float, ...] = 0.1
    """Share of the tokens that end a segment; a tuple: two stages (H-DRIP), each of what enters it."""
    after: int | tuple[int, ...] = 2
    """Blocks run before it."""
    capacity: float = 1.25
    weight: float = 1.0
    """Of the loss that holds the rate (of the spikes' loss for predictor="entropy")."""
    predictor: str = "mlp"
    """"mlp"; "hnet": cosine between neighbours; "entropy": an MLP taught spikes of grey-level entropy; "spikes": those
    themselves, without training."""
    temperature: float = 0.5
    loss: str = "prior"
    slack: float = 0.2
    """loss="interval" asks for rate * (1 - slack) to rate * (1 + slack)."""
    inference: str = "exact"
    """"exact": the ceil(N * rate) most likely; "threshold": those more likely than not; "sample": drawn, by the image's
    own content; "even": evenly spaced, whatever the predictor says."""
    smart_init: bool = False
    """Every token starts as a boundary (the authors' later choice); else the rate is met from the start."""

    presets = ("seed001",)
    """Class methods that are spelled like methods: `DRIP.seed001()`."""

    def __post_init__(self) -> None:
        sites = check_layers("DRIP", "after", self.after)
        object.__setattr__(self, "after", self.after if isinstance(self.after, int) else sites)
        if isinstance(self.rate, tuple) and len(self.rate) != len(sites):
            raise ValueError(f"DRIP: {len(self.rate)} rates for {len(sites)} places {sites}; give one per place")
        for rate in self.rate if isinstance(self.rate, tuple) else (self.rate,):
            check_number("DRIP", "rate", rate, 0, 1, above=True, below=True)
        check_number("DRIP", "capacity", self.capacity, 1)
        check_number("DRIP", "weight", self.weight)
        check_number("DRIP", "temperature", self.temperature, above=True)
        check_number("DRIP", "slack", self.slack, 0, 1, below=True)
        for field, known in CHOICES.items():
            check_choice("DRIP", field, getattr(self, field), known)
        if self.predictor == "spikes" and self.inference == "sample":
            raise ValueError('DRIP: spikes have no probabilities to draw by; use inference="exact" or "threshold"')

    @classmethod
    def seed001(cls, rate: float = 0.1) -> DRIP:
        """Document 001's settings, without its faults; its network as published is timm:drip_seed001_base_patch32_224."""
        return cls(rate=rate, loss="lower_bound", inference="sample")

    @property
    def facts(self) -> Facts:
        learned = self.predictor != "spikes"
        needs = {"training_noise"} if self.drawn else set()
        needs |= {"noise"} if self.inference == "sample" else set()
        needs |= {"image"} if self.predictor in ("entropy", "spikes") else set()
        static = self.inference in ("exact", "even")
        return Facts(static, "mean", needs=frozenset(needs), where="between", learned=learned, ragged=learned)

    @property
    def even(self) -> Method:
        return replace(self, inference="even")

    @property
    def trained(self) -> Method:
        return replace(self, inference="exact")

    @property
    def drawn(self) -> bool:
        """Boundaries are drawn in training, and the task's gradient reaches the predictor through the draw."""
        return self.predictor in ("mlp", "hnet")

    @property
    def known_failures(self) -> dict[str, str]:
        """Checks of the contract that this value cannot pass, and why."""
        why = "the spikes alone teach this predictor: as published, the task's gradient does not pass its threshold"
        return {"gradient_reaches_every_weight": why} if self.predictor == "entropy" else {}

    def sites(self, depth: int = 0) -> tuple[int, ...]:
        return self.after if isinstance(self.after, tuple) else (self.after,)

    def rate_at(self, layer: int) -> float:
        """The rate of one stage."""
        return self.rate[self.sites().index(layer)] if isinstance(self.rate, tuple) else self.rate

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """ceil(n * rate); n where the image decides."""
        return _share(n, self.rate_at(layer)) if layer in self.sites() and self.facts.static else n

    def room(self, n: int, layer: int) -> int:
        """Places in training: ceil(n * rate * capacity), at most n."""
        return _share(n, self.rate_at(layer) * self.capacity)

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return DRIPReducer(self, width, patches, prefix)


class DRIPReducer(Reducer):
    """One boundary predictor per stage."""

    method: DRIP

    def __init__(self, method: DRIP, width: int, patches: int | None, prefix: int) -> None:
        super().__init__(method, patches, prefix)
        kinds: dict[str, type[nn.Module]] = {"mlp": Perceptron, "entropy": Perceptron, "hnet": Neighbours}
        kind = kinds.get(method.predictor)
        rates = [method.rate_at(layer) for layer in method.sites()]
        self.predictors = nn.ModuleList(kind(width, rate, method.smart_init) for rate in rates if kind)

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        came = tokens
        tokens = tokens if tokens.ledger.valid is None else compact(tokens, tokens.n)
        valid, here = tokens.ledger.valid, torch.arange(tokens.n, device=tokens.x.device)
        n = tokens.ledger.counts()
        last = here == n.unsqueeze(1) - 1
        jump = self._jump(tokens, signals)
        logit = self._logit(tokens, jump, layer)

        ragged, m = self.method.facts.ragged and self.training, self.count(tokens.n, layer)
        soft, hard = self._decide(logit, last, m, signals.noise)
        soft, hard = (torch.where(last, 1.0, each) for each in (soft, hard))
        if valid is not None:
            soft, hard = soft * valid, hard * valid
        kept = hard
        if ragged:
            m = self.method.room(tokens.n, layer)
            ends = hard.detach() > 0
            # taken off as a constant: a factor would also cut the gradient of those that are no boundary yet
            kept = hard - (ends & ~most_likely(logit.masked_fill(last, torch.inf), m, ends)).to(hard.dtype)
        more = self._losses(logit, soft, hard, kept, n, jump, valid, layer) if self.training else {}
        if signals.watched:
            more["score"] = _as_came(logit.sigmoid(), came)
        return segments(tokens, kept, m, ragged or not self.method.facts.static, **more)

    def _jump(self, tokens: Tokens, signals: Signals) -> Tensor | None:
        return None if signals.seen is None else spikes(per_token(signals.seen, tokens.ledger))

    def look(self, image: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
        if self.predictors and not self.training:  # only its teacher looks at the image
            return None
        if grid is None:
            raise ValueError(f"{self.method} reads the patches' grey levels: the model must say its patch grid")
        return entropy(image, grid)

    def _logit(self, tokens: Tokens, jump: Tensor | None, layer: int) -> Tensor:
        """[B, N] log-odds of a boundary, in float32 at least."""
        if not self.predictors:
            assert jump is not None, "begin() looks at the image"
            return jump
        predictor = self.predictors[self.method.sites().index(layer)]
        return predictor(tokens.x)

    def _decide(self, logit: Tensor, last: Tensor, m: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Soft and hard boundaries [B, N]."""
        method, soft = self.method, logit.sigmoid()
        if (self.training and method.drawn) or (not self.training and method.inference == "sample"):
            assert noise is not None, "the core fills what Facts.needs asks for"
            return relaxed(logit, noise.to(logit.dtype), method.temperature)
        if (self.training and method.facts.learned) or method.inference == "threshold":
            return soft, (logit > 0).to(soft.dtype)
        if method.inference == "even":
            hard = evenly(logit.shape[1], m, logit.device).expand_as(logit)
        else:
            hard = most_likely(logit.masked_fill(last, torch.inf), m, torch.ones_like(last).expand_as(logit))
        return soft, hard.to(soft.dtype)

    def _losses(
        self, logit: Tensor, soft: Tensor, hard: Tensor, kept: Tensor, n: Tensor, jump: Tensor | None,
        valid: Tensor | None, layer: int,
    ) -> dict[str, dict[str, Tensor]]:  # fmt: skip
        """The weighted loss and the figures of one stage."""
        method, rate, n = self.method, self.method.rate_at(layer), n.to(soft.dtype)
        share = soft.sum(1) / n
        if method.predictor == "entropy":
            assert jump is not None, "begin() looks at the image"
            each = F.binary_cross_entropy_with_logits(logit, (jump > 0).to(logit.dtype), reduction="none")
            found = each.mean() if valid is None else (each * valid).sum() / n.sum()
        elif method.loss == "prior":
            found = losses.prior(hard.sum(1), n, rate)
        elif method.loss == "lower_bound":
            found = losses.lower_bound(share, rate)
        else:
            found = losses.interval(share, rate * (1 - method.slack), rate * (1 + method.slack))
        count = hard.detach().sum(1)
        figures = {
            "boundaries": count.mean(),
            "boundary_ratio": (count / n).mean(),
            "boundaries_given_up": (count - kept.detach().sum(1)).mean(),
        }
        return {"losses": {"boundary": method.weight * found} if method.facts.learned else {}, "metrics": figures}

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        return sum(predictor.macs(n) for predictor in self.predictors[:1])  # stages have predictors of one size


class Perceptron(nn.Module):
    """Log-odds of a boundary from the token alone, normalised: two layers, exact GELU, twice the width inside."""

    def __init__(self, width: int, rate: float, smart: bool) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, 1)
        if smart:
            nn.init.xavier_uniform_(self.hidden.weight)
            nn.init.zeros_(self.hidden.bias)
            nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, SMART if smart else math.log(rate / (1 - rate)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N]"""
        # hosts' streams differ a hundredfold in scale; saturated log-odds would have no gradient
        x = F.layer_norm(x, x.shape[-1:])
        return _precise(self.out(F.gelu(self.hidden(x))).squeeze(-1))

    def macs(self, n: int) -> float:
        """On n tokens."""
        return n * (self.hidden.weight.numel() + self.out.weight.numel())


class Neighbours(nn.Module):
    """Log-odds from the cosine between a token and the next one (H-Net, Hwang et al., 2025): unlike means boundary."""

    def __init__(self, width: int, rate: float, smart: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for part in (self.query, self.key):
            nn.init.eye_(part.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N]; the last token's is certain."""
        here, there = _precise(self.query(x[:, :-1])), _precise(self.key(x[:, 1:]))
        tiny = torch.finfo(torch.float32).eps
        p = ((1 - F.cosine_similarity(here, there, dim=-1)) / 2).clamp(tiny, 1 - tiny)
        return F.pad(p.logit(), (0, 1), value=CERTAIN)

    def macs(self, n: int) -> float:
        """On n tokens."""
        return (n - 1) * (self.query.weight.numel() + self.key.weight.numel())


SMART = 5.0
"""Bias of the authors' smart_init: probability 0.993."""
CERTAIN = 16.0
"""Log-odds of 1 - 1e-7."""


def _share(n: int, share: float) -> int:
    """ceil(n * share), from 1 to n."""
    return max(1, min(n, math.ceil(n * share - 1e-9)))


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_came(score: Tensor, came: Tokens) -> Tensor:
    """Scores of compacted tokens, back where the tokens came in."""
    valid = came.ledger.valid
    return score if valid is None else score.gather(1, (valid.cumsum(1) - 1).clamp_min(0))
