"""Programs that each do one update when told to, so that sides are measured in turns and one at a time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARK = "@turn "


class Side:
    """A running program; `turn` lets it do one update and returns what it says of it."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("w", encoding="utf-8") as stream:
            self.process = subprocess.Popen(
                command, env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
            )

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        raise SystemExit(
            "\n".join([*self.log.read_text(encoding="utf-8").splitlines()[-30:], f"{self.name} ended early"])
        )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def told() -> Iterator[Callable[..., None]]:
    """In a side's program: one item per turn, to be called with the update's facts when it is done. The time between and the
    highest memory so far are added to them."""
    for _ in sys.stdin:
        began = time.perf_counter()

        def done(**facts: Any) -> None:
            facts |= {"seconds": time.perf_counter() - began, "peak_mib": peak_mib()}  # noqa: B023
            print(MARK + json.dumps(facts), flush=True)

        yield done
    os._exit(0)


def peak_mib() -> float:
    """The most memory this process has had: on the GPU if it uses one, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
