"""Several hosts, as two network namespaces: a stage equals the one-host run's, and what hosts must share is asked for first.

The cut cable, the killed hosts and the whole chain take minutes: scripts/two_hosts.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline import agent, hosts
from pipeline.config.recipe import load
from pipeline.errors import UserError
from tests.faults.test_resume import assert_same_files
from tests.support import tiny
from tests.support.hosts import FIRST, SECOND, TwoHosts, why_not
from tests.support.session import Ranks


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("hosts")


def test_a_stage_over_two_hosts_equals_one_host(
    two_hosts: Path, ranks: Callable[[int], Ranks], tiny_llama: Path, tmp_path: Path
) -> None:
    one = tiny.recipe(tmp_path / "one.yaml", tiny_llama)
    ranks(2).call("tests.support.stages:run", recipe=str(one), stage="sft", run_dir=str(tmp_path / "one"))
    with TwoHosts(two_hosts / "shared") as place:
        two = over(place, tmp_path / "two.yaml", tiny_llama)
        arguments = ("run", str(two), "--run-dir", str(tmp_path / "two"), "--until", "sft")
        running = place.relay(*arguments, log=tmp_path / "log", env={"WANDB_API_KEY": "a-secret"})
        shown: set[str] = set()
        while running.poll() is None:
            shown |= {word for pid in psutil.pids() for word in words(pid)}
            time.sleep(0.5)
        log = (tmp_path / "log").read_text()
        assert running.returncode == 0, log
        assert f"sft  on {FIRST}, {SECOND}" in log
        assert "stages.sft" in shown
        assert not [word for word in shown if "a-secret" in word]
        place.quiet(5.0)
    assert_same_files(tmp_path / "two", tmp_path / "one", "sft")
    manifests = [json.loads((tmp_path / run / "sft/output/manifest.json").read_text()) for run in ("one", "two")]
    assert manifests[0]["inputs"] == manifests[1]["inputs"]  # the same work, wherever its ranks lie


def test_a_run_directory_that_is_not_shared(two_hosts: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run, local = tmp_path / "run", tmp_path / "local"
    run.mkdir()
    local.mkdir()
    rows = (tiny.QUICKSTART / "demonstrations.jsonl").read_text()
    (local / "rows.jsonl").write_text(rows)
    with TwoHosts(two_hosts / "apart", apart=[run, local]) as place:
        recipe = over(place, tmp_path / "two.yaml", tiny_llama)
        log = told(place, recipe, run, tmp_path / "log")
        assert f"what {FIRST} writes there is not seen on {SECOND}\n  expected one file system" in log
        recipe = over(place, tmp_path / "two.yaml", tiny_llama, stages__sft__data=[{"path": str(local / "rows.jsonl")}])
        log = told(place, recipe, tmp_path / "shared", tmp_path / "log")
        assert f"host {SECOND}: cannot read {local / 'rows.jsonl'}\n" in log
        place.quiet(5.0)


def told(place: TwoHosts, recipe: Path, run: Path, log: Path) -> str:
    """What a run that is refused prints."""
    running = place.relay("run", str(recipe), "--run-dir", str(run), "--until", "sft", log=log)
    assert running.wait(60.0) == 2, log.read_text()
    return log.read_text()


def over(place: TwoHosts, path: Path, base: Path, **changes: object) -> Path:
    """The tiny recipe with one rank on each of two hosts."""
    spread = {"config": "zero2", "num_gpus": 1, "num_nodes": 2, "hostfile": str(place.hostfile)}
    return tiny.recipe(path, base, deepspeed=spread, **changes)


def words(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def start_agent(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """`start_agent(command, lost=…)`: this host's agent, told to run `command`."""

    def start(command: list[str], lost: float = agent.LOST) -> subprocess.Popen[bytes]:
        (tmp_path / "token").touch()
        program = f"from pipeline import agent; agent.LOST = {lost}; agent.main()"
        pipe = subprocess.PIPE
        started = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stderr=pipe, bufsize=0)
        job = {
            "cwd": str(tmp_path),
            "environment": {"GREETING": "hello"},
            "paths": [str(tmp_path), str(tmp_path / "nothing")],
            "token": str(tmp_path / "token"),
            "toward": "127.0.0.1",
        }
        assert started.stdin is not None
        started.stdin.write(json.dumps(job).encode() + b"\n" + json.dumps({"command": command}).encode() + b"\n")
        return started

    return start


def heard(started: subprocess.Popen[bytes]) -> list[object]:
    """What an agent has said until its end, signs of life left out."""
    assert started.stderr is not None
    lines = [line for line in started.stderr.read().splitlines() if line != agent.MARK]
    return [json.loads(line[1:]) if line.startswith(agent.MARK) else line.decode() for line in lines]


def test_the_agent_tells_what_is_there_and_the_exit_code(
    start_agent: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    ready, text, code = heard(start_agent(["sh", "-c", "echo $GREETING $GLOO_SOCKET_IFNAME >&2; exit 75"]))
    assert isinstance(ready, dict)
    assert ready["absent"] == [str(tmp_path / "nothing")]
    assert ready["shared"] is True
    assert text == "hello lo"
    assert code == {"code": 75}


@pytest.mark.parametrize("silent", [False, True])
def test_the_agent_ends_the_ranks_without_relay(
    start_agent: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, silent: bool
) -> None:
    """A closed line, as when `relay run` is killed; or an open one on which nothing comes, as when the network is cut."""
    started = start_agent(["sh", "-c", "echo $$ > pid; sleep 100 & wait"], lost=1.0)
    limit = time.monotonic() + 10.0
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < limit
        time.sleep(0.02)
    group = int((tmp_path / "pid").read_text())
    began = time.monotonic()
    if not silent:
        assert started.stdin is not None
        started.stdin.close()
    assert started.wait(10.0) == 0
    assert time.monotonic() - began < 5.0
    assert not [p.pid for p in psutil.process_iter() if of_group(p.pid, group)]


def of_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("exit 0", "sleep 1", 0),
        ("exit 75", "exit 1", 75),  # rank 0 has left in order: all had saved
        ("sleep 100", "exit 2", 2),
        ("sleep 100", "kill -9 $PPID; sleep 100", 3),
    ],
)
def test_the_job_ends_everywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], first: str, second: str, code: int
) -> None:
    """Two agents on this machine; the last case kills the second one."""
    commands = [["sh", "-c", f"echo $$ >> {tmp_path}/pids; {script}"] for script in (first, second)]
    job = hosts.Job(["127.0.0.1", "127.0.0.2"], lambda node, _: commands[node], dict(os.environ), tmp_path, [])
    limit = time.monotonic() + 15.0
    while job.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert job.poll() == code
    left = [int(pid) for pid in (tmp_path / "pids").read_text().split() if of_group(int(pid), int(pid))]
    for pid in left:
        os.killpg(pid, 9)
    assert len(left) == (1 if code == 3 else 0)  # a plain program does not watch its agent, as ranks do
    lost = "host 127.0.0.2: its connection ended; the job is ended on 127.0.0.1"
    assert (lost in capfd.readouterr().err) == (code == 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pids"]


@pytest.mark.parametrize(
    ("text", "change", "said"),
    [
        ("127.0.0.1 slots=1\nb slots=1\n", {"num_nodes": 4}, r"num_nodes: 4 hosts wanted\n  expected at most 2"),
        ("127.0.0.1 slots=1\nb slots=1\n", {"num_gpus": 2}, r"num_gpus: 2 ranks per host wanted; .* gives 127.0.0.1 1"),
        ("127.0.0.1 slots=1\n\n# here\nb\n", {}, r"hostfile, line 4: 'b'\n  expected HOST slots=N"),
        ("b slots=1\nb slots=1\n", {}, r"line 2: .*\n  expected HOST slots=N, each host once"),
        ("203.0.113.7 slots=1\nb slots=1\n", {}, r"its first host, 203.0.113.7, is not this machine"),
        (None, {}, r"hostfile: no such file"),
        ("", {"hostfile": None}, r"num_nodes: 2 hosts wanted, and no hostfile says which"),
    ],
)
def test_bad_hostfiles(tmp_path: Path, text: str | None, change: dict[str, object], said: str) -> None:
    if text is not None:
        (tmp_path / "hostfile").write_text(text)
    spread = {"config": "zero2", "num_gpus": 1, "num_nodes": 2, "hostfile": "hostfile", **change}
    recipe = load(tiny.recipe(tmp_path / "two.yaml", tiny.QUICKSTART / "base", deepspeed=spread))
    if text is None:
        (tmp_path / "hostfile").unlink(missing_ok=True)
    with pytest.raises(UserError, match=said):
        hosts.read(recipe, "sft")
