"""MACs by closed form: what the adapters and the reducer say a forward costs, beside what is counted.

Winnow's own; MAC = one multiply-add; norms, softmax and activations are not counted (see macs.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._host import Host
from .._reduce import seat_of
from ..adapters import host_of, unwrap
from ..reducer import Reducer

TOLERANCE = 0.02


def plain_macs(model: nn.Module, blocks: str | None = None) -> float | None:
    """MACs per image of an unreduced model on its own input; None where stem or head are not known."""
    host = host_of(model, blocks)
    if host.setting.patches is None:
        return None
    counts = torch.full((1, host.setting.depth + 1), host.setting.patches, dtype=torch.float64)
    found = closed_form(host, None, counts)
    return None if found is None else float(found)


def closed_macs(model: nn.Module, counts: Tensor) -> Tensor | None:
    """[B] MACs per image of a reduced model that ran `counts` [B, depth+1] patch tokens (run.valid_counts)."""
    seat = seat_of(unwrap(model))
    return closed_form(seat.host, seat.reducer, counts.double())


def closed_form(host: Host, reducer: Reducer | None, counts: Tensor) -> Tensor | None:
    """[B] MACs per image for `counts` [B, depth+1] patch tokens; None where stem or head are not known."""
    if host.outside_macs is None:
        return None
    setting, prefix = host.setting, host.setting.prefix
    embedded = counts[:, 0] if reducer is None else _embedded(counts, reducer, host)
    total = host.outside_macs(embedded, counts[:, -1] + prefix)
    where = reducer.method.facts.where if reducer is not None else "none"
    sites = reducer.method.sites(setting.depth) if reducer is not None else ()
    for layer, (block, view) in enumerate(zip(host.blocks, host.views)):
        entering, leaving = counts[:, layer], counts[:, layer + 1]
        total = total + view.macs(block, entering + prefix, (leaving if where == "block" else entering) + prefix)
        if reducer is not None and layer in sites:
            came = entering if where == "block" else counts[:, layer - 1] if layer else embedded
            total = total + torch.tensor(
                [reducer.macs(int(n), layer, setting) for n in came.tolist()], dtype=torch.float64
            )
    return total


def _embedded(counts: Tensor, reducer: Reducer, host: Host) -> Tensor:
    """[B] patches that were embedded: all of them, unless the image itself was made smaller."""
    if reducer.method.facts.where == "input" or host.setting.patches is None:
        return counts[:, 0]
    return torch.full_like(counts[:, 0], host.setting.patches)


def check_counted(counted: float, closed: float | None, what: str) -> None:
    """ValueError where the counter and the closed form are more than 2 % apart."""
    if closed is not None and abs(counted / closed - 1) > TOLERANCE:
        raise ValueError(
            f"{what}: {counted / 1e9:.4f} GMAC counted, {closed / 1e9:.4f} by closed form, more than 2 % apart; "
            "one of the two misses something: please report it"
        )
