"""The HTTP source against a real server on this machine: batches, retries, and everything an endpoint can do wrong."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from pipeline.config.schema import HttpReward
from pipeline.scoring import http
from pipeline.scoring.errors import SourceError, SourceUnavailable
from pipeline.scoring.source import build, checked
from tests.support.endpoint import Server, always, reply, serving

pytestmark = pytest.mark.fast


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


def lengths(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """The score of a response is its length, and a tenth of its row's `n`."""
    pairs = zip(asked["responses"], asked["rows"], strict=True)
    reply(request, json.dumps({"scores": [len(text) + row["n"] / 10 for text, row in pairs]}).encode())


def ask(url: str, rows: int = 1, **settings: Any) -> list[float]:
    """Scores of `rows` responses "", "x", "xx" … whose data rows are n = 0, 1, 2 …"""
    source = build(HttpReward(http=url, **{"backoff": 0.001, "timeout": 5.0} | settings), "here")
    responses = ["x" * n for n in range(rows)]
    return checked(source, [f"p{n}" for n in range(rows)], responses, [{"n": n} for n in range(rows)])


def test_scores_of_one_request(server: Server) -> None:
    server.script = lengths
    assert ask(server.url, 3) == [0.0, 1.1, 2.2]
    assert server.requests == [
        {"prompts": ["p0", "p1", "p2"], "responses": ["", "x", "xx"], "rows": [{"n": 0}, {"n": 1}, {"n": 2}]}
    ]


def test_batches_keep_the_order(server: Server) -> None:
    server.script = lengths
    assert ask(server.url, 5, batch=2) == [0.0, 1.1, 2.2, 3.3, 4.4]
    assert [body["prompts"] for body in server.requests] == [["p0", "p1"], ["p2", "p3"], ["p4"]]


def test_nothing_is_asked_about_nothing(server: Server) -> None:
    server.script = lengths
    assert ask(server.url, 0) == []
    assert server.requests == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_errors_that_pass_are_tried_again(server: Server, status: int) -> None:
    def script(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if len(server.requests) <= 2:
            reply(request, b"busy", status)
        else:
            lengths(request, asked)

    server.script = script
    assert ask(server.url, 2, retries=2) == [0.0, 1.1]
    assert server.requests == [server.requests[0]] * 3


def test_errors_that_stay_are_unavailability(server: Server) -> None:
    server.script = always(b"out of memory", 500)
    with pytest.raises(SourceUnavailable) as caught:
        ask(server.url, retries=3)
    assert len(server.requests) == 4
    assert caught.value.reason == "failed 4 times, at last with HTTP 500: out of memory"
    assert caught.value.source == f"http:127.0.0.1:{server.server_port}/score"


def test_the_last_batch_alone_can_be_unavailable(server: Server) -> None:
    server.script = lambda request, asked: (
        lengths(request, asked) if "p0" in asked["prompts"] else reply(request, b"", 502)
    )
    with pytest.raises(SourceUnavailable, match="failed once with HTTP 502"):
        ask(server.url, 3, batch=2, retries=0)
    assert len(server.requests) == 2


def test_waits_double(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http.time, "sleep", waits.append)
    server.script = always(b"", 500)
    with pytest.raises(SourceUnavailable):
        ask(server.url, retries=4, backoff=0.5)
    assert waits == [0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [400, 404, 422])
def test_errors_of_the_request_are_final(server: Server, status: int) -> None:
    server.script = always("é".encode() * 300, status)
    with pytest.raises(SourceError) as caught:
        ask(server.url, retries=3)
    assert not isinstance(caught.value, SourceUnavailable)
    assert len(server.requests) == 1
    assert caught.value.reason == f"HTTP {status}: {'é' * 200}"


def test_a_redirect_is_not_followed(server: Server) -> None:
    def script(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        request.send_response(302)
        request.send_header("Location", "/elsewhere")
        request.end_headers()

    server.script = script
    with pytest.raises(SourceError, match="HTTP 302"):
        ask(server.url)
    assert len(server.requests) == 1


def test_timeout(server: Server) -> None:
    released = threading.Event()
    server.script = lambda request, asked: (released.wait(5), None)[1]
    started = time.monotonic()
    try:
        with pytest.raises(
            SourceUnavailable, match=r"failed 2 times, at last with TimeoutError: no whole reply within 0\.2 s"
        ):
            ask(server.url, timeout=0.2, retries=1)
    finally:
        released.set()
    assert 0.4 <= time.monotonic() - started < 4.0
    assert len(server.requests) == 2


def test_timeout_of_an_endpoint_that_dribbles(server: Server) -> None:
    def script(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        request.send_response(200)
        request.end_headers()
        for _ in range(300):
            request.wfile.write(b" ")
            time.sleep(0.02)

    server.script = script
    started = time.monotonic()
    with pytest.raises(SourceUnavailable, match=r"no whole reply within 0\.2 s"):
        ask(server.url, timeout=0.2, retries=0)
    assert time.monotonic() - started < 4.0


def test_a_large_reply_is_not_read_whole(server: Server) -> None:
    written: list[int] = []
    finished = threading.Event()

    def script(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            for _ in range(1000):
                written.append(request.wfile.write(b"0" * 100_000))
        finally:
            finished.set()

    server.script = script
    with pytest.raises(SourceError, match="its reply is larger than max_bytes, 1000") as caught:
        ask(server.url, max_bytes=1000)
    assert not isinstance(caught.value, SourceUnavailable)
    assert finished.wait(5)
    assert len(server.requests) == 1
    assert sum(written) < 50_000_000  # what the sockets' buffers took


def test_a_reply_announced_as_large_is_not_waited_for(server: Server) -> None:
    released = threading.Event()

    def script(request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        reply(request, b"", length=1001)
        released.wait(5)

    server.script = script
    try:
        with pytest.raises(SourceError, match="its reply is larger than max_bytes, 1000"):
            ask(server.url, max_bytes=1000, timeout=0.5, retries=0)
    finally:
        released.set()


def test_a_reply_of_exactly_max_bytes_is_read(server: Server) -> None:
    body = b'{"scores": [1]}'
    server.script = always(body)
    assert ask(server.url, max_bytes=len(body)) == [1.0]
    with pytest.raises(SourceError, match="larger than max_bytes"):
        ask(server.url, max_bytes=len(body) - 1)


def test_a_reply_cut_short_is_tried_again(server: Server) -> None:
    body = b'{"scores": [1]}'
    server.script = lambda request, asked: reply(request, body, length=len(body) + (len(server.requests) == 1))
    assert ask(server.url) == [1.0]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "its reply is not JSON: <html>"),
        (b"", "its reply is not JSON: "),
        (b"\xff\xfe\xff", "its reply is not JSON: "),
        (b"[1, 2]", "its reply has no list `scores`: [1, 2]"),
        (b'{"score": [1, 2]}', 'its reply has no list `scores`: {"score": [1, 2]}'),
        (b'{"scores": {"0": 1}}', "its reply has no list `scores`"),
        (b'{"scores": [1]}', "its reply has 1 scores for 2 responses"),
        (b'{"scores": [1, 2, 3]}', "its reply has 3 scores for 2 responses"),
        (b'{"scores": [1, NaN]}', "its score is nan, not finite"),
        (b'{"scores": [1, 1e999]}', "its score is inf, not finite"),
        (b'{"scores": [1, null]}', "its score is None, not a number"),
        (b'{"scores": [1, "2"]}', "its score is '2', not a number"),
    ],
)
def test_replies_that_are_no_scores(server: Server, body: bytes, reason: str) -> None:
    server.script = always(body)
    with pytest.raises(SourceError) as caught:
        ask(server.url, 2)
    assert not isinstance(caught.value, SourceUnavailable)
    assert caught.value.reason.startswith(reason)
    assert caught.value.row == (1 if "its score" in reason else None)
    assert len(server.requests) == 1


def test_wrong_counts_that_add_up_are_wrong(server: Server) -> None:
    server.script = lambda request, asked: reply(
        request, b'{"scores": [1]}' if len(server.requests) > 1 else b'{"scores": [1, 2, 3]}'
    )
    with pytest.raises(SourceError, match="3 scores for 2 responses"):
        ask(server.url, 4, batch=2)


def test_connection_refused() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(SourceUnavailable, match="failed 3 times, at last with ConnectionRefusedError"):
            ask(f"http://127.0.0.1:{taken.getsockname()[1]}/", retries=2)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_proxy_is_not_asked_about_this_machine(server: Server, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.script = lengths
    assert ask(server.url.replace("127.0.0.1", host), 2, retries=0) == [0.0, 1.1]


def test_the_proxy_is_asked_about_other_machines(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    server.script = lengths
    assert ask("http://rewards.invalid/score", 2, retries=0) == [0.0, 1.1]


def test_rows_that_json_cannot_hold(server: Server) -> None:
    source = build(HttpReward(http=server.url), "here")
    for value, error in ((b"raw", "TypeError"), (float("nan"), "ValueError")):
        with pytest.raises(SourceError, match=f"raised {error}"):
            checked(source, ["p"], ["r"], [{"image": value}])
    assert server.requests == []
