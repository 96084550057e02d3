"""How good a set of images is: distances to real ones, fit to prompts, GenEval, alignment, and the digits' judge."""

from varpi.evaluation.alignment import evaluate_alignment
from varpi.evaluation.detectors import ClipColorist, Mask2FormerDetector
from varpi.evaluation.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from varpi.evaluation.distribution import evaluate_distribution
from varpi.evaluation.embedded import measure, summarize
from varpi.evaluation.features import load_extractor
from varpi.evaluation.geneval import evaluate_geneval, judge_geneval, read_geneval_folder, write_geneval_folder
from varpi.evaluation.images import (
    NpzWriter,
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
from varpi.evaluation.result import Result, differences, read_result, write_result
from varpi.evaluation.sample_sets import open_reference, open_samples
from varpi.evaluation.text_scores import clip_scores, evaluate_text, hps_scores

__all__ = [
    "ClipColorist",
    "Mask2FormerDetector",
    "NpzWriter",
    "Result",
    "clip_scores",
    "differences",
    "embed",
    "evaluate_alignment",
    "evaluate_distribution",
    "evaluate_geneval",
    "evaluate_text",
    "frechet_distance",
    "from_uint8",
    "hps_scores",
    "inception_score",
    "judge_geneval",
    "kernel_distance",
    "load_extractor",
    "load_judge",
    "make_grid",
    "measure",
    "open_reference",
    "open_samples",
    "precision_recall",
    "read_folder",
    "read_geneval_folder",
    "read_npz",
    "read_result",
    "resize_384_to_256",
    "save_grid",
    "save_npz",
    "save_png",
    "summarize",
    "to_uint8",
    "write_geneval_folder",
    "write_result",
]
