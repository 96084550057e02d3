"""Chromium without a window, steered through its DevTools protocol over a pipe: pages that are clicked, typed into and
seen, each a visitor of its own with its own storage."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
"""Of every Chromium that a test starts."""


class Browser:
    """A running Chromium. Answers and events arrive in one stream, which is read when something is waited for."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Commands come in at descriptor 3 and answers go out at 4; the shell puts them there, out of the way of others.
        high = [fcntl.fcntl(number, fcntl.F_DUPFD, 20) for number in (theirs_in, theirs_out)]
        shell = 'exec "$0" "$@" 3<&{} 4>&{}'.format(*high)
        command = [
            "bash",
            "-c",
            shell,
            program,
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(command, pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in (theirs_in, theirs_out, *high):
            os.close(number)
        os.set_blocking(self._in, False)
        self._rest, self._last = b"", 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while number not in self._answers:
            assert time.monotonic() < end, f"no answer to {method}"
            self.listen()
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def listen(self) -> None:
        """Take in what has arrived; waits a moment when nothing has."""
        try:
            new = os.read(self._in, 1 << 20)
            assert new, "the browser is gone"
        except BlockingIOError:
            time.sleep(0.01)
            return
        *messages, self._rest = (self._rest + new).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif page := self._pages.get(message.get("sessionId", "")):
                page.note(message["method"], message["params"])

    def visit(self, url: str, width: int = 1280, height: int = 900) -> "Page":
        """A new visitor's page, loaded."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        mobile = width < 600
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        page.call("Page.navigate", url=url)
        return page

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


class Page:
    """One visitor's page; what it said on the console and asked for is in `console` and `requests`."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.console: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def note(self, method: str, event: dict[str, Any]) -> None:
        """Take in an event."""
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Log.entryAdded":
            self.console.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(given.get("value", given)) for given in event["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(event["exceptionDetails"])[:500])

    def see(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression, once it is true; true for an element."""
        end = time.monotonic() + seconds
        look = (
            f"(() => {{ try {{ const v = {expression}; return v instanceof Node || v }} catch {{ return null }} }})()"
        )
        while not (value := self.see(look)):
            assert time.monotonic() < end, f"not seen: {expression}; on the page: {self.text()[:2000]}"
            time.sleep(0.03)
        return value

    def text(self) -> str:
        return self.see("document.body.innerText")

    def click(self, expression: str) -> None:
        """A real click in the middle of the element that an expression gives."""
        self.wait(expression)
        x, y = self.see(
            f"(() => {{ const e = {expression}; e.scrollIntoView({{block: 'center'}}); "
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, expression: str, text: str) -> None:
        """Type into the field that an expression gives, in place of what is there."""
        self.wait(expression)
        self.see(f"(() => {{ const e = {expression}; e.focus(); e.select() }})()")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13)

    def upload(self, selector: str, file: Path) -> None:
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def screenshot(self, path: Path) -> None:
        """Of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Chromium, or a skip where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine: no browser sees the page")
    browser = Browser(found, profile)
    try:
        yield browser
    finally:
        browser.close()
