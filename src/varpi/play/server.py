"""The page's server: on this machine alone unless told otherwise, with nothing left on its disk."""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from varpi.errors import VarpiError
from varpi.play.opened import Playground

MOST_BYTES = 10 * 2**20
"""Of an upload."""
PATIENCE = 2
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


class Serving(NamedTuple):
    """A server that is ready to run on a socket that listens already: `server.run(sockets=[socket])`."""

    server: Any
    socket: socket.socket
    url: str


@contextmanager
def open_server(playground: Playground, studies: Sequence[Path], host: str, port: int) -> Iterator[Serving]:
    """Make the page and its server. port: 0 takes a free one.

    What visitors upload is in a folder of its own until it is read; the folder goes with the server. Raises VarpiError
    when the address cannot be had.
    """
    with _listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="varpi-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported, and when a page is made
        import uvicorn

        config = uvicorn.Config(
            _application(playground, studies),
            log_level="warning",
            timeout_graceful_shutdown=PATIENCE,
            server_header=False,
        )
        shown = f"[{host}]" if ":" in host else host
        yield Serving(uvicorn.Server(config), listening, f"http://{shown}:{listening.getsockname()[1]}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise VarpiError(f"--host {host}: no address of this machine ({error.strerror or error})") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise VarpiError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    return listening


def check_extra() -> None:
    """Raise VarpiError where Gradio is not installed."""
    if find_spec("gradio") is None:
        raise VarpiError("the playground needs Gradio: pip install 'varpi[play]'")


def _application(playground: Playground, studies: Sequence[Path]) -> Any:
    import gradio
    from fastapi import FastAPI

    from varpi.play.app import QUEUE, THEME, build_app, stylesheet

    logging.getLogger("httpx").setLevel(logging.WARNING)
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


def _with_policy(application: Any) -> Any:
    """The application, with `POLICY` on every answer."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await application(scope, receive, send_with_policy)

    return answer
