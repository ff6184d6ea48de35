"""The dashboard: a real process, asked over HTTP and looked at in a real browser while a run grows."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.report.dashboard import TOKEN, Runs
from tests.report.conftest import Seen
from tests.support import runs


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.address + path, timeout=10, **options)


def start(root: Path, *more: str, env: dict[str, str] | None = None) -> Server:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "dashboard", str(root), "--port", "0", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert process.stdout is not None
    return Server(process, process.stdout.readline().split()[-1].rstrip("/"))


def stop(server: Server) -> str:
    """End it as Ctrl-C does; what it said after its address."""
    server.process.send_signal(signal.SIGINT)
    said, _ = server.process.communicate(timeout=20)
    assert server.process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dashboard") / "runs"
    folder.mkdir()
    runs.run(folder / "first", steps=10)
    runs.run(folder / "a b&c=é", steps=5, until="ppo")
    runs.run(folder.parent / "outside", steps=5)
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    started = start(root)
    yield started
    assert stop(started) == ""


def test_runs_are_listed(server: Server) -> None:
    listed = server.get("/api/runs").json()
    assert {run["id"]: run["state"] for run in listed} == {"first": "done", "a b&c=é": "failed"}
    latest = next(run for run in listed if run["id"] == "first")["latest"]["ppo"]
    assert (latest["step"], latest["metric"]) == (10, "objective/scores")


def test_a_run_of_any_name(server: Server) -> None:
    view = server.get("/api/run", params={"id": "a b&c=é"}).json()
    assert view["stages"]["ppo"]["why"] == "the reward source gave no number for row 7"


@pytest.mark.parametrize("name", ["none", "", ".", "..", "../outside", "link", "first/sft", "/etc", "empty"])
def test_nothing_but_the_runs(server: Server, name: str) -> None:
    assert server.get("/api/run", params={"id": name}).status_code == 404


def test_nothing_but_its_own_files(server: Server) -> None:
    assert server.get("/assets/page.js").status_code == 200
    for path in ("/assets/page.py", "/assets/..%2fpage.py", "/assets/../page.py", "/first/sft/metrics.jsonl"):
        assert server.get(path).status_code == 404, path


def test_it_only_reads(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert httpx.request(method, server.address + "/api/runs").status_code == 405
    headers = server.get("/").headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_another_site_s_name_is_refused(server: Server) -> None:
    """As a page of that site would ask, once its name leads to this machine."""
    port = server.address.rpartition(":")[2]
    assert server.get("/api/runs", headers={"host": f"evil.example:{port}"}).status_code == 400
    assert server.get("/api/runs", headers={"host": f"localhost:{port}"}).status_code == 200


def test_off_loopback_a_token_is_asked_for(root: Path) -> None:
    server = start(root, "--host", "0.0.0.0", env={TOKEN: "s3cret-token"})
    address, token = server.address.replace("0.0.0.0", "127.0.0.1").split("/?token=")
    try:
        assert token == "s3cret-token"
        for path in ("/", "/api/runs", "/assets/page.js", "/?token=", "/?token=wrong"):
            assert httpx.get(address + path).status_code == 401, path
        assert httpx.get(address + "/", cookies={"relay_dashboard": "wrong"}).status_code == 401
        with httpx.Client(follow_redirects=True) as client:
            answer = client.get(f"{address}/?token={token}")
            assert (answer.status_code, answer.url.query) == (200, b"")
            assert client.get(address + "/api/runs").status_code == 200
            cookie = answer.history[0].headers["set-cookie"].lower()
            assert "httponly" in cookie
            assert "samesite=strict" in cookie
        assert "s3cret" not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    finally:
        said = stop(server)
    assert "s3cret" not in said


def test_a_port_that_is_taken(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        relay = [sys.executable, "-m", "pipeline.cli", "dashboard", str(root), "--port", str(port)]
        refused = subprocess.run(relay, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"--port {port}" in refused.stderr


def test_loopback_of_ipv6(root: Path) -> None:
    server = start(root, "--host", "::1")
    try:
        assert server.get("/api/runs").status_code == 200
        assert server.get("/api/runs", headers={"host": "evil.example"}).status_code == 400
    finally:
        stop(server)


@pytest.mark.fast
def test_a_run_that_goes_and_comes(tmp_path: Path) -> None:
    runs.run(tmp_path / "hh", steps=2)
    seen = Runs(tmp_path)
    assert [run["state"] for run in seen.summaries()] == ["done"]
    assert seen.view("hh") is not None
    shutil.rmtree(tmp_path / "hh")
    assert (seen.summaries(), seen.view("hh")) == ([], None)
    runs.run(tmp_path / "hh", steps=4, until="ppo")
    assert [run["state"] for run in seen.summaries()] == ["failed"]
    view = seen.view("hh")
    assert view is not None
    assert view["stages"]["sft"]["series"]["loss"]["x"] == [1, 2, 3, 4], "of the new files, not of those before"


@pytest.mark.fast
def test_one_run_alone(tmp_path: Path) -> None:
    runs.run(tmp_path / "hh", steps=2)
    assert [run["id"] for run in Runs(tmp_path / "hh").summaries()] == ["hh"]


def test_the_page_grows_with_the_run(look: Callable[..., Seen], server: Server, root: Path) -> None:
    """A row is added while the run is locked: the page shows it, and what was typed and opened stays."""
    from pipeline.lock import run_lock

    with run_lock(root / "first"):
        seen = look(server.address + "/")
        page = seen.page
        page.get_by_role("link", name="first").click()
        page.locator("#stage-ppo figure").first.scroll_into_view_if_needed()
        page.wait_for_selector("#stage-ppo figure svg.main-svg", state="attached")
        page.locator("#stage-ppo input[type=search]").fill("Question")
        page.locator("#stage-ppo figure summary").first.click()
        with runs.tracker(root / "first" / "ppo", 12, resume=10) as stream:
            stream.log(11, runs.row("ppo", 11))
        page.wait_for_selector("#node-ppo >> text=step 11 of 12")
        assert page.locator("#stage-ppo figure").first.locator("tbody tr").count() == 11
        assert page.locator("#stage-ppo input[type=search]").input_value() == "Question"
        page.get_by_role("link", name="All runs").click()
        page.get_by_label("Compare first").check()
        page.get_by_label("Compare a b&c=é").check()
        page.get_by_role("button", name="Compare 2").click()
        page.wait_for_selector("text=Where the recipes differ")
    assert seen.errors == []
    assert all(request.startswith((server.address, "data:")) for request in seen.requests)
