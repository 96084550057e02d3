"""How good a set of images is: distances between feature sets, image files, the digits' judge."""

from varpi.evaluation.distances import frechet_distance, inception_score, precision_recall
from varpi.evaluation.embedded import measure, summarize
from varpi.evaluation.images import (
    from_uint8,
    make_grid,
    read_folder,
    read_npz,
    resize_384_to_256,
    save_grid,
    save_npz,
    save_png,
    to_uint8,
)
from varpi.evaluation.judge import embed, load_judge

__all__ = [
    "embed",
    "frechet_distance",
    "from_uint8",
    "inception_score",
    "load_judge",
    "make_grid",
    "measure",
    "precision_recall",
    "read_folder",
    "read_npz",
    "resize_384_to_256",
    "save_grid",
    "save_npz",
    "save_png",
    "summarize",
    "to_uint8",
]
