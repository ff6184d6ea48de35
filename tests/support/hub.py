"""A server on this machine that speaks as much of the Hugging Face hub's HTTP interface as making a repository, looking at it,
what its card says, and uploading a folder (regular files in the commit, large ones by Git LFS) take."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LARGE = (".safetensors", ".gguf")


class Hub(ThreadingHTTPServer):
    """`repos` holds {private, files} by name; `tokens` who has come in; `refuses` is the status it answers everything with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.validated: list[str] = []
        self.asked: list[str] = []
        self.refuses: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a request that has a body."""
        if self.refuses:
            return self.refuses, {"error": "no right to do that"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            private = asked.get("private") or asked.get("visibility") == "private"
            self.repos[name] = {"private": bool(private), "files": {}}
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            self.validated.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**one, "actions": {"upload": {"href": f"{self.url}/put/{one['oid']}"}}} for one in objects]
            return 200, {"transfer": "basic", "objects": upload}
        name = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")[0]
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "lfs" if f.endswith(LARGE) else "regular"} for f in files]
            return 200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]}
        if "/commit/" in path:
            for line in body.splitlines():
                self.commit(self.repos[name]["files"], json.loads(line))
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40, "success": True}
        return 404, {"error": f"{path}: not spoken here"}

    def commit(self, files: dict[str, bytes], line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = self.large[value["oid"]]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.body()
        if "/put/" not in self.path:
            self.server.tokens.add(self.headers["Authorization"])
        self.reply(*self.server.answer(self.path.partition("?")[0], body))

    def do_PUT(self) -> None:
        body = self.body()
        assert self.path == f"/put/{hashlib.sha256(body).hexdigest()}"
        self.server.large[self.path.removeprefix("/put/")] = body
        self.reply(200, {})

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/").partition("/")[2].partition("/revision/")[0]
        repo = self.server.repos.get(name)
        found = {"id": name, "modelId": name, "sha": "c" * 40, "tags": [], "private": repo["private"]} if repo else {}
        card = repo["files"].get("README.md", b"").decode() if repo else ""
        if card.startswith("---\n"):
            found["cardData"] = yaml.safe_load(card.split("---\n")[1])
        self.server.asked += [name] if name else []
        self.reply(200 if repo else 404, found)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.shutdown()
        thread.join()
