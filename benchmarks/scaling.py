"""Strong and weak scaling to 256 GPUs, on paper: from what a step computes and what its processes must move.

Nothing here is measured. Assumed: the seconds of a step in one process are those that benchmarks/reckon.py reckons for
an H100; nodes have 8 GPUs with NVLink between them and a 400 Gbit/s network card each, of both of which four fifths are
reached (--nvlink, --network); a ring moves (n - 1) / n of a tensor past each of n processes. FSDP gathers the fp32
weights for the forward and for the backward pass of every micro-batch and scatters its gradients; all of that overlaps
with the transformer's passes and with nothing else, so that a step takes the longer of the two, and then the rest. With
HSDP each node holds all weights, and the nodes sum their shares of the gradients over the network.

    python benchmarks/scaling.py
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from common import machine, parse, write_json
from reckon import CARDS, FAST, REACHED

from varpi.recipe import load_recipe
from varpi.training.reckoning import Rates, reckon

NODE = 8
PROCESSES = (1, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Step:
    """What a step takes in one process, and what its weights weigh."""

    transformer: float
    """Seconds per image of the passes that communication can hide behind."""
    rest: float
    """Seconds per image of all else but the optimizer."""
    optimizer: float
    """Seconds of the update of all weights, of which each process makes its share."""
    weights: float
    """Bytes, fp32."""


@dataclass(frozen=True)
class Links:
    node: float
    """Bytes a second and GPU, within a node."""
    network: float
    """Between nodes."""


def seconds(step: Step, links: Links, processes: int, images: int, micro: int, *, hsdp: bool) -> dict[str, float]:
    """Of one step of so many images in all; of that the transformer's passes and the communication."""
    own = images / processes
    passes = max(1.0, own / micro)
    over = min(processes, NODE) if hsdp else processes
    nodes = processes // over
    link = links.node if over <= NODE else links.network
    moved = 3 * step.weights * (over - 1) / over / link  # two gatherings and one scattering
    if nodes > 1:
        moved += 2 * step.weights / over * (nodes - 1) / nodes / links.network
    transformer, communication = step.transformer * own, moved * passes
    whole = max(transformer, communication) + step.rest * own + step.optimizer / over
    return {"step": whole, "transformer": transformer, "communication": communication}


def reckoned(micro: int) -> Step:
    """XXL at 384 on an H100, as benchmarks/reckon.py has it."""
    card = CARDS["H100 80 GB"]
    flops = {torch.bfloat16: card.tflops * REACHED * 1e12, torch.float32: card.fp32 * REACHED * 1e12}
    rates = Rates(flops, card.bandwidth * REACHED * 1e12)
    found = reckon(load_recipe("llamagen-c2i-xxl", [*FAST, f"training.micro_batch={micro}"]), cuda=True)
    images = 128
    passes = ("transformer", "backward")
    by_stage = {
        name: sum(count / rates.flops[kind] for kind, count in work.flops.items()) + work.bytes / rates.bytes
        for name, work in found.work.items()
    }
    rest = sum(value for name, value in by_stage.items() if name not in (*passes, "optimizer"))
    return Step(
        sum(by_stage[name] for name in passes) / images,
        rest / images,
        by_stage["optimizer"],
        found.standing["trained weights"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="of a step, strong scaling")
    parser.add_argument("--images-each", type=int, default=16, help="of a step and process, weak scaling")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--nvlink", type=float, default=450 * REACHED, help="GB/s and GPU, one way")
    parser.add_argument("--network", type=float, default=50 * REACHED, help="GB/s and GPU, one way")
    options = parse(parser)
    step, links = reckoned(options.micro_batch), Links(options.nvlink * 1e9, options.network * 1e9)
    print(
        f"assumed: per image {step.transformer * 1e3:.1f} ms of transformer and {step.rest * 1e3:.1f} ms of all else, "
        f"{step.optimizer * 1e3:.0f} ms of optimizer a step, {step.weights / 2**30:.2f} GiB of weights; "
        f"{links.node / 1e9:.0f} GB/s within a node, {links.network / 1e9:.0f} between\n"
    )
    rows: list[dict[str, Any]] = []
    for scaling in ("strong", "weak"):
        print(
            f"| GPUs | images | {scaling}, FSDP: s a step | efficiency | HSDP: s a step | efficiency | "
            "communication wins |"
        )
        print("|---:|---:|---:|---:|---:|---:|---|")
        base = None
        for processes in PROCESSES:
            images = options.images if scaling == "strong" else options.images_each * processes
            if images < processes:
                continue
            both = {
                name: seconds(step, links, processes, images, options.micro_batch, hsdp=name == "HSDP")
                for name in ("FSDP", "HSDP")
            }
            rate = {name: images / found["step"] / processes for name, found in both.items()}
            base = base or rate["FSDP"]
            wins = [name for name, found in both.items() if found["communication"] > found["transformer"]]
            rows.append({"scaling": scaling, "processes": processes, "images": images, **both, "wins": wins})
            cells = [f"{both[name]['step']:.2f} | {rate[name] / base:.0%}" for name in both]
            print(f"| {processes} | {images} | {' | '.join(cells)} | {', '.join(wins) or 'nowhere'} |")
        print()
    write_json(options.json, {"machine": machine("cpu"), "assumed": {**vars(step), **vars(links)}, "rows": rows})


if __name__ == "__main__":
    main()
