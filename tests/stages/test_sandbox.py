"""Programs that try to get out of the sandbox, or never end: none does harm, and none counts as passed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from stages.evaluate import jail, sandbox
from stages.evaluate.sandbox import Limits, Outcome, run, run_all

ROOT = Path(__file__).resolve().parents[2]
SHORT = Limits(seconds=1.0)

FORGED = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b"0" * 32 + b" passed")
    except OSError:
        pass
os._exit(0)
"""
DEAF = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
OVER_AND_OVER = """
import os, subprocess, sys, threading, time
while True:
    try:
        {}
    except (OSError, RuntimeError, MemoryError):
        pass
"""


def test_a_program_that_runs_to_its_end_passes() -> None:
    assert run("import math, typing, collections\nassert math.sqrt(4) == 2") == Outcome("passed")


def test_a_thread_may_start() -> None:
    assert run("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").status == "passed"


def test_a_failed_assertion_says_so() -> None:
    assert run("assert 1 == 2, 'no'") == Outcome("failed", "AssertionError: no")


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os; os.write(3, b'passed'); os._exit(0)",
        FORGED,
        "import ctypes; ctypes.string_at(0)",
        "raise KeyboardInterrupt",
        "this is no Python",
        "def f(): f()\nf()",
    ],
    ids=["exit", "_exit", "guessed report", "forged report", "segfault", "interrupt", "syntax", "recursion"],
)
def test_leaving_early_is_no_success(program: str) -> None:
    assert run(program, SHORT).status in ("failed", "killed")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        DEAF,
        "while True: print('x' * 100000)",
    ],
    ids=["loop", "sleep", "caught", "ignored signals", "output"],
)
def test_endless_programs_are_stopped(program: str) -> None:
    began = time.monotonic()
    assert run(program, SHORT).status in ("timed out", "failed", "killed")
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        OVER_AND_OVER.format("os.fork()"),
        OVER_AND_OVER.format("subprocess.Popen([sys.executable, '-c', 'while True: pass'])"),
        OVER_AND_OVER.format("os.posix_spawn('/bin/sleep', ['sleep', '1000'], {{}})"),
        "import ctypes\nwhile True: ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0)",
        OVER_AND_OVER.format("threading.Thread(target=time.sleep, args=(1000,)).start()"),
    ],
    ids=["fork", "fork caught", "Popen", "posix_spawn", "clone", "threads"],
)
def test_fork_bombs_start_no_process(program: str) -> None:
    before = set(children())
    assert run(program, SHORT).status != "passed"
    assert set(children()) <= before


def children() -> list[str]:
    """Command lines of processes that run a jail, or what a program above would start."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if "jail.py" in line or line.startswith("sleep 1000") or "while True: pass" in line:
            found.append(f"{place.parent.name} {line}")
    return found


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 31)",
        "x = []\nwhile True: x.append('x' * (1 << 20))",
        "import mmap; x = [mmap.mmap(-1, 1 << 28) for _ in range(64)]",
        "import os; os.memfd_create('x')",
    ],
    ids=["at once", "bit by bit", "mmap", "memfd"],
)
@pytest.mark.alone
def test_memory_hogs_get_none(program: str) -> None:
    assert run(program, Limits(seconds=5.0)).status in ("failed", "killed")


def test_a_file_has_a_size_and_a_directory_too() -> None:
    assert "large" in run("open('x', 'wb').write(bytes(1 << 21))").reason
    many = "n = 0\nwhile True:\n    open(str(n), 'wb').write(bytes(1 << 20))\n    n += 1"
    assert run(many) == Outcome("killed", f"more than {1 << 24} bytes in its directory")


def test_its_own_directory_is_empty_writable_and_removed() -> None:
    steps = ["import os", "assert os.listdir('.') == []", "os.mkdir('a')", "open('a/b', 'w').write('c')"]
    found = run("\n".join([*steps, "assert open('a/b').read() == 'c'", "raise OSError(os.getcwd())"]))
    assert found.reason.startswith("OSError: /")
    assert not Path(found.reason.removeprefix("OSError: ")).exists()


@pytest.mark.parametrize("where", ["tmp", "repository", "home", "shm", "parent"])
def test_nothing_is_written_outside(where: str, tmp_path: Path) -> None:
    folders = {"tmp": tmp_path, "repository": ROOT, "home": Path.home(), "shm": Path("/dev/shm"), "parent": Path("..")}
    target = folders[where] / "relay-sandbox-escape"
    program = f"open({str(target)!r}, 'w').write('x')"
    assert "PermissionError" in run(program).reason
    assert where == "parent" or not target.exists()
    assert not (Path(sandbox.tempfile.gettempdir()) / "relay-sandbox-escape").exists()


@pytest.mark.parametrize(
    "attempt",
    [
        "open({0!r}, 'a')",
        "os.remove({0!r})",
        "os.rename({0!r}, 'x')",
        "os.chmod({0!r}, 0)",
        "os.utime({0!r})",
        "os.truncate({0!r}, 0)",
        "os.symlink({0!r}, 'x'); open('x', 'w')",
        "os.link({0!r}, 'x'); open('x', 'w')",
        "os.setxattr({0!r}, 'user.x', b'x')",
        "open({0!r}).read()",
        "os.listdir(os.path.dirname({0!r}))",
    ],
)
def test_a_file_outside_stays_as_it_is_and_unread(attempt: str, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("secret")
    before = file.stat()
    assert "Error" in run("import os\n" + attempt.format(str(file))).reason
    assert file.read_text() == "secret"
    assert (file.stat().st_mode, file.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_no_network(kind: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        found = run(
            f"import socket\ns = socket.socket(socket.AF_INET, socket.{kind})\ns.connect({server.getsockname()!r})"
        )
        assert "PermissionError" in found.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_names_are_looked_up() -> None:
    found = run("import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.create_connection(('localhost', 80))")
    assert found.status == "failed"


@pytest.mark.parametrize(
    "attempt",
    [
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.killpg(0, 9)",
        "ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) and 1 / 0",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.execv('/bin/sh', ['sh'])",
    ],
)
def test_other_processes_are_out_of_reach(attempt: str) -> None:
    assert "Error" in run("import os, ctypes, resource\n" + attempt).reason


def test_no_secret_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = run("import os\nraise OSError(dict(os.environ))")
    assert found.reason in ("OSError: {}", "OSError: {'LC_CTYPE': 'C.UTF-8'}")  # which Python sets itself


def test_many_at_once_in_order() -> None:
    programs = [f"assert {number} % 3" for number in range(12)]
    assert [outcome.status == "passed" for outcome in run_all(programs)] == [bool(number % 3) for number in range(12)]


def test_the_same_for_a_user_without_rights(tmp_path: Path) -> None:
    """As `nobody`, where the tests run as root; else they have run as an ordinary user already."""
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests are this one")
    programs = [
        "x = 1",
        "import os; os.fork()",
        "import socket; socket.socket()",
        f"open({str(tmp_path / 'x')!r}, 'w')",
    ]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from stages.evaluate.sandbox import run
print([run(program).status for program in {programs!r}])
"""
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    for python in (sys.executable, "/usr/bin/python3"):  # the first may lie in root's home
        try:
            found = subprocess.run([python, "-c", code], capture_output=True, text=True, **nobody)
        except PermissionError:
            continue
        if found.returncode == 0:
            assert found.stdout.strip() == "['passed', 'failed', 'failed', 'failed']"
            return
    pytest.skip("nobody can read no Python, or not this checkout")


def test_a_machine_without_landlock_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A jail whose call for Landlock is one that no kernel knows."""
    broken = tmp_path / "jail.py"
    broken.write_text(
        Path(jail.__file__)
        .read_text()
        .replace("LANDLOCK_RESTRICT_SELF = 444, 445, 446", "LANDLOCK_RESTRICT_SELF = 9444, 9445, 9446")
    )
    monkeypatch.setattr(sandbox, "JAIL", broken)
    with pytest.raises(UserError, match="offers no Landlock"):
        run("open('ran', 'w')")


def test_the_numbers_of_system_calls() -> None:
    """Against the kernel's headers, where they are installed and know a name."""
    headers = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
    if not all(header.is_file() for header in headers):
        pytest.skip("no kernel headers")
    ours = {**jail.DENIED, "clone": jail.CLONE, "clone3": jail.CLONE3, "prlimit64": jail.PRLIMIT}
    for column, header in enumerate(headers):
        theirs = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
        known = {name: numbers[column] for name, numbers in ours.items() if name in theirs}
        assert len(known) > 40
        assert known == {name: int(theirs[name]) for name in known}
