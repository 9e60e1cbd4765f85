"""Models we define ourselves, registered with timm when this package is imported."""

from . import drip_seed001, drip_vit, hybrid_vit, vit_scenes

__all__ = ["drip_seed001", "drip_vit", "hybrid_vit", "vit_scenes"]
