"""calibrate: turn quantile thresholds into numbers, site by site, on data that looks like yours.

Winnow's own; document 002 leaves the threshold to the reader.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ._reduce import reducer_of


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set every quantile limit of the model's reducer from image batches [B, 3, H, W]; returns the model.

    Sites are calibrated in order, each on what the earlier ones leave. ValueError where nothing is to be calibrated.
    """
    reducer = reducer_of(model)
    quantiles = reducer.quantiles()
    if not quantiles:
        raise ValueError(f'{reducer.method} has nothing to calibrate; Below(0.3, of="quantile") would')
    data, training = list(batches), model.training
    if not data:
        raise ValueError("calibrate() needs at least one batch of images")
    model.eval()
    reducer.limits.fill_(-torch.inf)  # a site not calibrated yet lets everything through
    try:
        for layer, share in quantiles.items():
            seen: list[Tensor] = []

            def collect(module, args, layer=layer, seen=seen):
                tokens, _, at = args
                if at == layer:
                    score, valid = module.score(tokens), tokens.ledger.valid
                    seen.append(score.flatten() if valid is None else score[valid])

            hook = reducer.register_forward_pre_hook(collect)
            try:
                for batch in data:
                    model(batch)
            finally:
                hook.remove()
            scores = torch.cat(seen).sort().values
            place = min(len(scores) - 1, int(share * len(scores)))
            reducer.set_limit(layer, float(scores[place - 1]) if place else -float("inf"))
    finally:
        model.train(training)
    return model
