"""Figures of embeddings: the densities against scipy, and what stands in the drawings."""

import re
import sys

import numpy as np
import pytest
from report_parts import EVIL, vectors

from varpi.errors import VarpiError
from varpi.report import embeddings
from varpi.report.drawing import DASHES, MARKS, SERIES, legend
from varpi.report.embeddings import embedding_density, embedding_map, kernel_density


def coordinates(svg: str) -> np.ndarray:
    """Where marks stand in a drawing, (n,2)."""
    return np.array(re.findall(r'<use href="[^"]+" x="([-.\d]+)" y="([-.\d]+)"', svg), dtype=float)


def test_density_equals_scipys():
    stats = pytest.importorskip("scipy.stats")
    points = np.random.default_rng(0).normal(size=(200, 2)) * (3.0, 0.5)
    points = (points - points.mean(axis=0)) @ np.linalg.eigh(np.cov(points.T))[1]  # scipy's kernel follows the axes
    bandwidth = points.std(axis=0, ddof=1) * 200 ** (-1 / 6)
    x, y, density = kernel_density(points, bandwidth, points.min(axis=0) - 3, points.max(axis=0) + 3)
    theirs = stats.gaussian_kde(points.T)(np.stack(np.meshgrid(x, y, indexing="ij")).reshape(2, -1))
    assert np.abs(density - theirs.reshape(density.shape)).max() < 0.02 * theirs.max()
    assert density.sum() * (x[1] - x[0]) * (y[1] - y[0]) == pytest.approx(1, abs=0.01)


def test_contours_enclose_their_share():
    x = np.linspace(-4, 4, 160)
    density = np.exp(-(x[:, None] ** 2 + x**2) / 2)
    heights = embeddings._levels(density)
    assert heights == sorted(heights)
    # of a round Gaussian, the circle of height h (of 1 at the top) holds the share 1 - h
    np.testing.assert_allclose(heights, [1 - share for share in reversed(embeddings.ENCLOSED)], atol=0.01)


def test_principal_axes_are_those_of_the_largest_variance():
    values = np.random.default_rng(0).normal(size=(4000, 3)) * (1.0, 5.0, 2.0)
    axes, shares = embeddings._principal_axes(values, 2)
    np.testing.assert_allclose(axes, [[0, 0], [1, 0], [0, 1]], atol=0.05)
    np.testing.assert_allclose(shares, [25 / 30, 4 / 30], atol=0.02)


def test_the_plane_is_that_of_the_real_images():
    """What only the samples differ in, across the real images' own plane, must not move them on the drawing."""
    real = vectors(40)
    real[:, 5:] = 0
    moved = real + 50.0 * (np.arange(8) == 7)
    marks = coordinates(embedding_density({"real": real, "base": moved}).svg)
    np.testing.assert_allclose(marks[0], marks[1], atol=1e-3)
    moved = real + 2.0 * embeddings._principal_axes(real, 1)[0][:, 0]
    marks = coordinates(embedding_density({"real": real, "base": moved}).svg)
    assert marks[1, 0] > marks[0, 0] + 10
    assert marks[1, 1] == pytest.approx(marks[0, 1], abs=1e-3)


@pytest.mark.parametrize("figure", [embedding_density, embedding_map])
def test_figures_are_in_the_pages_colours_and_say_what_they_show(figure):
    panel = figure({"real": vectors(30), EVIL: vectors(24, 3.0), "tuned": vectors(25)})
    assert re.search(r'<svg viewBox="[^"]+" role="img" aria-label="[^"]+: real, [^"]+, tuned">', panel.svg)
    assert {f"var(--series-{i})" for i in (1, 2, 3)} <= set(re.findall(r"var\(--series-\d\)", panel.svg))
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]|<style|<script|https?:", panel.svg)
    assert len(set(re.findall(r'<use href="#([^"]+)"', panel.svg))) == 3  # a mark for each set


def test_densities_have_dashes_of_their_own():
    svg = embedding_density({"real": vectors(30), "base": vectors(24), "tuned": vectors(25)}).svg
    drawn = {
        series: set(re.findall(rf"stroke-dasharray: ([^;]+);[^\"]*stroke: var\(--series-{series}\)", svg))
        for series in (1, 2, 3)
    }
    assert drawn[1] == set()
    assert len(drawn[2]) == len(drawn[3]) == 1
    assert drawn[2] != drawn[3]


def test_a_map_shows_as_many_points_as_it_says():
    panel = embedding_map({"real": vectors(60), "base": vectors(14, 40.0)}, points=20)
    marks = coordinates(panel.svg)
    assert len(marks) == 20 + 14
    assert panel.note.startswith("t-SNE of 14 and 20 images a set, perplexity 11.")


def test_sets_far_apart_do_not_mix_on_the_map():
    panel = embedding_map({"real": vectors(40, width=60), "base": vectors(41, 60.0, width=60)})
    name = re.findall(r'<use href="#([^"]+)"', panel.svg)
    marks, real = coordinates(panel.svg), np.array(name) == name[0]
    assert real.sum() == 40
    distances = np.linalg.norm(marks[:, None] - marks, axis=-1) + np.eye(len(marks)) * 1e9
    assert (real[distances.argmin(axis=1)] == real).mean() > 0.95


def test_the_same_vectors_give_the_same_figures():
    sets = {"real": vectors(20), "base": vectors(21)}
    assert embedding_map(sets) == embedding_map(sets)
    assert embedding_density(sets) == embedding_density(sets)


def test_six_series_differ_without_colour():
    assert len(set(DASHES)) == len({str(mark) for mark in MARKS}) == len(SERIES) == 6
    assert [key.name for key in legend(["a", "b"])] == ["a", "b"]
    numbers = [float(x) for key in legend("abcdef") for x in re.findall(r"[-.\d]+", key.mark)]
    assert min(numbers) >= 0  # inside the 36 x 8 of a key
    assert max(numbers[1::2]) <= 8


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"real": vectors(20)}, "embeddings of 1 sets; 2 to 6 can be compared"),
        ({str(i): vectors(20) for i in range(7)}, "embeddings of 7 sets"),
        ({"real": vectors(20), "base": vectors(9)}, r"embeddings of base have shape \(9, 8\); expected \(N, D\)"),
        ({"real": vectors(20), "base": vectors(20, width=7)}, r"embeddings of base have shape \(20, 7\)"),
        ({"real": vectors(20), "base": vectors(20) * np.nan}, "embeddings of base hold values that are not finite"),
        ({"real": np.ones((20, 3)), "base": vectors(20, width=3)}, "vectors of real lie on a line or a point"),
    ],
)
def test_bad_embeddings(sets, message):
    with pytest.raises(VarpiError, match=message):
        embedding_density(sets)


def test_a_map_of_few_points_is_refused():
    with pytest.raises(VarpiError, match="a map of 9 points a set"):
        embedding_map({"real": vectors(20), "base": vectors(20)}, points=9)


def test_without_scikit_learn_the_map_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(VarpiError, match=r"scikit-learn: pip install 'varpi\[evaluation\]'"):
        embedding_map({"real": vectors(20), "base": vectors(20)})
