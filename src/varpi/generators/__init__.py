"""Generators: what one is (`generator.py`), and a module for each family of them."""

from .generator import Generator, concat_conditions
from .llamagen import LlamaGen, LlamaGenConfig, TextCondition

__all__ = ["Generator", "LlamaGen", "LlamaGenConfig", "TextCondition", "concat_conditions"]
