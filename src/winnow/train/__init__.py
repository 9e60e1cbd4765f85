"""One training loop for every task: recipe in, checkpoints, log, curves and one result row out.

Winnow's own, on Hugging Face Accelerate (one process, several GPUs, several machines).
"""

from .recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
