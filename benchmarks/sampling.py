"""Cached generation beside recomputing the whole prefix at each token, in one run. Random weights.

Both sides decode greedily and must give the same tokens. The recomputing side is no straw man: it evaluates the output
layer at the last position only, and its attention skips the causal half where the kernel can. Two predictions stand
beside the measured factor: the ratio of operations; and that ratio times the ratio of the rates which this machine
reaches on linear layers, with as few rows as a cached step has (one per image) and with many. The more images, the
closer the two. Guidance is left out; it doubles the batch on both sides.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --architecture llamagen-c2i-xxl --image-size 384 --dtype bfloat16 --device cuda
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    DTYPES,
    class_conditional,
    in_fresh_process,
    machine,
    matmul_tflops,
    parse,
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


def count(config: LlamaGenConfig, images: int) -> dict[str, float]:
    """TFLOP of both sides, two operations per multiply-add; a query is counted with the keys that it sees."""
    assert config.ffn_dim is not None
    layers = config.n_layer * (4 * config.dim**2 + 3 * config.dim * config.ffn_dim)
    output = config.dim * config.vocab_size
    attention = 2 * config.n_layer * config.dim  # multiply-adds of one query with one key and its value
    lengths = range(1, config.grid**2 + 1)  # positions that the n-th token depends on, the condition being the first
    once = sum(layers + output + attention * n for n in lengths)
    again = sum(layers * n + output + attention * n * (n + 1) / 2 for n in lengths)
    return {"cached": 2e-12 * images * once, "recomputed": 2e-12 * images * again}


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
    options = parse(parser)
    try:
        tflop = count(class_conditional(options.architecture, options.image_size), options.images)
    except VarpiError as error:
        parser.error(str(error))
    rates = {
        "cached": in_fresh_process(matmul_tflops, options.device, options.dtype, options.images),
        "recomputed": in_fresh_process(matmul_tflops, options.device, options.dtype),
    }
    results = {
        name: in_fresh_process(measure, decode, options)
        for name, decode in (("cached", cached), ("recomputed", recompute))
    }
    ours, theirs = (torch.tensor(result.pop("tokens")) for result in results.values())
    equal = (ours == theirs).float().mean().item()
    if options.dtype == "float32":
        assert equal == 1, f"only {equal:.2%} of the greedy tokens agree"
    operations = tflop["recomputed"] / tflop["cached"]
    content: dict[str, Any] = {
        "machine": machine(options.device),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        **{name: {**results[name], "tflop": tflop[name], "linear_tflops": rates[name]} for name in results},
        "speedup": results["recomputed"]["seconds"] / results["cached"]["seconds"],
        "speedup_of_operations": operations,
        "speedup_predicted": operations * rates["cached"] / rates["recomputed"],
        "equal_tokens": equal,
    }
    _show(content)
    write_json(options.json, content)


def _show(content: dict[str, Any]) -> None:
    console = Console(width=120)
    title = "{architecture}, {image_size}x{image_size}, {images} images, {dtype}".format(**content["settings"])
    table = Table(title=f"{title}; {content['machine']['device']}")
    table.add_column("greedy generation")
    for column in ("s", "TFLOP", "TFLOP/s", "linear layers: TFLOP/s", "peak GiB"):
        table.add_column(column, justify="right")
    for name in ("cached", "recomputed"):
        side = content[name]
        row = side["seconds"], side["tflop"], side["tflop"] / side["seconds"], side["linear_tflops"], side["peak_gib"]
        table.add_row(name, *(f"{value:.3g}" for value in row))
    console.print(table)
    console.print(
        f"the cache is {content['speedup']:.1f} times as fast; predicted {content['speedup_predicted']:.1f} at these "
        f"rates, {content['speedup_of_operations']:.1f} by operations alone; {content['equal_tokens']:.2%} equal tokens"
    )


if __name__ == "__main__":
    main()
