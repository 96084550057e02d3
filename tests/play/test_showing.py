"""What the page shows as HTML: the right pixels, text escaped, studies as their own page shows them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from play_parts import pictures, playground

from varpi.errors import VarpiError
from varpi.play.frames import Frame
from varpi.play.picture_step import take_step
from varpi.play.showing import (
    BETTER,
    WORSE,
    code_colors,
    credit_map,
    find_studies,
    show_error,
    show_frame,
    show_status,
    show_step,
    show_study,
)

EVIL = '"><script>alert(1)</script>'
STUDY = Path(__file__).parents[2] / "docs" / "results" / "digits.json"


@pytest.mark.parametrize("side", [16, 96])
def test_a_frame_shows_the_pixels_it_was_given(side: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 4), dtype=np.uint8)
    html = str(show_frame([EVIL, "tuned"], EVIL, Frame(4, 4, [images[:2], images[1:]])))
    assert [image.shape for image in pictures(html)] == [(side, side, 4)] * 4
    for shown, image in zip(pictures(html), images[[0, 1, 1, 2]], strict=True):
        assert np.array_equal(shown, image)
    assert "<script>" not in html
    assert html.count('class="sharp"' if side == 16 else 'class="photograph"') == 4


def test_a_large_frame_that_is_not_finished_is_a_tenth_the_size_and_says_so() -> None:
    noisy = np.full((256, 256, 4), 255, dtype=np.uint8)
    noisy[..., :3] = np.arange(240)[None, :256, None].repeat(2, axis=1)[:, :256]
    noisy[..., :3] += np.random.default_rng(0).integers(0, 9, (256, 256, 3), dtype=np.uint8)
    noisy[128:] = 0
    unfinished = str(show_frame(["a"], "b", Frame(2, 4, [noisy[None]])))
    finished = str(show_frame(["a"], "b", Frame(4, 4, [noisy[None]])))
    assert len(unfinished) < len(finished) / 4
    assert "not finished" in unfinished
    assert "not finished" not in finished
    assert (pictures(unfinished)[0][136:, :, 3] == 0).all()


def test_messages_are_escaped() -> None:
    assert "<script>" not in show_error(EVIL) + show_status(EVIL)
    assert 'role="alert"' in show_error(EVIL)


def test_credit_is_coloured_by_sign_and_as_strong_as_it_is_large() -> None:
    shown = credit_map(torch.tensor([2.5, 1.0, 0.0, -1.0]))
    assert shown.shape == (2, 2, 4)
    assert shown[0, 0].tolist() == [*BETTER, 255]
    assert shown[0, 1].tolist() == [*BETTER, 128]
    assert shown[1, 0, 3] == 0
    assert shown[1, 1].tolist() == [*WORSE, 128]


def test_codes_that_are_alike_look_alike() -> None:
    tokenizer = tiny.tokenizer()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[7] = tokenizer.quantize.embedding.weight[3] * 1.0001
    colors = code_colors(tokenizer)
    assert colors.shape == (32, 3)
    distances = np.abs(colors[3].astype(int) - colors).sum(axis=1)
    assert distances[7] <= 3 * 6
    assert np.median(distances) > 60


def test_codes_without_vectors_have_colours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> torch.Tensor:
        raise VarpiError("none")

    tokenizer = tiny.tokenizer()
    monkeypatch.setattr(tokenizer, "code_vectors", none)
    assert len({tuple(color) for color in code_colors(tokenizer).tolist()}) == 32


def test_a_step_shows_tokens_samples_and_what_they_are_worth() -> None:
    ground = playground()
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    step = take_step(ground, ground.pair, picture, [0], group_size=3, context_noise=0.5, seed=0)
    html = str(show_step(step, picture, code_colors(ground.pair.tokenizer)))
    shown = pictures(html)
    assert len(shown) == 2 + 2 * 3
    assert np.array_equal(shown[0], picture)
    assert np.array_equal(shown[1], step.reconstruction)
    for i in range(3):
        assert np.array_equal(shown[2 + 2 * i], step.samples[i])
        assert np.array_equal(shown[3 + 2 * i], credit_map(step.credit[i]))
        assert f"advantage {step.advantages[i]:+.2f}".replace("-", "−") in html
    replaced = int((step.context != step.tokens).sum())
    assert html.count('class="replaced"') == replaced > 0
    for tokens in (step.tokens, step.context):
        assert all(f'title="token {token}"' in html for token in tokens.tolist())
    assert re.findall(r"Sample (\d) \((\w+)\)", html) in (
        [(str(int(step.rewards.argmax()) + 1), "best"), (str(int(step.rewards.argmin()) + 1), "worst")],
        [(str(int(step.rewards.argmin()) + 1), "worst"), (str(int(step.rewards.argmax()) + 1), "best")],
    )
    plain = take_step(ground, ground.pair, picture, [0], group_size=2, context_noise=0.0, seed=0)
    assert "Context" not in show_step(plain, picture, code_colors(ground.pair.tokenizer))


def test_studies_are_found_below_directories_but_not_deep(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "study.json", tmp_path / "a" / "b" / "study.json", tmp_path / "one.json"]
    for path in [*paths, tmp_path / "a" / "b" / "c" / "study.json"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert find_studies([tmp_path, paths[2], paths[0], tmp_path / "none"]) == paths


def test_a_study_is_shown_in_a_frame_that_runs_nothing(tmp_path: Path) -> None:
    html = str(show_study(STUDY))
    assert html.startswith('<iframe class="study" sandbox="" title="Post-training on the embedded digits" srcdoc="')
    assert "VA-π against the start: −0.133 ± 0.038, a gain beyond the spread over seeds." in html
    assert "Judged by digits: each at its own best guidance scale" in html
    assert "Made by" not in html
    evil = json.loads(STUDY.read_text())
    evil["study"]["title"] = EVIL
    (tmp_path / "study.json").write_text(json.dumps(evil))
    assert "<script>" not in show_study(tmp_path / "study.json")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": 1}', '{"format": 9}', "no JSON", '{"format": 1, "rows": 3}']
)
def test_a_file_that_is_no_study_is_refused_in_a_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.json"
    path.write_text(content)
    with pytest.raises(
        VarpiError, match=r"study\.json: (not what|a study of format|cannot be read as JSON)"
    ) as refused:
        show_study(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [("rows", []), ("judges", {}), ("references", {}), ("pair", 3), ("choices", [1])])
def test_a_damaged_study_is_refused_in_a_line(tmp_path: Path, damage: tuple[str, object]) -> None:
    found = json.loads(STUDY.read_text())
    found[damage[0]] = damage[1]
    path = tmp_path / "study.json"
    path.write_text(json.dumps(found))
    with pytest.raises(VarpiError, match=r"study\.json: not what"):
        show_study(path)
