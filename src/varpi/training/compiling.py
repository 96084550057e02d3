"""torch.compile of what a step repeats most: the transformer's blocks, one graph for all of a generator."""

import importlib.util
import os
import shutil

from torch import nn

from varpi.errors import VarpiError
from varpi.generators import Generator


def compile_blocks(model: nn.Module, device: str) -> None:
    """Have the blocks of a generator compiled when they first run. Dropout draws as it does without.

    Raises VarpiError where torch would find no compiler.
    """
    if device.startswith("cuda"):
        if importlib.util.find_spec("triton") is None:
            raise VarpiError("training.compile needs triton on a GPU: pip install triton")
    elif not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise VarpiError("training.compile needs a C++ compiler on the CPU: install g++, or name one in CXX")
    if isinstance(model, Generator):
        for block in model.blocks:
            block.compile(options={"fallback_random": True})
