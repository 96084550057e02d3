"""The page: what it says, that it stands alone, and that data cannot break out of it."""

import base64
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from report_parts import EVIL, curve, full_report, pictures, vectors

from varpi.errors import VarpiError
from varpi.report import (
    ClassChanges,
    Embeddings,
    Page,
    Reconstruction,
    SampleGrid,
    ScoredImages,
    TableRow,
    render,
    write_page,
)
from varpi.report.tables import mean_and_std


@pytest.fixture(scope="module")
def report() -> Page:
    return Page(
        title="Digits, post-trained",
        paragraph="What was done.",
        command="varpi demo --out runs/demo",
        table=[
            TableRow("Base", {"frechet_distance": [31.12, 0.43], "precision": [0.8112, 0.0047]}, "temperature 1"),
            TableRow("Tuned", {"frechet_distance": [13.2, 0.13], "precision": [0.79, 0.004]}),
        ],
        samples=[
            SampleGrid("Base", pictures(6), [1, 0, 1, 0, 1, 0]),
            SampleGrid("Tuned", pictures(5), [0, 1, 0, 1, 0]),
        ],
        reconstructions=[Reconstruction(*pictures(4)), Reconstruction(*pictures(4))],
        curves={"VA-π": curve("reward_mean", "cross_entropy"), "Control": curve("cross_entropy", "seconds")},
        environment={"torch": "2.15"},
        recipe="method: va_pi\n",
        costs={"VA-π": {"seconds": 143.21, "images": 3840}, "Control": {"seconds": 51.0}},
    )


@pytest.fixture(scope="module")
def page(report) -> str:
    return render(report)


@pytest.fixture(scope="module")
def full() -> str:
    return render(full_report())


def mosaics(page: str) -> list[np.ndarray]:
    codes = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) for code in codes]


@pytest.mark.parametrize("name", ["page", "full"])
def test_page_asks_for_nothing_from_elsewhere(name, request):
    page = request.getfixturevalue(name)
    text = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link (?!rel=\"icon\" href=\"data:,\")", text)
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)', page))
    assert all(target.startswith(("#", "data:")) for target in re.findall(r'\bhref="([^"]*)', page))
    assert set(re.findall(r"url\(([^)]{1,4})", page)) <= {"#rew", "#cro", "#den", "#map"}
    assert page.count("<style") == 1  # a curve's own style sheet would apply to the whole page


@pytest.mark.parametrize("name", ["page", "full"])
def test_ids_are_unique_and_references_resolve(name, request):
    page = request.getfixturevalue(name)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_numbers_and_the_best_of_each_column(page):
    text = re.sub(r"\s+", " ", re.sub(r'<span class="std">|</span>', "", page))
    assert '<td class="best">13.20 ± 0.13</td>' in text
    assert "<td>31.1 ± 0.4</td>" in text
    assert '<td class="best">0.811 ± 0.005</td>' in text
    assert page.count('class="best"') == 2
    assert "lower is better" in page
    assert "How far the distribution" in page
    assert "Diversity" not in page  # recall was not measured


@pytest.mark.parametrize(
    ("mean", "std", "shown"),
    [
        (0.81234, 0.0043, ("0.812", "0.004")),
        (17.42, 1.26, ("17.4", "1.3")),
        (17.42, 1.97, ("17", "2")),
        (130.8, 24.0, ("131", "24")),
        (14.38, 0.0996, ("14.38", "0.10")),
        (14.38, 0.1, ("14.38", "0.10")),
        (1.0, 0.0, ("1", "0")),
    ],
)
def test_digits_follow_the_spread(mean, std, shown):
    assert mean_and_std(mean, std) == shown


def test_samples_stand_in_columns_of_their_class(page):
    images = pictures(6)
    mosaic = mosaics(page)[0]
    factor, gap = 16, 8
    assert mosaic.shape == (3 * 128 + 2 * gap, 2 * 128 + gap, 4)
    for row, column, index in [(0, 0, 1), (0, 1, 0), (1, 0, 3), (2, 1, 4)]:
        top, left = row * (128 + gap), column * (128 + gap)
        tile = mosaic[top : top + 128 : factor, left : left + 128 : factor]
        np.testing.assert_array_equal(tile[..., :3], images[index])
    assert (mosaic[128 : 128 + gap, :, 3] == 0).all()
    assert 'alt="Base: 6 generated images, one class a column: 0, 1"' in page
    assert 'alt="Tuned: 5 generated images"' in page  # unequal classes stay in the order given


def test_reconstructions_make_four_strips_and_two_of_errors(page):
    strips = mosaics(page)[2:]
    assert len(strips) == 6
    for i, strip in enumerate(strips[:4]):
        np.testing.assert_array_equal(strip[:128:16, :128:16, :3], pictures(4)[i])


def test_every_image_has_a_description(page):
    assert page.count("<img ") == len(re.findall(r'<img src="[^"]+" alt="[^"]{10,}">', page)) == 8


def test_curves_of_known_metrics_only(page):
    panels = re.findall(r'<svg viewBox="[^"]+" role="img" aria-label="([^"]+)">', page)
    assert panels == [
        "Reward over training steps: VA-π",
        "Cross-entropy over training steps: VA-π, Control",
    ]
    assert "var(--series-1)" in page
    assert "#0a0001" not in page
    assert "#010101" not in page


def test_a_skipped_update_leaves_the_rest_of_its_curve(report):
    records = [
        *curve("cross_entropy", steps=3),
        {"step": 4, "cross_entropy": math.nan},
        {"step": 5, "cross_entropy": 0.2},
    ]
    page = render(replace(report, curves={"run": records}))
    assert "Cross-entropy over training steps: run" in page
    assert not re.search(r"\bnan\b", page.split("Learning curves")[1].split("</section>")[0])


def test_data_is_escaped(report):
    evil = EVIL
    page = render(
        replace(
            report,
            title=evil,
            paragraph=evil,
            command=evil,
            table=[TableRow(evil, {"recall": [0.5, 0.1]}, evil)],
            samples=[SampleGrid(evil, pictures(2), [0, 0])],
            curves={evil: curve("mse", steps=2)},
            environment={evil: evil},
            recipe=evil,
            costs={evil: {evil: evil}},
            extremes=[ScoredImages(evil, pictures(2), [1, 2], evil, [evil, evil])],
            per_class=[ClassChanges("recall", {evil: (0.1, 0.2)})],
            embeddings=Embeddings({evil: vectors(12), "$x": vectors(13)}, evil),
        )
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 25


def test_empty_parts_are_left_out():
    page = render(Page("Title", "Paragraph.", "varpi demo"))
    assert "<h2>" not in page
    assert "<h1>Title</h1>" in page


def test_every_part_has_a_heading(full):
    assert re.findall("<h2>(.*?)</h2>", full) == [
        "Results",
        "Samples",
        "Reconstructions under teacher forcing",
        "Worst and best samples",
        "Changes by class",
        "Where the images lie",
        "Learning curves",
        "Cost",
        "How to make it again",
    ]


def test_a_number_without_a_spread(full):
    assert '<td class="best">0.6000</td>' in full
    assert "A number without ± is of one set of samples" in full


def test_every_image_of_a_full_page_has_a_description(full):
    assert full.count("<img ") == len(re.findall(r'<img src="[^"]+" alt="[^"]{10,}">', full)) == 14
    assert full.count('role="img"') == len(re.findall(r'role="img" aria-label="[^"]{10,}"', full)) == 4


def test_a_full_page_is_light(full):
    assert len(full) < 1_000_000


def test_large_costs_are_powers_of_ten(full):
    assert "<td>12\u202f800</td>" in full
    assert "<td>1.38 × 10¹⁷</td>" in full


def test_costs(page):
    assert re.search(r"<td>143</td>\s*<td>3\u202f840</td>", page)
    assert re.search(r"<td>51</td>\s*<td>–</td>", page)


def test_same_report_gives_the_same_page(report, page):
    assert render(report) == page


def test_write(report, page, tmp_path):
    write_page(tmp_path / "runs" / "report.html", report)
    assert (tmp_path / "runs" / "report.html").read_text(encoding="utf-8") == page
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["report.html"]
    with pytest.raises(VarpiError, match=r"report\.html/again\.html: could not be written"):
        write_page(tmp_path / "runs" / "report.html" / "again.html", report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"table": [TableRow("Base", {"fidelity": [1.0, 0.1]})]},
            "Base has an unknown metric fidelity; known are frechet_distance",
        ),
        ({"table": [TableRow("Base", {"recall": [math.nan, 0.1]})]}, "recall of Base is .*finite"),
        ({"table": [TableRow("Base", {"recall": [0.5]})]}, "recall of Base is .*finite"),
        ({"table": [TableRow("Base", {"recall": [0.5, -0.1]})]}, "recall of Base is .*finite"),
        ({"table": [TableRow("Base", {"recall": math.inf})]}, "recall of Base is inf; it must be a finite"),
        (
            {"samples": [SampleGrid("Base", pictures(3) / 255, [0, 1, 2])]},
            "samples of Base: expected uint8 .* got float64",
        ),
        ({"samples": [SampleGrid("Base", pictures(3), [0, 1])]}, "samples of Base: 3 images, 2 conditions"),
        ({"reconstructions": [Reconstruction(*pictures(3), pictures(1, 4)[0])]}, "different shapes"),
        ({"curves": {"run": [{"mse": 0.1}]}}, "1 of 1 metrics records of run have no step"),
        ({"curves": {str(i): curve("mse") for i in range(7)}}, "7 runs; at most 6"),
    ],
)
def test_bad_reports(report, change, message):
    with pytest.raises(VarpiError, match=message):
        render(replace(report, **change))
