"""Cached generation beside recomputing the whole prefix at each token, in one run. Random weights.

Both sides decode greedily and must give the same tokens. The recomputing side is no straw man: it evaluates the output
layer at the last position only, and its attention skips the causal half where the kernel can. Two predictions stand
beside the measured factor: the ratio of operations, which many images approach, and the ratio of times when each pass
takes as long as its operations or as reading the weights and the cache, whichever is longer, at the rates that this
machine reaches. Guidance is left out; it doubles the batch on both sides.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --architecture llamagen-c2i-xxl --image-size 384 --dtype bfloat16 --device cuda
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    class_conditional,
    in_fresh_process,
    machine,
    matmul_tflops,
    memory_terabytes,
    peak_gib,
    random_generator,
    reset_peak,
    synchronize,
    write_json,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

import varpi
from varpi.errors import VarpiError
from varpi.generators import LlamaGen, LlamaGenConfig


@torch.inference_mode()
def recompute(generator: LlamaGen, condition: Tensor) -> Tensor:
    """Greedy tokens int64 (B,N), every one from a pass over the condition and all the tokens before it."""
    generator.eval()
    tokens = torch.empty(len(condition), 0, dtype=torch.int64, device=condition.device)
    for _ in range(generator.num_tokens):
        x = torch.cat([generator.class_embedding(condition)[:, None], generator.token_embedding(tokens)], dim=1)
        for block in generator.blocks:
            x = block(x, generator.rotary[: x.shape[1]], None)
        token = generator.output(generator.norm(x[:, -1])).float().argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens


def cached(generator: LlamaGen, condition: Tensor) -> Tensor:
    return varpi.generate(generator, condition, greedy=True, batch_size=len(condition))


@dataclass
class Work:
    """What one pass of the transformer takes."""

    tflop: float
    """Two operations per multiply-add; a query is counted with the keys that it sees."""
    terabytes: float
    """The weights, and the keys and values of earlier positions, read once."""


def passes(config: LlamaGenConfig, images: int, dtype: str) -> dict[str, list[Work]]:
    """The work of each side's N passes; the n-th depends on n positions, the condition being the first."""
    assert config.ffn_dim is not None
    layers = config.n_layer * (4 * config.dim**2 + 3 * config.dim * config.ffn_dim)
    output = config.dim * config.vocab_size
    attention = 2 * config.n_layer * config.dim  # multiply-adds per query and position; also the numbers cached per position
    size = 1e-12 * DTYPES[dtype].itemsize
    cached, recomputed = [], []
    for n in range(1, config.grid**2 + 1):
        weights = size * (layers + output)
        once = layers + output + attention * n
        cached.append(Work(2e-12 * images * once, weights + size * images * attention * n))
        again = layers * n + output + attention * n * (n + 1) / 2
        recomputed.append(Work(2e-12 * images * again, weights))
    return {"cached": cached, "recomputed": recomputed}


def measure(decode: Callable[[LlamaGen, Tensor], Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds (the best of the repeats), peak GiB, and the tokens."""
    torch.manual_seed(0)
    device = options.device
    config = class_conditional(options.architecture, options.image_size)
    generator = random_generator(config, "cpu").to(device, DTYPES[options.dtype])  # the same weights on every device
    condition = torch.randint(config.num_classes, (options.images,)).to(device)
    tokens = decode(generator, condition[:1])  # warms up
    reset_peak(device)
    seconds = []
    for _ in range(options.repeats):
        synchronize(device)
        begun = time.perf_counter()
        tokens = decode(generator, condition)
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return {"seconds": min(seconds), "peak_gib": peak_gib(device), "tokens": tokens.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llamagen-c2i-b", help="a class-conditional LlamaGen")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=32, help="generated at once")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="in bfloat16 equal tokens are counted, not required"
    )
    parser.add_argument("--json", type=Path, help="also write what is printed here")
    options = parser.parse_args()
    try:
        work = passes(class_conditional(options.architecture, options.image_size), options.images, options.dtype)
    except VarpiError as error:
        parser.error(str(error))
    rate = in_fresh_process(matmul_tflops, options.device, options.dtype)
    bandwidth = in_fresh_process(memory_terabytes, options.device, options.dtype)
    results = {
        name: in_fresh_process(measure, decode, options)
        for name, decode in (("cached", cached), ("recomputed", recompute))
    }
    ours, theirs = (torch.tensor(result.pop("tokens")) for result in results.values())
    equal = (ours == theirs).float().mean().item()
    if options.dtype == "float32":
        assert equal == 1, f"only {equal:.2%} of the greedy tokens agree"
    tflop = {name: sum(one.tflop for one in side) for name, side in work.items()}
    ideal = {name: sum(max(one.tflop / rate, one.terabytes / bandwidth) for one in side) for name, side in work.items()}
    content: dict[str, Any] = {
        "machine": machine(options.device),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "matmul_tflops": rate,
        "memory_terabytes": bandwidth,
        **{name: {**result, "tflop": tflop[name], "seconds_at_rates": ideal[name]} for name, result in results.items()},
        "speedup": results["recomputed"]["seconds"] / results["cached"]["seconds"],
        "speedup_predicted": ideal["recomputed"] / ideal["cached"],
        "speedup_of_operations": tflop["recomputed"] / tflop["cached"],
        "equal_tokens": equal,
    }
    _show(content)
    write_json(options.json, content)


def _show(content: dict[str, Any]) -> None:
    console = Console(width=120)
    title = "{architecture}, {image_size}x{image_size}, {images} images, {dtype}".format(**content["settings"])
    table = Table(title=f"{title}; {content['machine']['device']}")
    table.add_column("greedy generation")
    for column in ("s", "s at this machine's rates", "TFLOP", "peak GiB"):
        table.add_column(column, justify="right")
    for name in ("cached", "recomputed"):
        result = content[name]
        row = (result["seconds"], result["seconds_at_rates"], result["tflop"], result["peak_gib"])
        table.add_row(name, *(f"{value:.2f}" for value in row))
    console.print(table)
    console.print(
        f"the cache is {content['speedup']:.1f} times as fast; predicted {content['speedup_predicted']:.1f} from "
        f"{content['matmul_tflops']:.3g} TFLOP/s and {content['memory_terabytes']:.3g} TB/s measured here, "
        f"{content['speedup_of_operations']:.1f} by operations alone; {content['equal_tokens']:.2%} of tokens equal"
    )


if __name__ == "__main__":
    main()
