"""This machine's memory: asked before much is taken, for too much ends in a killed process; kept once it is taken."""

import ctypes
import os
import sys
from typing import Any

from varpi.errors import VarpiError


def physical_memory() -> int | None:
    """Bytes of main memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def check_memory(size: int, what: str, device: str = "cpu") -> None:
    """Refuse what takes more bytes than this machine, or its CUDA device, has. Raises VarpiError, `what` before all."""
    there, where = physical_memory(), "this machine"
    if device.startswith("cuda"):
        import torch

        there, where = torch.cuda.get_device_properties(device).total_memory, device
    if there is not None and size > there:
        raise VarpiError(f"{what}: {size / 2**30:.0f} GiB are needed, and {where} has {there / 2**30:.0f}")


def keep_freed_memory() -> None:
    """From now on this process keeps up to 2 GiB of the main memory that it frees, for what it takes next.

    glibc gives large blocks back to the system at once, and the system clears every page of those that it hands out
    again: a twelfth of the time of a decoder on a CPU. Does nothing elsewhere.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks are not pages of their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back_freed_memory() -> None:
    """Give the system what `keep_freed_memory` kept until now."""
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(function: str) -> Any:
    """A function of the C library; None where there is none of this name."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
