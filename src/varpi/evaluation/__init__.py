"""How good a set of images is: distances to real ones, fit to prompts, GenEval, alignment, and the digits' measures."""

from varpi.evaluation.alignment import evaluate_alignment
from varpi.evaluation.digits import measure, summarize
from varpi.evaluation.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from varpi.evaluation.distribution import evaluate_distribution
from varpi.evaluation.geneval import evaluate_geneval, judge_geneval, read_geneval_folder, write_geneval_folder
from varpi.evaluation.reference import open_reference
from varpi.evaluation.result import Result, differences, read_result, write_result
from varpi.evaluation.text_scores import clip_scores, evaluate_text, hps_scores

__all__ = [
    "Result",
    "clip_scores",
    "differences",
    "evaluate_alignment",
    "evaluate_distribution",
    "evaluate_geneval",
    "evaluate_text",
    "frechet_distance",
    "hps_scores",
    "inception_score",
    "judge_geneval",
    "kernel_distance",
    "measure",
    "open_reference",
    "precision_recall",
    "read_geneval_folder",
    "read_result",
    "summarize",
    "write_geneval_folder",
    "write_result",
]
