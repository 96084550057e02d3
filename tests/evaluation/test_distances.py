"""Distances against the original evaluator's numbers, an independent matrix root, and cases worked by hand."""

import warnings

import numpy as np
import pytest
import torch
from golden import GOLDEN
from scipy.linalg import sqrtm

from varpi.errors import VarpiError
from varpi.evaluation import distances, frechet_distance, inception_score, precision_recall
from varpi.evaluation.distances import kernel_distance


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def test_golden_numbers():
    golden = np.load(GOLDEN / "distances.npz")
    reference, samples = golden["reference"], golden["samples"]
    expected = float(golden["precision"]), float(golden["recall"])
    assert frechet_distance(reference, samples) == pytest.approx(float(golden["frechet"]), rel=1e-6)
    assert precision_recall(reference, samples, k=3) == pytest.approx(expected, abs=1e-8)
    assert inception_score(golden["logits"], splits=1) == pytest.approx(float(golden["inception_score"]), rel=1e-6)


def test_tensors_give_what_arrays_give():
    a, b = normal(50, 4).astype(np.float32), normal(60, 4, seed=1).astype(np.float32)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b).requires_grad_()) == frechet_distance(a, b)
    assert precision_recall(torch.from_numpy(a), torch.from_numpy(b)) == precision_recall(a, b)


def test_frechet_equals_the_formula_with_a_matrix_root():
    a, b = normal(300, 8), 1.5 * normal(200, 8, seed=1) @ normal(8, 8, seed=2) + 0.3
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(axis=0) - b.mean(axis=0)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_by_hand():
    # One dimension: (mean difference)^2 + (difference of standard deviations)^2, with variances 2 and 8.
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])) == pytest.approx(16 + 2)


def test_frechet_is_symmetric_and_zero_for_equal_sets():
    a, b = normal(100, 6), normal(80, 6, seed=1) * 2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)


def test_frechet_of_singular_covariances():
    """Fewer samples than features, and a feature that never fires: a shift is still measured exactly."""
    a = np.hstack([normal(10, 30), np.zeros((10, 1))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(a, a + 2) == pytest.approx(4 * 31, rel=1e-5)


def test_precision_recall_by_hand():
    # Ten reference points on a line, one apart; with k = 1 each ball reaches 1. Two samples lie on the line and two far
    # off, and their balls reach 0.5 each.
    reference = np.array([[float(i), 0.0] for i in range(10)])
    samples = np.array([[4.0, 0.0], [4.5, 0.0], [100.0, 0.0], [100.5, 0.0]])
    precision, recall = precision_recall(reference, samples, k=1)
    assert precision == 0.5  # two of four
    assert recall == 0.2  # the points 4 and 5


def test_a_vector_on_the_surface_of_a_ball_is_inside():
    reference = np.array([[float(i), 0.0] for i in range(10)])
    samples = np.array([[-2.0, 0.0], [-1.0, 0.0]])  # -1 and 0 lie on the surface of each other's balls
    assert precision_recall(reference, samples, k=1) == (0.5, 0.1)


def test_precision_recall_of_a_set_with_itself_and_a_far_one():
    points = normal(40, 3) + 1000
    assert precision_recall(points, points[::-1]) == (1.0, 1.0)
    assert precision_recall(points, points + 500) == (0.0, 0.0)


def test_precision_recall_does_not_depend_on_the_block(monkeypatch):
    reference, samples = normal(150, 5), normal(130, 5, seed=1) * 1.2
    whole = precision_recall(reference, samples)
    monkeypatch.setattr(distances, "BLOCK", 7)
    assert precision_recall(reference, samples) == whole


def test_precision_recall_in_single_precision():
    golden = np.load(GOLDEN / "distances.npz")
    expected = float(golden["precision"]), float(golden["recall"])
    found = precision_recall(golden["reference"], golden["samples"], dtype=torch.float32)
    assert found == pytest.approx(expected, abs=2 / 600)  # two of 600 balls may end within rounding of a vector


def test_precision_recall_agree_with_torch_fidelity():
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    reference, samples = normal(150, 8).astype(np.float32), (normal(130, 8, seed=1) * 1.3).astype(np.float32)
    sides = torch.from_numpy(samples), torch.from_numpy(reference)
    theirs = metric_prc.prc_features_to_metric(*sides, verbose=False)
    precision, recall = precision_recall(reference, samples)
    assert 0.3 < precision < 1
    assert 0.3 < recall < 1
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_kernel_distance_agrees_with_torch_fidelity(whole):
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = normal(90, 16).astype(np.float32), (normal(90, 16, seed=1) * 1.2 + 0.3).astype(np.float32)
    size, subsets = (90, 1) if whole else (40, 20)
    theirs = metric_kid.kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=subsets, kid_subset_size=size, rng_seed=7, verbose=False
    )
    expected = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    found = kernel_distance(a, b, subsets=subsets, subset_size=size, seed=7)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_kernel_distance_by_hand():
    # One feature, two vectors a side: kernels (xy + 1)^3. Within a: (0·1 + 1)^3 = 1; within b: (2·2 + 1)^3 = 125;
    # across: 1, 1, (1·2 + 1)^3 = 27 twice, mean 14. The estimate is 1 + 125 - 2 · 14.
    found = kernel_distance(np.array([[0.0], [1.0]]), np.array([[2.0], [2.0]]), subsets=3, subset_size=2)
    assert found == pytest.approx((98.0, 0.0))


def test_kernel_distance_of_one_distribution_is_near_zero_and_repeatable():
    a, b = normal(400, 8), normal(400, 8, seed=1)
    mean, spread = kernel_distance(a, b, subsets=20, subset_size=100)
    assert abs(mean) < 3 * spread
    assert (mean, spread) == kernel_distance(a, b, subsets=20, subset_size=100)
    assert mean != kernel_distance(a, b, subsets=20, subset_size=100, seed=1)[0]
    assert kernel_distance(a, b + 1, subsets=20, subset_size=100)[0] > 10 * abs(mean)


def test_inception_score_agrees_with_torch_fidelity():
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * normal(100, 12)
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
    assert inception_score(logits, splits=4) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_inception_score_by_hand():
    certain = 1000.0 * np.eye(4)[np.arange(40) % 4]  # sure of itself, evenly over four classes
    assert inception_score(certain, splits=10) == pytest.approx(4.0)
    assert inception_score(np.zeros((20, 4)), splits=2) == pytest.approx(1.0)
    by_class = certain[np.argsort(np.arange(40) % 4)]
    assert inception_score(by_class, splits=2) == pytest.approx(2.0)  # in file order, each half holds two classes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(normal(5, 3), normal(1, 3)), "second: 1 vectors are too few, at least 2"),
        (lambda: frechet_distance(normal(5, 3), normal(5, 4)), "first features have 3 dimensions and the second 4"),
        (lambda: frechet_distance(normal(5, 3), np.zeros((5, 2, 2))), r"second: expected .* got \(5, 2, 2\)"),
        (
            lambda: frechet_distance(np.array([[0.0], [np.nan], [np.inf]]), normal(5, 1)),
            "first: 2 of 3 vectors hold NaN",
        ),
        (lambda: precision_recall(normal(3, 2), normal(9, 2)), "reference: 3 vectors are too few, at least 4"),
        (lambda: precision_recall(normal(9, 2), normal(9, 2), k=0), "k is 0"),
        (
            lambda: kernel_distance(normal(9, 2), normal(19, 2), subset_size=10),
            "first: 9 vectors are too few, at least 10",
        ),
        (lambda: kernel_distance(normal(9, 2), normal(9, 2), subset_size=1), "subset_size is 1; it must be >= 2"),
        (lambda: kernel_distance(normal(9, 2), normal(9, 2), subsets=0), "subsets is 0; it must be >= 1"),
        (lambda: inception_score(normal(9, 2), splits=10), "logits: 9 vectors are too few, at least 10"),
        (lambda: inception_score(normal(9, 2), splits=0), "splits is 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(VarpiError, match=message):
        call()
