"""One `relay run` as a user sees it from outside: its processes, the moment it is in, how it ended."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

STAGES = ("sft", "reward", "ppo")


@dataclass
class Job:
    """`relay run` in the background; what it prints goes to `log`."""

    recipe: Path
    run_dir: Path
    log: Path
    more: list[str] = field(default_factory=list)
    env: dict[str, str] | None = None

    def start(self) -> Job:
        self.began = time.time()
        relay = Path(sys.executable).parent / "relay"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [str(relay), "run", str(self.recipe), "--run-dir", str(self.run_dir), *self.more],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self.env,
            )
        return self

    def wait(self, timeout: float) -> int | None:
        """The exit code; None when it is still there after so long."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self, role: str) -> list[psutil.Process]:
        """The job's processes: `relay`, `deepspeed`, `launcher` (DeepSpeed's launch.py) or `rank`, in rank order."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if str(self.run_dir) in line and role_of(line) == role:
                found.append(process)
        return sorted(found, key=lambda p: next((a for a in p.info["cmdline"] if a.startswith("--local_rank")), ""))

    def left(self) -> list[psutil.Process]:
        """Every process that names the run directory."""
        return [p for role in ("relay", "deepspeed", "launcher", "rank") for p in self.processes(role)]

    def ended(self, timeout: float) -> float | None:
        """Seconds until none of its processes is left; None when some stay so long."""
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            if self.process.poll() is not None and not self.left():
                return time.monotonic() - began
            time.sleep(0.1)
        return None

    def reach(self, moment: Callable[[Path, float], bool], timeout: float) -> bool:
        """Wait for a moment; False when the job ended or the time is over before it came."""
        limit = time.monotonic() + timeout
        while time.monotonic() < limit and self.process.poll() is None:
            if moment(self.run_dir, self.began):
                return True
            time.sleep(0.001)
        return False


def role_of(line: list[str]) -> str:
    text = " ".join(line)
    if "deepspeed.launcher.launch" in text:
        return "launcher"
    if any(Path(part).name == "deepspeed" for part in line[:2]):
        return "deepspeed"
    if any(Path(part).name == "relay" for part in line[:2]):
        return "relay"
    return "rank" if "-m" in line and any(part.startswith("stages.") for part in line) else ""


def during_save(run_dir: Path, began: float) -> bool:
    """A checkpoint lies there that was begun since and is not complete yet."""
    return any(
        _since(folder, began) and (folder.name.endswith(".writing") or not (folder / "COMPLETE.json").exists())
        for stage in STAGES
        for folder in (run_dir / stage / "checkpoints").glob("*-*")
        if not folder.name.endswith((".damaged", ".suspect"))
    )


def during_publish(run_dir: Path, began: float) -> bool:
    return any(_since(run_dir / stage / "output.writing", began) for stage in STAGES)


def during_handoff(run_dir: Path, began: float) -> bool:
    """A stage has published since, and another is to follow."""
    return outputs(run_dir) < len(STAGES) and any(_since(run_dir / stage / "output", began) for stage in STAGES)


def _since(folder: Path, began: float) -> bool:
    try:
        return folder.stat().st_mtime > began
    except FileNotFoundError:
        return False


def outputs(run_dir: Path) -> int:
    """How many stages have published."""
    return sum((run_dir / stage / "output").exists() for stage in STAGES)
