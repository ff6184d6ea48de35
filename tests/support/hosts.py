"""Two hosts on one machine: two network namespaces joined by a cable (a veth pair), an sshd in the second, one file system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

FIRST, SECOND = "10.9.0.1", "10.9.0.2"
TOOLS = ("ip", "sshd", "ssh", "ssh-keygen")


def why_not() -> str | None:
    """Why this machine cannot play two hosts; None when it can."""
    if os.geteuid() != 0:
        return "two hosts want root, for network namespaces"
    if missing := [tool for tool in TOOLS if _tool(tool) is None]:
        return f"two hosts want {', '.join(missing)} (Debian: iproute2, openssh-server)"
    probe = f"relay-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces are not permitted here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class TwoHosts:
    """`with TwoHosts(folder) as hosts`: `hosts.relay(…)` starts `relay` on the first; `hosts.cable(up=False)` cuts the network.

    `apart`: folders of which the second host has an empty one of its own. `folder` is for keys and logs.
    """

    def __init__(self, folder: Path, apart: list[Path] | None = None) -> None:
        self.folder, self.apart = folder, apart or []
        self.names = [f"relay-{os.getpid()}-{letter}" for letter in "ab"]
        self.hostfile = folder / "hostfile"

    def __enter__(self) -> TwoHosts:
        bin_ = self.folder / "bin"
        bin_.mkdir(parents=True, exist_ok=True)
        self.hostfile.write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
        for key in ("host", "user"):
            (self.folder / key).unlink(missing_ok=True)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder / 'user'}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        )
        (bin_ / "ssh").write_text(f'#!/bin/sh\nexec {_tool("ssh")} -F {self.folder / "ssh_config"} "$@"\n')
        (bin_ / "ssh").chmod(0o755)
        try:
            self._connect()
            self._serve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            for pid in self.processes(name, sshd=True):
                if psutil.pid_exists(pid):
                    os.kill(pid, 9)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def relay(self, *arguments: str, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """`relay` on the first host; what it prints goes to `log`."""
        own = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **(env or {})}
        line = ["ip", "netns", "exec", self.names[0], str(Path(sys.executable).parent / "relay"), *arguments]
        with log.open("wb") as stream:
            return subprocess.Popen(line, stdout=stream, stderr=subprocess.STDOUT, env=own)

    def cable(self, *, up: bool) -> None:
        subprocess.run(_in(self.names[1], "ip", "link", "set", "eth0", "up" if up else "down"), check=True)

    def processes(self, name: str, *, sshd: bool = False) -> list[int]:
        """Pids on a host. Those of sshd itself are left out: one keeps a connection that was cut until TCP gives it up."""
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        pids = [int(pid) for pid in listed.stdout.split()]
        return [pid for pid in pids if sshd or not _words(pid).startswith("sshd:")]

    def quiet(self, timeout: float) -> float:
        """Seconds until no process of a job is left on either host. Raises AssertionError with those that stay."""
        began = time.monotonic()
        while left := [pid for name in self.names for pid in self.processes(name)]:
            if time.monotonic() - began > timeout:
                raise AssertionError(f"still there after {timeout:g} s: {[_words(pid) for pid in left]}")
            time.sleep(0.1)
        return time.monotonic() - began

    def _connect(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(_in(name, "ip", "link", "set", "lo", "up"), check=True)
        pair = ["ip", "link", "add", "eth0", "netns", self.names[0], "type", "veth", "peer", "name", "eth0"]
        subprocess.run([*pair, "netns", self.names[1]], check=True)
        for name, address in zip(self.names, (FIRST, SECOND), strict=True):
            subprocess.run(_in(name, "ip", "address", "add", f"{address}/24", "dev", "eth0"), check=True)
            subprocess.run(_in(name, "ip", "link", "set", "eth0", "up"), check=True)

    def _serve(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        options = {
            "HostKey": self.folder / "host",
            "AuthorizedKeysFile": self.folder / "user.pub",
            "ListenAddress": SECOND,
            "StrictModes": "no",
            "PermitRootLogin": "yes",
            "UsePAM": "no",
            "PidFile": "none",
        }
        (self.folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
        mounts = "".join(f"mount -t tmpfs tmpfs '{path}' && " for path in self.apart)
        serve = f"{mounts}exec {_tool('sshd')} -D -f '{self.folder / 'sshd_config'}' -E '{self.folder / 'sshd.log'}'"
        subprocess.Popen(_in(self.names[1], "unshare", "--mount", "sh", "-c", serve))
        listening = _in(self.names[1], "ss", "-Hltn", "sport", "=", ":22")
        limit = time.monotonic() + 10.0
        while not subprocess.run(listening, capture_output=True, check=True).stdout:
            assert time.monotonic() < limit, (self.folder / "sshd.log").read_text()
            time.sleep(0.05)


def _in(name: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", name, *command]


def _words(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
