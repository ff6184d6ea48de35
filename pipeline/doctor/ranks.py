"""Ranks can talk: started by the launcher as a stage's are, on the recipe's hosts, they add up numbers of known sum."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
import uuid
from pathlib import Path

from pipeline import hosts, launch
from pipeline.config.recipe import Recipe
from pipeline.doctor.finding import Case, Finding, fail, ok, warn

LOAD, TALK = 240.0, 20.0
"""Seconds that ranks may take to load their libraries and kernels, and then to find each other and add up."""


def ranks(case: Case, load: float = LOAD, talk: float = TALK) -> list[Finding]:
    """On this host, and on every list of hosts that the recipe names."""
    findings, seen = [], set[tuple[str, ...]]()
    for stage in case.recipe.stages if case.recipe else ():
        assert case.recipe is not None
        names = tuple(hosts.read(case.recipe, stage))
        if names and names not in seen:
            findings.append(_on_hosts(case, case.recipe, stage, load, talk))
        seen.add(names)
    if not findings:
        findings = [_here(case, load, talk)]
    return findings


def _here(case: Case, load: float, talk: float) -> Finding:
    world = case.ranks
    if case.gpus is not None and world > case.gpus:
        return fail("ranks", f"{world} GPUs wanted, {case.gpus} here", f"run with --num-gpus {case.gpus}")
    with tempfile.TemporaryDirectory(prefix="relay-doctor-") as name, open(f"{name}/log", "w+b") as log:
        line = [*launch.launcher(world, [], launch.free_port()), "--module", "pipeline.doctor.rank", name]
        job = launch.Launcher(line, env=launch.environment(), start_new_session=True, stdout=log, stderr=log)
        return _watch(case, job, Path(name), world, load, talk)


def _on_hosts(case: Case, recipe: Recipe, stage: str, load: float, talk: float) -> Finding:
    place, names, port = recipe.stages[stage].deepspeed, hosts.read(recipe, stage), launch.free_port()
    shared = case.run_dir.absolute()
    while not shared.exists():
        shared = shared.parent
    folder = shared / f".relay-doctor-{uuid.uuid4().hex}"
    folder.mkdir()
    where = ["--hostfile", recipe.local(str(place.hostfile)), "--num_nodes", str(place.num_nodes)]

    def command(node: int, address: str) -> list[str]:
        line = launch.launcher(place.num_gpus, where, port, (node, address))
        return [*line, "--module", "pipeline.doctor.rank", str(folder)]

    try:
        job = hosts.Job(names, command, launch.environment(), folder, [])
        return _watch(case, job, folder, place.ranks, load, talk, names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(
    case: Case,
    job: launch.Launcher | hosts.Job,
    folder: Path,
    world: int,
    load: float,
    talk: float,
    names: list[str] | None = None,
) -> Finding:
    where = f"on {', '.join(names)}" if names else "here"
    limit, joined = time.monotonic() + load, 0.0
    try:
        while (code := job.poll()) is None and time.monotonic() < limit:
            if not joined and len([*folder.glob("ready-*")]) == world:
                joined = time.monotonic()
                limit = joined + talk
            time.sleep(0.05)
    finally:
        if job.poll() is None:
            job.kill()
            job.poll()
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("sum-*"))]
    expected = float(2**world - 1)  # rank r gives 2^r: no rank left out or counted twice has this sum
    if len(found) == world and all(rank["sums"] == [expected] * 2 for rank in found):
        kind = f"{found[0]['backend']}, {found[0]['device'].split(':')[0]}"
        return ok("ranks", f"{world} ranks {where} add up right ({kind}; {time.monotonic() - (joined or limit):.1f} s)")
    if len(found) == world:
        return fail(
            "ranks", f"{world} ranks {where} sum to {[rank['sums'] for rank in found]}, not {expected:g}", _fix(case)
        )
    if code is not None:
        return fail("ranks", f"{world} ranks {where} failed: {_reason(folder) or launch.ended(code)}", _fix(case))
    if joined:
        return fail("ranks", f"{world} ranks {where} do not find each other in {talk:g} s", _fix(case))
    late = f"{world} ranks {where} take more than {load:g} s to start{_said(folder)}"
    return warn("ranks", late, "look at what else this machine is doing, and run again")


def _fix(case: Case) -> str:
    first, last = launch.PORTS.start, launch.PORTS.stop - 1
    if case.gpus is not None:
        return (
            "NCCL_DEBUG=INFO relay doctor shows where; NCCL_SOCKET_IFNAME names the network interface, NCCL_P2P_DISABLE=1 "
            f"helps where an IOMMU is in the way; no firewall may drop ports {first} to {last}"
        )
    return (
        f"the loopback interface must be up (ip link set lo up), no firewall may drop ports {first} to {last}, and "
        "GLOO_SOCKET_IFNAME, if it is set, must name an interface of `ip -brief address`"
    )


def _said(folder: Path) -> str:
    return f": {reason}" if (reason := _reason(folder)) else ""


def _reason(folder: Path) -> str:
    """The last line of the log that names an error."""
    log = folder / "log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    named = [line.strip() for line in lines if re.match(r"\s*(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)\b", line)]
    return (named or [""])[-1][:300]
