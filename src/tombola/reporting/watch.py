"""Watch: serve the page of a running study on this machine only, and update it.

The server answers two requests, `GET /` and `GET /version`, to clients that name it by its own address. It never has
more than `CONNECTIONS` connections, each waits for at most `SECONDS`, and a client that goes away is no error.
"""

from __future__ import annotations

import hashlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tombola.errors import UserError

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
"""The names under which the server answers."""

ADDRESS = "/version"
"""The path under which the server returns the version of its page."""

CONNECTIONS = 32
"""Maximum number of connections: with one more, the oldest is closed. A browser opens at most six."""

SECONDS = 10.0
"""How long a connection waits for a client that sends nothing, or takes nothing."""


class ServedPage:
    """A page at a URL of the loopback interface; `show` replaces it."""

    def __init__(self, url: str, show: Callable[[str], None]) -> None:
        self.url, self.show = url, show


class _Server(ThreadingHTTPServer):
    """A server of few connections that says nothing about clients that go away."""

    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.append(request)
            oldest = self._connections.pop(0) if len(self._connections) > CONNECTIONS else None
            if oldest is not None:
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end of the connection, and closes it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock, suppress(ValueError):  # it is the oldest, and no longer in the list
            self._connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a client that goes away or waits too long."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


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
        timeout = SECONDS

        def do_GET(self) -> None:
            # DNS rebinding: a foreign page can let its own name point to the loopback; requests then carry that name.
            hosts, known = self.headers.get_all("Host"), {f"{name}:{server.server_port}" for name in NAMES}
            path = self.requestline.split()[1]  # `self.path` has one slash where the request has several
            if hosts is None or len(hosts) != 1 or hosts[0] not in known:
                self.send_error(HTTPStatus.FORBIDDEN)
            elif path == "/":
                self._send(current["page"], "text/html; charset=utf-8")
            elif path == ADDRESS:
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
        server = _Server((LOOPBACK, port), Handler)
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
