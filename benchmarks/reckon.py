"""What the large recipes would take on cards that are not here: memory and minutes, reckoned as `--dry-run` does.

The memory is counted from the recipes' own step on tensors without numbers. The minutes are that step's matrix products
at four fifths of a card's data-sheet rate, dense and in bf16, and then the traffic of all other operations at four
fifths of its bandwidth: assumptions (CARDS), where `varpi train RECIPE --dry-run` measures the card it runs on. Eager
operations, nothing compiled or overlapped.

    python benchmarks/reckon.py                     # prints the table of the README
"""

import argparse
from typing import Any, NamedTuple

import torch
from common import machine, parse, write_json

from varpi.recipe import load_recipe
from varpi.training.reckoning import Rates, reckon, room_of


class Card(NamedTuple):
    gib: int
    tflops: float
    """Data sheet: dense bf16, TFLOP/s."""
    fp32: float
    """Data sheet: fp32 without tensor cores."""
    bandwidth: float
    """Data sheet: TB/s."""


CARDS = {
    "H100 80 GB": Card(80, 989, 67, 3.35),
    "A100 80 GB": Card(80, 312, 19.5, 2.04),
    "A100 40 GB": Card(40, 312, 19.5, 1.56),
    "RTX 4090 24 GB": Card(24, 165, 82.6, 1.01),
}
REACHED = 0.8
"""Of the data sheet."""
FAST = ["method.reward.precision=bf16", "method.reward.decode_batch=32"]
CHECKPOINTED = ["training.gradient_checkpointing=true"]
JANUS = ["generator.architecture=janus-pro-7b", "tokenizer.architecture=janus-pro-7b", "generator.source=Janus-Pro-7B"]
CASES: list[tuple[str, str, str, list[str]]] = [
    ("XXL, fp32 AdamW", "H100 80 GB", "llamagen-c2i-xxl", [*FAST, "training.micro_batch=8"]),
    ("XXL, fp32 AdamW", "A100 80 GB", "llamagen-c2i-xxl", [*FAST, "training.micro_batch=8"]),
    (
        "XXL, bf16 states",
        "A100 40 GB",
        "llamagen-c2i-xxl",
        [*FAST, *CHECKPOINTED, "training.micro_batch=8", "optimizer.state_precision=bf16"],
    ),
    ("XL, fp32 AdamW", "H100 80 GB", "llamagen-c2i-xl", [*FAST, "training.micro_batch=8"]),
    ("XL, LoRA", "RTX 4090 24 GB", "llamagen-c2i-xl", [*FAST, *CHECKPOINTED, "training.micro_batch=8", "lora.rank=16"]),
    (
        "Janus-Pro-7B, LoRA",
        "H100 80 GB",
        "janus-pro-1b",
        [*FAST, *JANUS, "tokenizer.source=Janus-Pro-7B", "training.micro_batch=8", "lora.rank=16"],
    ),
]


def rates_of(card: Card) -> Rates:
    """What is assumed to be reached of a card's data sheet."""
    flops = {torch.bfloat16: card.tflops * REACHED * 1e12, torch.float32: card.fp32 * REACHED * 1e12}
    return Rates(flops, card.bandwidth * REACHED * 1e12)


def case(card: Card, recipe: str, settings: list[str]) -> dict[str, Any]:
    """GiB needed and there, and minutes of 100 steps of 128 images."""
    found = reckon(load_recipe(recipe, [*settings, "training.batch_size=128", "training.steps=100"]), cuda=True)
    rates = rates_of(card)
    return {
        "needed_gib": found.peak / 2**30,
        "room_gib": room_of("cpu", card.gib).tensors / 2**30,
        "standing_gib": sum(found.standing.values()) / 2**30,
        "peak_stage": found.peak_stage,
        "tflop": found.tflop,
        "seconds": found.seconds(rates),
        "minutes_of_100_steps": found.seconds(rates) * 100 / 60,
    }


def main() -> None:
    options = parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    print("| model at 384 | card | settings | GiB needed | there for tensors | minutes, 100 steps of 128 images |")
    print("|---|---|---|---:|---:|---:|")
    rows = []
    for name, card, recipe, settings in CASES:
        row = case(CARDS[card], recipe, settings)
        rows.append({"model": name, "card": card, "recipe": recipe, "settings": settings, **row})
        shown = ", ".join(setting for setting in settings if "source" not in setting and "architecture" not in setting)
        print(
            f"| {name} | {card} | `{shown}` | {row['needed_gib']:.1f} | {row['room_gib']:.1f} | "
            f"{row['minutes_of_100_steps']:.1f} |",
            flush=True,
        )
    cards = {name: card._asdict() for name, card in CARDS.items()}
    write_json(
        options.json, {"machine": machine("cpu"), "assumed": {"cards": cards, "reached": REACHED}, "cases": rows}
    )


if __name__ == "__main__":
    main()
