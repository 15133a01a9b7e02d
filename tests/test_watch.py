"""The server of the watched page: to whom it answers, and what hostile or idle clients can do."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from processes import LONG, until
from tombola.reporting import watch
from tombola.reporting.watch import CONNECTIONS, ServedPage, serve

PAGE = "<p>the page</p>"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedPage]:
    with serve(0) as one:
        one.show(PAGE)
        yield one


def port_of(served: ServedPage) -> int:
    return int(served.url.rstrip("/").rpartition(":")[2])


def connect(served: ServedPage) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(served)), timeout=LONG)


def ask(served: ServedPage, request: bytes) -> bytes:
    """Send bytes and return all that comes back; PORT becomes the server's port."""
    with connect(served) as client:
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(request.replace(b"PORT", str(port_of(served)).encode()))
            client.shutdown(socket.SHUT_WR)
        return read(client)


def read(client: socket.socket) -> bytes:
    """Return all that comes until the server closes the connection."""
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", *headers, "", ""]).encode("latin-1")


GOOD = "Host: 127.0.0.1:PORT"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/", GOOD), 200),
        (get("/", "host:  localhost:PORT"), 200),
        (get("/version", GOOD), 200),
        (get("//", GOOD), 404),
        (get("///", GOOD), 404),
        (get("//version", GOOD), 404),
        (get("/?", GOOD), 404),
        (get("/#", GOOD), 404),
        (get("/.", GOOD), 404),
        (get("/%2f", GOOD), 404),
        (get("http://127.0.0.1:PORT/", GOOD), 404),
        (get("/"), 403),
        (get("/", GOOD, GOOD), 403),
        (get("/", GOOD, "Host: evil.example"), 403),
        (get("/", "Host: evil.example", GOOD), 403),
        (get("/", GOOD, "host: evil.example"), 403),
        (get("/", "Host: 127.0.0.1"), 403),
        (get("/", "Host: 127.0.0.1:1"), 403),
        (get("/", "Host: 127.0.0.1:PORT.evil.example"), 403),
        (get("/", "Host: LOCALHOST:PORT"), 403),
        (get("/", "Host: 127.0.0.1:PORT", " evil.example"), 403),
        (get("/", "Host : 127.0.0.1:PORT"), 403),
        (get("/", *[f"a{number}: b" for number in range(200)], GOOD), 431),
        (get("/", "a: " + "b" * 70_000, GOOD), 431),
        (get("/" + "a" * 70_000, GOOD), 414),
        (get("/", GOOD).replace(b"GET", b"POST"), 501),
        (get("/", GOOD).replace(b"GET", b"get"), 501),
        (get("/", GOOD).replace(b"GET ", b"GET"), 400),
        (get("/", GOOD).replace(b"1.1", b"2.0"), 505),
        (get("/", GOOD).replace(b"1.1", b"1.1.1"), 400),
        (b"\0\xff\r\n\r\n", 400),
    ],
)
def test_requests_and_their_answers(served: ServedPage, request_: bytes, status: int) -> None:
    answer = ask(served, request_)
    found = re.match(rb"HTTP/1.0 (\d+)", answer) or re.search(rb"Error code: (\d+)", answer)  # HTTP 0.9 has no status
    assert found is not None
    assert int(found[1]) == status
    assert (PAGE.encode() in answer) == (status == 200 and b"/version" not in request_)


TARGETS = ["/", "/version", "//", "/x", "*", "http://127.0.0.1:PORT/", "/%00", "/\xe9", ""]
HOSTS = ["127.0.0.1:PORT", "localhost:PORT", "evil.example", "evil.example:PORT", "", "127.0.0.1:PORT\t", "[::1]:PORT"]
LATIN = st.text(st.characters(max_codepoint=255), max_size=9)
HEADERS = st.one_of(
    st.tuples(st.sampled_from(["Host", "host", "HOST", "Host ", "X-Host"]), st.sampled_from(HOSTS)),
    st.tuples(
        st.sampled_from(["Content-Length", "Transfer-Encoding", "Expect", "Connection", "\0"]),
        st.sampled_from(["-1", "9" * 30, "chunked", "100-continue", "keep-alive", "\xff"]),
    ),
    st.tuples(LATIN, LATIN),
)


@settings(max_examples=200)
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "OPTIONS", "GET\t", "\xff", ""]),
    target=st.sampled_from(TARGETS),
    version=st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/9.9", "HTTP/x", ""]),
    headers=st.lists(HEADERS, max_size=4),
    cut=st.integers(0, 400),
    after=st.binary(max_size=30),
)
@example(method="GET", target="/", version="HTTP/1.1", headers=[("Host", "localhost:PORT")], cut=400, after=b"")
def test_the_page_goes_to_those_alone_who_ask_rightly(
    served: ServedPage,
    method: str,
    target: str,
    version: str,
    headers: list[tuple[str, str]],
    cut: int,
    after: bytes,
) -> None:
    lines = [f"{method} {target} {version}", *(f"{name}: {value}" for name, value in headers), "", ""]
    answer = ask(served, "\r\n".join(lines).encode("latin-1")[:cut] + after)
    hosts = [value.strip() for name, value in headers if name.strip().lower() == "host"]
    rightly = hosts and method.strip() == "GET" and target == "/" and set(hosts) <= {"127.0.0.1:PORT", "localhost:PORT"}
    assert PAGE.encode() not in answer or rightly
    assert ask(served, get("/", GOOD)).endswith(PAGE.encode()), "it goes on serving"


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_bytes_that_are_no_request(served: ServedPage, content: bytes) -> None:
    assert PAGE.encode() not in ask(served, content)


def test_idle_connections_are_closed_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS", 2 * LONG)
    with serve(0) as served:
        served.show(PAGE)
        clients = [connect(served) for _ in range(3 * CONNECTIONS)]
        for client in clients[::2]:
            client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert ask(served, get("/", GOOD)).endswith(PAGE.encode())
        for client in clients[: 2 * CONNECTIONS]:
            assert read(client) == b""
        for client in clients:
            client.close()
        assert ask(served, get("/", GOOD)).endswith(PAGE.encode())


def test_an_idle_connection_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.05)
    with serve(0) as served:
        with connect(served) as client:
            assert read(client) == b""
        with connect(served) as client:
            client.sendall(b"GET / HTTP/1.1\r\n")
            assert read(client) == b""


def test_clients_that_go_away_leave_no_word(capfd: pytest.CaptureFixture[str]) -> None:
    with serve(0) as served:
        served.show("x" * (8 << 20))  # more than is on its way at once
        for part in (get("/", GOOD), get("/", GOOD)[:20], b""):
            with connect(served) as client:
                client.sendall(part.replace(b"PORT", str(port_of(served)).encode()))
                if part.endswith(b"\r\n\r\n"):
                    client.recv(1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes by a reset
        until(lambda: not any("process_request" in each.name for each in threading.enumerate()), "the threads to end")
    assert capfd.readouterr() == ("", "")
