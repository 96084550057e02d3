"""varpi (ϖ): pixel-space post-training of autoregressive image generators.

The names below are imported when they are first asked for, so that `import varpi` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varpi import data, evaluation, objective
    from varpi.errors import VarpiError
    from varpi.generators import Generator, LlamaGen, LlamaGenConfig, TextCondition
    from varpi.recipe import Recipe, load_recipe
    from varpi.sampling.generate import generate
    from varpi.sampling.settings import Sampling
    from varpi.tokenizers import VQ, Tokenizer, VQConfig
    from varpi.training import train
    from varpi.weights import export_original, load_generator, load_tokenizer, save_generator, save_tokenizer

__version__ = "0.1.0"

__all__ = [
    "VQ",
    "Generator",
    "LlamaGen",
    "LlamaGenConfig",
    "Recipe",
    "Sampling",
    "TextCondition",
    "Tokenizer",
    "VQConfig",
    "VarpiError",
    "data",
    "evaluation",
    "export_original",
    "generate",
    "load_generator",
    "load_recipe",
    "load_tokenizer",
    "objective",
    "save_generator",
    "save_tokenizer",
    "train",
]

_HOMES = {
    "errors": ("VarpiError",),
    "generators": ("Generator", "LlamaGen", "LlamaGenConfig", "TextCondition"),
    "recipe": ("Recipe", "load_recipe"),
    "sampling.generate": ("generate",),
    "sampling.settings": ("Sampling",),
    "tokenizers": ("VQ", "Tokenizer", "VQConfig"),
    "training": ("train",),
    "weights": ("export_original", "load_generator", "load_tokenizer", "save_generator", "save_tokenizer"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("data", "evaluation", "objective"):
        return importlib.import_module(f"varpi.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'varpi' has no attribute {name!r}")
    return getattr(importlib.import_module(f"varpi.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
