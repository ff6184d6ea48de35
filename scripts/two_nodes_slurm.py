"""scripts/slurm.sbatch under a real Slurm of two nodes on one machine: preempted, signalled, cancelled; writes a section of
docs/results/two_hosts.md. Wants root, ip, sshd, and Debian's slurm-wlm and munge.

    PYTHONPATH=. python scripts/two_nodes_slurm.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pages
from two_hosts import PAGE, Bench, published

from tests.faults.test_resume import SLOW
from tests.support import tiny
from tests.support.hosts import FIRST, SECOND, TwoHosts, why_not

SBATCH = Path(__file__).resolve().parent / "slurm.sbatch"
NODES = {"node1": FIRST, "node2": SECOND}
HEADING = "## Under Slurm"

CONFIG = """ClusterName=two
SlurmctldHost=node1({first})
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeAddr={first} CPUs=1 State=UNKNOWN
NodeName=node2 NodeAddr={second} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=node1,node2 PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Slurm's own daemons, one set of names for each network namespace."""

    def __init__(self, place: TwoHosts, folder: Path) -> None:
        self.place, self.folder = place, folder

    def on(self, node: str, *command: str) -> list[str]:
        """`command` on a node: its network, its host name, and a file that knows both names."""
        namespace = self.place.names[list(NODES).index(node)]
        setup = f"hostname {node} && mount --bind '{self.folder}/hosts' /etc/hosts && exec \"$@\""
        inside = ["unshare", "--uts", "--mount", "sh", "-c", setup, "sh", *command]
        return ["ip", "netns", "exec", namespace, "env", f"SLURM_CONF={self.folder}/slurm.conf", *inside]

    def ask(self, *command: str) -> str:
        done = subprocess.run(self.on("node1", *command), cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def submit(self, recipe: Path, run: str, *options: str) -> str:
        return self.ask("sbatch", "--parsable", str(SBATCH), str(recipe), "--run-dir", str(self.folder / run), *options)

    def await_state(self, job: str, *states: str, timeout: float = 600.0) -> str:
        limit = time.monotonic() + timeout
        while (found := self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")) not in states:
            assert time.monotonic() < limit, f"job {job} is {found}, not {states}:\n{self.log(job)}"
            time.sleep(1.0)
        return found

    def await_step(self, job: str, run: str, stage: str, timeout: float = 300.0) -> None:
        limit, rows = time.monotonic() + timeout, self.folder / run / stage / "metrics.jsonl"
        while not rows.exists() or len(rows.read_text().splitlines()) < 5:
            assert time.monotonic() < limit, self.log(job)
            time.sleep(0.5)

    def log(self, job: str) -> str:
        file = self.folder / f"slurm-{job}.log"
        return file.read_text() if file.exists() else ""


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, first=FIRST, second=SECOND))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is used, and none is looked for then
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in NODES.items()))
    if subprocess.run(["pgrep", "-x", "munged"], capture_output=True, check=False).returncode != 0:
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "/run/munge"], check=True)
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    with TwoHosts(folder / "ssh") as place:
        found = Cluster(place, folder)
        for node, daemon in (("node1", "slurmctld"), ("node1", "slurmd"), ("node2", "slurmd")):
            with (folder / f"{daemon}-{node}.log").open("wb") as log:
                subprocess.Popen(found.on(node, daemon, "-D"), stdout=log, stderr=log)
            time.sleep(2.0)
        limit = time.monotonic() + 30.0
        while found.ask("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split() != ["idle", "idle"]:
            assert time.monotonic() < limit, "the nodes do not come up"
            time.sleep(1.0)
        yield found


def preempted(place: Cluster, recipe: Path, bench: Bench) -> list[str]:
    job = place.submit(recipe, "preempted")
    place.await_step(job, "preempted", "reward")
    began = time.monotonic()
    place.ask("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 5")
    place.await_state(job, "PENDING")
    seconds = time.monotonic() - began
    end = place.await_state(job, "COMPLETED", "FAILED", "CANCELLED")
    resumed = re.findall(r"interrupted; (resumes from step \d+)", place.log(job))
    same = "identical" if published(place.folder / "preempted") == bench.expected else "DIFFERENT"
    return [
        "preempted by a job of a higher partition, in the reward model",
        f"{seconds:.0f}",
        end,
        ", ".join([same, *resumed]),
    ]


def signalled(place: Cluster, recipe: Path, bench: Bench) -> list[str]:
    """As two minutes before the time limit. It goes back to the queue; the rest is as above."""
    job = place.submit(recipe, "signalled", "--until", "reward")
    place.await_step(job, "signalled", "reward")
    began = time.monotonic()
    place.ask("scancel", "--signal=TERM", "--batch", job)
    end, seconds = place.await_state(job, "PENDING", "FAILED"), time.monotonic() - began
    place.ask("scancel", job)
    return ["SIGTERM to the batch script, in the reward model", f"{seconds:.0f}", end, ""]


def cancelled(place: Cluster, recipe: Path, bench: Bench) -> list[str]:
    job = place.submit(recipe, "cancelled", "--until", "reward")
    place.await_step(job, "cancelled", "reward")
    began = time.monotonic()
    place.ask("scancel", job)
    place.await_state(job, "CANCELLED")
    seconds = time.monotonic() - began
    time.sleep(15.0)
    left = [pid for name in place.place.names for pid in place.place.processes(name) if _is_rank(pid)]
    end = place.await_state(job, "CANCELLED", "PENDING", "RUNNING")
    return ["`scancel`, in the reward model", f"{seconds:.0f}", f"{end} after 15 s, {len(left)} ranks left", ""]


def _is_rank(pid: int) -> bool:
    try:
        return b"--local_rank=0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def main() -> None:
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as name:
        bench, folder = Bench(Path(name)), Path(name) / "slurm"
        folder.mkdir()
        recipe = tiny.recipe(folder / "tiny.yaml", bench.base, **{**SLOW, "deepspeed": {"config": "zero2"}})
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with cluster(folder) as place:
            rows = []
            for case in (preempted, signalled, cancelled):
                rows.append(case(place, recipe, bench))
                print(" | ".join(rows[-1]), flush=True)
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout.strip()
    head = "| what happened | s until it had left the nodes | state at the end | published |\n|---|---|---|---|"
    table = "\n".join([head, *("| " + " | ".join(row) + " |" for row in rows)])
    intro = (
        f"`PYTHONPATH=. python scripts/two_nodes_slurm.py` {pages.measured_on('torch', 'deepspeed')}, {version}:\n"
        "slurmctld and two slurmd in the same two namespaces, one rank per node through `scripts/slurm.sbatch`. Slurm on a\n"
        "cluster, with GPUs and cgroups, is not measured."
    )
    pages.put(PAGE, HEADING, f"{intro}\n\n{table}")


if __name__ == "__main__":
    main()
