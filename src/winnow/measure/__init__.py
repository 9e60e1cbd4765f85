"""What a model costs and how well it does: multiply-adds, time, memory, accuracy, and the row that records them.

Winnow's own; one file measures one quantity.
"""

from .accuracy import accuracy_of, mcnemar, pack, unpack, wilson
from .latency import compare_latency, share, verdict
from .macs import count_macs, fvcore_macs, macs_by_module
from .memory import peak_memory
from .profile import Profile, profile_model
from .vlm import VlmMacs, vlm_ceiling, vlm_macs
from .vlm_count import count_vlm_macs

__all__ = [
    "Profile",
    "VlmMacs",
    "accuracy_of",
    "compare_latency",
    "count_macs",
    "count_vlm_macs",
    "fvcore_macs",
    "macs_by_module",
    "mcnemar",
    "pack",
    "peak_memory",
    "profile_model",
    "share",
    "unpack",
    "verdict",
    "vlm_ceiling",
    "vlm_macs",
    "wilson",
]
