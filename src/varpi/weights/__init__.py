"""Weights in and out, strictly; the pair of a generator and its tokenizer, opened and checked."""

from varpi.runtime.sources import EMBEDDED, Source, embedded
from varpi.runtime.tensors import read_checkpoint, sha256_of
from varpi.weights.load import load_generator, load_tokenizer
from varpi.weights.save import export_original, save_generator, save_tokenizer, to_original

__all__ = [
    "EMBEDDED",
    "Source",
    "embedded",
    "export_original",
    "load_generator",
    "load_tokenizer",
    "read_checkpoint",
    "save_generator",
    "save_tokenizer",
    "sha256_of",
    "to_original",
]
