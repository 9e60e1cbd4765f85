"""What a channel matters to the loss: running moments of its gradient at each site, gathered while training.

First order: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017; Fisher:
Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

MOMENTUM = 0.99
"""Of the running moments: they look back about a hundred steps."""


class ChannelGradients(nn.Module):
    """Moments of dL/dx per channel [S, C], over images and tokens, at each of S sites; a token's own gradient is not
    known when it must be judged, the forward comes before it.
    """

    mean: Tensor
    size: Tensor
    square: Tensor
    visits: Tensor

    def __init__(self, sites: int, width: int) -> None:
        super().__init__()
        for name in ("mean", "size", "square"):  # ones: before any gradient is known, all channels matter alike
            self.register_buffer(name, torch.ones(sites, width))
        self.register_buffer("visits", torch.zeros(sites))

    def listen(self, x: Tensor, site: int) -> None:
        """Take the gradient of x [B, N, C] into the moments of `site` when it comes."""
        if not x.requires_grad:
            return
        if torch.compiler.is_compiling():
            raise ValueError(
                'gradients are gathered by a hook, which cannot be compiled: use saliency="cls_attention", or do not '
                "compile"
            )
        x.register_hook(partial(self._take, site))

    @torch.no_grad()
    def _take(self, site: int, gradient: Tensor) -> None:
        g = gradient.float().flatten(0, 1)
        # a loss scaled too high gives infinities once in a while: that step teaches nothing
        known = g.isfinite().all()
        self.visits[site] += known
        share = known * (1 / self.visits[site].clamp_min(1)).clamp_min(1 - MOMENTUM)
        g = g.nan_to_num(0, 0, 0)
        for moment, new in ((self.mean, g), (self.size, g.abs()), (self.square, g.square())):
            moment[site] = moment[site].lerp(new.mean(0).to(moment.dtype), share.to(moment.dtype))

    def score(self, kind: str, x: Tensor, site: int) -> Tensor:
        """[B, N] what the loss stands to lose with each token of x [B, N, C].

        "gradient": sum of |x| E|g|, first order; "fisher": sum of x² E[g²], second order with the diagonal Fisher
        information as curvature; "gradient_snr": sum of |x| |E g| / sqrt(E[g²]), channels whose gradient keeps its sign.
        """
        x = x.detach().float()
        if kind == "fisher":
            return (x.square() @ self.square[site].float().unsqueeze(1)).squeeze(-1)
        if kind == "gradient":
            weight = self.size[site].float()
        else:
            square = self.square[site].float()
            weight = self.mean[site].float().abs() * square.clamp_min(torch.finfo(square.dtype).tiny).rsqrt()
        return (x.abs() @ weight.unsqueeze(1)).squeeze(-1)
