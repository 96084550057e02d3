"""What samples are measured against: images, statistics that were computed from some, or both."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from varpi.data import open_dataset
from varpi.errors import VarpiError
from varpi.evaluation.statistics import Moments
from varpi.runtime.numpy_files import array_names, open_npz, read_arrays
from varpi.runtime.tensors import sha256_of
from varpi.samples.reading import DatasetImages, NpzImages, SampleSet, open_samples

_MOST_BYTES = 1 << 30  # a covariance of 11 000 features


@dataclass(frozen=True)
class Reference:
    """What samples are measured against: images, statistics that were computed from some, or both."""

    source: str
    images: SampleSet | None
    """None where a file holds nothing but statistics."""
    statistics: Mapping[str, Moments]
    """Of Inception's streams "pool" and "spatial", as a file stores them; empty for mere images."""
    path: Path | None = None
    """The file that stores them."""
    image_column: str | None = None
    """Of a dataset, where it is another than "image"."""

    @cached_property
    def file_sha256(self) -> str | None:
        """Of the file with statistics; a reference of images is known by its contents."""
        return None if self.path is None else sha256_of(self.path)


def open_reference(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_size: int | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> Reference:
    """The reference at `source`.

    source: one of
        an ADM reference batch: an `.npz` with mu and sigma, perhaps mu_s and sigma_s (for sFID), which are used as they
            are for the Fréchet distances, and perhaps images as arr_0, which precision, recall and KID need;
        images, as `open_samples` takes them;
        with a `split`: a dataset, as `varpi.data.open_dataset` takes it, cropped to `image_size`; "digits" is one too.
    split: "train", "validation" or "test"; for "digits" by default "test".

    Raises:
        VarpiError: nothing is there, it cannot be read, or the arguments contradict each other.
    """
    name = str(source)
    if split is not None or name == "digits":
        if image_size is None and name != "digits":
            raise VarpiError(f"{name}: a dataset as the reference needs the size of its images: give image_size")
        size, split = image_size or 32, split or "test"
        dataset = open_dataset(name, image_size=size, split=split, image_column=image_column, label_column=label_column)
        name = f"{name}[{split}]"
        column = image_column if image_column != "image" else None
        return Reference(name, DatasetImages(dataset, name, size), {}, image_column=column)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".npz":
        statistics, has_images = _read_statistics(path)
        if statistics:
            return Reference(name, NpzImages([path], name) if has_images else None, statistics, path)
    try:
        return Reference(name, open_samples(source), {})
    except VarpiError as error:
        if path.is_file():
            raise
        raise VarpiError(f"{error}; to read a dataset, name its split as well") from error


def _read_statistics(path: Path) -> tuple[dict[str, Moments], bool]:
    """The statistics in an `.npz`, by stream, and whether it holds images as well."""
    with open_npz(path) as archive:
        names = array_names(archive)
    arrays = read_arrays(path, ("mu", "sigma", "mu_s", "sigma_s"), _MOST_BYTES)
    statistics = {}
    for stream, suffix in (("pool", ""), ("spatial", "_s")):
        pair = f"mu{suffix}", f"sigma{suffix}"
        found = [name for name in pair if name in arrays]
        if len(found) == 1:
            raise VarpiError(f"{path}: holds {found[0]} alone; {pair[0]} and {pair[1]} belong together")
        if found:
            if any(arrays[name].dtype.kind not in "fiu" for name in pair):
                raise VarpiError(f"{path}: {pair[0]} and {pair[1]} must hold numbers")
            mean, covariance = (arrays[name].astype(np.float64) for name in pair)
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise VarpiError(
                    f"{path}: {pair[0]} {mean.shape} and {pair[1]} {covariance.shape} are no mean and covariance; "
                    "expected (D,) and (D, D)"
                )
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise VarpiError(f"{path}: {pair[0]} or {pair[1]} holds NaN or infinity")
            statistics[stream] = Moments(None, mean, covariance)
    return statistics, "arr_0" in names
