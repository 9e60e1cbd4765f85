"""Static methods compile as one graph and export with a free batch; saving and loading keeps the reducer.

Winnow's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import winnow

from .case import Case, Skip, close


def compiles_as_one_graph(case: Case) -> None:
    """torch.compile(fullgraph=True), aot_eager backend, gives the eager output."""
    if not case.facts.static:
        raise Skip("the token count depends on the image")
    model, images = case.model(), case.images()
    torch._dynamo.reset()
    with torch.no_grad():
        eager = model(images)
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), eager, 1e-5, "compiled against eager")
    torch._dynamo.reset()


def exports_with_a_free_batch(case: Case) -> None:
    """torch.export with a dynamic batch gives the eager output at another batch size."""
    if not case.facts.static:
        raise Skip("the token count depends on the image")
    model = case.model()
    free = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (case.images(3),), dynamic_shapes=free)
    images = case.images(5)
    with torch.no_grad():
        close(program.module()(images), model(images), 1e-5, "exported against eager")


def saves_and_loads(case: Case) -> None:
    """winnow.save and winnow.load bring the same reducer to a fresh model."""
    if type(case.method) not in winnow.METHODS:
        raise Skip("winnow.load reads the spellings of winnow.METHODS only")
    model, images, fresh = case.model(), case.images(), case.plain()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reducer.safetensors"
        winnow.save(model, path)
        winnow.load(fresh, path).train(model.training)
    with torch.no_grad():
        assert torch.equal(model(images), fresh(images)), "the loaded reducer gives another output"


CHECKS = (compiles_as_one_graph, exports_with_a_free_batch, saves_and_loads)
