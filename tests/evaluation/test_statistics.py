"""Moments gathered in parts against numpy over everything, and the Fréchet distance against torch-fidelity's."""

import numpy as np
import pytest
import torch
from golden import GOLDEN

from varpi.errors import VarpiError
from varpi.evaluation import frechet_distance
from varpi.evaluation.statistics import Moments, frechet, merge_moments, moments, moments_of_parts


def vectors(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_parts_give_the_moments_of_the_whole():
    whole = vectors(100)
    found = moments_of_parts(np.split(whole, [1, 2, 40, 97]))
    assert found.count == 100
    assert found.width == 5
    np.testing.assert_allclose(found.mean, whole.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(whole.astype(np.float64), rowvar=False), rtol=1e-10)


def test_a_large_common_offset_costs_no_digits():
    """Sums of squares would lose all of them: the variance is 1e-12 of the squared mean."""
    whole = vectors(1000).astype(np.float64)
    found = moments_of_parts(np.split(whole + 1e6, 10))
    np.testing.assert_allclose(found.covariance, np.cov(whole, rowvar=False), rtol=1e-5, atol=1e-6)


def test_merging_by_hand():
    # {0, 2} and {5}: mean 7/3, variance (49/9 + 1/9 + 64/9) / 2 = 19/3
    both = merge_moments(moments(np.array([[0.0], [2.0]])), moments(np.array([[5.0]])))
    assert both.count == 3
    assert both.mean == pytest.approx([7 / 3])
    assert both.covariance == pytest.approx(np.array([[19 / 3]]))


def test_frechet_of_moments_is_that_of_the_vectors():
    golden = np.load(GOLDEN / "distances.npz")
    sides = (moments_of_parts(np.array_split(golden[name], 7)) for name in ("reference", "samples"))
    distance = frechet(*sides)
    assert distance == pytest.approx(float(golden["frechet"]), rel=1e-6)
    assert distance == pytest.approx(frechet_distance(golden["reference"], golden["samples"]), rel=1e-9)


def test_frechet_agrees_with_torch_fidelity():
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = vectors(300, 32), 1.3 * vectors(200, 32, seed=1) @ vectors(32, 32, seed=2) + 0.2
    theirs = [metric_fid.fid_features_to_statistics(torch.from_numpy(side)) for side in (a, b)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet(moments(a), moments(b)) == pytest.approx(expected, rel=1e-5)


def test_moments_that_do_not_fit_together():
    with pytest.raises(VarpiError, match="one side has 5 features and the other 4; take both from the same network"):
        frechet(moments(vectors(9)), moments(vectors(9, 4)))
    with pytest.raises(VarpiError, match="one side has 5 features and the other 4"):
        merge_moments(moments(vectors(9)), moments(vectors(9, 4)))
    with pytest.raises(VarpiError, match="unknown number of vectors cannot be merged"):
        merge_moments(Moments(None, np.zeros(2), np.eye(2)), moments(vectors(9, 2)))
