"""Generating tokens free-running: `generate` and what it draws from."""

from varpi.sampling.generate import filter_logits, generate

__all__ = ["filter_logits", "generate"]
