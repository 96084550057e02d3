"""The playground in a real browser: drawing side by side, stopping, two visitors at once, pictures good and bad."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, Page, open_browser
from PIL import Image
from play_parts import pictures, playground

from varpi.data.pixels import to_uint8
from varpi.play import app
from varpi.play.opened import Playground
from varpi.play.server import address, listen, open_server
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling

STUDY = Path(__file__).parents[2] / "docs" / "results" / "digits.json"
STATUS = "document.querySelector('#drawn-status').innerText"
DONE = f"{STATUS}.startsWith('Done')"
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@contextmanager
def serving(ground: Playground, studies: Path) -> Iterator[tuple[str, Path]]:
    """The address of a page that is served meanwhile, and the folder of what is uploaded to it."""
    with listen("127.0.0.1", 0) as listening, open_server(ground, [studies], listening) as made:
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        try:
            yield address(listening), folder
        finally:
            made.should_exit = True
            thread.join(30)
    assert not thread.is_alive()
    assert not folder.exists()


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for name in ("digits", "broken"):
        (folder / name).mkdir()
    (folder / "digits" / "study.json").write_bytes(STUDY.read_bytes())
    (folder / "broken" / "study.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def ground() -> Playground:
    return playground("base", "tuned")


@pytest.fixture(scope="module")
def served(ground: Playground, studies: Path) -> Iterator[tuple[str, Path]]:
    with serving(ground, studies) as address:
        yield address


@pytest.fixture
def url(served: tuple[str, Path]) -> str:
    return served[0]


@pytest.fixture
def slow(ground: Playground, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes each token of the second player take a while, and counts them."""
    steps: list[int] = []
    generator = ground.pair.generator
    step = generator.decode_step

    def decode_step(*given: Any) -> Any:
        steps.append(1)
        time.sleep(0.1)
        return step(*given)

    monkeypatch.setattr(generator, "decode_step", decode_step)
    return steps


def visit(browser: Browser, url: str, width: int = 1280) -> Page:
    """A new visitor's page that has come to life."""
    page = browser.visit(url, width)
    page.wait("document.documentElement.dataset.alive === 'yes'")
    return page


def button(text: str) -> str:
    return f"[...document.querySelectorAll('button')].find(e => e.innerText === {json.dumps(text)} && e.offsetParent)"


def field(label: str) -> str:
    """The visible field of a label: of the blocks around both, the innermost one's."""
    return (
        "[...document.querySelectorAll('label, .block')].filter(e => e.offsetParent && "
        f"[...e.querySelectorAll('span')].some(s => s.innerText.trim() === {json.dumps(label)}))"
        ".map(e => e.querySelector('input, textarea')).filter(e => e).pop()"
    )


def set_seed(page: Page, seed: int) -> None:
    page.fill(field("Seed"), str(seed))


def choose(page: Page, choice: str, text: str) -> None:
    """An option of a drop-down list, by typing what it is called."""
    page.fill(choice, text)
    page.wait(f"[...document.querySelectorAll('[role=option]')].some(e => e.innerText.includes({json.dumps(text)}))")
    page.press("Enter")


def generate(page: Page) -> None:
    page.click("document.querySelector('#generate')")


def shown(page: Page, where: str = "#drawn") -> list[np.ndarray]:
    return pictures(page.see(f"document.querySelector('{where}').innerHTML"))


def expected(ground: Playground, class_id: int, seed: int, **settings: Any) -> list[np.ndarray]:
    """What the page must show in the end."""
    condition, sampling = torch.tensor([class_id] * 4), Sampling(seed=seed, **settings)
    images = []
    for player in ground.players:
        tokens = generate_with(player.pair.generator, condition, sampling)
        images += [*to_uint8(player.pair.tokenizer.decode(tokens))]
    return images


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return len(found) == len(wanted) and all(
        np.array_equal(a[..., :3], b) and (a[..., 3] == 255).all() for a, b in zip(found, wanted, strict=True)
    )


def clean(page: Page, url: str) -> None:
    """Nothing on the console, and nothing asked of others."""
    assert page.console == []
    assert [name for name in page.requests if not name.startswith((url, "data:"))] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_both_draw_from_one_seed_row_by_row(
    browser: Browser, url: str, ground: Playground, slow: list[int], width: int
) -> None:
    page = visit(browser, url, width)
    set_seed(page, 7)
    generate(page)
    page.wait(f"{STATUS} === 'Row 1 of 4: class 0 · a, seed 7.'")
    early = shown(page)
    assert len(early) == 8
    for image in early:
        rows = (image[..., 3] == 255).all(axis=1)
        assert rows.any()
        assert not rows.all()
        assert rows[:4].all()
    page.wait(DONE)
    assert same(shown(page), expected(ground, 0, 7))
    assert page.see("[...document.querySelectorAll('#drawn figcaption')].map(e => e.innerText)") == ["base", "tuned"]
    lefts = page.see("[...document.querySelectorAll('#drawn figure')].map(e => e.getBoundingClientRect().x)")
    assert (lefts[0] < lefts[1]) == (width > 600)  # side by side on a desk, one below the other on a phone
    look = "e => [e.naturalWidth, e.width, e.getBoundingClientRect().right]"
    boxes = f"[...document.querySelectorAll('#drawn img')].map({look})"
    for box in page.see(boxes):
        assert box[0] == 16
        assert box[1] >= 60
        assert box[2] <= width
    assert page.see("document.documentElement.scrollWidth") <= width
    clean(page, url)


def test_the_settings_arrive(browser: Browser, url: str, ground: Playground) -> None:
    page = visit(browser, url)
    choose(page, field("Class"), "1 · b & c")
    page.click("[...document.querySelectorAll('button')].find(e => e.innerText.startsWith('How tokens are drawn'))")
    for label, value in (("Guidance scale", "2.5"), ("Temperature", "0.8"), ("Top-k", "9"), ("Top-p", "0.7")):
        page.fill(field(label), value)
        page.press("Tab")
    page.click(button("Another"))
    seed = int(page.wait(f"{field('Seed')}.value !== '0' && {field('Seed')}.value"))
    generate(page)
    page.wait(DONE)
    assert page.see(STATUS) == f"Done: class 1 · b & c, seed {seed}."
    wanted = expected(ground, 1, seed, guidance_scale=2.5, temperature=0.8, top_k=9, top_p=0.7)
    assert same(shown(page), wanted)
    assert not same(wanted, expected(ground, 1, seed))
    clean(page, url)


def test_buttons_take_no_click_until_the_page_listens(browser: Browser, url: str) -> None:
    page = visit(browser, url)
    look = "getComputedStyle(document.querySelector('#generate')).pointerEvents"
    assert page.see(look) == "auto"
    assert page.see(f"delete document.documentElement.dataset.alive && {look}") == "none"


def test_a_missing_seed_is_said_in_words(browser: Browser, url: str) -> None:
    page = visit(browser, url)
    page.wait(field("Seed"))
    page.see(f"(() => {{ const e = {field('Seed')}; e.focus(); e.select() }})()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Delete", code="Delete", windowsVirtualKeyCode=46)
    generate(page)
    page.wait(f"{STATUS} === 'give a seed: a whole number'")
    assert shown(page) == []


def test_two_visitors_do_not_mix(browser: Browser, url: str, ground: Playground, slow: list[int]) -> None:
    pages = [visit(browser, url) for _ in range(2)]
    for page, seed in zip(pages, (11, 12), strict=True):
        set_seed(page, seed)
    for page in pages:
        generate(page)
    for page, seed in zip(pages, (11, 12), strict=True):
        page.wait(DONE)
        assert page.see(STATUS) == f"Done: class 0 · a, seed {seed}."
        assert same(shown(page), expected(ground, 0, seed))
        clean(page, url)


@pytest.mark.parametrize("how", ["stopped", "left"])
def test_what_is_cancelled_is_not_drawn(browser: Browser, url: str, slow: list[int], how: str) -> None:
    page = visit(browser, url)
    generate(page)
    page.wait(f"{STATUS}.startsWith('Row 1')")
    if how == "stopped":
        page.click("document.querySelector('#stop')")
        page.wait(f"{STATUS} === 'Stopped.'")
    else:
        page.close()
    time.sleep(1)
    drawn = len(slow)
    assert drawn < 15  # of the 15 that would follow the first token
    time.sleep(2)
    assert len(slow) == drawn
    other = visit(browser, url)  # the next one is served at once
    generate(other)
    other.wait(f"{STATUS}.startsWith('Row 1')")
    other.click("document.querySelector('#stop')")


def test_a_full_queue_is_said(
    browser: Browser, studies: Path, ground: Playground, slow: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "QUEUE", 1)
    with serving(ground, studies) as (url, _):
        pages = [visit(browser, url) for _ in range(3)]
        generate(pages[0])
        pages[0].wait(f"{STATUS}.startsWith('Row 1')")
        for page in pages[1:]:
            generate(page)
        pages[2].wait("document.body.innerText.includes('currently busy')")
        pages[1].wait(DONE)
        for page in pages:
            page.close()


# -- one's own picture


def open_tab(page: Page, name: str) -> None:
    tab = (
        f"[...document.querySelectorAll('button[role=tab]')].find(e => e.innerText.includes({json.dumps(name)}) && "
        "e.offsetParent && getComputedStyle(e).visibility === 'visible')"
    )
    page.click(tab)
    page.wait(f"{tab}.getAttribute('aria-selected') === 'true'")


def give(page: Page, file: Path) -> None:
    open_tab(page, "Your picture")
    page.wait("document.querySelector('#upload input[type=file]')")
    page.upload("#upload input[type=file]", file)


def step_status(page: Page, words: str) -> None:
    page.wait(f"document.querySelector('#step-status').innerText.includes({json.dumps(words)})")


def kept(folder: Path) -> list[Path]:
    """All but the empty files of random names that Gradio puts beside uploads."""
    return [path for path in folder.rglob("*") if path.is_dir() or path.stat().st_size > 0]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_of_ones_own(browser: Browser, served: tuple[str, Path], tmp_path: Path, width: int) -> None:
    url, folder = served
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    page = visit(browser, url, width)
    give(page, tmp_path / "mine.png")
    step_status(page, "The picture is here, cut to 16x16 pixels.")
    assert kept(folder) == []
    page.click("document.querySelector('#step')")
    step_status(page, "VA-π's step by tuned, asked for class 0 · a")
    images = shown(page, "#step-shown")
    assert len(images) == 2 + 2 * 4  # picture, reconstruction; G samples with their credit
    assert np.array_equal(images[0], pixels)
    text = page.see("document.querySelector('#step-shown').innerText")
    assert text.count("advantage") == 4 + 1  # and once in the legend
    assert "Context" in text
    cells = page.see(
        "[...document.querySelectorAll('#step-shown .tokens i')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(cells) == 2 * 16
    assert min(cells) > 15
    assert page.see("document.documentElement.scrollWidth") <= width
    assert kept(folder) == []
    clean(page, url)


def test_by_the_other_player(browser: Browser, url: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "teal").save(tmp_path / "mine.png")
    page = visit(browser, url)
    give(page, tmp_path / "mine.png")
    step_status(page, "The picture is here")
    page.click("[...document.querySelectorAll('input[type=radio]')].find(e => e.offsetParent)")
    page.click("document.querySelector('#step')")
    step_status(page, "VA-π's step by base")


def test_bad_files_are_refused_and_not_kept(browser: Browser, served: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = served
    (tmp_path / "bad.png").write_bytes(b"\x89PNG and nothing that belongs to it")
    Image.new("1", (6000, 4001)).save(tmp_path / "large.png")
    page = visit(browser, url)
    give(page, tmp_path / "bad.png")
    step_status(page, "the picture: unreadable image")
    give(page, tmp_path / "large.png")
    step_status(page, "the picture: 6000x4001 pixels are more than 24000000")
    page.click("document.querySelector('#step')")
    step_status(page, "Give a picture first.")
    assert kept(folder) == []
    assert page.see("document.querySelector('#step-status [role=alert]') !== null")
    clean(page, url)


def test_a_file_of_too_many_bytes_is_refused(browser: Browser, served: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = served
    (tmp_path / "heavy.png").write_bytes(bytes(10 * 2**20 + 1))
    page = visit(browser, url)
    give(page, tmp_path / "heavy.png")
    page.wait("document.body.innerText.includes('maximum allowed size') || document.body.innerText.includes('exceed')")
    assert kept(folder) == []


# -- studies


@pytest.mark.parametrize("width", WIDTHS)
def test_studies_are_shown_as_their_own_page(browser: Browser, url: str, studies: Path, width: int) -> None:
    page = visit(browser, url, width)
    open_tab(page, "Studies")
    page.wait("document.querySelector('#study-shown').innerText.includes('not what `varpi study` writes')")
    choose(page, "document.querySelector('#study input')", "digits")
    page.wait("document.querySelector('iframe.study')")
    source = page.see("document.querySelector('iframe.study').srcdoc")
    assert "VA-π against the start: −0.133 ± 0.038" in source
    box = page.see("(b => [b.x, b.right, b.height])(document.querySelector('iframe.study').getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] <= width
    assert box[2] >= 400
    assert page.see("document.documentElement.scrollWidth") <= width
    clean(page, url)


# -- what the tests above rely on


def test_what_is_asked_of_others_is_refused_and_noticed(browser: Browser, url: str) -> None:
    page = visit(browser, url)
    page.wait(button("Generate"))
    page.see("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/a.png'}))")
    page.see("console.warn('a fault')")
    page.wait("true")
    with pytest.raises(AssertionError):
        clean(page, url)
    assert "a fault" in page.console
    assert any("Content Security Policy" in line and "http://127.0.0.1:9/a.png" in line for line in page.console)
