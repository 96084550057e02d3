"""How a run would scale to many GPUs, on paper: stage times and bytes moved, and where the traffic takes longer.

A step of one GPU's share is reckoned as `benchmarks/reckon.py` does. To it comes what FSDP moves: for each micro-batch
every weight is gathered for the forward and again for the backward pass and its gradient is reduced, in fp32; the
frozen tokenizer is gathered to encode and for each micro-batch's decoding. Sharded over all processes (`all`), the
slowest link on the way, between nodes, bears all of it; sharded within nodes (`node`), it stays on the links inside,
and between nodes each GPU's part of the gradients is added up once a step. Two answers: with none of the traffic
hidden, and with all of it hidden behind computing as far as that reaches. Strong scaling keeps 128 images a step, weak
16 a GPU.

    python benchmarks/scaling.py
"""

import argparse
from dataclasses import replace
from typing import Any

from common import machine, parse, write_json
from reckon import CARDS, FAST, REACHED, rates_of

from varpi.recipe import load_recipe
from varpi.training.reckoning import Rates, Reckoning, StageWork, reckon

CARD = "H100 80 GB"
PER_NODE = 8
INSIDE = 450e9
"""Data sheet: bytes a second that a GPU sends within a node, NVLink 4."""
BETWEEN = 50e9
"""Data sheet: bytes a second that a GPU sends to other nodes, one port of 400 Gb/s each."""
MICRO_BATCH = 8
SIZES = (8, 16, 32, 64, 128, 256)


def share(recipe: str, images: int) -> Reckoning:
    """A step of so many images in one process."""
    settings = [*FAST, f"training.batch_size={images}", f"training.micro_batch={min(images, MICRO_BATCH)}"]
    return reckon(load_recipe(recipe, settings), cuda=True)


def seconds_computing(step: Reckoning, parts: int, rates: Rates) -> float:
    """Of a step whose optimizer updates one of so many parts."""
    update = step.work["optimizer"]
    part = StageWork({kind: count / parts for kind, count in update.flops.items()}, update.bytes / parts)
    return replace(step, work={**step.work, "optimizer": part}).seconds(rates)


def seconds_moving(weights: float, frozen: float, micro_batches: int, size: int, over: str) -> float:
    """Of a step's traffic. weights, frozen: bytes of the trained and the frozen parts, whole."""
    parts = size if over == "all" else PER_NODE
    gathered = micro_batches * 3 * weights + (1 + micro_batches) * frozen
    link = BETWEEN if parts > PER_NODE else INSIDE
    seconds = gathered * (parts - 1) / parts / (link * REACHED)
    if (copies := size // parts) > 1:
        seconds += 2 * weights / parts * (copies - 1) / copies / (BETWEEN * REACHED)
    return seconds


def rows(recipe: str) -> list[dict[str, Any]]:
    rates = rates_of(CARDS[CARD])
    found: dict[int, Reckoning] = {}
    table = []
    for kind in ("strong", "weak"):
        for size in SIZES:
            images = 128 // size if kind == "strong" else 16
            if not images:
                continue
            if images not in found:
                found[images] = share(recipe, images)
            step = found[images]
            weights, frozen = (step.standing[part] for part in ("trained weights", "tokenizer"))
            for over in ("all", "node") if size > PER_NODE else ("all",):
                computing = seconds_computing(step, size if over == "all" else PER_NODE, rates)
                moving = seconds_moving(weights, frozen, -(-images // MICRO_BATCH), size, over)
                table.append(
                    {
                        "scaling": kind,
                        "gpus": size,
                        "images_per_gpu": images,
                        "shard_over": over,
                        "computing": computing,
                        "moving": moving,
                        "images_per_second": [size * images / s for s in (computing + moving, max(computing, moving))],
                    }
                )
    for row in table:
        first = next(other for other in table if other["scaling"] == row["scaling"])
        rates_per_gpu = [[rate / each["gpus"] for rate in each["images_per_second"]] for each in (row, first)]
        row["efficiency"] = [rate / of_first for rate, of_first in zip(*rates_per_gpu, strict=True)]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llamagen-c2i-xxl", help="one that reckons without its weights")
    options = parse(parser)
    table = rows(options.recipe)
    print("| scaling | GPUs | images each | shard_over | computing, s | moving, s | images/s | efficiency |")
    print("|---|---:|---:|---|---:|---:|---|---|")
    for row in table:
        rate, efficiency = row["images_per_second"], row["efficiency"]
        print(
            f"| {row['scaling']} | {row['gpus']} | {row['images_per_gpu']} | {row['shard_over']} | "
            f"{row['computing']:.2f} | {row['moving']:.2f} | {rate[0]:.0f} to {rate[1]:.0f} | "
            f"{efficiency[0]:.0%} to {efficiency[1]:.0%} |"
        )
    assumed = {"card": CARD, **CARDS[CARD]._asdict(), "inside": INSIDE, "between": BETWEEN, "reached": REACHED}
    write_json(options.json, {"machine": machine("cpu"), "assumed": assumed, "rows": table})


if __name__ == "__main__":
    main()
