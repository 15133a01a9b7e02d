"""Watch: serve the page of a running study on this machine only, and update it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tombola.errors import UserError

LOOPBACK = "127.0.0.1"
ADDRESS = "/version"
"""The path under which the server returns the version of its page."""


class ServedPage:
    """A page at a URL of the loopback interface; `show` replaces it."""

    def __init__(self, url: str, show: Callable[[str], None]) -> None:
        self.url, self.show = url, show


@contextmanager
def serve(port: int) -> Iterator[ServedPage]:
    """Serve a page on 127.0.0.1 and nowhere else, until the context ends.

    Args:
        port: 0 for any free port.

    Raises:
        UserError: if the port cannot be used.
    """
    current = {"page": b"", "version": b""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # DNS rebinding: a foreign page can let its own name point to the loopback; requests then carry that name.
            if self.headers.get("Host") not in {f"{name}:{server.server_port}" for name in (LOOPBACK, "localhost")}:
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path == "/":
                self._send(current["page"], "text/html; charset=utf-8")
            elif self.path == ADDRESS:
                self._send(current["version"], "text/plain; charset=utf-8")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _send(self, content: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(content))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Print nothing about requests."""

    def show(page: str) -> None:
        content = page.encode()
        current.update(page=content, version=hashlib.sha256(content).hexdigest().encode())

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used: {getattr(error, 'strerror', None) or error}") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield ServedPage(f"http://{LOOPBACK}:{server.server_port}/", show)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def keep_fresh(
    state: Callable[[], object], make: Callable[[], str], show: Callable[[str], None], seconds: float
) -> None:
    """Show what `make` returns, and again whenever `state` has changed, until interrupted.

    Args:
        state: returns a value that changes when there may be something new; it must be cheap.
        make: returns the page.
        show: shows the page.
        seconds: time between two calls of `state`.
    """
    shown: object = None
    while True:
        now = state()
        if now != shown:
            show(make())
            shown = now
        time.sleep(seconds)
