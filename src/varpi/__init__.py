"""varpi (ϖ): pixel-space post-training of autoregressive image generators."""

from varpi import data, evaluation, objective
from varpi.errors import VarpiError
from varpi.generators import Generator, LlamaGen, LlamaGenConfig, TextCondition
from varpi.recipe import Recipe, load_recipe
from varpi.sampling import generate
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
