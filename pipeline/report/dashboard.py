"""The page, live: a small server of its own process that reads run folders and writes nothing.

Training neither knows of it nor waits for it. It answers GET alone, to its own host names alone, and off loopback only who
brings its token.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from pipeline.errors import UserError
from pipeline.report import page
from pipeline.report.read import is_run, read_run, running, stage_names, summary, updated
from pipeline.report.series import Series

TOKEN = "RELAY_DASHBOARD_TOKEN"  # nosec B105 # the name of an environment variable
COOKIE = "relay_dashboard"
KEPT = 16
"""Of so many runs the curves stay in memory between two readings."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Runs:
    """The runs below a folder, or the one run that it is. Only direct children count, and none that leads out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._summaries: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._series: OrderedDict[str, dict[Path, Series]] = OrderedDict()
        self._lock = Lock()

    def folders(self) -> dict[str, Path]:
        if is_run(self.root):
            return {self.root.resolve().name: self.root}
        inside = self.root.resolve()
        found = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return {p.name: p for p in found if p.is_dir() and is_run(p) and p.resolve().parent == inside}

    def summaries(self) -> list[dict[str, Any]]:
        """A line for each run, the one that changed last first; one is read again when something of it changed."""
        found = []
        for name, folder in self.folders().items():
            try:
                order = list(self._summaries[name][1]["stages"]) if name in self._summaries else stage_names(folder, {})
                now = (updated(folder, order), running(folder))
                if name not in self._summaries or self._summaries[name][0] != now:
                    self._summaries[name] = (now, summary(folder) | {"id": name})
                found.append(self._summaries[name][1])
            except OSError:  # removed meanwhile
                self._summaries.pop(name, None)
        return sorted(found, key=lambda run: (run["state"] != "running", -run["updated"]))

    def view(self, name: str) -> dict[str, Any] | None:
        """All of a run; None where there is none of that name."""
        folder = self.folders().get(name)
        if folder is None:
            return None
        with self._lock:
            kept = self._series.setdefault(name, {})
            self._series.move_to_end(name)
            if len(self._series) > KEPT:
                self._series.popitem(last=False)
            try:
                return read_run(folder, kept)
            except FileNotFoundError:  # removed meanwhile
                return None


def application(runs: Runs, hosts: list[str], token: str | None) -> Any:
    """The ASGI application. `hosts`: the names it answers to; with a `token`, it answers who brings that."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route

    kinds = {".js": "text/javascript", ".css": "text/css"}

    def index(request: Request) -> Response:
        return Response(page.render([], live=True), media_type="text/html")

    def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in (*page.LIVE, "page.css"):
            return PlainTextResponse("no such file", 404)
        return Response(
            page.asset(name), media_type=kinds[Path(name).suffix], headers={"cache-control": "max-age=3600"}
        )

    def listed(request: Request) -> Response:
        return Response(page.dumps(runs.summaries()), media_type="application/json")

    def one(request: Request) -> Response:
        view = runs.view(request.query_params.get("id", ""))
        if view is None:
            return PlainTextResponse("no such run", 404)
        return Response(page.dumps(view), media_type="application/json")

    class Guard:
        """Adds the headers to every answer; with a token, asks for it first."""

        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def guarded(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                await send(message)

            answer = self.app
            if token is not None and scope["type"] == "http":
                request = Request(scope)
                if same(request.query_params.get("token", ""), token):
                    answer = RedirectResponse("/", 303)
                    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
                elif not same(request.cookies.get(COOKIE, ""), token):
                    answer = PlainTextResponse(
                        "Open the address that `relay dashboard` printed, with its token.\n", 401
                    )
            await answer(scope, receive, guarded)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/assets/{name}", asset),
            Route("/api/runs", listed),
            Route("/api/run", one),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Guard)],
    )


def same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def serve(root: Path, host: str, port: int) -> None:
    """Serve the runs of `root` until interrupted. Raises UserError where the address cannot be had."""
    import uvicorn

    loopback = is_loopback(host)
    token = None if loopback else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}",
            f"cannot listen there: {error.strerror}",
            expected="an address of this machine and a free port",
            fix="choose another --port; 0 takes a free one",
        ) from None
    listening.listen(128)  # who reads the address below may come at once
    names = (
        ["127.0.0.1", "[::1]", "localhost"] if loopback else ["*"]
    )  # off loopback the token says who may, whatever the name
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    print(f"dashboard: http://{shown}:{port}/{f'?token={token}' if token else ''}", flush=True)
    config = uvicorn.Config(
        application(Runs(root), names, token),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
