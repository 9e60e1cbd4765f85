"""Winnow: vision transformers that read fewer tokens, and say honestly what that costs and saves."""

__version__ = "0.1.0"
