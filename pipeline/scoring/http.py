"""Score responses by an HTTP endpoint: JSON {"prompts", "responses", "rows"} there, {"scores"} back. Standard library only."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from pipeline.config.schema import Endpoint, HttpReward
from pipeline.errors import UserError
from pipeline.scoring.errors import SourceError, SourceUnavailable
from pipeline.scoring.function import Judge

SHOWN = 200
"""Characters of an endpoint's reply that an error shows."""

CHUNK = 1 << 16
JSON = {"Content-Type": "application/json", "Accept": "application/json"}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would follow it with a GET, without the request's body, and take the token along to any
    host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Clock:
    """Cuts a request's connection when its time is over, whatever the endpoint is sending: urllib's timeout is for each wait
    on the socket, and one that sends a byte now and then would never end."""

    def __init__(self, seconds: float) -> None:
        self.end, self.over = time.monotonic() + seconds, False
        self._timer: threading.Timer | None = None

    def watch(self, connection: socket.socket) -> None:
        self._timer = threading.Timer(max(0.0, self.end - time.monotonic()), self._cut, [connection])
        self._timer.daemon = True
        self._timer.start()

    def _cut(self, connection: socket.socket) -> None:
        self.over = True
        with suppress(OSError):  # it ended meanwhile
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's own, which is no safe call from here

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Request(urllib.request.Request):
    clock: _Clock


class _Timed:
    """For urllib's handlers: connections are watched by their request's clock as soon as they stand."""

    def do_open(self, http_class: Any, request: _Request, **options: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            connection = http_class(*args, **kwargs)
            connect = connection.connect

            def watched() -> None:
                connect()
                request.clock.watch(connection.sock)

            connection.connect = watched
            return connection

        return super().do_open(made, request, **options)  # type: ignore[misc]


class _Http(_Timed, urllib.request.HTTPHandler):  # type: ignore[misc]
    pass


class _Https(_Timed, urllib.request.HTTPSHandler):  # type: ignore[misc]
    pass


def judge(block: HttpReward, name: str, where: str) -> Judge:
    """Scores from `block.http`, asked for in requests of `block.batch` rows; values as the endpoint gave them.

    Raises UserError at `where` when there is no token, SourceUnavailable when a request failed `1 + retries` times by a
    connection error, a timeout, HTTP 429 or 5xx, and SourceError at once for any other status and for a reply that is too
    large, not JSON, or not one score per row.
    """
    opener, headers = opener_for(block.http), authorization(block, where)

    def scores(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(responses), block.batch):
            part = slice(start, start + block.batch)
            asked = {"prompts": prompts[part], "responses": responses[part], "rows": rows[part]}
            reply = ask(opener, block, block.http, name, json.dumps(asked, allow_nan=False).encode(), headers)
            found += _parse(reply, name, len(responses[part]))
        return found

    return scores


def authorization(block: Endpoint, where: str) -> dict[str, str]:
    """The header with the bearer token. Raises UserError at `where` when its variable is not set."""
    if block.key_env is None:
        return {}
    token = os.environ.get(block.key_env, "").strip()
    if not token:
        raise UserError(
            where, f"the environment variable {block.key_env} is not set", fix=f"export {block.key_env}=KEY"
        )
    if not (token.isascii() and token.isprintable()):  # http.client's own message would show it
        raise UserError(where, f"the environment variable {block.key_env} holds no bearer token", expected="ASCII text")
    return {"Authorization": f"Bearer {token}"}


def ask(
    opener: urllib.request.OpenerDirector,
    block: Endpoint,
    url: str,
    name: str,
    body: bytes,
    headers: dict[str, str],
) -> bytes:
    """The reply to one request, tried again after `backoff`, 2 `backoff`, 4 `backoff` … seconds. Raises SourceError under
    `name`."""
    reason = ""
    for attempt in range(1 + block.retries):
        if attempt:
            time.sleep(block.backoff * 2 ** (attempt - 1))
        try:
            status, reply = _post(opener, block, _Request(url, body, {**JSON, **headers}, method="POST"))
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = f"{type(cause).__name__}: {cause}"
            continue
        if status < 300:
            if reply is None:
                raise SourceError(name, None, f"its reply is larger than max_bytes, {block.max_bytes}")
            return reply
        reason = f"HTTP {status}: {_hidden(beginning(reply or b''), headers)}"
        if status != 429 and status < 500:
            raise SourceError(name, None, reason)
    times = "once" if block.retries == 0 else f"{1 + block.retries} times, at last"
    raise SourceUnavailable(name, None, f"failed {times} with {reason}")


def _post(opener: urllib.request.OpenerDirector, block: Endpoint, request: _Request) -> tuple[int, bytes | None]:
    """(status, body) of one reply within `timeout`; the body is None as soon as it is known to exceed `max_bytes`, and of an
    error no more than its beginning."""
    request.clock = _Clock(block.timeout)
    try:
        try:
            with opener.open(request, timeout=block.timeout) as reply:
                found = reply.status, _read(reply, block.max_bytes)
        except urllib.error.HTTPError as error:
            with error:
                found = error.code, _beginning(error)
        if request.clock.over:  # to a reader a connection that was cut looks like the end of a reply
            raise TimeoutError
    except (OSError, HTTPException) as error:
        timed_out = isinstance(getattr(error, "reason", error), TimeoutError)
        if request.clock.over or timed_out:
            raise TimeoutError(f"no whole reply within {block.timeout:g} s") from None
        raise
    finally:
        request.clock.stop()
    return found


def _read(reply: HTTPResponse, most: int) -> bytes | None:
    """The body; None as soon as it is known to be longer than `most`."""
    if (reply.length or 0) > most:
        return None
    read = bytearray()
    while part := reply.read1(CHUNK):
        read += part
        if len(read) > most:
            return None
    if reply.length:  # the connection closed before all that Content-Length announced
        raise IncompleteRead(bytes(read), reply.length)
    return bytes(read)


def _parse(reply: bytes, name: str, size: int) -> list[Any]:
    try:
        answer = json.loads(reply)
    except ValueError:
        raise SourceError(name, None, f"its reply is not JSON: {beginning(reply)}") from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise SourceError(name, None, f"its reply has no list `scores`: {beginning(reply)}")
    if len(scores) != size:
        raise SourceError(name, None, f"its reply has {len(scores)} scores for {size} responses")
    return scores


def _beginning(error: urllib.error.HTTPError) -> bytes:
    """The first bytes of an error's body, as far as they can be read."""
    try:
        return error.read(4 * SHOWN)
    except (OSError, HTTPException):
        return b""


def _hidden(text: str, headers: dict[str, str]) -> str:
    """`text` without the token, which some endpoints repeat in their errors."""
    token = headers.get("Authorization", "").removeprefix("Bearer ")
    return text.replace(token, "…") if token else text


def beginning(body: bytes) -> str:
    """The first characters of a body, for an error."""
    return body[: 4 * SHOWN].decode(errors="replace")[:SHOWN]  # a character has four bytes at most


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """An opener that follows no redirect, and on this machine goes past the proxy that the environment names."""
    host = urlsplit(url).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects(), _Http(), _Https()]
    if loopback:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)
