"""Our sampler beside LlamaGen's own, from a checkout of it, in one run. Random weights, the same ones on every side.

Both generate class-conditional images greedily under guidance, as many at once. In float32 all tokens must be equal; in
bfloat16 the share of equal ones is printed, against LlamaGen's float32. Each side runs in a fresh process. On the CPU
the ratio is one of processor seconds, all threads together, which other work on the machine changes least.

    python benchmarks/llamagen.py --llamagen PATH
    python benchmarks/llamagen.py --llamagen PATH --architecture llamagen-c2i-xxl --image-size 384 --device cuda
"""

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    class_conditional,
    in_fresh_process,
    machine,
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
from varpi.generators import LlamaGen

REFERENCE = "llamagen-float32"
SIDES = [f"{side}-{dtype}" for dtype in DTYPES for side in ("llamagen", "varpi")]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by the clock and of the processor (the best of the repeats), peak GiB, and the tokens."""
    side, dtype = name.split("-")
    torch.manual_seed(0)
    device, size = options.device, options.images
    config = class_conditional(options.architecture, options.image_size)
    ours = random_generator(config, "cpu").eval()
    condition = torch.randint(config.num_classes, (size,)).to(device)
    if side == "varpi":
        ours.to(device, DTYPES[dtype]).reset_tables()

        def sample(condition: Tensor) -> Tensor:
            return varpi.generate(
                ours,
                condition,
                guidance_scale=options.guidance,
                greedy=True,
                batch_size=len(condition),
                graph=options.graph,
            )
    else:
        sample = _theirs(ours, options, DTYPES[dtype])
        del ours
    if device.startswith("cuda"):
        sample(condition)  # warms up
    reset_peak(device)
    seconds, processor, tokens = [], [], condition
    for _ in range(options.repeats):
        synchronize(device)
        begun, busy = time.perf_counter(), time.process_time()
        tokens = sample(condition)
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - busy)
    best = {"seconds": min(seconds), "processor": min(processor)}
    return {**best, "peak_gib": peak_gib(device), "tokens": tokens.tolist()}


def _theirs(ours: LlamaGen, options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """LlamaGen's transformer with the weights of `ours`, and its function `generate`."""
    sys.path.insert(0, str(options.llamagen))
    from autoregressive.models.generate import generate  # pyright: ignore[reportMissingImports]
    from autoregressive.models.gpt import ModelArgs, Transformer  # pyright: ignore[reportMissingImports]

    config = ours.config
    theirs = Transformer(
        ModelArgs(
            dim=config.dim,
            n_layer=config.n_layer,
            n_head=config.n_head,
            vocab_size=config.vocab_size,
            block_size=config.grid**2,
            num_classes=config.num_classes,
            cls_token_num=1,
            model_type="c2i",
        )
    )
    theirs.load_state_dict({ours.name_in_file(name): tensor for name, tensor in ours.state_dict().items()})
    theirs.to(options.device, dtype).eval()

    def sample(condition: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torch in a way that warns, at each token
            tokens = generate(
                theirs,
                condition,
                config.grid**2,
                cfg_scale=options.guidance,
                cfg_interval=-1,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                sample_logits=False,
            )
        return tokens.long()

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamagen", type=Path, help="a checkout of FoundationVision/LlamaGen; needed")
    parser.add_argument("--architecture", default="llamagen-c2i-b", help="a class-conditional LlamaGen")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=8, help="generated at once")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help=f"{REFERENCE} is always among them")
    parser.add_argument("--graph", action="store_true", help="ours by a CUDA graph")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parse(parser)
    try:
        class_conditional(options.architecture, options.image_size)
        if options.llamagen is None or not (options.llamagen / "autoregressive/models/generate.py").is_file():
            raise VarpiError(f"--llamagen: {options.llamagen} is no checkout of LlamaGen")
    except VarpiError as error:
        parser.error(str(error))
    names = [name for name in SIDES if name in {*options.sides, REFERENCE}]
    results = {name: in_fresh_process(measure, name, options) for name in names}
    clock = "processor" if options.device == "cpu" else "seconds"
    tokens = {name: torch.tensor(result.pop("tokens")) for name, result in results.items()}
    for name, result in results.items():
        result["equal_tokens"] = (tokens[name] == tokens[REFERENCE]).float().mean().item()
        result["speedup"] = results[REFERENCE][clock] / result[clock]
    if "varpi-float32" in results:
        assert results["varpi-float32"]["equal_tokens"] == 1, results["varpi-float32"]
    content: dict[str, Any] = {
        "machine": machine(options.device),
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "llamagen")},
        **results,
    }
    _show(content)
    write_json(options.json, content)


def _show(content: dict[str, Any]) -> None:
    title = "{architecture}, {image_size}x{image_size}, {images} images, guidance {guidance}".format(
        **content["settings"]
    )
    table = Table(title=f"{title}; {content['machine']['device']}, {content['machine']['threads']} threads")
    table.add_column("greedy generation")
    for column in ("s", "processor s", "peak GiB", "equal tokens", "LlamaGen in float32 takes"):
        table.add_column(column, justify="right")
    for name in SIDES:
        if (result := content.get(name)) is not None:
            row = [f"{result[key]:.2f}" for key in ("seconds", "processor", "peak_gib")]
            table.add_row(name, *row, f"{result['equal_tokens']:.2%}", f"{result['speedup']:.2f} times")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
