"""Image tokenizers: what one is (`tokenizer.py`), and a module for each family of them."""

from .tokenizer import Tokenizer
from .vq import VQ, VQConfig

__all__ = ["VQ", "Tokenizer", "VQConfig"]
