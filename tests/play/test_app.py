"""What the page's buttons do, without a browser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from play_parts import SETTINGS, pictures, playground

from varpi.errors import VarpiError
from varpi.play.app import LARGEST_GROUP, MOST_IMAGES, build_app, stylesheet
from varpi.play.opened import Player, Playground
from varpi.weights.pair import Pair

PLAIN = {"guidance": 1.0, "seed": 3, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def pressed(ground: Playground, name: str, studies: Path = Path("none")) -> Callable[..., Any]:
    """What is called when a button of the page is pressed, by the function's name."""
    return next(one.fn for one in build_app(ground, [studies]).fns.values() if getattr(one.fn, "__name__", "") == name)


def prompted(check: Callable[[str, str], None] | None = None) -> Playground:
    """Of a generator that takes prompts: what it draws depends on their length alone."""

    class Prompted(type(tiny.generator())):
        caption_check: Any = check and staticmethod(check)

        def prepare_condition(self, condition: Any) -> Any:
            if isinstance(condition, list):
                condition = torch.tensor([len(prompt) % 3 for prompt in condition])
            return super().prepare_condition(condition)

    generator = tiny.generator()
    generator.__class__ = Prompted
    generator.num_classes = None
    return Playground((Player("tiny", Pair(generator, tiny.tokenizer())),), SETTINGS, None, "", None)


def test_drawing_ends_with_the_images_and_says_what_they_are() -> None:
    said, shown = zip(*pressed(playground(), "draw")(asked=1, images=2, **PLAIN), strict=True)
    assert "Row 1 of 4: class 1 · b &amp; c, seed 3." in said[0]
    assert "Done: class 1 · b &amp; c, seed 3." in said[-1]
    assert len(pictures(shown[-1])) == 2


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (7, {}, "choose a class"),
        (None, {}, "choose a class"),
        (0, {"seed": None}, "give a seed: a whole number"),
        (0, {"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        (0, {"top_p": 2.0}, "top_p is 2.0; it must be in (0, 1]"),
    ],
)
def test_what_cannot_be_drawn_is_said(asked: Any, changes: dict[str, Any], message: str) -> None:
    ((said, _),) = pressed(playground(), "draw")(asked=asked, images=1, **{**PLAIN, **changes})
    assert message in said
    assert 'role="alert"' in said


def test_memory_that_is_lacking_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ground = playground()
    monkeypatch.setattr(ground.pair.generator, "prefill", fail)
    ((said, _),) = pressed(ground, "draw")(asked=0, images=1, **PLAIN)
    assert "out of memory: ask for fewer images" in said


def test_prompts_are_checked_and_arrive() -> None:
    def check(prompt: str, name: str) -> None:
        if "long" in prompt:
            raise VarpiError(f"{name}: too long")

    draw = pressed(prompted(check), "draw")
    *_, (said, shown) = draw(asked=" a dog ", images=1, **PLAIN)
    assert "Done: “a dog”, seed 3." in said
    *_, (_, other) = draw(asked="two dog", images=1, **PLAIN)
    assert not np.array_equal(pictures(shown)[0], pictures(other)[0])
    for asked, message in (
        ("  ", "say in the prompt what to draw"),
        (None, "say in"),
        ("long", "the prompt: too long"),
    ):
        ((said, _),) = draw(asked=asked, images=1, **PLAIN)
        assert message in said


def test_the_file_of_a_picture_is_deleted_good_or_bad(tmp_path: Path) -> None:
    take_in = pressed(playground(), "take_in")
    good, bad = tmp_path / "1" / "good.png", tmp_path / "2" / "bad.png"
    for path in (good, bad):
        path.parent.mkdir()
    Image.new("RGB", (30, 20), "red").save(good)
    bad.write_text("no picture")
    _, picture, said = take_in(str(good))
    assert picture.tolist() == [[[255, 0, 0]] * 16] * 16
    assert "cut to 16x16 pixels" in said
    _, picture, said = take_in(str(bad))
    assert picture is None
    assert "unreadable image" in said
    assert list(tmp_path.iterdir()) == []
    assert "lost on the way" in take_in(str(good))[2]


def test_a_step_needs_a_picture_and_a_class() -> None:
    step = pressed(playground("base", "tuned"), "step")
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    assert "Give a picture first." in step(None, 0, 1, 4, 0.0, 0)[0]
    assert "choose a class" in step(picture, 9, 1, 4, 0.0, 0)[0]
    assert "give a seed" in step(picture, 0, 1, 4, 0.0, None)[0]
    said, shown = step(picture, 0, 0, 4, 0.0, 0)
    assert "by base, asked for class 0 · a" in said
    assert len(pictures(shown)) == 2 + 2 * 4


def test_a_step_takes_a_prompt() -> None:
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    said, shown = pressed(prompted(), "step")(picture, "a dog", 0, 2, 0.0, 0)
    assert "by tiny, asked for “a dog”" in said
    assert len(pictures(shown)) == 2 + 2 * 2


def test_no_other_file_than_a_study_is_shown(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    other = tmp_path / "secret.json"
    other.write_text("{}")
    show = pressed(playground(), "show", tmp_path)
    assert "no such study" in show(str(other))
    assert "not what `varpi study` writes" in show(str(tmp_path / "study.json"))
    assert f"No study.json below {tmp_path}" in show(None)


def test_what_is_asked_for_is_bounded_by_the_server_too() -> None:
    app = build_app(playground(), [])
    bounds = {block.label: block for block in app.blocks.values() if hasattr(block, "maximum")}
    for label, most in (("Images", MOST_IMAGES), ("G, samples", LARGEST_GROUP)):
        assert bounds[label].maximum == most
        assert bounds[label].preprocess(most) == most
        with pytest.raises(Exception, match=r"."):
            bounds[label].preprocess(most + 1)


def test_models_serve_one_request_at_a_time_and_nothing_is_public() -> None:
    app = build_app(playground(), [])
    using = [one for one in app.fns.values() if getattr(one.fn, "__name__", "") in ("draw", "step")]
    assert {(one.concurrency_id, one.concurrency_limit) for one in using} == {("models", 1)}
    assert {one.api_visibility for one in app.fns.values()} == {"private"}
    assert not app.analytics_enabled
    assert "http" not in stylesheet()
