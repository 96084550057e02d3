"""The page in a real browser: what is on it can be seen, on a desk and on a phone, and it asks for nothing."""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import FLAGS
from PIL import Image
from report_parts import full_report

from varpi.report import render

Run = Callable[..., tuple[str, list[str]]]
WIDTHS = {"desk": 1100, "phone": 390}

# Runs inside a copy of the page, in a frame of the width in question, and tells the page around it what it sees.
PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message || event.target.tagName), true);
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
addEventListener("load", () => {
  const box = element => {
    const {x, width, height} = element.getBoundingClientRect();
    return {name: element.tagName + " " + element.className, x, width, height};
  };
  const all = (what, see) => [...document.querySelectorAll(what)].map(see);
  parent.postMessage({
    width: innerWidth,
    wide: document.documentElement.scrollWidth,
    images: all("img", image => ({...box(image), natural: image.complete * image.naturalWidth})),
    boxes: all("table, figure, figure svg, dl, h2, h3, .notice", box),
    outside: all("body *", box).filter(box => box.x + box.width > innerWidth + 1).map(box => box.name),
    scrolling: all(".scroll table *, .scroll table", box).map(box => box.name),
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    errors,
  }, "*");
});
</script>
"""
FRAMES = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body style="margin: 0">
<script>
addEventListener("message", event => {
  const name = [...document.querySelectorAll("iframe")].find(frame => frame.contentWindow === event.source).id;
  const text = btoa(unescape(encodeURIComponent(JSON.stringify([name, event.data]))));
  document.body.append(Object.assign(document.createElement("pre"), {textContent: text}));
});
</script>
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the browser with more arguments; gives its output, and what it logged on the console."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine: the page is not seen by a browser")
    profile = tmp_path_factory.mktemp("profile")

    def run(*arguments: str) -> tuple[str, list[str]]:
        command = [found, *FLAGS, "--enable-logging=stderr", f"--user-data-dir={profile}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(full_report()), encoding="utf-8")
    return path


def probe(browser: Run, page: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What the probe sees on a page at every width of `WIDTHS`."""
    policy = "default-src 'none'; "
    assert page.count(policy) == page.count("</head>") == 1
    copy = page.replace(policy, f"{policy}script-src 'unsafe-inline'; ").replace("</head>", f"{PROBE}</head>")
    (folder / "copy.html").write_text(copy, encoding="utf-8")
    frames = "".join(f'<iframe id="{n}" src="copy.html" width="{w}" height="900"></iframe>' for n, w in WIDTHS.items())
    (folder / "frames.html").write_text(FRAMES + frames, encoding="utf-8")
    output, _ = browser("--virtual-time-budget=5000", "--dump-dom", (folder / "frames.html").as_uri())
    return dict(json.loads(base64.b64decode(text)) for text in re.findall(r"<pre>([^<]+)</pre>", output))


@pytest.fixture(scope="module")
def seen(browser, page, tmp_path_factory) -> dict[str, dict[str, Any]]:
    return probe(browser, page.read_text(encoding="utf-8"), tmp_path_factory.mktemp("probe"))


@pytest.mark.parametrize("where", WIDTHS)
def test_all_that_is_on_the_page_can_be_seen(seen, where):
    assert len(seen[where]["images"]) == 14
    for image in seen[where]["images"]:
        assert image["natural"] > 0, "an image did not decode"
        assert image["width"] >= 60, image
        assert image["height"] >= 20, image
    boxes = seen[where]["boxes"]
    assert sum(box["name"].startswith("TABLE") for box in boxes) == 6
    assert sum(box["name"].startswith("svg") for box in boxes) == 4
    assert [box for box in boxes if box["width"] < 60 or box["height"] < 12] == []


@pytest.mark.parametrize("where", WIDTHS)
def test_the_page_is_no_wider_than_its_window(seen, where):
    assert seen[where]["width"] == WIDTHS[where]
    assert seen[where]["wide"] <= WIDTHS[where]
    assert set(seen[where]["outside"]) <= set(seen[where]["scrolling"])  # wide tables scroll in their own frame


def test_a_picture_that_is_clicked_on_fills_the_screen(browser, page, tmp_path):
    text = page.read_text(encoding="utf-8").replace('<input type="checkbox"', '<input type="checkbox" checked', 1)
    for where, found in probe(browser, text, tmp_path).items():
        first, second = found["images"][:2]
        assert (first["x"], first["width"], first["height"]) == (0, WIDTHS[where], 900)
        assert second["width"] < WIDTHS[where]


@pytest.mark.parametrize("where", WIDTHS)
def test_nothing_goes_wrong_and_nothing_is_asked_for(seen, where):
    assert seen[where]["errors"] == []
    assert [name for name in seen[where]["requests"] if not name.startswith("data:")] == []


def test_the_probe_sees_what_is_wrong(browser, page, tmp_path):
    """What the tests above rely on: a broken image, one from elsewhere, and a part that is too wide are noticed."""
    broken = '<img src="data:image/png;base64,AAAA"><img src="http://127.0.0.1:9/a.png">'
    text = page.read_text(encoding="utf-8").replace("<main>", f'<main>{broken}<div style="width: 3000px">wide</div>')
    found = probe(browser, text, tmp_path)["phone"]
    assert found["images"][0]["natural"] == 0
    assert "http://127.0.0.1:9/a.png" in found["errors"]
    assert found["wide"] >= 3000
    assert "DIV " in set(found["outside"]) - set(found["scrolling"])
    (tmp_path / "broken.html").write_text(text, encoding="utf-8")
    _, console = browser("--dump-dom", (tmp_path / "broken.html").as_uri())
    assert "http://127.0.0.1:9/a.png" in "".join(console)


@pytest.mark.parametrize(("scheme", "background"), [("light", (0xFC, 0xFC, 0xFA)), ("dark", (0x14, 0x17, 0x1A))])
def test_the_page_itself_is_drawn_without_a_word_on_the_console(browser, page, tmp_path, scheme, background):
    picture = tmp_path / "page.png"
    setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    _, console = browser(setting, "--window-size=1100,2400", f"--screenshot={picture}", page.as_uri())
    assert console == []
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (2400, 1100, 3)
    assert tuple(pixels[2, 2]) == background
    ink = np.abs(pixels.astype(int) - background).sum(axis=2) > 60
    filled = ink.reshape(12, 200, 1100).mean(axis=(1, 2))
    assert (filled > 0.005).all(), "200 rows of the page are blank"
    assert filled.mean() < 0.6
    assert len(np.unique(pixels[::7, ::7].reshape(-1, 3) @ (1, 256, 65536))) > 500  # pictures, not only text


def test_the_page_prints(browser, page, tmp_path):
    printed = tmp_path / "page.pdf"
    _, console = browser("--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri())
    assert console == []
    content = printed.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
