"""Models we define ourselves, registered with timm when this package is imported."""

from . import vit_scenes

__all__ = ["vit_scenes"]
