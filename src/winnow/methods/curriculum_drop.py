"""CurriculumDrop: while training, tokens that matter little are dropped, more and more of them as training goes on.

Curriculum Token Drop (document 003; Chaudhary, 2025), as described; `seed003_as_run` is what its published run did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..parts.amount import check_layers
from ..parts.choose import top
from ..parts.combine import drop
from ..parts.gradient import ChannelGradients
from ..parts.schedule import SHAPES, bend, between, plateau, way
from ..parts.score import attention, norm, surprise
from ..parts.settings import check_choice, check_number
from ..reducer import Facts, Method, Reducer, Setting, Signals
from ..tokens import Tokens
from .evit import attention_macs

NEEDS: dict[str, frozenset[str]] = {
    "cls_attention": frozenset({"cls_attention"}),
    "received": frozenset({"received"}),
    "entropy": frozenset({"cls_attention"}),
    "norm": frozenset(),
    "random": frozenset({"noise"}),
    "gradient": frozenset(),
    "fisher": frozenset(),
    "gradient_snr": frozenset(),
}
GATHERED = ("gradient", "fisher", "gradient_snr")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "saliency": tuple(NEEDS),
    "per": ("block", "model"),
    "schedule": SHAPES,
    "learn": (None, "heads", "positions", "both"),
}
NEGLIGIBLE = 1e-6
"""Shares up to this drop nothing, as in the document's code."""


@dataclass(frozen=True, repr=False)
class CurriculumDrop(Method):
    """At each of `blocks`, int(N * (1 - d)) of N tokens stay while training; d moves from `start` to `final`.

    start, final: shares dropped, one for all blocks or one per block. from_, to: shares of training (`reducer.progress`).
    gamma: of schedule="polynomial", d = start + t**gamma * (final - start); a larger gamma drops less.
    blocks: None is the one block a quarter into the model, so that `final` is what the document describes, the share of
    patches gone in all, and there is class attention worth following; "all" is every block, where d compounds.
    saliency: "cls_attention" (mean over heads), "received", "norm", "random", "entropy" (what a token adds to the
    entropy of the class token's attention), or by the gradients of past steps "gradient", "fisher", "gradient_snr".
    per: "block", d of the tokens that enter each block; "model", d of all patches, spread evenly over the blocks.
    epochs: where given, d moves by whole epochs. plateaus: under torch.compile d takes only so many values, so that a
    training compiles at most so often. learn: weights per head, per position or both that multiply the saliency.
    reindex: survivors get a learned embedding of their new place besides that of their old one.
    """

    start: float | tuple[float, ...] = 0.0
    final: float | tuple[float, ...] = 0.35
    from_: float = 0.1
    to: float = 0.8
    gamma: float = 1.5
    blocks: str | tuple[int, ...] | None = None
    saliency: str = "cls_attention"
    per: str = "block"
    schedule: str = "polynomial"
    at_eval: bool = False
    epochs: int | None = None
    plateaus: int = 5
    learn: str | None = None
    reindex: bool = False

    presets = ("seed003_as_described", "seed003_as_coded", "seed003_as_run")
    """Class methods that are spelled like methods: `CurriculumDrop.seed003_as_run()`."""

    @classmethod
    def seed003_as_described(cls, epochs: int = 200) -> CurriculumDrop:
        """What document 003 says: 35 % of the patches gone in all, by one drop; in block 0, as its author did later."""
        return cls(blocks=(0,), epochs=epochs)

    @classmethod
    def seed003_as_coded(cls, epochs: int = 200) -> CurriculumDrop:
        """What document 003's code would do with the stated 0.35: every block drops 35 % of what enters it."""
        return cls(blocks="all", epochs=epochs)

    @classmethod
    def seed003_as_run(cls, epochs: int = 200) -> CurriculumDrop:
        """What document 003's published run did: its 0.35 was never read, and every block dropped up to a half."""
        return cls(final=0.5, blocks="all", epochs=epochs)

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks != "all":
            object.__setattr__(self, "blocks", check_layers("CurriculumDrop", "blocks", self.blocks))
        for name in ("start", "final"):
            self._check_shares(name, getattr(self, name))
        for name, known in CHOICES.items():
            check_choice("CurriculumDrop", name, getattr(self, name), known)
        check_number("CurriculumDrop", "gamma", self.gamma, above=True)
        check_number("CurriculumDrop", "plateaus", self.plateaus, 2, whole=True)
        if self.epochs is not None:
            check_number("CurriculumDrop", "epochs", self.epochs, 1, whole=True)
        for name in ("from_", "to"):
            check_number("CurriculumDrop", name, getattr(self, name), 0, 1)
        if self.from_ > self.to:
            raise ValueError(f"CurriculumDrop(from_={self.from_!r}, to={self.to!r}): from_ <= to is needed")
        if self.schedule != "polynomial" and self.gamma != type(self).gamma:
            raise ValueError(f'CurriculumDrop(schedule={self.schedule!r}): gamma belongs to schedule="polynomial"')
        if self.learn in ("heads", "both") and "cls_attention" not in NEEDS[self.saliency]:
            raise ValueError(
                f"CurriculumDrop(learn={self.learn!r}): weights per head need class attention, "
                'saliency="cls_attention" or "entropy"; learn="positions" goes with any'
            )

    def _check_shares(self, name: str, value: object) -> None:
        for share in value if isinstance(value, tuple) else (value,):
            check_number("CurriculumDrop", name, share, 0, 1, below=True)
        if isinstance(value, tuple) and (not isinstance(self.blocks, tuple) or len(value) != len(self.blocks)):
            raise ValueError(f"CurriculumDrop({name}={value!r}): several shares need as many blocks=, one share each")
        if isinstance(value, tuple) and self.per == "model":
            raise ValueError(
                f'CurriculumDrop({name}={value!r}): per="model" takes one share, which is spread over blocks'
            )

    @property
    def facts(self) -> Facts:
        return Facts(
            combine="other" if self.reindex else "none",
            needs=NEEDS[self.saliency],
            learned=self.learn is not None or self.reindex,
            training_only=not self.at_eval,
        )

    @property
    def known_failures(self) -> dict[str, str]:
        """Checks of the contract that these settings cannot pass, and why."""
        found = {}
        if self.saliency in GATHERED:
            found["exports_with_a_free_batch"] = "the hook that gathers gradients cannot be traced"
        if self.learn in ("positions", "both"):
            found["count_is_as_promised"] = "weights per position are those of one grid, other images are refused"
        return found

    def sites(self, depth: int) -> tuple[int, ...]:
        if isinstance(self.blocks, tuple):
            return self.blocks
        return tuple(range(depth)) if self.blocks == "all" else (depth // 4,)

    def share(self, progress: float) -> float:
        """How far d has moved from `start` (0) to `final` (1) after this share of training."""
        return bend(self.schedule, way(progress, self.from_, self.to, self.epochs), self.gamma)

    def dropped(self, share: float, place: int = 0) -> float:
        """d at the place-th of the blocks, after this share of the move."""
        start, final = (d[place] if isinstance(d, tuple) else d for d in (self.start, self.final))
        return between(start, final, share)

    def kept(self, n: int, layer: int, sites: tuple[int, ...], patches: int | None, share: float) -> int:
        """Tokens that stay of n at block `layer` of `sites`, after this share of the move."""
        if layer not in sites:
            return n
        place = sites.index(layer)
        d = self.dropped(share, place)
        if d <= NEGLIGIBLE:
            return n
        if self.per == "block":
            return max(1, int(n * (1 - d)))
        assert patches is not None, "check() has refused"
        return max(1, min(n, int(patches * (1 - d) ** ((place + 1) / len(sites)))))

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """Tokens after block `layer` at the end of training; `counts` and the reducer know the depth and the progress."""
        if isinstance(self.blocks, tuple):
            return self.kept(n, layer, self.blocks, patches, 1.0)
        if self.per == "model" and self.blocks == "all":
            raise ValueError(f"{self}: how many stay depends on the depth; use counts(setting)")
        return self.kept(n, layer, (layer,), patches, 1.0)

    def counts(self, setting: Setting, progress: float = 1.0) -> tuple[int, ...]:
        """depth+1 patch-token counts after this share of training: entering block 0, then after each block."""
        if setting.patches is None:
            raise ValueError("the counts need the model's own grid, which it does not say")
        sites, share, found = self.sites(setting.depth), self.share(progress), [setting.patches]
        for layer in range(setting.depth):
            found.append(self.kept(found[-1], layer, sites, setting.patches, share))
        return tuple(found)

    def check(self, setting: Setting) -> None:
        super().check(setting)
        asks = 'per="model"' if self.per == "model" else f"learn={self.learn!r}" if self.learn else "reindex=True"
        if setting.patches is None and (self.per == "model" or self.learn in ("positions", "both") or self.reindex):
            raise ValueError(f"{self}: {asks} needs the model's own grid, which it does not say")

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return CurriculumDropReducer(self, depth, width, heads, patches, prefix)


class CurriculumDropReducer(Reducer):
    """Drops by the progress the training loop sets; without a loop progress is 1, the end of training."""

    method: CurriculumDrop

    def __init__(
        self, method: CurriculumDrop, depth: int, width: int, heads: int, patches: int | None, prefix: int
    ) -> None:
        super().__init__(method, patches, prefix)
        self.sites = sites = method.sites(depth)
        self.progress = Reducer.progress
        if method.learn in ("heads", "both"):
            self.heads = nn.Parameter(torch.full((len(sites), heads), 1 / heads))
        if method.learn in ("positions", "both"):
            assert patches is not None, "check() has refused"
            self.positions = nn.Parameter(torch.ones(len(sites), patches))
        if method.reindex:
            assert patches is not None, "check() has refused"
            self.places = nn.Parameter(torch.zeros(patches, width))
        self.gradients = ChannelGradients(len(sites), width) if method.saliency in GATHERED else None

    @property
    def progress(self) -> float:  # type: ignore[override]
        """Share of training done, set by the training loop."""
        return self._progress

    @progress.setter
    def progress(self, progress: float) -> None:
        self._progress = progress
        # a compiled graph reads only this whole number, so it is made again only when it moves
        self.level = plateau(self.method.share(progress), self.method.plateaus)

    def share(self) -> float:
        """How far d has moved; a plateau where it is being compiled."""
        if torch.compiler.is_compiling():
            return self.level / (self.method.plateaus - 1)
        return self.method.share(self._progress)

    def count(self, n: int, layer: int) -> int:
        """Tokens after block `layer` when n enter it, at the present progress."""
        return self.method.kept(n, layer, self.sites, self.patches, self.share())

    def idle(self, n: int, layer: int) -> bool:
        return super().idle(n, layer) or self.count(n, layer) == n

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        place = self.sites.index(layer)
        if not self.idle(tokens.n, layer):
            tokens = self._drop(tokens, signals, layer, place)
        if self.gradients is not None and self.training and torch.is_grad_enabled():
            tokens = replace(tokens)  # tokens handed back as they came are not part of the graph
            self.gradients.listen(tokens.x, place)
        return tokens

    def _drop(self, tokens: Tokens, signals: Signals, layer: int, place: int) -> Tokens:
        method, m = self.method, self.count(tokens.n, layer)
        score = self._weighed(self._saliency(tokens, signals, place), tokens, place)
        kept = top(score, m)
        out = drop(tokens, kept, score=score.detach() if signals.watched else None)
        if method.learn is not None:  # a factor of 1 whose gradient says what more of the token would do
            found = score.gather(1, kept)
            out = replace(out, x=out.x * (1 + found - found.detach()).to(out.x.dtype).unsqueeze(-1))
        if not method.reindex:
            return out
        if m > len(self.places):
            self._check_grid(tokens)
        return replace(out, x=out.x + self.places[:m])

    def _saliency(self, tokens: Tokens, signals: Signals, place: int) -> Tensor:
        """[B, N], or [B, H, N] where heads are weighed."""
        kind = self.method.saliency
        if kind in ("cls_attention", "entropy"):
            assert signals.cls_row is not None
            return signals.cls_row.detach() if kind == "cls_attention" else surprise(signals.cls_row.detach())
        if kind == "random":
            assert signals.noise is not None
            return signals.noise
        if kind == "norm":
            return norm(tokens.x)
        if self.gradients is not None:
            return self.gradients.score(kind, tokens.x, place)
        return attention(signals, "received").detach()

    def _weighed(self, score: Tensor, tokens: Tokens, place: int) -> Tensor:
        """[B, N] the mean over heads, or the learned sum, times the learned weights of the tokens' patches."""
        learn = self.method.learn
        if score.ndim == 3:
            score = (score * self.heads[place, :, None]).sum(1) if learn in ("heads", "both") else score.mean(1)
        if learn in ("positions", "both"):
            self._check_grid(tokens)
            score = score * self.positions[place][tokens.ledger.first()]
        return score

    def _check_grid(self, tokens: Tokens) -> None:
        found = tokens.ledger.owner.shape[1]
        if found != self.patches:
            raise ValueError(f"{self.method} has weights for {self.patches} patches, the image has {found}: resize it")

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        if self.idle(n, layer):
            return 0.0
        kind = self.method.saliency
        if self.gradients is not None:
            return n * setting.width
        if kind in ("norm", "random"):
            return 0.0
        return attention_macs("received" if kind == "received" else "cls", n, setting)
