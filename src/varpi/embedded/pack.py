"""Packs a run's model for the package: `python -m varpi.embedded.pack RUN FILE`, part of `make embedded`."""

import sys
from pathlib import Path

from safetensors import safe_open

from varpi.runtime.files import write_aside
from varpi.runtime.tensors import sha256_of, write_safetensors


def pack(run: Path, output: Path) -> None:
    """Write the weights of `run` in bf16, with their recipe and the hash of the full-precision file beside them."""
    source = run / "model.safetensors"
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), "trained_sha256": sha256_of(source)}
    halved = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    write_aside(output, lambda aside: write_safetensors(halved, aside, metadata))


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
