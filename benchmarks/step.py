"""One VA-π step, timed and weighed stage by stage, beside the naive step that it replaces. Random weights.

The shipped step (varpi.methods.va_pi under varpi.training's own Trainer) sends each image through the transformer once
and draws its G samples from that pass. The naive one, as in the released code, samples from one pass and then sends
each image G times through a forward and a backward pass. Both run here, one after the other, each in a fresh process;
everything but the transformer's part is the same code. Data loading and several processes are left out.

With `--authors PATH`, a checkout of the released code, its own step runs beside ours instead of the naive one
(released.py says how); with `--before PATH`, a checkout of varpi at another commit, that one's too. `--reward-dtype`
is the precision of our decoder and LPIPS; the correlation of the advantages with those of float32 is printed. On the
CPU ratios are of processor seconds, all threads together, which other work on the machine changes least.

    python benchmarks/step.py --small-vq --perceptual-weight 0          # GPT-B, 256x256, mostly the transformer
    python benchmarks/step.py --architecture llamagen-c2i-xxl --image-size 384 --images 128 --device cuda
    python benchmarks/step.py --images 1 --reward-dtype bfloat16 --dtype bfloat16 --authors PATH --before PATH
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    class_conditional,
    count_tflop,
    in_fresh_process,
    machine,
    matmul_tflops,
    parse,
    peak_gib,
    random_generator,
    random_lpips,
    reset_peak,
    synchronize,
    write_json,
)
from released import MODELS, check_checkout, measure_released
from rich.console import Console
from rich.table import Table

from varpi import objective
from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.generators import LlamaGen
from varpi.methods import Outcome
from varpi.methods.rewards import lower, pixel_rewards
from varpi.methods.va_pi import Rollout, Settings, VaPi
from varpi.recipe import Recipe, parse_recipe
from varpi.runtime.processes import find_world
from varpi.runtime.stages import Stages
from varpi.tokenizers import VQ, VQConfig
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress

STAGES = {
    "encode": "encode",
    "transformer": "forward",
    "sample": "sampling",
    "reward": "decode + reward",
    "loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer",
}


class Naive(VaPi):
    """The released code's step: one pass to sample from, then G copies of each image through the transformer."""

    def loss(self, batch: Batch, step: int, rollout: Rollout | None = None) -> Outcome:
        settings, copies = self.settings, self.settings.group_size
        targets, context, condition = self._teach(batch, step)
        with self.stages("transformer"), torch.no_grad():
            self.model.eval()
            logits = self.logits(self.model, context, condition)
        samples = self._sample(logits, batch, step)
        with self.stages("reward"):
            rewards = pixel_rewards(settings.reward, self.tokenizer, samples, batch.images, self.perceptual)
        advantages = objective.group_advantages(rewards.total, clip=settings.advantage_clip)
        with self.stages("loss"), torch.no_grad():
            old = objective.token_log_probs(logits, samples).flatten(0, 1)
        with self.stages("transformer"):
            self.model.train(settings.policy_mode == "train")
            context, condition = context.repeat_interleave(copies, 0), condition.repeat_interleave(copies, 0)
            logits = self.logits(self.model, context, condition)
        with self.stages("loss"):
            tokens = torch.stack([samples.flatten(0, 1), targets.repeat_interleave(copies, 0)], dim=1)
            log_probs = objective.token_log_probs(logits, tokens)
            policy, metrics = objective.policy_loss(
                log_probs[:, :1], old[:, None], advantages.flatten()[:, None], clip_range=settings.clip_range
            )
            loss = policy - settings.prior_weight * log_probs[:, 1].mean()
        return Outcome(loss, metrics)


class Meter(Stages):
    """Stages that also note the peak memory of each, and of what lies between them."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.device = device
        self.peaks: dict[str, float] = defaultdict(float)
        reset_peak(device)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.note("between")
        with super().__call__(name):
            yield
        self.note(name)

    def note(self, name: str) -> None:
        self.peaks[name] = max(self.peaks[name], peak_gib(self.device))
        reset_peak(self.device)


def measure(kind: type[VaPi], options: argparse.Namespace) -> dict[str, Any]:
    """Of the fastest step after the first, which warms up: seconds by stage. Of them all: peak GiB by stage."""
    torch.manual_seed(0)
    device = options.device
    config = class_conditional(options.architecture, options.image_size)
    recipe = _recipe(options, 1 if kind is VaPi else options.group_size)
    tokenizer, perceptual = _frozen(options, device)
    generator = random_generator(config, device)
    method = kind(
        generator,
        tokenizer,
        recipe.method,
        precision=recipe.training.precision,
        perceptual=perceptual,
        device=device,
    )
    trainer = Trainer(recipe, method, make_optimizer(generator, recipe.optimizer), find_world(device))
    batch = Batch(
        images=torch.rand(options.images, 3, options.image_size, options.image_size) * 2 - 1,
        condition=torch.randint(config.num_classes, (options.images,)),
        positions=torch.arange(options.images),
        indices=torch.arange(options.images),
        bad=0,
    )
    progress = Progress()

    def step(number: int) -> dict[str, float]:
        synchronize(device)
        begun, busy = time.perf_counter(), time.process_time()
        (metrics,) = trainer.updates(batch, number, progress)
        whole = {"step": time.perf_counter() - begun, "processor": time.process_time() - busy}
        return {name: metrics[f"seconds_{name}"] for name in STAGES} | whole

    step(0)
    meter = method.stages = Meter(device)
    steps = [step(number) for number in range(1, 1 + options.repeats)]
    meter.note("between")
    return {
        "seconds": min(steps, key=lambda seconds: seconds["step"]),
        "peak_gib": {**{name: meter.peaks[name] for name in STAGES}, "step": max(meter.peaks.values())},
    }


def _recipe(options: argparse.Namespace, copies: int) -> Recipe:
    """The defaults of VA-π. `copies` of each image share a micro-batch, so both steps have equally large passes."""
    precision, of_reward = ("bf16" if name == "bfloat16" else "fp32" for name in (options.dtype, options.reward_dtype))
    weight, chunk = options.perceptual_weight, options.decode_batch
    reward = {"perceptual_weight": weight, "decode_batch": chunk, "precision": of_reward}
    return parse_recipe(
        {
            "method": {"name": "va_pi", "group_size": options.group_size, "reward": reward},
            "generator": {"source": "random"},
            "tokenizer": {"source": "random"},
            "data": {"source": "random", "image_size": options.image_size},
            "optimizer": {"learning_rate": 1e-6},
            "training": {
                "steps": 1 + options.repeats,
                "batch_size": options.images,
                "micro_batch": max(1, (options.micro_batch or options.images) // copies),
                "precision": precision,
            },
        }
    )


def _frozen(options: argparse.Namespace, device: str) -> tuple[VQ, Any]:
    """VQ-16 and, unless its weight is 0, LPIPS on VGG16."""
    with torch.device(device):
        tokenizer = VQ(VQConfig(channels=32 if options.small_vq else 128)).requires_grad_(False).eval()
    return tokenizer, random_lpips(device) if options.perceptual_weight > 0 else None


def count(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """TFLOP by stage of both steps, counted from the modules themselves; the backward pass is twice the forward one."""
    tokenizer, perceptual = _frozen(options, "meta")
    with torch.device("meta"):
        model = LlamaGen(class_conditional(options.architecture, options.image_size))
        tokens, condition = torch.zeros(1, model.num_tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        image = torch.zeros(1, 3, options.image_size, options.image_size)
        forward = count_tflop(lambda: model.logits(tokens, condition))
        encode = count_tflop(lambda: tokenizer.encode(image))
        decode = count_tflop(lambda: tokenizer.decode(tokens))
        maps = count_tflop(lambda: perceptual.maps(image)) if perceptual is not None else 0.0
    images, group = options.images, options.group_size
    same = {"encode": images * encode, "reward": images * (group * decode + (group + 1) * maps)}
    shared = {**same, "transformer": images * forward, "backward": images * 2 * forward}
    naive = {**same, "transformer": images * (1 + group) * forward, "backward": images * group * 2 * forward}
    return {name: {**part, "step": sum(part.values())} for name, part in (("shared", shared), ("naive", naive))}


def measure_before(path: Path, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The step of another checkout of varpi, by that one's own benchmark: as `measure`."""
    own = {"dtype": dtype, "channels_last": False, "compile_decoder": False, "authors": None, "before": None}
    settings = {name: value for name, value in vars(options).items() if name != "json"} | own
    paths = [str(path / "benchmarks"), str(path / "src")]
    script = (
        f"import sys; sys.path[:0] = {paths!r}; import argparse, json, step; "
        f"print(json.dumps(step.measure(step.VaPi, argparse.Namespace(**{settings!r}))))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{path}: {ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def correlation(options: argparse.Namespace) -> float:
    """Of group advantages as scored here with those scored in float32, on random samples of random images."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, options.image_size, options.image_size, device=options.device) * 2 - 1
    scores = []
    for dtype in (options.reward_dtype, "float32"):
        torch.manual_seed(1)
        tokenizer, perceptual = _frozen(options, options.device)
        settings = _recipe(argparse.Namespace(**{**vars(options), "reward_dtype": dtype}), 1).method
        assert isinstance(settings, Settings)
        lower(settings.reward, tokenizer, perceptual)
        tokens = torch.randint(tokenizer.codebook_size, (2, options.group_size, (options.image_size // 16) ** 2))
        rewards = pixel_rewards(settings.reward, tokenizer, tokens.to(options.device), images, perceptual)
        scores.append(objective.group_advantages(rewards.total).flatten())
    return torch.corrcoef(torch.stack(scores))[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llamagen-c2i-b", help="a class-conditional LlamaGen")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=2, help="images of one step")
    parser.add_argument("--micro-batch", type=int, help="sequences of one transformer pass; all at once by default")
    parser.add_argument("--group-size", type=int, default=8, help="G, samples per image")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps, after one to warm up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="bfloat16 is autocast, the default on CUDA")
    parser.add_argument("--reward-dtype", choices=list(DTYPES), help="of our decoder and LPIPS; by default --dtype")
    parser.add_argument("--decode-batch", type=int, default=16, help="sequences decoded at once")
    parser.add_argument("--perceptual-weight", type=float, default=1.0, help="0 leaves LPIPS out")
    parser.add_argument("--small-vq", action="store_true", help="a tokenizer of a quarter of VQ-16's width")
    parser.add_argument("--authors", type=Path, help="a checkout of VA-π's released code, to run its step")
    parser.add_argument("--before", type=Path, help="a checkout of varpi at another commit, to run its step")
    options = parse(parser)
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    options.reward_dtype = options.reward_dtype or options.dtype
    try:
        tflop = count(options)
        if options.authors is not None:
            check_checkout(options.authors)
            if options.small_vq or options.perceptual_weight != 1 or options.architecture not in MODELS:
                raise VarpiError(f"--authors: the released step has {', '.join(MODELS)}, VQ-16 and LPIPS of weight 1")
    except VarpiError as error:
        parser.error(str(error))
    rate = in_fresh_process(matmul_tflops, options.device, options.dtype)
    results = {"shared": in_fresh_process(measure, VaPi, options)}
    if options.authors is None and options.before is None:
        results["naive"] = in_fresh_process(measure, Naive, options)
    if options.authors is not None:
        results["released"] = in_fresh_process(measure_released, options)
    if options.before is not None:
        for dtype in dict.fromkeys(("float32", options.dtype)):
            results[f"before-{dtype}"] = measure_before(options.before, dtype, options)
    clock = "processor" if options.device == "cpu" else "step"
    ours = results["shared"]["seconds"][clock]
    content: dict[str, Any] = {
        "machine": machine(options.device),
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "authors", "before")},
        "matmul_tflops": rate,
        **{name: {**result, "tflop": tflop.get(name, {})} for name, result in results.items()},
        "speedup": {name: result["seconds"][clock] / ours for name, result in results.items() if name != "shared"},
    }
    if options.reward_dtype != "float32":
        content["advantages_correlation"] = in_fresh_process(correlation, options)
    if "naive" in results:
        naive, shared = results["naive"], results["shared"]
        content["transformer_speedup"] = _transformer(naive["seconds"]) / _transformer(shared["seconds"])
        content["transformer_speedup_counted"] = _transformer(tflop["naive"]) / _transformer(tflop["shared"])
    _show(content, list(results))
    write_json(options.json, content)


def _transformer(stages: dict[str, float]) -> float:
    return stages["transformer"] + stages["backward"]


def _show(content: dict[str, Any], names: list[str]) -> None:
    settings, rate = content["settings"], content["matmul_tflops"]
    console = Console(width=140)
    title = "{architecture}, {image_size}x{image_size}, {images} images, G = {group_size}, {dtype}".format(**settings)
    table = Table(title=f"{title}; {content['machine']['device']}, {rate:.3g} TFLOP/s measured on a matrix product")
    table.add_column("stage")
    for name in names:
        counted = ("TFLOP", "share of rate") if content[name]["tflop"] else ()
        for column in (f"{name}: s", *counted, "peak GiB"):
            table.add_column(column, justify="right")
    for stage in (*STAGES, "step", "processor"):
        row = []
        for name in names:
            side = content[name]
            seconds, peak, tflop = side["seconds"].get(stage), side["peak_gib"].get(stage), side["tflop"].get(stage)
            row.append("" if seconds is None else f"{seconds:.3f}")
            if side["tflop"]:
                row += ["", ""] if tflop is None else [f"{tflop:.3f}", f"{tflop / seconds / rate:.0%}"]
            row.append("" if peak is None else f"{peak:.2f}")
        label = {"step": "whole step", "processor": "of the processor"}.get(stage) or STAGES[stage]
        table.add_row(label, *row, end_section=stage == "optimizer")
    console.print(table)
    for name, factor in content["speedup"].items():
        console.print(f"{name}: {factor:.2f} times the time of ours (shared)")
    if "advantages_correlation" in content:
        console.print(f"advantages: correlation with those in float32 {content['advantages_correlation']:.5f}")
    if "transformer_speedup" in content:
        console.print(
            f"transformer, forward and backward: {content['transformer_speedup']:.2f} times as fast as with every "
            f"image repeated {settings['group_size']} times; counted {content['transformer_speedup_counted']:.2f}"
        )


if __name__ == "__main__":
    main()
