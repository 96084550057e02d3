"""What the benchmarks share: models with random weights, counted and measured work, and where it was measured."""

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from varpi.errors import VarpiError
from varpi.generators import LlamaGen, LlamaGenConfig
from varpi.generators.llamagen_files import config_for
from varpi.networks.loading import load_perceptual
from varpi.objective import Perceptual
from varpi.runtime.files import check_output, write_text

MARKER = b'{\n  "machine": {\n    "device": '
"""How the file of a result begins."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def class_conditional(architecture: str, image_size: int) -> LlamaGenConfig:
    """The configuration of a named class-conditional generator for images of VQ-16."""
    if image_size % 16:
        raise VarpiError(f"--image-size is {image_size}; VQ-16 needs a multiple of 16")
    config = config_for(architecture, image_size // 16)
    if config.conditioning != "class":
        raise VarpiError(f"--architecture is {architecture}; the benchmarks know the class-conditional ones")
    return config


def random_generator(config: LlamaGenConfig, device: str) -> LlamaGen:
    """A fresh generator. Its output layer, all zeros at the start of a training, gets weights like the others'."""
    with torch.device(device):
        generator = LlamaGen(config)
    nn.init.normal_(generator.output.weight, std=0.02)
    return generator


def random_lpips(device: str) -> Perceptual:
    """LPIPS as the recipes load it, on a VGG16 with random weights."""
    with torch.device("meta"):
        trunk = vgg16(weights=None, init_weights=False).features
    weights = {f"features.{name}": torch.zeros(parameter.shape) for name, parameter in trunk.named_parameters()}
    for weight in weights.values():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, f"{folder}/vgg16.pth")
        return load_perceptual("lpips-vgg", f"{folder}/vgg16.pth", device)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function where nothing has been allocated yet, so that its peaks are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def count_tflop(function: Callable[[], object]) -> float:
    """Operations of matrix products, convolutions and attention, two per multiply-add; attention is a full square."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops() / 1e12


def matmul_tflops(device: str, dtype: str, rows: int | None = None) -> float:
    """The rate this machine reaches on linear layers, TFLOP/s: the best of three tries after one to warm up.

    The layers are large and many, so that their weights come from memory as a model's do. `rows` is how many vectors go
    through at once; by default as many as a layer is wide, which is a square matrix product.
    """
    width = 8192 if device.startswith("cuda") else 2048
    rows = rows or width
    weights = [torch.randn(width, width, device=device, dtype=DTYPES[dtype]) for _ in range(16)]
    x = torch.randn(rows, width, device=device, dtype=DTYPES[dtype])
    seconds = []
    for _ in range(4):
        synchronize(device)
        begun = time.perf_counter()
        for weight in weights:
            nn.functional.linear(x, weight)
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return len(weights) * 2 * rows * width**2 / min(seconds[1:]) / 1e12


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> None:
    """Start a new measurement of the peak memory. Linux lets a process reset its own; elsewhere it only ever grows."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: str) -> float:
    """Peak since the last reset: tensors on the accelerator, or this whole process's resident memory on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def machine(device: str) -> dict[str, Any]:
    """What a measured number depends on besides the code, and the commit of the code."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or None,
    }


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, --json among them: a file that holds anything but an earlier result is refused at once."""
    parser.add_argument("--json", type=Path, help="also write what is printed here")
    options = parser.parse_args()
    if options.json is not None:
        try:
            check_output("--json", options.json, marker=MARKER)
        except VarpiError as error:
            parser.error(str(error))
    return options


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write what was measured: `machine` first, which is what a result is known by, then the command, its paths cut."""
    if path is not None:
        words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
        write_text(path, json.dumps({"machine": content["machine"], "command": command, **content}, indent=2) + "\n")
