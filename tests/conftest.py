"""Shared pieces of the tests: small models that are not numb, and the folder of reference outputs where it exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.backends.mha.set_fastpath_enabled(False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def reference(name: str) -> dict:
    """Cases of one file of reference outputs; skips where the folder is not there."""
    path = SHARED / "reference_outputs" / f"{name}.pt"
    if not path.exists():
        pytest.skip(f"no reference outputs beside the project: {name}.pt")
    return torch.load(path, weights_only=False)["cases"]
