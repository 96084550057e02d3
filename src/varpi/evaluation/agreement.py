"""Class agreement: the share of samples in which a judge sees the class that was asked for.

Shapes: n samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from varpi.data.digits import digit_in
from varpi.networks.extractors import FeatureExtractor
from varpi.samples.reading import SampleSet

AGREEMENT = "class_agreement"


def classes_asked(record: Mapping[str, Any] | None, judge: FeatureExtractor) -> list[int] | None:
    """The class that each sample was to show; for digits also by the word in its prompt. None where that is not known.

    record: of sample.json. judge: one of `varpi.networks.judges.JUDGES`; classes that it does not have are not its own.
    """
    if record is None:
        return None
    asked: Sequence[int | None] = record.get("classes", ())
    if not asked and judge.name == "digits":
        asked = [digit_in(prompt) for prompt in record.get("prompts", ())]
    own = [label for label in asked if label is not None and 0 <= label < judge.streams["logits"]]
    return own if own and len(own) == len(asked) else None


def class_agreement(
    samples: SampleSet, asked: Sequence[int], judge: FeatureExtractor, batch_size: int
) -> tuple[float, dict[str, float]]:
    """The share of samples in which the judge sees the class of the (n,) `asked`: of all, and by class."""
    parts = [range(start, min(start + batch_size, samples.count)) for start in range(0, samples.count, batch_size)]
    seen = torch.cat([judge(batch.images)["logits"].argmax(dim=1).cpu() for batch in samples.batches(parts)])
    right = (seen == torch.tensor(asked)).double()
    by_class = {str(label): right[torch.tensor(asked) == label].mean().item() for label in sorted(set(asked))}
    return right.mean().item(), by_class
