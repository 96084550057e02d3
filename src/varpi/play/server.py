"""The page's server: on this machine alone unless told otherwise, with nothing left on its disk."""

import logging
import os
import socket
import tempfile
from asyncio import CancelledError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError
from varpi.play.opened import Playground

MOST_BYTES = 10 * 2**20
"""Of an upload."""
GRACE = 2
"""Seconds that a stop waits for requests under way."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'self'; object-src 'none'; form-action 'self'"
)
"""What the page may load: a browser refuses it all that comes from elsewhere."""
HEAD = """<script>{
  const warn = console.warn;
  console.warn = (...said) => said[0] === "Method not implemented." || warn(...said);
}</script>"""
"""Gradio's client says just that on the console whenever a stream of events ends; what else it says is to be seen."""


@contextmanager
def open_server(playground: Playground, studies: Sequence[Path], listening: socket.socket) -> Iterator[Any]:
    """The page's server, uvicorn's, to `run(sockets=[listening])`.

    What visitors upload is in a folder of its own until it is read; the folder goes with the server.
    """
    with tempfile.TemporaryDirectory(prefix="varpi-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported, and when a page is made
        import uvicorn

        logging.getLogger("uvicorn.error").addFilter(_is_news)
        config = uvicorn.Config(
            _application(playground, studies),
            log_level="warning",
            timeout_graceful_shutdown=GRACE,
            server_header=False,
        )
        yield uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. port: 0 takes a free one. Raises VarpiError where that cannot be."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise VarpiError(f"--host {host}: no address of this machine ({error.strerror or error})") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen()
    except OSError as error:
        listening.close()
        raise VarpiError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    return listening


def address(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_extra() -> None:
    """Raise VarpiError where Gradio is not installed."""
    if find_spec("gradio") is None:
        raise VarpiError("the playground needs Gradio: pip install 'varpi[play]'")


def _application(playground: Playground, studies: Sequence[Path]) -> Any:
    import gradio
    from fastapi import FastAPI

    from varpi.play.app import QUEUE, THEME, build_app, stylesheet

    app = build_app(playground, studies).queue(max_size=QUEUE, default_concurrency_limit=2)
    mounted = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        app,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=THEME,
        css=stylesheet(),
        head=HEAD,
    )
    return _with_policy(mounted)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log is more than that a stop ended the streams of events, which every open page has."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is not CancelledError and not record.getMessage().startswith("Cancel ")


def _with_policy(application: Any) -> Any:
    """The application, with `POLICY` on every answer."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await application(scope, receive, send_with_policy)

    return answer
