"""What a check works with: random tokens and signals for a bare reducer, and two small models that are not numb.

Winnow's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import winnow

from ..reducer import Method, Reducer, Setting, Signals
from ..tokens import Ledger, Tokens
from ..twin import twin

WIDTH, HEADS, GRID, PATCH = 32, 2, (8, 8), 8


class Skip(Exception):
    """This check does not concern this method; the message says why."""


class Case:
    """One method under one check, on the contract's own small models or on `model`."""

    def __init__(self, method: Method, model: nn.Module | None = None, images: Tensor | None = None) -> None:
        self.method, self.facts, self.given, self.given_images = method, method.facts, model, images
        sites = method.sites(2)
        depth = max(3, max(sites, default=0) + 2)
        # deep enough for one amount per block, and large enough for an image side in pixels
        rooms = [(depth + more, patch) for patch in (PATCH, 4 * PATCH) for more in range(64)]
        self.depth, self.patch = next((room for room in rooms if self._allowed(*room)), rooms[0])
        self.layer = sites[0] if sites else 0
        self.generator = torch.Generator().manual_seed(0)

    def _allowed(self, depth: int, patch: int) -> bool:
        try:
            self.method.check(Setting(depth, WIDTH, HEADS, 1, True, GRID, (patch, patch)))
        except ValueError:
            return False
        return True

    def rand(self, *shape: int) -> Tensor:
        """Standard normal numbers from the case's own generator."""
        return torch.randn(*shape, generator=self.generator)

    def reducer(self, patches: int = 64) -> Reducer:
        """A bare reducer in evaluation mode; Skip for methods that act on the image."""
        if self.facts.where == "input":
            raise Skip("acts on the image, not on tokens")
        reducer = self.method.build(self.depth, WIDTH, HEADS, patches, 1).train(self.facts.training_only)
        ready(reducer)
        return reducer

    def tokens(self, b: int = 3, n: int = 64, x: Tensor | None = None) -> Tokens:
        """b images of n fresh tokens."""
        x = self.rand(b, n, WIDTH) if x is None else x
        return Tokens(x, Ledger.start(x.shape[0], x.shape[1]), GRID if x.shape[1] == 64 else None)

    def signals(self, tokens: Tokens) -> Signals:
        """All signals, derived from the features so that gradients and batch independence can be seen."""
        x = tokens.x
        heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        received = x.float().mean(-1).softmax(1)
        noise = (x.detach().float().sum(-1) * 1e3).sin().add(1).div(2.001)
        return Signals(
            q=heads,
            k=heads.flip(-1),
            v=heads.roll(1, -1),
            cls_row=received[:, None].expand(-1, HEADS, -1),
            received=received,
            cls_q=heads.mean(2),
            cls_k=heads.flip(-1).mean(2),
            cls=x.mean(1),
            token=x.mean(1),
            text_row=received[:, None].expand(-1, HEADS, -1),
            noise=noise,
            seen=tokens.ledger.dense(x.detach().float().sum(-1)),
            watched=True,
        )

    def step(self, reducer: Reducer, tokens: Tokens) -> Tokens:
        """One call of the reducer at its first site."""
        return reducer(tokens, self.signals(tokens), self.layer)

    def plain(self, cls: bool = True) -> nn.Module:
        """A small timm ViT whose gains are far from 0 and 1: class token and LayerScale, or registers and mean pooling."""
        if self.given is not None:
            return twin(self.given)
        if self.facts.where in ("tower", "llm"):
            raise Skip("acts in a vision-language model: tests/test_vlm.py")
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError:
            raise ImportError('the contract runs on timm models: pip install "winnow-vision[timm]"') from None
        words: dict[str, Any] = {
            "img_size": GRID[0] * self.patch,
            "patch_size": self.patch,
            "embed_dim": WIDTH,
            "depth": self.depth,
            "num_heads": HEADS,
            "num_classes": 5,
            "mlp_ratio": 2.0,
            "qk_norm": True,
            "init_values": 1.0,
        }
        if not cls:
            words |= {"class_token": False, "reg_tokens": 2, "global_pool": "avg", "no_embed_class": True}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = VisionTransformer(**words)
            for parameter in model.parameters():
                nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
        return model.eval()

    def model(self, cls: bool = True, way: Any = "auto") -> nn.Module:
        """The same, reduced with the method; Skip where it needs a class token and there is none."""
        if not cls and "cls_attention" in self.facts.needs:
            raise Skip("needs a class token")
        model = winnow.reduce(self.plain(cls), self.method, way)
        ready(winnow.reducer_of(model))
        return model.train(self.facts.training_only)

    def images(self, b: int = 3) -> Tensor:
        """b images of very different contrast."""
        if self.given_images is not None:
            return self.given_images[:b]
        return self.rand(b, 3, GRID[0] * self.patch, GRID[1] * self.patch) * torch.tensor([0.3, 1.0, 3.0])[
            torch.arange(b) % 3
        ].view(b, 1, 1, 1)

    @property
    def modes(self) -> list[bool]:
        """Training flags under which decisions are made: both for learned methods, whose training is another run."""
        return [False, True] if self.facts.learned and self.given is None else [self.facts.training_only]

    def fits(self) -> list[bool]:
        """Which of the two models the method can work on."""
        if self.given is not None:
            return [True]
        return [True] if "cls_attention" in self.facts.needs else [True, False]


def ready(reducer: Reducer) -> None:
    """Give a method that must be calibrated some limits, and a learned one the same weights every time, none of them 0."""
    if reducer.quantiles():
        reducer.limits.fill_(WIDTH**0.5)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in reducer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """AssertionError where a and b differ by more than tolerance, relative to their size."""
    assert a.shape == b.shape, f"{what}: shape {[*a.shape]} against {[*b.shape]}"
    worst = float((a.detach().double() - b.detach().double()).abs().max()) if a.numel() else 0.0
    limit = tolerance * max(1.0, float(b.double().abs().max()) if b.numel() else 1.0)
    assert worst <= limit, f"{what}: differs by {worst:.2e}, allowed {limit:.1e}"
