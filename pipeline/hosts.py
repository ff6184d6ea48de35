"""Several hosts: an agent on each runs the stage's launcher there, and the job ends everywhere when it ends on one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import agent
from pipeline.config.recipe import Recipe, outside, sources
from pipeline.errors import EXIT_STOPPED, EXIT_TROUBLE, UserError

ANSWER = 60.0
"""Seconds within which every host must answer at the start."""

SETTLE = 3.0
"""Seconds that the other hosts get to end by themselves after one has."""

OWN = re.compile(
    r"(SSH_|SLURM|SRUN_|XDG_|DBUS_)|(CUDA_VISIBLE_DEVICES|DISPLAY|HOSTNAME|OLDPWD|PWD|RELAY_PARENT|SHLVL|TMPDIR|_)$"
)
"""Variables that mean something on their own host alone."""


def read(recipe: Recipe, stage: str) -> list[str]:
    """The hosts of a stage, rank 0's first; empty when it runs on this host alone. Raises UserError on a bad hostfile."""
    place, where = recipe.stages[stage].deepspeed, recipe.where("stages", stage, "deepspeed")
    if place.hostfile is None:
        if place.num_nodes > 1:
            raise UserError(
                f"{where}.num_nodes",
                f"{place.num_nodes} hosts wanted, and no hostfile says which",
                expected="deepspeed.hostfile: a file with a line `HOST slots=N` for each host",
            )
        return []
    file = Path(recipe.local(place.hostfile))
    if not file.is_file():
        raise UserError(f"{where}.hostfile", f"no such file: {file}", expected="a line `HOST slots=N` for each host")
    slots: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.match(r"(\S+)\s+slots=(\d+)", line.strip())
        if found is None or found[1] in slots:
            raise UserError(
                f"{file}, line {number}", repr(line), expected="HOST slots=N, each host once", fix="correct that line"
            )
        slots[found[1]] = int(found[2])
    chosen = list(slots)[: place.num_nodes]
    if len(chosen) < place.num_nodes:
        raise UserError(
            f"{where}.num_nodes", f"{place.num_nodes} hosts wanted", expected=f"at most {len(chosen)}, as {file} lists"
        )
    if small := [host for host in chosen if slots[host] < place.num_gpus]:
        raise UserError(
            f"{where}.num_gpus",
            f"{place.num_gpus} ranks per host wanted; {file} gives {small[0]} {slots[small[0]]} slots",
            fix=f"lower num_gpus, or raise slots of {small[0]} if it has the devices",
        )
    if not is_here(chosen[0]):
        raise UserError(
            str(file),
            f"its first host, {chosen[0]}, is not this machine, {socket.gethostname()}",
            expected="`relay run` on the first host, where rank 0 runs",
            fix=f"start it on {chosen[0]}, or put this machine's line first",
        )
    return chosen


def is_here(host: str) -> bool:
    """Whether `host` is this machine: the node that Slurm says it is, or else one that has the address."""
    if name := os.environ.get("SLURMD_NODENAME"):
        return host == name
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


class Host:
    """The agent on one host, and what it has said."""

    def __init__(self, name: str) -> None:
        self.name, self.ready = name, dict[str, Any]()
        self.code: int | None = None
        self.said, self.heard = "", time.monotonic()
        self.way = _way(name)
        ends: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(self.way, start_new_session=True, bufsize=0, **ends)  # nosec B603 # hostfile's hosts
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def tell(self, message: dict[str, Any] | None = None) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # gone, or closed: it is noticed by what it no longer says
            self.process.stdin.write((json.dumps(message) if message else "").encode() + b"\n")

    @property
    def trouble(self) -> str | None:
        """Why this host counts as lost, if it does."""
        if self.process.poll() is not None:
            self.listener.join(1.0)  # what it said last may be on its way
        if self.code is not None:
            return None
        if self.process.poll() is not None or not self.listener.is_alive():
            return "its connection ended"
        silence = time.monotonic() - self.heard
        return f"it has not been heard for {agent.LOST:g} s" if silence > agent.LOST else None

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with open(self.process.stderr.fileno(), "rb", closefd=False) as stream:
            for line in stream:
                self.heard = time.monotonic()
                text, _, message = line.partition(agent.MARK)
                if message.strip():
                    self._note(json.loads(message))
                if self.ready:
                    sys.stderr.write(text.decode(errors="replace"))
                    sys.stderr.flush()
                else:
                    self.said = text.decode(errors="replace").strip() or self.said

    def _note(self, message: dict[str, Any]) -> None:
        self.code = message.get("code")
        self.ready = self.ready or message


def _way(host: str) -> list[str]:
    """The command that runs the agent on `host`: directly on this one, through srun inside a Slurm job, else through ssh."""
    line = [sys.executable, "-u", agent.__file__]
    if is_here(host):
        return line
    if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
        one = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap", "--cpu-bind=none", "--unbuffered"]
        return ["srun", *one, *line]
    options = ["-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"]
    return ["ssh", *options, host, "exec " + shlex.join(line)]


class Job:
    """A stage on `hosts`: what `subprocess.Popen` is to a stage on one.

    `command(node, address)` is the launcher's command on that host, `address` the first host's as the others reach it.
    Raises UserError when a host cannot be reached, or does not share what it must.
    """

    def __init__(
        self,
        hosts: list[str],
        command: Callable[[int, str], list[str]],
        environment: dict[str, str],
        run_dir: Path,
        paths: list[str],
    ) -> None:
        self.returncode: int | None = None
        self._settled: float | None = None
        self.hosts = [Host(name) for name in hosts]
        address = agent.source(hosts[-1]) or hosts[0]
        given = {name: value for name, value in environment.items() if not OWN.match(name)}
        token = run_dir.resolve() / f".shared-{uuid.uuid4().hex}"
        token.touch()
        try:
            for host in self.hosts:
                toward = hosts[-1] if host is self.hosts[0] else address
                host.tell(
                    {
                        "cwd": os.getcwd(),
                        "environment": given,
                        "paths": [os.getcwd(), *paths],
                        "token": str(token),
                        "toward": toward,
                    }
                )
            threading.Thread(target=self._beat, daemon=True).start()
            self._await()
            self._check(run_dir)
        except BaseException:
            self.kill()
            raise
        finally:
            token.unlink()
        for node, host in enumerate(self.hosts):
            host.tell({"command": command(node, address)})

    def poll(self) -> int | None:
        """The exit code once the job has ended on every host."""
        if self.returncode is not None:
            return self.returncode
        lost = [(host, trouble) for host in self.hosts if (trouble := host.trouble)]
        codes = [host.code for host in self.hosts]
        if lost or any(codes):
            self._settled = self._settled or time.monotonic() + SETTLE
        if None not in codes or (self._settled and time.monotonic() > self._settled):
            self._end()
            if codes[0] == EXIT_STOPPED:  # rank 0 has left after all ranks had saved
                self.returncode = EXIT_STOPPED
            elif lost and not any(codes):
                self._tell_lost(*lost[0])
                self.returncode = EXIT_TROUBLE
            else:
                self.returncode = next((code for code in codes if code), 0)
        return self.returncode

    def kill(self) -> None:
        """End the job on every host that can still be reached; the others end it themselves."""
        self.returncode = -signal.SIGKILL
        self._end()

    def _end(self) -> None:
        for host in self.hosts:
            if host.process.stdin is not None:
                host.process.stdin.close()
        limit = time.monotonic() + 5.0
        for host in self.hosts:
            try:
                host.process.wait(max(limit - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                host.process.kill()
                host.process.wait()
            host.listener.join(1.0)

    def _beat(self) -> None:
        while any(host.process.poll() is None for host in self.hosts):
            for host in self.hosts:
                host.tell()
            time.sleep(agent.BEAT)

    def _await(self) -> None:
        limit = time.monotonic() + ANSWER
        while waiting := [host for host in self.hosts if not host.ready]:
            gone = [host for host in waiting if not host.listener.is_alive()]
            if gone or time.monotonic() > limit:
                first = (gone or waiting)[0]
                raise UserError(
                    f"host {first.name}",
                    f"{Path(first.way[0]).name} could not start Relay there: {first.said or f'no answer in {ANSWER:g} s'}",
                    expected=f"a login without a password, and {sys.executable} and {agent.__file__} at the same path",
                    fix=f"try `{shlex.join(first.way)} < /dev/null`",
                )
            time.sleep(0.05)

    def _check(self, run_dir: Path) -> None:
        if apart := [host.name for host in self.hosts if not host.ready["shared"]]:
            raise UserError(
                f"run directory {run_dir.resolve()}",
                f"what {self.hosts[0].name} writes there is not seen on {', '.join(apart)}",
                expected="one file system that all hosts of the hostfile share, at the same path",
                fix="give a --run-dir on a shared file system (NFS, Lustre, …), or mount it there",
            )
        for host in self.hosts:
            if missing := host.ready["absent"]:
                raise UserError(
                    f"host {host.name}",
                    f"cannot read {', '.join(missing)}",
                    expected="recipe, data, base model and working directory at the same paths on every host",
                    fix="put them on the shared file system, or copy them there",
                )

    def _tell_lost(self, host: Host, trouble: str) -> None:
        others = ", ".join(other.name for other in self.hosts if other is not host)
        print(
            f"\nhost {host.name}: {trouble}; the job is ended on {others}\n"
            f"  either the host is down, or the network to it, or its processes were killed\n"
            f"  ranks that still run there end by themselves within {agent.LOST:g} s of losing this host\n"
            f"  fix: see that `ssh {host.name} true` works; the same command then goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )


def paths(recipe: Recipe, stage: str) -> list[str]:
    """What every host must be able to read, of what this one can: recipe, hostfile, data, models that are folders."""
    block = recipe.stages[stage]
    named = [str(recipe.path), recipe.local(block.deepspeed.hostfile or "")]
    named += [recipe.data(source.path) for source in sources(block) if source.path is not None]
    named += [recipe.local(block.base.model)] if block.base else []
    named += [recipe.local(item.model) for _, item in outside(block)]
    here = [os.path.abspath(name) for name in named if name]
    return sorted(set(here) - set(agent.absent(here)))
