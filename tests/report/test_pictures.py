"""Pictures of the page: large images are held lightly, and the worst and best are those by score."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_parts import pictures

from varpi.errors import VarpiError
from varpi.report import Reconstruction, SampleGrid, ScoredImages
from varpi.report.pictures import before_after, extremes, grid, strips


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def photographs(n: int, side: int) -> np.ndarray:
    """Smooth images with some noise, each of its own colour."""
    light = np.linspace(0, 120, side)
    images = light[None, :, None, None] + light[None, None, :, None] / 2 + np.arange(n * 3).reshape(n, 1, 1, 3)
    return (images + np.random.default_rng(0).normal(0, 4, (n, side, side, 3))).clip(0, 255).astype(np.uint8)


def test_large_images_become_one_webp_no_wider_than_a_page_shows():
    uri = grid(SampleGrid("Base", photographs(40, 384), list(range(10)) * 4))["image"]
    assert uri.startswith("data:image/webp;base64,")
    picture = opened(uri)
    assert picture.size == (10 * 240 + 9 * 15, 4 * 240 + 3 * 15)
    assert len(uri) < 700_000


def test_before_and_after_in_one_picture(tmp_path: Path):
    """A class a column, small images twice their size, before to the left of a white band."""
    images = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    images[:] = np.arange(6)[:, None, None, None]
    before = SampleGrid("Before", images, [2, 1, 0] * 2)
    before_after(tmp_path / "picture.png", before, before._replace(images=images + 100))
    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    wide, high = 3 * 64 + 2 * 4, 2 * 64 + 4
    assert picture.shape == (high, 2 * wide + 32, 3)
    assert (picture[:, wide : wide + 32] == 255).all()
    firsts = picture[::68, [0, 68, 136, wide + 32, wide + 100, wide + 168], 0]
    assert firsts.tolist() == [[2, 1, 0, 102, 101, 100], [5, 4, 3, 105, 104, 103]]
    large = SampleGrid("Before", photographs(8, 384), [*range(8)])
    before_after(tmp_path / "picture.png", large, large)
    assert Image.open(tmp_path / "picture.png").size == (2 * (3 * 192 + 2 * 4) + 32, 3 * 192 + 2 * 4)
    with pytest.raises(VarpiError, match="not as many samples of one size"):
        before_after(tmp_path / "picture.png", large, before)


def test_a_photograph_looks_like_the_photograph():
    images = photographs(4, 256)
    (original, *_) = strips([Reconstruction(*images[:4])] * 8)
    tile = np.asarray(opened(original["image"]).convert("RGB"), dtype=float)[:256, :256]
    expected = np.asarray(Image.fromarray(images[0]), dtype=float)
    assert np.abs(tile - expected).mean() < 4  # of the noise, whose mean size is 3.2, WebP keeps little


def test_what_is_too_wide_is_shrunk():
    images = photographs(4, 256)
    (original, *_) = strips([Reconstruction(*images[:4])] * 12)
    tile = np.asarray(opened(original["image"]).convert("RGB"), dtype=float)[:200, :200]
    expected = np.asarray(Image.fromarray(images[0]).resize((200, 200)), dtype=float)
    assert np.abs(tile - expected).mean() < 3


def test_the_error_of_a_reconstruction_is_bright_where_it_is():
    original = np.full((32, 32, 3), 100, dtype=np.uint8)
    base, tuned = original.copy(), original.copy()
    base[:8, :8] += 80
    tuned[24:, 24:] += 40
    shown = {one["label"]: np.asarray(opened(one["image"]))[::4, ::4, :3].astype(int).sum(axis=2)
             for one in strips([Reconstruction(original, original, base, tuned)])}  # fmt: skip
    assert [*shown] == ["Original", "Tokenizer", "Base", "Tuned", "Base, error", "Tuned, error"]
    of_base, of_tuned = shown["Base, error"], shown["Tuned, error"]
    assert of_base[:6, :6].min() > of_tuned[26:, 26:].max() > 300  # twice the error, on one scale
    assert of_tuned[26:, 26:].min() > 200
    for dark in (of_base[12:], of_base[:, 12:], of_tuned[:20], of_tuned[:, :20]):
        assert dark.max() < 10
    same = strips([Reconstruction(original, original, original, original)])
    assert np.asarray(opened(same[-1]["image"]))[..., :3].max() < 10  # no error at all is no division by it


def test_images_that_are_not_square_keep_their_shape():
    picture = opened(grid(SampleGrid("Base", photographs(1, 800)[:, :400], [0]))["image"])
    assert picture.size == (384, 192)


def test_small_images_are_kept_to_the_pixel():
    shown = extremes(ScoredImages("Base", pictures(4, 32), [0.1, 0.4, 0.3, 0.2], "score"))
    (_, worst), (_, best) = shown["rows"]
    np.testing.assert_array_equal(np.asarray(opened(worst[0]["image"]))[::4, ::4, :3], pictures(4, 32)[0])
    np.testing.assert_array_equal(np.asarray(opened(best[0]["image"]))[::4, ::4, :3], pictures(4, 32)[1])


def test_worst_and_best_are_those_by_score():
    images, scores = pictures(7), [3.0, 1.0, 2.0, 7.0, 5.0, 4.0, 6.0]
    shown = extremes(ScoredImages("Base", images, scores, "HPS v2.1", list("abcdefg"), most=2))
    assert [(what, [(t["score"], t["asked"]) for t in tiles]) for what, tiles in shown["rows"]] == [
        ("Worst", [("1.00", "b"), ("2.00", "c")]),
        ("Best", [("7.00", "d"), ("6.00", "g")]),
    ]
    assert shown["note"] == "HPS v2.1, higher is better; of 7 images, the median has 4.00"
    assert shown["rows"][0][1][0]["alt"] == "Base, image 1: HPS v2.1 1.00, b"


def test_where_lower_is_better_the_largest_score_is_the_worst():
    shown = extremes(ScoredImages("Base", pictures(3), [1.0, 3.0, 2.0], "LPIPS", lower_is_better=True))
    assert [[t["score"] for t in tiles] for _, tiles in shown["rows"]] == [["3.00"], ["1.00"]]  # 2.00 would be in both


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        (ScoredImages("Base", pictures(3), [1.0, 2.0], "s"), "of Base: 3 images, 2 scores"),
        (ScoredImages("Base", pictures(2), [1.0, 2.0], "s", ["a"]), "of Base: 2 images, 2 scores, 1 conditions"),
        (ScoredImages("Base", pictures(2), [1.0, np.nan], "s"), "scores of Base hold values that are not finite"),
        (ScoredImages("Base", pictures(1), [1.0], "s"), "of Base: at least 2 images"),
        (ScoredImages("Base", pictures(2) / 255, [1.0, 2.0], "s"), "expected uint8 .* got float64"),
    ],
)
def test_bad_scored_images(scored, message):
    with pytest.raises(VarpiError, match=message):
        extremes(scored)
