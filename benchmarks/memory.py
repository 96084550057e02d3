"""What `varpi train --dry-run` reckons beside the peak that a run then has, for recipes of different kinds.

Each recipe is carried out for two steps by `varpi.training.train` in a fresh process; what its resident memory grew by
at its peak is what was measured. Weights and images are random: nothing is downloaded. On the CPU the peak is that of
the whole process, less what it had once everything was imported.

    python benchmarks/memory.py
    python benchmarks/memory.py --only gpt-b-256 --json benchmarks/results/memory.json
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    class_conditional,
    in_fresh_process,
    machine,
    parse,
    peak_gib,
    random_generator,
    reset_peak,
    write_json,
)
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models import vgg16

from varpi.data.classes import wordnet_ids
from varpi.generators import LlamaGenConfig
from varpi.recipe import Recipe, load_recipe
from varpi.runtime.memory import give_back_freed_memory
from varpi.tokenizers import VQ, VQConfig
from varpi.weights import save_generator, save_tokenizer

SHORT = ["training.steps=2", "validation=null"]
KINDS = {
    "digits": ["digits"],
    "digits-first-order": ["digits-best"],
    "cifar10": ["cifar10", "data.image_column=image", "data.split=train"],
    "cifar10-bf16-checkpointing": [
        "cifar10",
        "data.image_column=image",
        "data.split=train",
        "training.precision=bf16",
        "training.gradient_checkpointing=true",
    ],
    "gpt-b-256": [
        "llamagen-c2i-xxl",
        "generator.architecture=llamagen-c2i-b",
        "data.image_size=256",
        "data.workers=0",
        "method.group_size=4",
        "method.reward.decode_batch=4",
        "training.precision=fp32",
        "training.batch_size=4",
        "training.micro_batch=2",
    ],
    "gpt-b-256-lora": [
        "llamagen-c2i-xxl",
        "generator.architecture=llamagen-c2i-b",
        "data.image_size=256",
        "data.workers=0",
        "method.group_size=4",
        "method.reward.decode_batch=4",
        "training.batch_size=4",
        "training.micro_batch=2",
        "lora.rank=16",
    ],
}


def prepare(folder: Path, kind: str) -> list[str]:
    """Random weights and images for a kind of recipe; the settings that point to them."""
    settings = []
    torch.manual_seed(0)
    size = 32 if "cifar10" in kind else 256
    if "digits" not in kind:
        draws = np.random.default_rng(0)
        names = [f"c{i}" for i in range(10)] if "cifar10" in kind else wordnet_ids()[:10]
        settings += [f"data.classes={list(names)}"] if "cifar10" in kind else []
        for name in names:
            (folder / "images" / name).mkdir(parents=True)
            for i in range(4):
                pixels = draws.integers(256, size=(size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
        settings += [f"data.source={folder / 'images'}", f"method.reward.perceptual_weights={folder / 'vgg16.pth'}"]
        torch.save(
            {f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}, folder / "vgg16.pth"
        )
    if "gpt" in kind:
        config = class_conditional("llamagen-c2i-b", size)
        save_generator(random_generator(config, "cpu"), folder / "generator.safetensors")
        tokenizer = VQ(VQConfig())
        nn.init.normal_(tokenizer.quantize.embedding.weight)
        save_tokenizer(tokenizer, folder / "tokenizer.safetensors")
        settings += [
            f"generator.source={folder / 'generator.safetensors'}",
            f"tokenizer.source={folder / 'tokenizer.safetensors'}",
        ]
    return settings


def measure(folder: Path, name: str, settings: list[str], device: str) -> dict[str, float]:
    """GiB: what the process had before, and its peak while the recipe was carried out."""
    from varpi.training import train

    recipe = load_recipe(name, settings)
    train(_warm_up(folder), folder / "warm-up", device=device, show=False)
    give_back_freed_memory()
    reset_peak(device)
    before = 0.0 if device.startswith("cuda") else peak_gib(device)
    train(recipe, folder / "run", device=device, show=False)
    return {"before": before, "peak": peak_gib(device)}


def _warm_up(folder: Path) -> Recipe:
    """A run that takes next to nothing itself, and loads what any run takes: libraries and their state."""
    generator = LlamaGenConfig(dim=32, n_layer=1, n_head=2, vocab_size=32, grid=2, num_classes=10, ffn_dim=32)
    sizes: dict[str, Any] = {
        "downsample": 16,
        "channels": 8,
        "latent_channels": 8,
        "codebook_size": 32,
        "codebook_dim": 4,
    }
    tokenizer = VQConfig(**sizes, norm_groups=4, encoder_blocks=1, decoder_blocks=1)
    save_generator(random_generator(generator, "cpu"), folder / "small-generator.safetensors")
    save_tokenizer(VQ(tokenizer), folder / "small-tokenizer.safetensors")
    pair = [f"{part}.source={folder / f'small-{part}.safetensors'}" for part in ("generator", "tokenizer")]
    return load_recipe("digits", [*pair, *SHORT, "training.save_every=1", "training.batch_size=4"])


def reckoned(name: str, settings: list[str], cuda: bool) -> dict[str, Any]:
    from varpi.training.reckoning import reckon

    found = reckon(load_recipe(name, settings), cuda=cuda)
    return {
        "peak": found.peak / 2**30,
        "stage": found.peak_stage,
        "standing": {part: size / 2**30 for part, size in found.standing.items()},
        "working": {stage: size / 2**30 for stage, size in found.working.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(KINDS), help="one kind of recipe; may be repeated")
    parser.add_argument("--device", default="cpu")
    options = parse(parser)
    rows: dict[str, Any] = {}
    for kind in options.only or KINDS:
        name, *settings = KINDS[kind]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            settings = [*settings, *SHORT, *in_fresh_process(prepare, folder, kind)]
            guess = in_fresh_process(reckoned, name, settings, options.device.startswith("cuda"))
            found = in_fresh_process(measure, folder, name, settings, options.device)
        grown = found["peak"] - found["before"]
        rows[kind] = {"recipe": name, "reckoned": guess, "measured": {**found, "grown": grown}}
        rows[kind]["ratio"] = guess["peak"] / grown
        print(kind, rows[kind], flush=True)
    content = {"machine": machine(options.device), "recipes": rows}
    _show(rows)
    write_json(options.json, content)


def _show(rows: dict[str, Any]) -> None:
    table = Table("recipe", "reckoned GiB", "measured GiB", "reckoned / measured", "largest in")
    for kind, row in rows.items():
        guess, grown = row["reckoned"], row["measured"]["grown"]
        table.add_row(kind, f"{guess['peak']:.3f}", f"{grown:.3f}", f"{row['ratio']:.2f}", guess["stage"])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
