"""The evaluation of the embedded digits: free-running samples against held-out digits, seen by the judge.

Shapes: n images, D features of the judge.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from varpi.data import open_dataset
from varpi.data.digits import digit_in
from varpi.errors import VarpiError
from varpi.evaluation.distances import Features, frechet_distance, precision_recall
from varpi.evaluation.images import from_uint8, read_folder, read_npz
from varpi.evaluation.judge import embed, load_judge
from varpi.objective.features import SmallConvNet


def measure(
    samples: torch.Tensor, classes: torch.Tensor, judge: SmallConvNet, reference_features: Features
) -> dict[str, float]:
    """Judge one set of samples, as it would be after saving to 8-bit images.

    samples (n,3,32,32) in [-1,1]; classes (n,), what was asked; reference_features (m,D) = `embed` of real images.
    Returns frechet_distance, precision, recall, and class_agreement: the share of samples in which the judge sees the
    class asked for. Raises VarpiError when samples and classes differ in number, and as `embed` and the distances do.
    """
    if classes.shape != (len(samples),):
        raise VarpiError(
            f"{len(samples)} samples need as many classes, shape ({len(samples)},); got {tuple(classes.shape)}"
        )
    features, seen = embed(judge, samples)
    precision, recall = precision_recall(reference_features, features)
    return {
        "frechet_distance": frechet_distance(reference_features, features),
        "precision": precision,
        "recall": recall,
        "class_agreement": (seen == classes.cpu()).double().mean().item(),
    }


def evaluate_files(path: Path, split: str = "test") -> dict[str, float]:
    """Measure saved digit images: a directory of `varpi sample`, a folder of images, or an ADM-style `.npz`.

    Against the digits of `split`. class_agreement needs the classes, or prompts that name one digit each, which only
    `varpi sample` records, and is left out without them.
    """
    record = path / "sample.json"
    if path.is_dir():
        images = read_npz(path / "samples.npz") if (path / "samples.npz").is_file() else read_folder(path)
    else:
        images = read_npz(path)
    if images.shape[1:3] != (32, 32):
        raise VarpiError(f"{path}: its images are {images.shape[2]}x{images.shape[1]}; the judge knows 32x32 digits")
    judge = load_judge()
    digits = open_dataset("digits", image_size=32, split=split)
    reference, _ = embed(judge, torch.stack([digits[i].image for i in range(len(digits))]))
    samples = from_uint8(images)
    asked = _digits_asked(json.loads(record.read_text())) if record.is_file() else None
    known = asked is not None
    classes = torch.tensor(asked) if known else torch.zeros(len(samples))
    numbers = measure(samples, classes, judge, reference)
    return numbers if known else {name: value for name, value in numbers.items() if name != "class_agreement"}


def _digits_asked(record: Mapping[str, Any]) -> list[int] | None:
    """The class of each sample, as asked for by number or by word."""
    if "classes" in record:
        return record["classes"]
    named = [digit_in(prompt) for prompt in record["prompts"]]
    return None if None in named else [digit for digit in named if digit is not None]


def summarize(measurements: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Mean and unbiased standard deviation over sampling seeds: {metric: [mean, std]}, from one `measure` a seed.

    Raises VarpiError for fewer than two measurements, which have no spread, or ones of different metrics.
    """
    if len(measurements) < 2:
        raise VarpiError(f"a spread needs at least 2 sampling seeds, got {len(measurements)}; add evaluation seeds")
    names = list(measurements[0])
    if any(set(measurement) != set(names) for measurement in measurements):
        found = sorted({name for measurement in measurements for name in measurement})
        raise VarpiError(
            f"the measurements hold different metrics (in all: {', '.join(found)}); measure each seed alike"
        )
    columns = {name: [measurement[name] for measurement in measurements] for name in names}
    return {name: [statistics.fmean(values), statistics.stdev(values)] for name, values in columns.items()}
