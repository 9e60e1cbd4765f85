"""Which tokens belong together.

Density peaks with nearest neighbours: Du et al., 2016, as SparseVLM (Zhang et al., 2025) uses it, without its noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, m: int) -> Tensor:
    """[B, N] cluster, 0 to m-1, of tokens x [B, N, C]: centres are dense and far from anything denser.

    Of two equally dense tokens the first counts as the denser.
    """
    x = x.detach().float()
    distance = torch.cdist(x, x) / x.shape[-1] ** 0.5
    near = distance.topk(m, dim=2, largest=False).values
    density = (-near.square().mean(2)).exp()
    n = x.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
    ahead = density[:, None] > density[:, :, None]
    ahead |= (density[:, None] == density[:, :, None]) & earlier
    apart = distance.masked_fill(~ahead, torch.inf).amin(2)
    apart = torch.where(apart.isinf(), distance.flatten(1).amax(1, keepdim=True), apart)
    centres = (apart * density).topk(m, dim=1).indices
    nearest = distance.gather(2, centres[:, None].expand(-1, n, -1)).argmin(2)
    own = torch.arange(m, device=x.device).expand(len(x), -1)
    return nearest.scatter(1, centres, own)  # identical tokens would leave a centre to another cluster
