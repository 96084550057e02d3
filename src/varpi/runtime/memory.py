"""This machine's memory, asked before much is taken: too much ends not in an error but in a killed process."""

import os

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
