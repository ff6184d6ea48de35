"""Endpoints, against real servers on this machine: where a request goes, how long it may take, who gets the token."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from pipeline.config.evaluate import ChatJudge
from pipeline.config.schema import HttpReward
from pipeline.errors import UserError
from pipeline.scoring.chat import Chat
from pipeline.scoring.errors import SourceError, SourceUnavailable
from pipeline.scoring.source import build, checked
from tests.support.endpoint import Server, always, reply, serving

pytestmark = pytest.mark.fast

TOKEN = "swordfish-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    with serving() as started:
        yield started


def ask(url: str, **settings: Any) -> list[float]:
    block = HttpReward(http=url, **{"backoff": 0.0, "timeout": 0.3, "retries": 0, "key_env": "REWARD_TOKEN"} | settings)
    return checked(build(block, "here"), ["p"], ["r"], [{}])


@contextmanager
def raw(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that speaks for itself, on one connection, once it has read the request's beginning."""

    def speak() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            with suppress(OSError):
                answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/score"
        thread.join(5)
        assert not thread.is_alive(), "the connection was not cut"


def drip(connection: socket.socket, *parts: bytes) -> None:
    """The first parts at once, then the last for ever, a piece every 20 ms."""
    for part in parts[:-1]:
        connection.sendall(part)
    while True:
        connection.sendall(parts[-1])
        time.sleep(0.02)


@pytest.mark.parametrize(
    "parts",
    [
        (b"H",),
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", b" "),
        (b"HTTP/1.1 500 No\r\n\r\n", b" "),
    ],
    ids=["status", "continue", "header", "body", "chunks", "announced body", "error's body"],
)
def test_an_endpoint_that_drips_is_cut_off(server: Server, parts: tuple[bytes, ...]) -> None:
    """Wherever in its reply it does: the time is the whole request's, not each read's."""
    began = time.monotonic()
    with (
        raw(lambda connection: drip(connection, *parts)) as url,
        pytest.raises(SourceUnavailable, match=r"failed once with TimeoutError: no whole reply within 0\.3 s"),
    ):
        ask(url)
    assert 0.25 < time.monotonic() - began < 3.0


def test_an_endless_body_is_not_read_whole(server: Server) -> None:
    sent: list[int] = []

    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"0" * 65536)
            sent.append(65536)

    with raw(endless) as url, pytest.raises(SourceError, match="larger than max_bytes, 100000"):
        ask(url, max_bytes=100_000, timeout=5.0)
    assert sum(sent) < 20_000_000  # what the sockets' buffers took


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server: Server, status: int) -> None:
    """Neither to another host, which would get the token, nor on this one, nor to a file."""
    with serving() as other:
        other.script = always(b'{"scores": [1]}')
        for target in (other.url, server.url, "file:///etc/passwd"):

            def redirect(request: BaseHTTPRequestHandler, asked: Any, to: str = target) -> None:
                request.send_response(status)
                request.send_header("Location", to)
                request.end_headers()

            server.script = redirect
            with pytest.raises(SourceError, match=f"HTTP {status}"):
                ask(server.url, timeout=5.0, retries=2)
        assert other.requests == []
    assert len(server.requests) == 3


def test_the_token_goes_to_the_endpoint_and_into_no_message(server: Server) -> None:
    """Some endpoints repeat it in their errors."""
    given: list[str | None] = []

    def refuse(request: BaseHTTPRequestHandler, asked: Any) -> None:
        given.append(request.headers["Authorization"])
        reply(request, f"no such key: {TOKEN}".encode(), 401)

    server.script = refuse
    with pytest.raises(SourceError) as caught:
        ask(server.url, timeout=5.0)
    assert caught.value.reason == "HTTP 401: no such key: …"
    chat = Chat(ChatJudge(chat=server.url, model="m", key_env="REWARD_TOKEN", retries=0), "here")
    with pytest.raises(SourceError) as asked:
        chat(["p"], ["a"], ["b"])
    assert TOKEN not in str(asked.value)
    assert set(given) == {f"Bearer {TOKEN}"}


def test_no_token_is_sent_unasked(server: Server) -> None:
    given: list[str | None] = []

    def score(request: BaseHTTPRequestHandler, asked: Any) -> None:
        given.append(request.headers["Authorization"])
        reply(request, b'{"scores": [1]}')

    server.script = score
    assert ask(server.url, timeout=5.0, key_env=None) == [1.0]
    assert given == [None]


@pytest.mark.parametrize("value", ["", " ", "swordfish\nX-Evil: 1", "schwertfisch-ß"])
def test_a_token_that_is_none(server: Server, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(UserError) as caught:
        ask(server.url)
    assert "REWARD_TOKEN" in str(caught.value)
    assert "fish" not in str(caught.value)
    assert server.requests == []


def test_the_clock_of_a_request_that_is_over_does_not_go_on(server: Server) -> None:
    """A rollout asks thousands of times."""
    server.script = always(b'{"scores": [1]}')
    before = threading.active_count()
    for _ in range(20):
        ask(server.url, timeout=60.0)
    time.sleep(0.2)
    assert threading.active_count() < before + 10
