"""A second model on the same weights: so that plain and reduced can be timed in turn without holding two copies.

Winnow's own.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A structural copy that shares every parameter and buffer with the model."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
