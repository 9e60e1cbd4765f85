"""Models we define ourselves, registered with timm when this package is imported."""

from . import hybrid_vit, vit_scenes

__all__ = ["hybrid_vit", "vit_scenes"]
