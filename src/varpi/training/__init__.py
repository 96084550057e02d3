"""Carrying out recipes."""

from .logging import read_metrics
from .loop import train

__all__ = ["read_metrics", "train"]
