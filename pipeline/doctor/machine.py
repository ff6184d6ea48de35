"""The machine itself: compiler, disks, shared memory, limits, and the cage for programs that a model wrote."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline import launch
from pipeline.config.kinds import KINDS
from pipeline.doctor.finding import Case, Finding, fail, ok, warn
from pipeline.memory.phases import FRAMEWORK

GIB, MIB = 2**30, 2**20
LEAST_DISK, LITTLE_DISK = 1 * GIB, 10 * GIB
"""Free bytes below which a place fails, and is warned of."""

BUFFER = 66 * MIB
"""Shared memory that DeepSpeed's all-reduce takes for each rank on the CPU."""

LEAST_FILES = 1024

NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "glusterfs", "fuse.sshfs", "9p", "afs")

KERNEL = """
#include <Python.h>
#include <omp.h>
#include <vector>
extern "C" int relay_sum(int n) {
    std::vector<int> values(n, 2);
    int sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += values[i];
    return sum;
}
"""


def compiler(case: Case) -> list[Finding]:
    """Compile, link, load and call a small extension, with OpenMP and Python's headers as DeepSpeed's kernels have them."""
    bad = fail if case.gpus is None else warn  # on GPUs no configuration that ships compiles anything
    fix = "install a C++17 compiler and Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev), or name it in CXX"
    line = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(line[0], path=launch.environment()["PATH"]) is None:
        return [bad("C++ compiler", f"no {line[0]} on PATH; DeepSpeed compiles a kernel at first use", fix)]
    with tempfile.TemporaryDirectory(prefix="relay-doctor-") as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(KERNEL, encoding="utf-8")
        options = ["-O2", "-std=c++17", "-fPIC", "-shared", "-fopenmp", f"-I{sysconfig.get_path('include')}"]
        made = subprocess.run(  # nosec B603 # the user's own compiler
            [*line, *options, str(source), "-o", str(library)], capture_output=True, text=True, timeout=60, check=False
        )
        if made.returncode != 0:
            said = next((text for text in made.stderr.splitlines() if "error" in text.lower()), made.stderr.strip())
            return [bad("C++ compiler", f"{shlex.join(line)} does not compile: {said[:200]}", fix)]
        if (found := ctypes.CDLL(str(library)).relay_sum(1000)) != 2000:
            return [bad("C++ compiler", f"{shlex.join(line)}: a compiled sum is {found}, not 2000", fix)]
    version = subprocess.run([*line, "--version"], capture_output=True, text=True, check=False).stdout  # nosec B603
    return [ok("C++ compiler", f"{(version.splitlines() or [line[0]])[0]}; compiled and ran a kernel")]


def ninja(case: Case) -> list[Finding]:
    bad = fail if case.gpus is None else warn
    path = launch.environment()["PATH"]
    where = shutil.which("ninja", path=path)
    if where is None:
        return [bad("ninja", "not on PATH; DeepSpeed builds kernels with it", "pip install ninja")]
    run = subprocess.run([where, "--version"], capture_output=True, text=True, check=False)  # nosec B603
    if run.returncode != 0:
        return [bad("ninja", f"{where} fails: {run.stderr.strip()[:200]}", "pip install --force-reinstall ninja")]
    return [ok("ninja", f"{run.stdout.strip()} ({where})")]


def disks(case: Case) -> list[Finding]:
    """Every place that a run writes to."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    built = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    places = {"run directory": case.run_dir, "hub cache": hub, "kernels": built, "TMPDIR": _temporary()}
    return [disk(name, Path(place).expanduser()) for name, place in places.items()]


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # none of them can be written to, which the check then says
        return os.environ.get("TMPDIR", "/tmp")  # nosec B108 # looked at, not used


def disk(name: str, place: Path) -> Finding:
    """Write, lock and measure in `place`, or in the folder in which it is to be made."""
    check, folder = f"disk, {name}", place.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        locks = _write_and_lock(folder)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return fail(
            check,
            f"{folder}: cannot write there: {error.strerror}; {free / MIB:.0f} MiB free",
            "free room there, or raise the quota or `ulimit -f`" if full else _elsewhere(name),
        )
    free, kind = shutil.disk_usage(folder).free, _kind(folder)
    found = f"{folder}: {free / GIB:.1f} GiB free, {kind}{', over the network' if kind in NETWORK else ''}"
    if not locks:
        return fail(
            check, f"{found}; locks do not hold there", "mount it with locks (NFS: without nolock), " + _elsewhere(name)
        )
    if free < LEAST_DISK:
        return fail(check, found, f"free at least {LEAST_DISK / GIB:g} GiB there, or {_elsewhere(name)}")
    if free < LITTLE_DISK:
        return warn(check, found, "enough for small models; see `relay plan` and the sizes of your models' files")
    if kind in NETWORK and name in ("kernels", "TMPDIR"):
        return warn(check, found, _elsewhere(name) + " on a disk of this host")
    return ok(check, f"{found}; writes and locks")


def _elsewhere(name: str) -> str:
    variables = {"hub cache": "HF_HOME", "kernels": "TORCH_EXTENSIONS_DIR", "TMPDIR": "TMPDIR"}
    return f"set {variables[name]} to another folder" if name in variables else "give another --run-dir"


def _write_and_lock(folder: Path) -> bool:
    """Whether a lock that one opening of a file holds keeps another one out. Raises OSError where nothing can be written."""
    number, path = tempfile.mkstemp(prefix=".relay-doctor-", dir=folder)
    try:
        with os.fdopen(number, "wb") as first:
            first.write(os.urandom(MIB))
            first.flush()
            os.fsync(first.fileno())
            with open(path, "rb") as second:
                try:
                    fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                except OSError:
                    return False
                return False
    finally:
        os.unlink(path)


def _kind(folder: Path) -> str:
    """The type of the file system that `folder` is on."""
    best, kind = "", "unknown file system"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if len(point) >= len(best) and folder.resolve().is_relative_to(point):
            best, kind = point, right.split()[0]
    return kind


def shared_memory(case: Case) -> list[Finding]:
    folder = Path("/dev/shm")  # nosec B108 # looked at, not used
    fix = "mount -o remount,size=8g /dev/shm; in a container: docker run --shm-size=8g"
    if not folder.is_dir():
        return [fail("shared memory", f"no {folder}", fix)]
    size, _, free = shutil.disk_usage(folder)
    found = f"{folder}: {free / MIB:.0f} of {size / MIB:.0f} MiB free"
    need = BUFFER * case.ranks
    if case.gpus is None and free < need:
        return [fail("shared memory", f"{found}; {case.ranks} ranks on the CPU take {need / MIB:.0f} MiB", fix)]
    if free < GIB:
        return [warn("shared memory", f"{found}; NCCL and data workers use it too", fix)]
    return [ok("shared memory", found)]


def memory(case: Case) -> list[Finding]:
    """Free memory, of the machine or of the container, beside what ranks take before any model."""
    free, whose = _free_memory()
    need = FRAMEWORK["cpu"] * case.ranks
    found = f"{free / GIB:.1f} GiB free ({whose}); {case.ranks} ranks take {need / GIB:.1f} GiB before any model"
    if free < need:
        return [fail("memory", found, "end other programs, raise the container's limit, or run with fewer --num-gpus")]
    if free < 2 * need:
        return [warn("memory", found, "`relay plan RECIPE` counts what your models need")]
    return [ok("memory", found)]


def _free_memory() -> tuple[int, str]:
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    available = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    room = [(available, "this machine"), *((free, "its cgroup's limit") for free in _cgroup_rooms())]
    return min(room)


def _cgroup_rooms(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What the limit of each cgroup above this process leaves, for both versions of cgroups."""
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder = root / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inside = (folder / path.lstrip("/")).resolve()
        for group in (inside, *inside.parents):
            if group.is_relative_to(folder.resolve()) and (group / names[0]).is_file() and (group / names[1]).is_file():
                limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in names)
                if limit != "max" and int(limit) < 2**60:  # version 1 writes a huge number for none
                    yield max(int(limit) - int(used), 0)


def limits(case: Case) -> list[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    bound = "no limit" if locked == resource.RLIM_INFINITY else f"at most {locked / MIB:.0f} MiB"
    found = (
        f"{'any number of' if files == resource.RLIM_INFINITY else files} open files (ulimit -n), locked memory {bound}"
    )
    findings = [ok("limits", found)]
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        findings = [warn("limits", found, f"ulimit -n {4 * LEAST_FILES}")]
    if case.gpus and locked != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited (docker run --ulimit memlock=-1): InfiniBand and offload pin memory"
        findings.append(warn("limits", f"locked memory {bound}", fix))
    return findings


def cage(case: Case) -> list[Finding]:
    """Run a program as an evaluate stage runs those that a model wrote, in a process of its own."""
    if not case.wants(lambda block: getattr(getattr(block, "forgetting", None), "code", None)):
        return []
    module = f"{KINDS['evaluate'].module}.sandbox"
    ask = f"from {module} import run; outcome = run('assert 1 + 1 == 2'); print(outcome.status, outcome.reason)"
    tried = subprocess.run(  # nosec B603 # this interpreter, on Relay's own module
        [sys.executable, "-c", ask], env=launch.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    if tried.stdout.strip() == "passed":
        return [ok("sandbox", "runs a program and holds it in (Landlock, seccomp)")]
    said = (tried.stdout.strip() or tried.stderr.strip() or f"exit code {tried.returncode}").splitlines()[-1]
    return [
        (warn if case.recipe is None else fail)(
            "sandbox",
            f"programs that a model wrote cannot be held in: {said[:200]}",
            "only `forgetting.code` needs it: leave it out, or run on Linux 5.13 or newer with Landlock and seccomp on",
        )
    ]
