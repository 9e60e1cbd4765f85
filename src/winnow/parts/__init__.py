"""What methods are made of: amounts, scores, choices, combinations; those of document 004 under its names."""

from .budget import BudgetEmbedding, VisionEncoderWithBudgetToken
from .controller import VisionTokenController

__all__ = ["BudgetEmbedding", "VisionEncoderWithBudgetToken", "VisionTokenController"]
