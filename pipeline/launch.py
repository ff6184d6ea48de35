"""One stage, one `deepspeed` command; and the process that runs it: started, asked to stop, never left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import hosts, lifeline, modules
from pipeline.config.kinds import KINDS
from pipeline.config.recipe import Recipe
from pipeline.errors import EXIT_STOPPED, UserError

STOP_FILE = "STOP"
"""A file of this name in a stage's folder asks its ranks to save and stop at the next step boundary."""

GRACE_SECONDS = 600.0

PORTS = range(20000, 32768)
"""Below the ports that Linux gives to outgoing connections, so that none of those takes one before the ranks listen on it."""


def command(
    recipe: Recipe,
    stage: str,
    run_dir: Path,
    overrides: list[str],
    port: int | None = None,
    node: tuple[int, str] | None = None,
) -> list[str]:
    """The `deepspeed` command of a stage; the same one a user types by hand (there without a port). `node`: only the part
    of this host, by its number in the hostfile and the first host's address."""
    block = recipe.stages[stage]
    place = block.deepspeed
    where = ["--hostfile", recipe.local(place.hostfile), "--num_nodes", str(place.num_nodes)] if place.hostfile else []
    line = launcher(place.num_gpus, where, port, node)
    held = ["--lock-held"] if port is not None else []
    line += [
        "--module",
        KINDS[block.kind].module,
        "--recipe",
        str(recipe.path),
        "--stage",
        stage,
        "--run-dir",
        str(run_dir),
        *held,
    ]
    for override in overrides:
        line += ["--set", override]
    return line


def launcher(ranks: int, where: list[str], port: int | None, node: tuple[int, str] | None = None) -> list[str]:
    """The `deepspeed` command up to the module that its ranks run. `where`: the options that name other hosts."""
    if node is not None:
        where = [*where, "--no_ssh", "--node_rank", str(node[0]), "--master_addr", node[1]]
    line = [_deepspeed(), *where, "--num_gpus", str(ranks)]
    if port is not None:
        line += ["--master_port", str(port), "--log_level", "critical"]
    return line


def _deepspeed() -> str:
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise UserError("deepspeed", "the launcher is not installed beside this Python", fix="pip install deepspeed")
    return found


def devices() -> int | None:
    """GPUs this host offers, or None when it has none and ranks run on the CPU. Asks the driver, not torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible == "" or shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "-L"]
    listed = subprocess.run(asked, capture_output=True, text=True, check=False)  # nosec B603 # fixed arguments
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    if count == 0:
        return None
    return min(count, len(visible.split(","))) if visible else count


def check_devices(recipe: Recipe, stage: str) -> None:
    """Refuse a stage whose modules would be hidden, that wants hosts that are not listed, or more GPUs than this host has.
    CPU ranks may share cores."""
    modules.check_working_directory()
    hosts.read(recipe, stage)
    place, have = recipe.stages[stage].deepspeed, devices()
    if have is not None and place.num_gpus > have:
        raise UserError(
            recipe.where("stages", stage, "deepspeed", "num_gpus"),
            f"{place.num_gpus} GPUs wanted",
            expected=f"at most {have}, which this host has",
            fix=f"run with --num-gpus {have}",
        )


def environment() -> dict[str, str]:
    """The environment of a stage's processes."""
    env = {**os.environ, **modules.python_path({**os.environ}), lifeline.OWNER: lifeline.owner()}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    if devices() is None:
        env["DS_ACCELERATOR"] = "cpu"
        env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env


def free_port() -> int:
    """A port for ranks to meet on, given to no other run on this host while this process lives.

    Ranks listen on it only seconds later. Until then a name in the kernel's table of abstract sockets, which goes with this
    process, keeps it from other runs. Raises UserError when every port is taken.
    """
    for number in random.SystemRandom().sample(PORTS, len(PORTS)):
        reserved = socket.socket(socket.AF_UNIX)
        try:
            reserved.bind(f"\0relay-port-{number}")
            with socket.socket() as probe:
                probe.bind(("", number))
        except OSError:
            reserved.close()
            continue
        _reserved.append(reserved)
        return number
    raise UserError(
        "port", "none is free", expected=f"one of {PORTS.start} to {PORTS.stop - 1}", fix="end other programs"
    )


_reserved: list[socket.socket] = []


def ended(code: int) -> str:
    """What an exit code of the launcher says."""
    number = -code if code < 0 else 256 - code
    if number not in {*signal.Signals}:
        return f"exit code {code}, its error is above"
    cause = (
        "; the kernel does that to a process when memory runs out (`dmesg` says so)" if number == signal.SIGKILL else ""
    )
    return f"a process of the job was ended by {signal.Signals(number).name}{cause}"


class Launcher(subprocess.Popen[bytes]):
    """The `deepspeed` command on this host, in a session of its own; killed with all that it started."""

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)


def _start(recipe: Recipe, stage: str, run_dir: Path, overrides: list[str]) -> Launcher | hosts.Job:
    names, port = hosts.read(recipe, stage), free_port()
    if not names:
        return Launcher(command(recipe, stage, run_dir, overrides, port), env=environment(), start_new_session=True)
    print(f"{stage}  on {', '.join(names)}", flush=True)
    return hosts.Job(
        names,
        lambda node, address: command(recipe, stage, run_dir, overrides, port, (node, address)),
        environment(),
        run_dir,
        hosts.paths(recipe, stage),
    )


def run(recipe: Recipe, stage: str, run_dir: Path, overrides: list[str]) -> int:
    """Run a stage under the launcher; its exit code, or 75 when SIGTERM or SIGINT asked it to save and stop.

    The launcher gets a session of its own: a Ctrl-C in the terminal reaches this process alone, which asks the ranks to
    stop by a file that ranks on every host see. A second signal, or ten minutes, kills the job.
    """
    stop = run_dir / stage / STOP_FILE
    stop.unlink(missing_ok=True)
    stop.parent.mkdir(parents=True, exist_ok=True)
    child = _start(recipe, stage, run_dir, overrides)
    asked: list[float] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        stop.touch()

    previous: dict[int, Any] = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (code := child.poll()) is None:
            time.sleep(0.2)
            if len(asked) > 1 or (asked and time.monotonic() - asked[0] > GRACE_SECONDS):
                child.kill()
        return EXIT_STOPPED if asked and code in (0, EXIT_STOPPED) else code
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        stop.unlink(missing_ok=True)
        if child.poll() is None:
            child.kill()
