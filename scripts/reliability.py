"""Loop the embedded chain under random faults: does every run end in the same bytes, and does anything pile up?

Each round runs SFT, reward model and PPO on two ranks into an empty file system in memory, meets some faults on the way, is
started again after each, and is compared, byte for byte, with a run that met none. Writes docs/results/reliability.md.

    python scripts/reliability.py                              # an hour, and at least 50 kills
    python scripts/reliability.py --minutes 5 --kills 3 --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import chain, checkpoint, handoff  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from scripts.compare_trl import commit  # noqa: E402
from scripts.soak.job import STAGES, Job, during_handoff, during_publish, during_save, outputs  # noqa: E402

SHORT = ["stages.sft.steps=12", "stages.reward.steps=12", "stages.ppo.steps=8"]
SHORT += [f"stages.{stage}.save_every=3" for stage in STAGES]
OUT = ROOT / "docs" / "results" / "reliability.md"
LIMIT = 20
"""deepspeed.timeout of the soak, in seconds."""

APART = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "bash", "-c"]
APART += ['mount -t tmpfs tmpfs /dev/shm && "$@"; exit $?', "soak"]
"""Process and mount namespaces of its own: what piles up there is this script's, whatever else the machine does."""

KILLED = ("relay", "deepspeed", "launcher", "one rank", "all ranks")
MOMENTS: dict[str, Callable[[Path, float], bool] | None] = {
    "any moment": None,
    "save": during_save,
    "publish": during_publish,
    "handoff": during_handoff,
}


@dataclass
class Try:
    """One fault: what it was, how the job ended, and whether anything was lost by it."""

    fault: str
    moment: str
    code: int | None
    seconds: float | None
    said: str
    orphans: int = 0
    lost: str = ""


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.tries: list[Try] = []
        self.rounds: list[dict[str, float]] = []
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.more = [argument for value in SHORT for argument in ("--set", value)]
        self.more += ["--until", "ppo", "--set", f"deepspeed.timeout={LIMIT}"]

    def job(self, run_dir: Path, *more: str, env: dict[str, str] | None = None) -> Job:
        return Job(Path("quickstart"), run_dir, self.folder / "log.txt", [*self.more, *more], env).start()

    def undisturbed(self) -> Path:
        """The run that all others are compared with; before it, one that compiles what DeepSpeed lacks, longer than LIMIT."""
        first = self.job(self.folder / "first", "--until", "sft", "--set", "deepspeed.timeout=900")
        assert first.wait(900) == 0, first.said
        run_dir = self.folder / "undisturbed"
        job = self.job(run_dir)
        began = time.monotonic()
        assert job.wait(900) == 0, job.said
        self.span = time.monotonic() - began
        return run_dir

    def round(self, faults: list[str], expected: Path) -> None:
        """A fresh run that meets `faults` one after another and then goes on to its end."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.disk)], check=True)
        try:
            run_dir, met = self.disk / "run", []
            for fault in faults:
                met.append(self.meet(fault, run_dir))
            job = self.job(run_dir)
            code = job.wait(900)
            differing = differences(run_dir, expected) if code == 0 else f"the run ended with {code}: {job.said[-600:]}"
            for one in met:
                if one is not None:
                    one.lost = one.lost or differing
                    self.tries.append(one)
                    print(json.dumps(asdict(one)), flush=True)
            self.rounds.append(leftovers() | {"identical": float(not differing)})
            print(json.dumps(self.rounds[-1]), flush=True)
        finally:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)

    def meet(self, fault: str, run_dir: Path) -> Try | None:
        """Start the run, let one fault happen, see it end. None when the run was over before."""
        if fault == "a bit of the newest checkpoint":
            return self.spoil_checkpoint(run_dir)
        if fault == "a bit of a baton":
            return self.spoil_baton(run_dir)
        job = self.job(run_dir)
        names = list(MOMENTS)
        name = self.random.choice(names) if fault.startswith("SIGKILL") else "any moment"
        moment = MOMENTS[name]
        if moment is None:
            job.reach(never, self.random.uniform(0.0, 0.6 * self.span))
        elif name == "handoff":
            if job.reach(moment, 300):
                job.reach(never, self.random.uniform(0.0, 8.0))
        else:
            job.reach(moment, 300)
        if job.process.poll() is not None:
            return None
        before = intact(run_dir)
        fault = act(job, fault, self.random, self.disk)
        began = time.monotonic()
        code = job.wait(180)
        gone = job.ended(60)
        seconds = None if gone is None else time.monotonic() - began
        orphans = job.left()
        for process in orphans:
            process.kill()
        (self.disk / "filler").unlink(missing_ok=True)
        lost = "" if intact(run_dir) >= before else f"complete before and not after: {before - intact(run_dir)}"
        return Try(fault, name, code, seconds, last_words(job.said), len(orphans), lost)

    def spoil_checkpoint(self, run_dir: Path) -> Try | None:
        """Flip one bit of the newest checkpoint of the stage that was interrupted."""
        for stage in STAGES:
            folder, steps = run_dir / stage / "checkpoints", chain.checkpoints(run_dir / stage)
            if steps and not (run_dir / stage / "output").exists():
                newest = next(p for p in folder.glob(f"*-{steps[-1]}") if p.is_dir())
                file = flip(newest, self.random)
                job = self.job(run_dir, "--until", stage)
                code = job.wait(600)
                told = [line for line in job.said.splitlines() if "is left out" in line]
                lost = "" if code == 0 and told and file.name in told[0] else f"not told: {job.said[-600:]}"
                return Try("a bit of the newest checkpoint", stage, code, None, told[0] if told else "", 0, lost)
        return None

    def spoil_baton(self, run_dir: Path) -> Try | None:
        """Flip one bit of what a stage published and the next one needs: refused, then made again as the message says."""
        if outputs(run_dir) not in (1, 2):
            return None
        stage = STAGES[outputs(run_dir) - 1]
        file = flip(run_dir / stage / "output", self.random)
        job = self.job(run_dir)
        code = job.wait(300)
        said = job.said
        lost = "" if code == 2 and f"--from {stage}" in said and file.name in said else f"not refused: {said[-600:]}"
        again = self.job(run_dir, "--from", stage, "--until", stage)
        if again.wait(600) != 0:
            lost = lost or f"not made again: {again.said[-600:]}"
        return Try("a bit of a baton", stage, code, None, last_words(said), 0, lost)


def never(run_dir: Path, began: float) -> bool:
    return False


def act(job: Job, fault: str, rng: random.Random, disk: Path) -> str:
    """Do it; what was done, which is another thing where the ranks to kill were not there yet."""
    kind, _, who = fault.partition(" of ")
    if kind == "SIGKILL":
        found = job.processes(who.removeprefix("one ").removeprefix("all ranks") or "rank")
        for process in [rng.choice(found)] if found and who == "one rank" else found:
            process.kill()
        if not found:
            job.process.kill()
            return "SIGKILL of relay"
    elif kind in ("SIGTERM", "SIGINT"):
        job.process.send_signal(signal.Signals[kind])
    elif kind == "SIGSTOP":
        limit = time.monotonic() + 60
        while not (ranks := job.processes("rank")) and time.monotonic() < limit and job.process.poll() is None:
            time.sleep(0.1)
        if ranks:
            rng.choice(ranks).suspend()
    elif kind == "disk full":
        fill(disk / "filler")
    return fault


def fill(file: Path) -> None:
    """Take all the room of the file system that `file` is on."""
    with file.open("wb", buffering=0) as stream:
        for size in (2**20, 4096):
            try:
                while True:
                    stream.write(b"\0" * size)
            except OSError:
                continue


def flip(folder: Path, rng: random.Random) -> Path:
    """Flip one bit of one file in `folder`."""
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
    raw = bytearray(file.read_bytes())
    raw[rng.randrange(len(raw) - 1)] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(raw))
    return file


def intact(run_dir: Path) -> set[str]:
    """What a fault may not take away: stages published, and the newest whole checkpoint of each that is not."""
    found = set()
    for stage in STAGES:
        try:
            if handoff.current(run_dir / stage).exists() and handoff.open_baton(run_dir / stage):
                found.add(f"{stage} published")
        except UserError:
            pass
    return found


def differences(run_dir: Path, expected: Path) -> str:
    """Files of the published outputs that differ; empty when there are none."""
    found = []
    for stage in STAGES:
        ours, theirs = run_dir / stage / "output", expected / stage / "output"
        names = {p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()}
        names |= {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()}
        for name in sorted(names):
            if not (ours / name).is_file() or (ours / name).read_bytes() != (theirs / name).read_bytes():
                found.append(f"{stage}/output/{name}")
        damaged = [p for p in (run_dir / stage / "checkpoints").glob("*-*") if p.suffix == "" and checkpoint.damage(p)]
        found += [f"damaged: {p}" for p in damaged]
    return ", ".join(found)


def last_words(said: str) -> str:
    """The paragraph or line that a user reads at the end, without what ran well."""
    noise = re.compile(r"built successfully|^\w+  step \d|^\w+  (starts|up to date|published)|^roles on one copy|^\s*$")
    lines = [line for line in re.sub(r"/\S*/disk/run", "RUN", said).splitlines() if not noise.search(line)]
    failed = [n for n, line in enumerate(lines) if "failed:" in line or "stopped and saved" in line]
    cut = lines[max(0, failed[-1] - 4) : failed[-1] + 1] if failed else lines[-2:]
    return "\n".join(line for line in cut if not line.startswith(("  File", "    ")))[-700:]


def leftovers() -> dict[str, float]:
    """What may pile up from run to run, among all that this script ever started."""
    shared = sum(p.stat().st_blocks * 512 for p in Path("/dev/shm").iterdir() if p.is_file()) / 2**20
    processes = [process for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE]
    return {
        "time": time.time(),
        "memory": shared + sum(process.memory_full_info().pss for process in processes) / 2**20,
        "shared": shared,
        "processes": float(len(processes)),
        "descriptors": float(sum(process.num_fds() for process in processes)),
        "own": float(psutil.Process().num_fds()),
    }


def watched(soak: Soak, minutes: float) -> dict[str, float]:
    """A PPO left alone for `minutes`: how rank 0's memory and descriptors move from its twentieth step on."""
    run_dir = soak.folder / "long"
    shutil.copytree(soak.folder / "undisturbed", run_dir)
    job = soak.job(run_dir, "--set", "stages.ppo.steps=100000", "--set", "stages.ppo.save_every=20")
    rows, metrics = [], run_dir / "ppo" / "metrics.jsonl"
    began = time.monotonic()
    while time.monotonic() - began < 60 * minutes and job.process.poll() is None:
        time.sleep(1.0)
        ranks = job.processes("rank")
        steps = metrics.read_bytes().splitlines() if metrics.exists() else []
        if ranks and steps and (step := json.loads(steps[-1])["step"]) > 30:
            rows.append((step, ranks[0].memory_info().rss / 2**20, ranks[0].num_fds()))
    job.process.send_signal(signal.SIGTERM)
    code = job.wait(120)
    assert code == 75, job.said
    step, memory, descriptors = np.array(rows, dtype=np.float64).T
    half = len(step) // 2
    return {
        "steps": float(step[-1]),
        "slope": float(np.polyfit(step[half:], memory[half:], 1)[0] * 1024),
        "first": float(memory[half]),
        "last": float(memory[-1]),
        "fewest": float(descriptors.min()),
        "most": float(descriptors.max()),
    }


def slow(soak: Soak, expected: Path) -> Try:
    """The whole chain on a file system whose every open, sync, rename and removal takes 50 ms longer."""
    library = soak.folder / "slow.so"
    source = ROOT / "scripts" / "soak" / "slow.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    run_dir = soak.folder / "slow"
    job = soak.job(run_dir, env={**os.environ, "LD_PRELOAD": str(library), "SLOW_FOLDER": str(run_dir)})
    began = time.monotonic()
    code = job.wait(1800)
    seconds = time.monotonic() - began
    lost = differences(run_dir, expected) if code == 0 else job.said[-600:]
    shutil.rmtree(run_dir, ignore_errors=True)
    return Try(
        "slow file system", "whole chain", code, seconds, f"nothing; {seconds / soak.span:.1f} times as long", 0, lost
    )


def table(tries: list[Try]) -> list[str]:
    lines = ["| fault | tries | survived | lost | until all processes are gone | exit code | what the user sees |"]
    lines += ["|---|---|---|---|---|---|---|"]
    kinds = list(dict.fromkeys((t.fault, t.moment if t.fault.startswith("SIGKILL") else "") for t in tries))
    for fault, moment in sorted(kinds):
        own = [t for t in tries if t.fault == fault and moment in ("", t.moment)]
        lost = sum(bool(t.lost or t.orphans) for t in own)
        times = [t.seconds for t in own if t.seconds is not None]
        took = f"{statistics.median(times):.1f} s, at most {max(times):.1f}" if times else ""
        codes = ", ".join(str(code) for code in sorted({t.code for t in own if t.code is not None}))
        said = max((t.said for t in own), key=len).replace("|", "\\|").replace("\n", "<br>")
        name = f"{fault}, {moment}" if moment else fault
        lines.append(f"| {name} | {len(own)} | {len(own) - lost} | {lost} | {took} | {codes} | {said} |")
    return lines


def slope(rounds: list[dict[str, float]], key: str) -> float:
    """Least squares, per hour."""
    hours = np.array([r["time"] for r in rounds]) / 3600
    return float(np.polyfit(hours - hours[0], [r[key] for r in rounds], 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=50, help="go on until so many SIGKILLs were met")
    parser.add_argument("--alone", type=float, default=6.0, help="minutes of a PPO without faults, to watch its memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if "RELAY_APART" not in os.environ:
        sys.exit(subprocess.call([*APART, sys.executable, *sys.argv], env={**os.environ, "RELAY_APART": "1"}))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        soak = Soak(Path(name), arguments.seed)
        expected = soak.undisturbed()
        print(f"undisturbed: {soak.span:.0f} s", flush=True)
        began = time.monotonic()
        kills: Callable[[], int] = lambda: sum(t.fault.startswith("SIGKILL") for t in soak.tries)  # noqa: E731
        others = [
            "SIGTERM",
            "SIGINT",
            "SIGSTOP of one rank",
            "disk full",
            "a bit of the newest checkpoint",
            "a bit of a baton",
        ]
        while time.monotonic() - began < 60 * arguments.minutes or kills() < arguments.kills:
            faults = [f"SIGKILL of {who}" for who in KILLED]
            faults += soak.random.sample(others, 2)
            soak.random.shuffle(faults)
            soak.round(faults, expected)
        minutes = (time.monotonic() - began) / 60
        soak.tries.append(slow(soak, expected))
        alone = watched(soak, arguments.alone)
        rounds = soak.rounds
        text = [
            "# Reliability",
            "",
            f"`python scripts/reliability.py {' '.join(sys.argv[1:])}`, "
            f"{date.today().isoformat()}, commit {commit()}, {platform.machine()}, "
            f"{os.cpu_count()} cores, two ranks on the CPU, deepspeed.timeout {LIMIT} s. {len(rounds)} runs of the embedded "
            f"chain (SFT 12 steps, reward model 12, PPO 8, a checkpoint every 3) in {minutes:.0f} minutes, "
            f"{len(soak.tries)} faults of which {kills()} kills. One undisturbed run takes {soak.span:.0f} s.",
            "",
            "*Survived*: the same command afterwards ended well, every published file was the undisturbed run's byte for byte, "
            "no process was left, and nothing published before the fault was touched by it.",
            "",
            *table(soak.tries),
            "",
            "## What piles up",
            "",
            "| | first run | last run | slope |",
            "|---|---|---|---|",
            *(
                f"| {title} | {rounds[0][key]:.0f} | {rounds[-1][key]:.0f} | {slope(rounds, key):+.1f} an hour |"
                for title, key in (
                    ("memory of all processes and shared memory, MiB", "memory"),
                    ("shared memory files, MiB", "shared"),
                    ("processes", "processes"),
                    ("open files of all processes", "descriptors"),
                    ("open files of the script", "own"),
                )
            ),
            "",
            f"Identical to the undisturbed run: {sum(r['identical'] for r in rounds):.0f} of {len(rounds)} runs.",
            "",
            f"A PPO left alone for {arguments.alone:g} minutes, {alone['steps']:.0f} steps, a checkpoint every 20: rank 0 went "
            f"from {alone['first']:.1f} to {alone['last']:.1f} MiB over its second half, {alone['slope']:+.2f} KiB a step; "
            f"{alone['fewest']:.0f} to {alone['most']:.0f} open files.",
        ]
        arguments.out.write_text("\n".join(text) + "\n", encoding="utf-8")
        print("\n".join(text))


if __name__ == "__main__":
    main()
