"""Score responses by an HTTP endpoint: JSON {"prompts", "responses", "rows"} there, {"scores"} back. Standard library only."""

from __future__ import annotations

import ipaddress
import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from pipeline.config.schema import Endpoint, HttpReward
from pipeline.scoring.errors import SourceError, SourceUnavailable
from pipeline.scoring.function import Judge

SHOWN = 200
"""Characters of an endpoint's reply that an error shows."""

CHUNK = 1 << 16
JSON = {"Content-Type": "application/json", "Accept": "application/json"}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would follow it with a GET, without the request's body."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def judge(block: HttpReward, name: str) -> Judge:
    """Scores from `block.http`, asked for in requests of `block.batch` rows; values as the endpoint gave them.

    Raises SourceUnavailable when a request failed `1 + retries` times by a connection error, a timeout, HTTP 429 or 5xx,
    and SourceError at once for any other status and for a reply that is too large, not JSON, or not one score per row.
    """
    opener = opener_for(block.http)

    def scores(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(responses), block.batch):
            part = slice(start, start + block.batch)
            asked = {"prompts": prompts[part], "responses": responses[part], "rows": rows[part]}
            reply = ask(opener, block, block.http, name, json.dumps(asked, allow_nan=False).encode())
            found += _parse(reply, name, len(responses[part]))
        return found

    return scores


def ask(
    opener: urllib.request.OpenerDirector,
    block: Endpoint,
    url: str,
    name: str,
    body: bytes,
    headers: dict[str, str] | None = None,
) -> bytes:
    """The reply to one request, tried again after `backoff`, 2 `backoff`, 4 `backoff` … seconds. Raises SourceError under
    `name`."""
    reason = ""
    request = urllib.request.Request(url, body, {**JSON, **(headers or {})}, method="POST")
    for attempt in range(1 + block.retries):
        if attempt:
            time.sleep(block.backoff * 2 ** (attempt - 1))
        try:
            reply = _post(opener, block, request)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {_beginning(error)}"
            if error.code != 429 and error.code < 500:
                raise SourceError(name, None, reason) from None
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = f"{type(cause).__name__}: {cause}"
        else:
            if reply is None:
                raise SourceError(name, None, f"its reply is larger than max_bytes, {block.max_bytes}")
            return reply
    times = "once" if block.retries == 0 else f"{1 + block.retries} times, at last"
    raise SourceUnavailable(name, None, f"failed {times} with {reason}")


def _post(opener: urllib.request.OpenerDirector, block: Endpoint, request: urllib.request.Request) -> bytes | None:
    """The body of one reply, or None as soon as it is known to exceed `max_bytes`."""
    # urllib's timeout is for each wait on the socket; the deadline stops an endpoint that sends a byte now and then.
    deadline = time.monotonic() + block.timeout
    with opener.open(request, timeout=block.timeout) as reply:
        if (reply.length or 0) > block.max_bytes:
            return None
        read = bytearray()
        while part := reply.read1(CHUNK):
            read += part
            if len(read) > block.max_bytes:
                return None
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole reply within {block.timeout:g} s")
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


def _beginning(error: urllib.error.HTTPError) -> str:
    """The first characters of an error's body, as far as it can be read."""
    with error:
        try:
            return beginning(error.read(4 * SHOWN))
        except (OSError, HTTPException):
            return ""


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
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if loopback:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)
