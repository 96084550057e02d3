"""What several seeds say: means, spreads over training seeds and over sampling seeds, paired differences, winners.

The values of a row stand by training seed, one a sampling seed: {0: [a, b], 1: [c, d]}. A row without training, such as
the base, has one entry, `UNTRAINED`, which pairs with every training seed.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Values = Mapping[str, Sequence[float]]
UNTRAINED = "-"


def summarize_seeds(values: Values) -> dict[str, Any]:
    """Mean of all; `spread`: standard deviation (unbiased) over training seeds of each one's mean over sampling seeds;
    `sampling_spread`: that over sampling seeds, averaged over training seeds. None where there is one seed only."""
    by_training = [statistics.fmean(several) for several in values.values()]
    by_sampling = [statistics.stdev(several) for several in values.values() if len(several) > 1]
    return {
        "mean": statistics.fmean(by_training),
        "spread": statistics.stdev(by_training) if len(by_training) > 1 else None,
        "sampling_spread": statistics.fmean(by_sampling) if by_sampling else None,
        "values": {seed: list(several) for seed, several in values.items()},
    }


def paired_difference(row: Values, other: Values) -> dict[str, Any]:
    """Row minus other: pairs of one training seed and one sampling seed, so that what both share cancels.

    `spread` is over training seeds; where neither row was trained, over sampling seeds. `sampling_spread` is over
    sampling seeds, of means over training seeds: what a row without training adds is the same in all pairs of a
    sampling seed, and shows there alone. None where there is one pair, or one sampling seed.
    """
    named = [seed for seed in {**row, **other} if seed != UNTRAINED]
    trained = [seed for seed in named if all(seed in values or UNTRAINED in values for values in (row, other))]
    pairs = [[a - b for a, b in zip(_of(row, seed), _of(other, seed), strict=True)] for seed in trained or [UNTRAINED]]
    differences = [statistics.fmean(pair) for pair in pairs] if trained else pairs[0]
    by_sampling = [statistics.fmean(several) for several in zip(*pairs, strict=True)]
    return {
        "mean": statistics.fmean(differences),
        "spread": statistics.stdev(differences) if len(differences) > 1 else None,
        "sampling_spread": statistics.stdev(by_sampling) if len(by_sampling) > 1 else None,
        "values": differences,
    }


def is_clear(difference: Mapping[str, Any]) -> bool:
    """Whether a paired difference is larger than both its spreads; without one over training seeds it is not."""
    spread = difference["spread"]
    return spread is not None and abs(difference["mean"]) > max(spread, difference["sampling_spread"] or 0.0)


def winner(rows: Mapping[str, Values], *, lower_is_better: bool) -> str | None:
    """The row that is better than every other by more than both spreads of their difference; None where none is.

    Rows of the very same values count as one. Without a spread, nothing wins.
    """
    means = {
        name: statistics.fmean(statistics.fmean(several) for several in row.values()) for name, row in rows.items()
    }
    best = (min if lower_is_better else max)(means, key=lambda name: means[name])
    found = [paired_difference(rows[best], row) for row in rows.values() if row != rows[best]]
    return best if found and all(map(is_clear, found)) else None


def _of(values: Values, seed: str) -> Sequence[float]:
    return values[seed] if seed in values else values[UNTRAINED]
