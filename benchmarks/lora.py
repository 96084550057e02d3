"""One VA-π step of Janus-Pro by low-rank adapters beside the same step of all weights: memory and time. Random weights.

Both sides run in a fresh process each, through varpi's own method and Trainer: bf16, gradient checkpointing, frozen
weights held in bf16 on the adapters' side and fp32 master weights on the other. `--sides lora` leaves out the one that
may not fit. Prints what the memory should be, by arithmetic, beside what it was.

    python benchmarks/lora.py --small                                    # on a CPU, in a minute
    python benchmarks/lora.py --architecture janus-pro-7b --sides lora --device cuda
"""

import argparse
import time
from typing import Any

import torch
from common import in_fresh_process, machine, parse, peak_gib, random_lpips, reset_peak, synchronize, write_json
from rich.console import Console
from rich.table import Table
from torch import nn

from varpi.data import Batch
from varpi.generators.janus import FAMILY, Janus
from varpi.generators.janus_files import config_for
from varpi.methods.va_pi import VaPi
from varpi.recipe import parse_recipe
from varpi.runtime.processes import World
from varpi.tokenizers import VQ, VQConfig
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights.lora import add_adapters

IMAGE_SIZE = 384
GIB = 2**30


def random_janus(options: argparse.Namespace, dtype: torch.dtype) -> Janus:
    """The architecture with random weights of this dtype."""
    config: Any = config_for(options.architecture)
    if options.small:
        text = config.text_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 128, 256, 2
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 4, 32
        config.vision_config.num_hidden_layers = 1
        config.vision_config.projection_dim = config.vq_config.projection_dim = 128
        config.vq_config.image_token_embed_dim, config.vq_config.base_channels = 128, 32
    with torch.device("meta"):
        generator = Janus(config, ids={"bos_token_id": 0, "boi_token_id": 1, "pad_token_id": 2})
    generator.to(dtype).to_empty(device=options.device)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.02)
    generator.reset_tables()
    return generator


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Of the fastest step after the first: seconds. Of all: peak GiB. And how many weights there are, and learn."""
    torch.manual_seed(0)
    device = options.device
    generator = random_janus(options, torch.bfloat16 if side == "lora" else torch.float32)
    weights = sum(p.numel() for p in generator.parameters())
    if side == "lora":
        add_adapters(generator, rank=options.rank, alpha=2.0 * options.rank)
    generator.gradient_checkpointing = True
    with torch.device(device):
        tokenizer = VQ(VQConfig(channels=32 if options.small else 128)).requires_grad_(False).eval()
    perceptual = random_lpips(device) if options.perceptual_weight > 0 else None
    recipe = parse_recipe(
        {
            "method": {
                "name": "va_pi",
                "group_size": options.group_size,
                "condition_drop": 0.0,
                "reward": {"perceptual_weight": options.perceptual_weight, "decode_batch": options.decode_batch},
            },
            "generator": {"source": "random"},
            "tokenizer": {"source": "random"},
            "data": {"source": "random", "image_size": IMAGE_SIZE},
            "optimizer": {"learning_rate": 1e-6},
            "training": {
                "steps": 1 + options.repeats,
                "batch_size": options.images,
                "micro_batch": min(options.micro_batch, options.images),
                "precision": "bf16",
            },
        }
    )
    method = VaPi(
        generator,
        tokenizer,
        recipe.method,
        precision="bf16",
        perceptual=perceptual,
        device=device,
    )
    trainer = Trainer(recipe, method, make_optimizer(generator, recipe.optimizer), World(0, 1, device))
    prompts: Any = torch.randint(3, 1000, (options.images, options.prompt_tokens)).tolist()
    batch = Batch(
        images=torch.rand(options.images, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1,
        condition=prompts,
        positions=torch.arange(options.images),
        indices=torch.arange(options.images),
        bad=0,
    )
    progress, seconds = Progress(), []
    reset_peak(device)
    for number in range(1 + options.repeats):
        synchronize(device)
        begun = time.perf_counter()
        list(trainer.updates(batch, number, progress))
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    trainable = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    return {"seconds": min(seconds[1:]), "peak_gib": peak_gib(device), "weights": weights, "trainable": trainable}


def counted_gib(side: str, result: dict[str, float]) -> float:
    """Of the generator alone, without activations: frozen weights in bf16 (2 bytes) or fp32 (4 bytes), and of every
    weight that learns itself, its gradient and AdamW's two moments in fp32 (16 bytes)."""
    if side == "lora":
        return (2 * result["weights"] + 16 * result["trainable"]) / GIB
    return (4 * (result["weights"] - result["trainable"]) + 16 * result["trainable"]) / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="janus-pro-1b", choices=FAMILY.architectures)
    parser.add_argument("--small", action="store_true", help="two narrow layers and a small tokenizer, for a CPU")
    parser.add_argument("--sides", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--images", type=int, default=4, help="images of one step")
    parser.add_argument("--micro-batch", type=int, default=2, help="images of one transformer pass")
    parser.add_argument("--group-size", type=int, default=8, help="G, samples per image")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--decode-batch", type=int, default=16, help="sequences decoded at once")
    parser.add_argument("--perceptual-weight", type=float, default=1.0, help="0 leaves LPIPS out")
    parser.add_argument("--repeats", type=int, default=2, help="measured steps, after one to warm up")
    parser.add_argument("--device", default="cpu")
    options = parse(parser)
    results = {side: in_fresh_process(measure, side, options) for side in options.sides}
    for side, result in results.items():
        result["counted_gib"] = counted_gib(side, result)
    where = machine(options.device)
    table = Table(title=f"{options.architecture}{', small' if options.small else ''}; {where['device']}")
    for column in ("side", "weights, M", "that learn, M", "counted GiB", "peak GiB", "s per step"):
        table.add_column(column, justify="right")
    for side, result in results.items():
        millions = [f"{result[name] / 1e6:.1f}" for name in ("weights", "trainable")]
        table.add_row(side, *millions, *(f"{result[name]:.2f}" for name in ("counted_gib", "peak_gib", "seconds")))
    console = Console(width=100)
    console.print(table)
    console.print("counted: the generator's weights, gradients and moments, without activations and the tokenizer")
    if len(results) == 2:
        memory = results["full"]["peak_gib"] / results["lora"]["peak_gib"]
        console.print(f"adapters: {memory:.2f} times less memory at the peak")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"machine": where, "settings": settings, **results})


if __name__ == "__main__":
    main()
