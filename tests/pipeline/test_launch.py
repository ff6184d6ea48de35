"""Ports that no two runs share, what an exit code says, and no rank without the run it belongs to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import launch, lifeline

pytestmark = pytest.mark.fast

ASK = (
    "import sys; from pipeline.launch import free_port; print(*(free_port() for _ in range(200)), flush=True); input()"
)
RANK = (
    "from pipeline.lifeline import die_with_parents as d; d(); import time; print('lives', flush=True); time.sleep(60)"
)


def test_runs_get_different_ports() -> None:
    """Three processes at once ask for 200 ports each and listen on none yet."""
    runs = [
        subprocess.Popen([sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    with ThreadPoolExecutor() as pool:
        lines = list(pool.map(lambda run: run.stdout.readline(), runs))  # type: ignore[union-attr]
    ports = [int(port) for line in lines for port in line.split()]
    for run in runs:
        run.communicate("\n")
    assert len(ports) == len(set(ports)) == 600


def test_ports_in_use_and_of_outgoing_connections_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert launch.PORTS.stop <= first
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(launch, "PORTS", range(taken, taken + 1))
        with pytest.raises(launch.UserError, match="none is free"):
            launch.free_port()


def test_what_an_exit_code_says() -> None:
    assert "SIGKILL" in launch.ended(247)  # sys.exit(-9), as the launcher does
    assert "memory runs out" in launch.ended(247)
    assert "SIGSEGV" in launch.ended(245)
    assert launch.ended(1) == "exit code 1, its error is above"


def test_rank_whose_run_is_gone_before_it_starts() -> None:
    """A pid that is free now, and one that belongs to another process than the one that started the ranks."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine = lifeline.owner()
    assert mine.startswith(f"{os.getpid()}:")
    for owner, lives in ((mine, True), (f"{gone.pid}:12345", False), (f"{os.getpid()}:12345", False)):
        rank = subprocess.Popen(
            [sys.executable, "-c", RANK], env={**os.environ, lifeline.OWNER: owner}, stdout=subprocess.PIPE, text=True
        )
        try:
            assert lives == (_ended(rank) is None)
        finally:
            rank.kill()
            rank.communicate()


def _ended(rank: subprocess.Popen[str]) -> int | None:
    try:
        return rank.wait(timeout=2)
    except subprocess.TimeoutExpired:
        return None
