"""From a run's checkpoint to its FID: whole processes of `varpi evaluate RUN`, in images per second. Random weights.

A run directory is made with a class-conditional LlamaGen, VQ-16, Inception and reference images, all random. The
command is timed twice: the first makes the samples, decodes, writes and measures them; the second finds them there and
measures alone. Both include the start of Python and the loading of what they need.

    python benchmarks/end_to_end.py --small
    python benchmarks/end_to_end.py --architecture llamagen-c2i-xxl --image-size 384 --count 2048 --batch-size 64 \\
        --dtype bfloat16 --resize 256 --device cuda
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import class_conditional, machine, parse, random_generator, write_json
from evaluation import random_images, random_weights
from rich.console import Console

from varpi.errors import VarpiError
from varpi.generators import LlamaGenConfig
from varpi.recipe import parse_recipe
from varpi.runtime.files import write_text
from varpi.tokenizers import VQ, VQConfig
from varpi.weights import save_generator, save_tokenizer


def config_of(options: argparse.Namespace) -> LlamaGenConfig:
    if options.small:
        return LlamaGenConfig(256, 6, 4, vocab_size=16384, grid=options.image_size // 16)
    return class_conditional(options.architecture, options.image_size)


def make_run(folder: Path, options: argparse.Namespace) -> Path:
    """What `varpi train` would have left."""
    torch.manual_seed(0)
    run = folder / "run"
    run.mkdir()
    save_tokenizer(VQ(VQConfig(channels=32 if options.small else 128)), folder / "tokenizer.safetensors")
    save_generator(random_generator(config_of(options), "cpu"), run / "model.safetensors")
    recipe = parse_recipe(
        {
            "method": {"name": "next_token"},
            "generator": {"source": "random"},
            "tokenizer": {"source": str(folder / "tokenizer.safetensors")},
            "data": {"source": "random", "image_size": options.image_size},
            "optimizer": {"learning_rate": 1e-6},
            "training": {"steps": 1, "batch_size": 1},
        }
    )
    write_text(run / "recipe.yaml", recipe.to_yaml())
    return run


def evaluate(run: Path, folder: Path, options: argparse.Namespace) -> float:
    """Seconds of the whole command."""
    command = [sys.executable, "-m", "varpi", "evaluate", str(run), "--metrics", "fid", "--device", options.device]
    command += ["--count", str(options.count), "--guidance-scale", str(options.guidance), "--dtype", options.dtype]
    command += ["--batch-size", str(options.batch_size), "--reference", str(folder / "reference")]
    command += ["--weights", str(folder / "inception.pth"), "--precision", options.precision]
    command += ["--resize", str(options.resize)] if options.resize else []
    begun = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if ran.returncode or "fid" not in ran.stdout:
        raise RuntimeError(f"{' '.join(command)}: {ran.stderr}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llamagen-c2i-b", help="a class-conditional LlamaGen")
    parser.add_argument("--small", action="store_true", help="a LlamaGen of 6 layers and a tokenizer a quarter as wide")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--resize", type=int, help="as the flag of varpi evaluate")
    parser.add_argument("--count", type=int, default=64, help="images")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the pair")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of Inception")
    parser.add_argument("--device", default="cpu")
    options = parse(parser)
    try:
        config_of(options)
    except VarpiError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder, options)
        (folder / "reference").mkdir()
        random_images(folder / "reference", 64, options.resize or options.image_size, 1)
        random_weights(folder / "inception.pth")
        whole = evaluate(run, folder, options)
        measuring = evaluate(run, folder, options)
    content: dict[str, Any] = {
        "machine": machine(options.device),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "seconds": {"whole": whole, "measuring": measuring},
        "images_per_second": {"whole": options.count / whole, "sampling": options.count / (whole - measuring)},
    }
    rates = content["images_per_second"]
    Console(width=120).print(
        f"{options.count} images from checkpoint to FID in {whole:.1f} s, {rates['whole']:.2f} images/s; "
        f"{measuring:.1f} s when they are there, so that sampling, decoding and writing make {rates['sampling']:.2f} "
        "images/s"
    )
    write_json(options.json, content)


if __name__ == "__main__":
    main()
