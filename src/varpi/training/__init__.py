"""Carrying out recipes."""

from .loop import train
from .logging import read_metrics

__all__ = ["read_metrics", "train"]
