"""AdaptiveKeep: a learned controller keeps the image tokens a budget allows, and another budget keeps others.

Document 004, "Adaptive Vision Token Prune", after Xu et al., "Learning to Inference Adaptively for MLLMs", ICCV 2025.

Its author's published faults are set right (docs/log.md); tests/test_adaptive_keep.py has one test for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._noise import uniform
from ..parts.amount import Exactly, Keep
from ..parts.asking import Cross, Question
from ..parts.budget import SPREAD, BudgetEmbedding, VisionEncoderWithBudgetToken, check_budget, tokens_of
from ..parts.choose import top
from ..parts.combine import drop, mask
from ..parts.controller import HEADS, SELECTS, VisionTokenController
from ..parts.settings import check_number
from ..reducer import Facts, Method, Reducer, Setting, Signals
from ..tokens import Tokens
from ..ways import compact

__all__ = ["AdaptiveKeep", "BudgetEmbedding", "VisionEncoderWithBudgetToken", "VisionTokenController"]

LOWEST, HIGHEST = 0.0625, 1.0
"""Shares that training draws from: 36 of LLaVA-1.5's 576 tokens to all of them."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "fuse": ("encoder", "after"),
    "read": ("one_way", "both"),
    "cls": (True, False, "host"),
    "select": SELECTS,
    "head": HEADS,
    "train": ("gather", "mask", "zero"),
    "place": ("last", "first"),
    "position": ("own", "borrowed"),
    "join": ("attention", "concat"),
    "text": (True, False),
    "conditioned": (True, False),
}


@dataclass(frozen=True, repr=False)
class AdaptiveKeep(Method):
    """`winnow.budget(model, 128)` says how many; without it `budget_max`, and in training a random number per image.

    budget_min, budget_max: tokens (int) or shares (float). With the class token handed on (`cls=True`) a budget of K
    is 1 + K tokens.
    """

    budget_min: int | float = LOWEST
    budget_max: int | float = HIGHEST
    fuse: str = "encoder"
    """"encoder": a budget token is one more token of the vision tower's input; "after": it joins behind the tower."""
    read: str = "one_way"
    """"one_way": the budget token reads patches and is not read, so all patches kept are the plain model's to the bit;
    "both": they read each other."""
    cls: bool | str = "host"
    """Whether the class token is handed to the projector; "host": as the host does, and LLaVA does not."""
    select: str = "topk"
    """One draw; "sequential": K draws, one after another (AdaLLaVA's; as many softmaxes); "diverse": high logits unlike what
    was taken before (a determinantal point process, as CDPruner's, of what the language model is given), so that no object
    is taken twice."""
    tau: float = 5.0
    head: str = "patch"
    """"patch" and "dot" rank each patch by itself, on any grid; "index": one weight per place of the tower's own grid."""
    train: str = "gather"
    """In training dropped patches leave ("gather"), leave behind the projector ("mask") or stay as zeros ("zero")."""
    text: bool = False
    """Patches are ranked for the question, too: by the word of the prompt that each, behind the projector, is most alike."""
    conditioned: bool = True
    """False: patches are ranked alike under every budget."""
    place: str = "last"
    position: str = "own"
    """Of the budget token in the tower: learned, or "borrowed" from the last patch."""
    join: str = "attention"
    """fuse="after": the budget asks all patches (cross-attention), or stands beside each alone ("concat")."""

    presets = ("seed004",)
    """Class methods that are spelled like methods: `AdaptiveKeep.seed004()`."""

    def __post_init__(self) -> None:
        low: Any = check_budget(self.budget_min)
        high: Any = check_budget(self.budget_max)
        if isinstance(low, float) == isinstance(high, float) and low > high:
            raise ValueError(f"AdaptiveKeep: budget_min={low!r} is above budget_max={high!r}")
        for field, known in CHOICES.items():
            if (type(getattr(self, field)), getattr(self, field)) not in [(type(one), one) for one in known]:
                raise ValueError(
                    f"AdaptiveKeep({field}={getattr(self, field)!r}): {field} is one of {', '.join(map(repr, known))}"
                )
        check_number("AdaptiveKeep", "tau", self.tau, above=True)
        if self.cls is True and self.train != "gather":
            raise ValueError(f'AdaptiveKeep: cls=True with train={self.train!r} leaves it no place; use train="gather"')
        if self.cls is True and self.text:
            raise ValueError("AdaptiveKeep: cls=True is for the projector, and text=True ranks what comes out of it")
        if self.place == "first" and (self.fuse, self.read) != ("encoder", "both"):
            raise ValueError('AdaptiveKeep: place="first" is about fuse="encoder" with read="both"')

    @classmethod
    def seed004(cls, budget_min: int | float = 0.2, budget_max: int | float = 1.0) -> AdaptiveKeep:
        """Document 004's option A as described: both ways, the class token handed on, the budget token last."""
        return cls(budget_min=budget_min, budget_max=budget_max, read="both", cls=True)

    @property
    def facts(self) -> Facts:
        needs = {"training_noise"}
        if self.fuse == "encoder":
            needs.add("token" if self.read == "one_way" else "token_read")
        needs |= {"cls"} if self.cls is True else set()
        needs |= {"question", "projected"} if self.text else set()
        needs |= {"projected"} if self.select == "diverse" and self.cls is not True else set()
        needs |= {"training_projected"} if self.train == "mask" else set()
        return Facts(
            combine="other" if self.cls is True else "none", needs=frozenset(needs), where="tower", learned=True,
            ragged=True, budgeted=True, first=self.place == "first",
        )  # fmt: skip

    @property
    def known_failures(self) -> dict[str, str]:
        """Checks of the contract that this value cannot pass, and why."""
        found: dict[str, str] = {}
        if self.cls is True:
            why = "the class token stands in front and holds no patch"
            found |= dict.fromkeys(("ledger_is_sound", "survivors_in_raster_order"), why)
        if self.head == "index":
            found |= {"count_is_as_promised": "it has one weight per place of one grid, as its author built it"}
        return found

    @property
    def trained(self) -> Method:
        return replace(self, budget_min=LOWEST, budget_max=HIGHEST)

    def leaving(self, amount: Keep | Exactly) -> Method:
        budget = amount.share if isinstance(amount, Keep) else amount.tokens
        return replace(self, budget_min=budget, budget_max=budget)

    def sites(self, depth: int = 0) -> tuple[int, ...]:
        return (0,)

    def count(self, n: int, layer: int, patches: int | None = None) -> int:
        """What `budget_max` leaves."""
        return self.left(self.budget_max, n)

    def left(self, amount: Any, n: int) -> Any:
        """Tokens that the projector reads under a budget, the class token included: an int, or [B] for a tensor."""
        k, cls = tokens_of(amount, n), int(self.cls is True)
        if isinstance(k, Tensor):
            return k.clamp_max(n - cls) + cls
        return min(k, n - cls) + cls

    def check(self, setting: Setting) -> None:
        """A number of tokens and a share may stand the wrong way round."""
        n = setting.patches
        if n is not None and tokens_of(self.budget_min, n) > tokens_of(self.budget_max, n):
            raise ValueError(f"{self}: of {n} patches the lower budget is the larger one")

    def build(self, depth: int, width: int, heads: int, patches: int | None, prefix: int) -> Reducer:
        return AdaptiveKeepReducer(self, width, heads, patches, prefix)


class AdaptiveKeepReducer(Reducer):
    """Document 004's parts put together."""

    method: AdaptiveKeep

    def __init__(self, method: AdaptiveKeep, width: int, heads: int, patches: int | None, prefix: int) -> None:
        super().__init__(method, patches, prefix)
        if method.head == "index" and patches is None:
            raise ValueError(f'{method} needs a model with one grid; use head="patch" or "dot"')
        self.budget_embedding = BudgetEmbedding(width)
        self.vision_token_controller = VisionTokenController(
            width, patches or 0, method.tau, method.cls is True, head=method.head, select=method.select,
        )  # fmt: skip
        if method.fuse == "encoder" and method.position == "own":
            self.budget_pos_embed = nn.Parameter(SPREAD * torch.randn(1, 1, width))
        self.cross = Cross(width, heads) if method.fuse == "after" and method.join == "attention" else None
        self.question: Question | None = None
        self.width = width

    def meet(self, width: int) -> None:
        """The language model has so many channels."""
        self.question = Question(width)

    def amounts(self, n: int, images: int, draw: Tensor | None) -> int | Tensor:
        """Patches to keep: of a budget that is set, or of a draw between the bounds, or of the upper one."""
        if draw is not None:
            low, high = (tokens_of(bound, n) for bound in (self.method.budget_min, self.method.budget_max))
            return (low + (draw.double() * (high - low + 1)).floor().long()).clamp_max(high)
        budget = self.method.budget_max if self.budget is None else self.budget
        k = tokens_of(budget, n)
        if not isinstance(k, Tensor):
            return k
        if images % len(k):
            raise ValueError(f"{len(k)} budgets for {images} images: one for each, or one number for all")
        return k.repeat_interleave(images // len(k))  # beams repeat images, so they repeat budgets

    def count(self, n: int, layer: int) -> int:
        """Tokens left under the budget that is set; the most where it differs by image."""
        found = self.method.left(self.method.budget_max if self.budget is None else self.budget, n)
        return int(found.max()) if isinstance(found, Tensor) else found

    def token(self, budget: int | Tensor, n: int, images: int, place: Callable[[], Tensor]) -> Tensor:
        """[I, C] the budget token as it enters the tower; `place` gives the position of the last patch [C]."""
        own = self.method.position == "own"
        return self._told(budget, n, images) + (self.budget_pos_embed[:, 0] if own else place().detach())

    def _told(self, budget: int | Tensor, n: int, images: int) -> Tensor:
        """[I, C] the budget's embedding."""
        device = self.budget_embedding.out.weight.device
        share = torch.as_tensor(budget if self.method.conditioned else n, device=device).double() / n
        return self.budget_embedding(share.expand(images))

    def forward(self, tokens: Tokens, signals: Signals, layer: int) -> Tokens:
        n, images = tokens.n, len(tokens.x)
        budget = self.amounts(n, images, None) if signals.budget is None else signals.budget
        seen = tokens.x if signals.features is None else signals.features
        room = n - (self.method.cls is True)
        budget = budget.clamp_max(room).to(seen.device) if isinstance(budget, Tensor) else min(budget, room)
        logits = self._logits(seen, tokens, signals, budget)
        more = {"score": logits.detach()} if signals.watched else {}
        if self.training:
            out = self._drawn(tokens, logits, budget, signals.noise, more)
        elif isinstance(budget, int) and tokens.ledger.valid is None:
            out = replace(tokens, **more)
            if budget < n:
                out = drop(
                    tokens, top(self.vision_token_controller.keep(logits, budget, None, tokens.x), budget), **more
                )
        else:
            out = _packed(tokens, self.vision_token_controller.keep(logits, budget, None, tokens.x) > 0, budget, more)
        return out if self.method.cls is not True else _with_class(out, signals)

    def _logits(self, seen: Tensor, tokens: Tokens, signals: Signals, budget: int | Tensor) -> Tensor:
        """[B, N] float32; of padding -inf."""
        valid = tokens.ledger.valid
        if self.method.fuse == "encoder":
            assert signals.token is not None, "the core fills what Facts.needs asks for"
            known = signals.token
        else:
            known = self._told(budget, tokens.n, len(seen))
            known = known if self.cross is None else self.cross(known[:, None], seen, valid)[:, 0]
        asked = None
        if self.question is not None and signals.question is not None:
            asked = self.question(tokens.x, *signals.question, valid)
        patches = tokens.ledger.owner.shape[1]
        indexed = self.method.head == "index" and patches == self.patches
        at = tokens.ledger.first().clamp_max(patches - 1) if indexed else None
        logits = self.vision_token_controller.logits(seen, known.to(seen.dtype), at)
        logits = logits if asked is None else logits + asked
        return logits if valid is None else logits.masked_fill(~valid, float("-inf"))

    def _drawn(
        self, tokens: Tokens, logits: Tensor, budget: int | Tensor, noise: Tensor | None, more: dict[str, Any]
    ) -> Tokens:
        """A draw of training: what is kept is itself, times 1 with the gradient of the choice."""
        controller = self.vision_token_controller
        if noise is not None and self.method.select == "sequential":
            noise = _rounds(noise, int(torch.as_tensor(budget).max()))
        kept = controller.keep(logits, budget, noise, tokens.x)
        tokens = replace(tokens, x=tokens.x * kept.to(tokens.x.dtype)[..., None])
        if self.method.train == "zero":
            return replace(tokens, order=None, losses=None, metrics=None, **more)
        return _packed(tokens, kept.detach() > 0.5, budget, more)

    def macs(self, n: int, layer: int, setting: Setting) -> float:
        """Embedding, attentions and head; the budget token's way through the tower and the question apart."""
        found = self.budget_embedding.macs() + self.vision_token_controller.logit_head.macs(n)
        found += 0.0 if self.cross is None else self.cross.macs(1, n)
        m = self.count(n, layer)
        if self.method.select == "diverse" and m < n:
            found += n * n * setting.width + m * (m - 1) // 2 * n
        return found

    def asking(self, n: int, text: int) -> float:
        return 0.0 if self.question is None else self.question.macs(n, text)


def _packed(tokens: Tokens, keep: Tensor, budget: int | Tensor, more: dict[str, Tensor]) -> Tokens:
    """What is kept, first; as many places as the largest budget."""
    if tokens.ledger.valid is not None:
        keep = keep & tokens.ledger.valid
    if isinstance(budget, int) and tokens.ledger.valid is None:
        return drop(tokens, (~keep).int().argsort(dim=1, stable=True)[:, :budget], **more)
    return replace(compact(mask(tokens, keep), int(torch.as_tensor(budget).max())), **more)


def _with_class(tokens: Tokens, signals: Signals) -> Tokens:
    """The class token in front; it holds no patch."""
    assert signals.cls is not None, "the core fills what Facts.needs asks for"
    x = torch.cat([signals.cls[:, None].to(tokens.x.dtype), tokens.x], 1)
    move = torch.arange(1, tokens.n + 1, device=x.device).expand(len(x), -1)
    valid = tokens.ledger.valid
    more = {"score": tokens.score}
    return tokens.moved(x, move, tokens.n + 1, None if valid is None else F.pad(valid, (1, 0), value=True), **more)


def _rounds(noise: Tensor, rounds: int) -> Tensor:
    """[K, B, N] fresh uniform numbers, each from one number of noise [B, N] and its place."""
    place = torch.arange(noise.shape[1], device=noise.device)
    key = (noise.double() * 2**24).long() * noise.shape[1] + place
    return uniform(key.flatten(), 0, rounds).T.unflatten(1, noise.shape)
