"""How long a checkpoint holds up training: written while training waits, and in the background. Random weights.

Both sides save the same generator and its AdamW state, in a fresh process each. In the background training waits for a
copy in main memory; the second number says when the rest is written, with the processor free for it.

    python benchmarks/checkpoint.py --architecture llamagen-c2i-b --image-size 256
    python benchmarks/checkpoint.py --device cuda
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import class_conditional, in_fresh_process, machine, parse, random_generator, synchronize, write_json
from rich.console import Console
from rich.table import Table

from varpi.recipe import parse_recipe
from varpi.runtime.processes import World
from varpi.training.optimizer import make_optimizer
from varpi.training.state import CheckpointWriter, Progress


def measure(background: bool, options: argparse.Namespace) -> dict[str, float]:
    """Of the fastest of the checkpoints: seconds that training waits, and until it is on disk. And its size in GiB."""
    torch.manual_seed(0)
    device = options.device
    generator = random_generator(class_conditional(options.architecture, options.image_size), device)
    recipe = parse_recipe(
        {
            "method": {"name": "next_token"},
            "generator": {"source": "random"},
            "tokenizer": {"source": "random"},
            "data": {"source": "random", "image_size": options.image_size},
            "optimizer": {"learning_rate": 1e-6},
            "training": {"steps": 1, "batch_size": 1},
        }
    )
    optimizer = make_optimizer(generator, recipe.optimizer)
    for parameter in generator.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    waits, wholes = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writer = CheckpointWriter(Path(folder), World(0, 1, device), keep=1, background=background)
        for step in range(1, options.repeats + 1):
            synchronize(device)
            begun = time.perf_counter()
            writer.save(generator, optimizer, Progress(step=step))
            waits.append(time.perf_counter() - begun)
            writer.finish()
            wholes.append(time.perf_counter() - begun)
        writer.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"waits": min(waits), "on_disk": min(wholes), "gib": size / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llamagen-c2i-xxl")
    parser.add_argument("--image-size", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=2, help="checkpoints; the fastest counts")
    parser.add_argument("--folder", type=Path, help="where they are written; by default the system's temporary folder")
    parser.add_argument("--device", default="cpu")
    options = parse(parser)
    results = {
        "while training waits": in_fresh_process(measure, False, options),
        "in the background": in_fresh_process(measure, True, options),
    }
    where = machine(options.device)
    table = Table(title=f"{options.architecture} {options.image_size}; {where['device']}")
    for column in ("written", "training waits, s", "on disk after, s", "GiB"):
        table.add_column(column, justify="right")
    for side, result in results.items():
        table.add_row(side, *(f"{result[name]:.2f}" for name in ("waits", "on_disk", "gib")))
    console = Console(width=100)
    console.print(table)
    plain, background = (result["waits"] for result in results.values())
    console.print(f"in the background training waits 1/{plain / background:.1f} of the time")
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "folder")}
    write_json(options.json, {"machine": where, "settings": settings, **results})


if __name__ == "__main__":
    main()
