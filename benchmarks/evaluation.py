"""Measuring images with Inception beside torch-fidelity's own command line, on the same files in one run.

Both sides are whole processes, from the start of Python to the numbers: FID, Inception Score, precision, recall and KID
of a folder of PNG files against another, and the numbers must agree. Beside them, by batch size and precision, what
each stage of ours does alone: reading PNG and .npz files, the network, the statistics, the distances. The last table is
the drift of FID in bfloat16. Weights and images are random unless they are given; the drift of the published weights on
real images is what counts, so give those where there are any.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --weights weights-inception-2015-12-05-6726825d.pth --samples out --reference val \\
        --batch-size 64 --batch-size 256 --workers 8 --device cuda
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import in_fresh_process, machine, parse, synchronize, write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from varpi.evaluation.distances import kernel_distance, precision_recall
from varpi.evaluation.distribution import DistributionSettings, evaluate_distribution
from varpi.evaluation.reference import open_reference
from varpi.evaluation.statistics import frechet, moments
from varpi.networks.extractors import FeatureExtractor
from varpi.networks.loading import PRECISIONS, load_extractor
from varpi.samples.images import save_npz, save_png
from varpi.samples.reading import image_files, open_samples

NAMES = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
    "kid": "kernel_inception_distance_mean",
}
"""Of a metric, and what torch-fidelity calls it."""


class Unfilled(FeatureExtractorInceptionV3):
    def load_state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
        """Keep the weights of the constructor."""


def random_weights(path: Path) -> None:
    """A file as torch-fidelity's, with random weights that keep the signal alive through all layers."""
    torch.manual_seed(0)
    torch.save({}, path)
    network = Unfilled("inception", ["2048"], feature_extractor_weights_path=str(path))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)


def random_images(folder: Path, count: int, size: int, seed: int) -> None:
    """Smooth colours as PNG files: on plain noise a random network sees the same in every image."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        image = functional.interpolate(coarse, size, mode="bicubic")[0] + torch.rand(3, size, size) / 16
        save_png(folder / f"{i:05d}.png", (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def settings_for(options: argparse.Namespace) -> DistributionSettings:
    """The defaults, as far as so few images allow; equal splits, since the two sides round unequal ones otherwise."""
    samples, reference = (len(image_files(folder)) for folder in (options.samples, options.reference))
    splits = max(splits for splits in range(1, 11) if samples % splits == 0)
    return DistributionSettings(inception_score_splits=splits, kid_subset_size=min(1000, samples, reference))


def ours(options: argparse.Namespace, batch_size: int, precision: str) -> dict[str, float]:
    """The metrics, from the files."""
    result = evaluate_distribution(
        open_samples(options.samples),
        open_reference(options.reference),
        extractor=load_extractor("inception", weights=options.weights, device=options.device, precision=precision),
        metrics=("fid", "is", "precision", "recall", "kid"),
        settings=settings_for(options),
        batch_size=batch_size,
        workers=options.workers,
        device=options.device,
    )
    assert result is not None
    return dict(result.metrics)


def theirs(options: argparse.Namespace, batch_size: int) -> dict[str, float]:
    """The same by torch-fidelity's command line."""
    settings = settings_for(options)
    command = [
        sys.executable,
        "-m",
        "torch_fidelity.fidelity",
        "--fid",
        "--isc",
        "--kid",
        "--prc",
        "--json",
        "--silent",
    ]
    command += ["--feature-extractor", "inception-v3-compat", "--no-cache", "--no-samples-shuffle"]
    command += ["--samples-find-deep", "--feature-extractor-weights-path", str(options.weights)]
    command += ["--isc-splits", str(settings.inception_score_splits)]
    command += ["--kid-subset-size", str(settings.kid_subset_size), "--batch-size", str(batch_size)]
    command += ["--input1", str(options.samples), "--input2", str(options.reference)]
    command += ["--gpu", options.device.partition(":")[2] or "0"] if options.device.startswith("cuda") else ["--cpu"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"torch-fidelity failed:\n{finished.stderr}")
    found = json.loads(finished.stdout[finished.stdout.index("{") :])
    return {name: found[their_name] for name, their_name in NAMES.items()}


def stages(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, and where it applies images per second, of each stage alone."""
    rows: list[dict[str, Any]] = []

    def measure(stage: str, work: Callable[[], object], images: int | None = None, **settings: Any) -> None:
        work()  # warms up
        seconds = []
        for _ in range(options.repeats):
            begun = time.perf_counter()
            work()
            synchronize(options.device)
            seconds.append(time.perf_counter() - begun)
        rate = {} if images is None else {"images_per_second": images / min(seconds)}
        rows.append({"stage": stage, **settings, "seconds": min(seconds), **rate})

    for batch_size in options.batch_size:
        _measure_streaming(measure, options, batch_size)
    count = options.vectors
    made, real = (torch.randn(count, 2048, generator=torch.Generator().manual_seed(i)).numpy() for i in (0, 1))
    measure(f"mean and covariance of {count:,}", lambda: moments(made), count)
    both = moments(made), moments(real)
    measure("Fréchet distance", lambda: frechet(*both))
    for dtype in (torch.float64, torch.float32):
        measure(
            f"precision and recall, {count:,} a side",
            lambda dtype=dtype: precision_recall(real, made, device=options.device, dtype=dtype),
            2 * count,
            precision=str(dtype).removeprefix("torch."),
        )
    size = min(1000, count)
    measure(
        f"KID, 10 subsets of {size:,}",
        lambda: kernel_distance(made, real, subsets=10, subset_size=size, device=options.device),
    )
    return rows


def _measure_streaming(measure: Callable[..., None], options: argparse.Namespace, batch_size: int) -> None:
    samples = open_samples(options.samples)
    count = samples.count
    ranges = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    held = torch.cat([batch.images for batch in samples.batches(ranges)])
    with tempfile.TemporaryDirectory() as folder:
        save_npz(Path(folder, "samples.npz"), held.permute(0, 2, 3, 1).contiguous().numpy())
        packed = open_samples(Path(folder, "samples.npz"))
        measure("read and hash .npz", lambda: list(packed.batches(ranges)), count, batch_size=batch_size)
    reading = f"read and hash image files, {options.workers} workers"
    measure(reading, lambda: list(samples.batches(ranges, options.workers)), count, batch_size=batch_size)
    for precision in PRECISIONS:
        network = load_extractor("inception", weights=options.weights, device=options.device, precision=precision)

        def see(network: FeatureExtractor = network) -> None:
            for batch in held.split(batch_size):
                network(batch)

        measure("network", see, count, batch_size=batch_size, precision=precision)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begun, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, help="folder of images (default: random ones)")
    parser.add_argument("--reference", type=Path, help="folder of images (default: random ones)")
    parser.add_argument("--weights", type=Path, help="Inception's weights (default: random ones)")
    parser.add_argument("--count", type=int, default=64, help="random images a side (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=256, help="of random images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, action="append", help="may be repeated (default: 16 and 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    parser.add_argument("--vectors", type=int, default=1000, help="of the distances alone (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="of each stage; the best counts (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    options = parse(parser)
    options.batch_size = options.batch_size or [16, 64]
    if (options.samples is None) != (options.reference is None):
        parser.error("--samples and --reference belong together")
    with tempfile.TemporaryDirectory() as folder:
        if options.weights is None:
            options.weights = Path(folder, "random.pth")
            random_weights(options.weights)
        if options.samples is None:
            options.samples, options.reference = Path(folder, "samples"), Path(folder, "reference")
            for seed, images in enumerate((options.samples, options.reference)):
                random_images(images, options.count, options.image_size, seed)
        content = measure_all(options)
    _show(content)
    write_json(options.json, content)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    seen = sum(len(image_files(folder)) for folder in (options.samples, options.reference))
    whole = []
    for batch_size in options.batch_size:
        base, expected = timed(theirs, options, batch_size)
        sides = {"torch-fidelity": (base, expected)}
        for precision in PRECISIONS:
            sides[f"varpi, {precision}"] = timed(in_fresh_process, ours, options, batch_size, precision)
        for name, value in sides["varpi, fp32"][1].items():
            assert math.isclose(value, expected[name], rel_tol=1e-3, abs_tol=1e-5), (name, value, expected[name])
        for side, (seconds, metrics) in sides.items():
            numbers = {"seconds": seconds, "images_per_second": seen / seconds, "times_as_fast": base / seconds}
            whole.append({"side": side, "batch_size": batch_size, **numbers, "metrics": metrics})
    exact, half = (next(row["metrics"] for row in whole if row["side"].endswith(name)) for name in PRECISIONS)
    return {
        "machine": machine(options.device),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "images": seen,
        "whole": whole,
        "drift_of_bf16": {name: {"fp32": exact[name], "bf16": half[name]} for name in exact},
        "stages": in_fresh_process(stages, options),
    }


def _show(content: dict[str, Any]) -> None:
    console = Console(width=120)
    machine = content["machine"]
    table = Table(
        title=f"{content['images']} image files to numbers; {machine['device']}, {machine['threads']} threads"
    )
    for column in ("whole process", "batch size", "s", "images/s", "times as fast"):
        table.add_column(column, justify="left" if column == "whole process" else "right")
    for row in content["whole"]:
        numbers = f"{row['seconds']:.1f}", f"{row['images_per_second']:.2f}", f"{row['times_as_fast']:.2f}"
        table.add_row(row["side"], str(row["batch_size"]), *numbers)
    console.print(table)
    table = Table(title="stages alone")
    for column in ("stage", "batch size", "precision", "s", "images/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in content["stages"]:
        settings = (str(row.get(name, "")) for name in ("batch_size", "precision"))
        rate = f"{row['images_per_second']:,.1f}" if "images_per_second" in row else ""
        table.add_row(row["stage"], *settings, f"{row['seconds']:.3g}", rate)
    console.print(table)
    table = Table(title="drift of bf16")
    for column in ("metric", "fp32", "bf16", "relative"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, values in content["drift_of_bf16"].items():
        exact, half = values["fp32"], values["bf16"]
        relative = f"{(half - exact) / abs(exact):+.2e}" if exact else ""
        table.add_row(name, f"{exact:.6g}", f"{half:.6g}", relative)
    console.print(table)


if __name__ == "__main__":
    main()
