"""scripts/audit.sh, with pip-audit, against a service on this machine that answers as OSV does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "audit.sh"
KNOWN = {
    "id": "GHSA-462w-v97r-4m45",
    "aliases": ["CVE-2019-10906"],
    "summary": "Jinja2 sandbox escape via string formatting",
    "published": "2019-04-10T14:30:24Z",
    "affected": [
        {
            "package": {"name": "jinja2", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.10.1"}]}],
        }
    ],
}
"""What OSV says of Jinja2 before 2.10.1, shortened."""


class Osv(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        old = asked["package"]["name"] == "jinja2" and asked["version"] == "2.4.1"
        body = json.dumps({"vulns": [KNOWN]} if old else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def osv() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audit(folder: Path, url: str, *pins: str) -> tuple[int, str]:
    file = folder / "pins.txt"
    file.write_text("\n".join(pins) + "\n", encoding="utf-8")
    env = {**os.environ, "OSV_URL": url}
    done = subprocess.run([str(SCRIPT), str(file)], env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_known_vulnerability_fails(osv: str, tmp_path: Path) -> None:
    code, said = audit(tmp_path, osv, "requests==2.34.2", "Jinja2==2.4.1")
    assert code == 1
    assert "jinja2 2.4.1: CVE-2019-10906: fixed in 2.10.1: Jinja2 sandbox escape" in said
    assert "1 in 2 packages" in said


def test_versions_without_one_pass(osv: str, tmp_path: Path) -> None:
    code, said = audit(tmp_path, osv, "requests==2.34.2", "Jinja2==3.1.6")
    assert (code, said) == (0, f"known vulnerabilities of {tmp_path}/pins.txt: 0 in 2 packages\n")


def test_no_network_is_said_and_does_not_fail(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        code, said = audit(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}/", "Jinja2==2.4.1")
    assert code == 0
    assert "not checked: no network" in said


def test_a_report_that_does_not_come_fails(osv: str, tmp_path: Path) -> None:
    code, said = audit(tmp_path, osv, "this is no requirement ==")
    assert code == 1
    assert "no report" in said
