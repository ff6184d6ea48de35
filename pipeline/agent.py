"""One host's part of a stage that runs on several: it looks for what must be there, runs the launcher, and ends it in time.

`relay run` starts this file on every host of the hostfile, speaks to it on stdin, and hears it on stderr in lines that begin
with a NUL byte; what else is there comes from the ranks. Each side says something every few seconds. One that hears nothing
takes the other for gone: a cut network, a dead host and a killed `relay run` all end the ranks here. The environment, which
may hold tokens, travels on stdin, not in the command that process lists show.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

BEAT = 5.0
"""Seconds between two signs of life."""

LOST = 30.0
"""Seconds of silence after which either side takes the other for gone."""

SHARED = 10.0
"""Seconds that a new file may take to be seen on the other hosts of a shared file system."""

MARK = b"\0"


class Line:
    """What `relay run` says: now and then a message, else blank lines."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.ended, self.heard = False, time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def cut(self) -> bool:
        return self.ended or time.monotonic() - self.heard > LOST

    def message(self) -> dict[str, Any]:
        while not self.cut:
            with contextlib.suppress(queue.Empty):
                return self.messages.get(timeout=0.2)
        sys.exit(1)

    def _read(self) -> None:
        for line in open(0, "rb", buffering=0, closefd=False):  # noqa: SIM115 -- a buffer's lock would outlive the thread
            self.heard = time.monotonic()
            if line.strip():
                self.messages.put(json.loads(line))
        self.ended = True


def say(message: dict[str, Any] | None = None) -> None:
    """Tell `relay run` something, or only that this host is there."""
    with contextlib.suppress(OSError):
        os.write(2, MARK + (json.dumps(message).encode() if message else b"") + b"\n")


def source(toward: str) -> str | None:
    """This host's own IPv4 address on the way to the host `toward`."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((toward, 9))  # sends nothing: it asks the routing table
        return str(probe.getsockname()[0])
    return None


def interface(toward: str) -> str | None:
    """The network interface on the way to the host `toward`."""
    address = source(toward)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # SIOCGIFADDR: an interface may be without an address
                found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None


def absent(paths: list[str]) -> list[str]:
    """Which of `paths` (patterns too) cannot be read on this host."""
    return [path for path in paths if not any(os.access(found, os.R_OK) for found in [path, *glob.glob(path)])]


def seen(path: Path) -> bool:
    """Whether a file that another host has just written is here, within a few seconds."""
    limit = time.monotonic() + SHARED
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.2)
    return path.exists()


def environment(given: dict[str, str], toward: str) -> dict[str, str]:
    """This host's own environment under that of `relay run`, and the interface to the other hosts for gloo and NCCL."""
    env = {**os.environ, **given, "RELAY_PARENT": f"{os.getpid()}:{_born()}"}
    if (name := interface(toward)) is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", name)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return env


def _born() -> str:
    return Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]


def main() -> None:
    # Slurm sends SIGTERM to every process of a step. It is for the ranks, which save; the launcher would end them after 30 s.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    line = Line()
    job = line.message()

    def beat() -> None:
        while True:
            say()
            time.sleep(BEAT)

    threading.Thread(target=beat, daemon=True).start()
    say({"host": socket.gethostname(), "absent": absent(job["paths"]), "shared": seen(Path(job["token"]))})
    command = line.message()["command"]
    env = environment(job["environment"], job["toward"])
    there: dict[str, Any] = {"cwd": job["cwd"], "env": env, "stdin": subprocess.DEVNULL, "start_new_session": True}
    launcher = subprocess.Popen(command, **there)  # nosec B603 # said by `relay run`, which started this agent
    while launcher.poll() is None and not line.cut:
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    say({"code": launcher.wait()})


if __name__ == "__main__":
    main()
