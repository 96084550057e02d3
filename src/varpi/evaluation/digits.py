"""The evaluation of the embedded digits: free-running samples against held-out digits, seen by the judge.

Shapes: n images, D features of the judge.
"""

import statistics
from collections.abc import Mapping, Sequence

import torch

from varpi.errors import VarpiError
from varpi.evaluation.agreement import AGREEMENT
from varpi.evaluation.distances import Features, frechet_distance, precision_recall
from varpi.networks.convnet import SmallConvNet
from varpi.networks.judges import embed


def measure(
    samples: torch.Tensor, classes: torch.Tensor, judge: SmallConvNet, reference_features: Features
) -> dict[str, float]:
    """Measure one set of samples, as it would be after saving to 8-bit images.

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
        AGREEMENT: (seen == classes.cpu()).double().mean().item(),
    }


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
