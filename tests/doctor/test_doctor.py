"""Each check of `relay doctor` meets the trouble it is for, made here for real where this machine lets one."""

from __future__ import annotations

import http.server
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config.recipe import load
from pipeline.doctor import device, examine, machine, outside, packages, ranks
from pipeline.doctor.finding import Case, Finding
from pipeline.modules import ROOT
from tests.support.disk import no_room

pytestmark = pytest.mark.fast

ANY = Case(None, Path("runs"))


@pytest.fixture
def quickstart(tmp_path: Path) -> Case:
    return Case(load("quickstart"), tmp_path / "runs" / "quickstart")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def one(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def elsewhere(program: str, shell: str = "", **env: str) -> str:
    """What `program` prints in a process with mounts of its own, after the `shell` commands that make them."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0:
        pytest.skip("mounts of one's own want root and unshare")
    line = ["unshare", "-m", "sh", "-ec", f'{shell}\nexec "$0" -c "$1"', sys.executable, program]
    given = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(line, env=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


MACHINE = "from pathlib import Path; from pipeline.doctor import machine; from pipeline.doctor.finding import Case\n"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert one(machine.compiler(ANY)).state == "ok"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, ninja = one(machine.compiler(ANY)), one(machine.ninja(ANY))
    assert (compiler.state, ninja.state) == ("fail", "fail")
    assert "no c++ on PATH" in compiler.found
    assert "g++" in compiler.fix
    assert ninja.fix == "pip install ninja"


def test_compiler_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -nostdinc")
    finding = one(machine.compiler(ANY))
    assert finding.state == "fail"
    assert "does not compile" in finding.found
    assert "No such file" in finding.found
    assert "python3-dev" in finding.fix


def test_packages(tmp_path: Path) -> None:
    """An old trl, and a package that Relay would require and nobody has, found first on the path."""
    for name, lines in {
        "trl-0.1": "Name: trl\nVersion: 0.1\n",
        "relay_rlhf-0": "Name: relay-rlhf\nVersion: 0\nRequires-Python: >=3.99\n"
        "Requires-Dist: trl<1.17,>=1.16\nRequires-Dist: nowhere-to-be-found>=1\nRequires-Dist: rich>=14\n"
        'Requires-Dist: nor-this; extra == "test"\n',
    }.items():
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\n{lines}")
    program = (
        "import json; from dataclasses import asdict; from pipeline.doctor import packages\n"
        "print(json.dumps([asdict(f) for f in packages.python(None) + packages.versions(None)]))"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", program]
    # From there: in a folder that Relay is installed from, its own metadata would be found first.
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    python, trl, missing = json.loads(said)
    assert python["state"] == trl["state"] == missing["state"] == "fail"
    assert "wants >=3.99" in python["found"]
    assert trl["found"] == "trl 0.1 is installed; Relay wants <1.17,>=1.16"
    assert trl["fix"] == "pip install 'trl<1.17,>=1.16'"
    assert "nowhere-to-be-found is not installed" in missing["found"]
    assert one(packages.versions(ANY)).state == "ok"


def test_disks(tmp_path: Path) -> None:
    assert machine.disk("run directory", tmp_path / "not" / "there").state in ("ok", "warn")
    assert not [*tmp_path.iterdir()], "the doctor leaves nothing behind"
    with no_room():
        finding = machine.disk("run directory", tmp_path)
    assert finding.state == "fail"
    assert "cannot write there: File too large" in finding.found
    assert "free room there" in finding.fix
    assert not [*tmp_path.iterdir()]


def test_full_small_and_read_only_disks(tmp_path: Path) -> None:
    said = elsewhere(
        MACHINE + f"for name in ('full', 'small', 'still'): print(machine.disk('TMPDIR', Path('{tmp_path}', name)))",
        f"""cd {tmp_path}; mkdir full small still
        mount -t tmpfs -o size=64k none full; head -c 64k /dev/zero > full/it || true
        mount -t tmpfs -o size=100m none small; mount -t tmpfs -o ro none still""",
    )
    full, small, still = said.splitlines()
    assert all("state='fail'" in line for line in (full, small, still))
    assert "No space left on device; 0 MiB free" in full
    assert "0.1 GiB free, tmpfs" in small
    assert "Read-only file system" in still
    assert "set TMPDIR to another folder" in still


def test_network_file_systems_are_known() -> None:
    assert machine._kind(Path("/proc/self")) == "proc"
    assert machine._kind(Path("/dev/shm/nothing")) == "tmpfs"


def test_small_shared_memory() -> None:
    said = elsewhere(
        MACHINE + "print(machine.shared_memory(Case(None, Path())))", "mount -t tmpfs -o size=64m none /dev/shm"
    )
    assert "state='fail'" in said
    assert "64 of 64 MiB free; 2 ranks on the CPU take 132 MiB" in said
    assert "--shm-size" in said


def test_memory(quickstart: Case, tmp_path: Path) -> None:
    assert one(machine.memory(quickstart)).state in ("ok", "warn")
    many = Case(load("quickstart", ["stages.evaluate.deepspeed.num_gpus=1000000"]), tmp_path)
    finding = one(machine.memory(many))
    assert finding.state == "fail"
    assert "1000000 ranks take" in finding.found


def test_cgroups(tmp_path: Path) -> None:
    """Version 2, where the limit is of a group above; and version 1."""
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", "300"), (inner.parent, "1000", "400")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    assert [*machine._cgroup_rooms(tmp_path, own)] == [600]
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("5000\n")
    (old / "memory.usage_in_bytes").write_text("6000\n")
    own.write_text("3:memory:/job\n2:cpu:/job\n")
    assert [*machine._cgroup_rooms(tmp_path, own)] == [0]


def test_few_open_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        finding = one(machine.limits(ANY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert finding.state == "warn"
    assert "256 open files" in finding.found
    assert finding.fix == "ulimit -n 4096"


def test_sandbox_that_cannot_be_had() -> None:
    """A limit on files below the one that the cage sets, which a process without rights cannot raise."""
    assert one(machine.cage(ANY)).state == "ok"
    program = MACHINE + (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); print(machine.cage(Case(None, Path())))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert "state='warn'" in said
    assert "cannot be held in" in said
    assert "forgetting.code" in said


def test_model_hub(quickstart: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs nothing" in one(outside.hub(quickstart)).found
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    served = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", place)
    assert f"{place} answers" in one(outside.hub(ANY)).found
    served.shutdown()
    served.server_close()
    finding = one(outside.hub(Case(load("hh_opt_1.3b"), Path("runs"))))
    assert finding.state == "warn"
    assert "Connection refused" in finding.found
    assert "Anthropic/hh-rlhf" in finding.found
    assert "HF_HUB_OFFLINE=1" in finding.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert one(outside.hub(ANY)).state == "ok"


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


def test_wandb_login_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(load("quickstart", ["tracking.wandb.project=x"]), tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert one(outside.wandb(case)).state == "warn"
    assert "wandb login" in one(outside.wandb(case)).fix
    file.write_text("machine api.wandb.ai login user password s3cret0123\n")
    finding = one(outside.wandb(case))
    assert finding.state == "ok"
    assert str(file) in finding.found
    monkeypatch.setenv("WANDB_API_KEY", "s3cret0123")
    assert "s3cret" not in f"{finding} {outside.wandb(case)}"


def test_hostfile_that_is_not_there(tmp_path: Path) -> None:
    case = Case(load("quickstart", [f"deepspeed.hostfile={tmp_path}/hosts", "deepspeed.num_nodes=2"]), tmp_path)
    finding = one(examine.guarded("hosts", outside.hostfiles, case))
    assert finding.state == "fail"
    assert f"no such file: {tmp_path}/hosts" in finding.found


def test_gpus_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that lists a GPU, beside this environment's torch."""
    import torch

    if torch.version.cuda:
        pytest.skip("this torch is built for GPUs")
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: A Card" || echo "| CUDA Version: 12.8 |"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding = one(examine.SLOW["torch"][0](ANY))
    assert finding.state == "fail"
    assert "the driver shows 1 GPUs and torch none: it is built for CPUs" in finding.found
    assert "CUDA up to 12.8" in finding.fix


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 6), True),  # machine code of the same major version, an older minor one
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_86"], (8, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),  # PTX
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),  # `a`: on that version alone
    ],
)
def test_which_gpus_a_build_runs_on(built: list[str], capability: tuple[int, int], runs: bool) -> None:
    """By NVIDIA's rules of compatibility (CUDA C++ programming guide, 3.1.2 to 3.1.4 and 5.1)."""
    assert device._runs_on(built, *capability) is runs


def test_kernel_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "deepspeed_shm_comm" / "lock"
    mark.parent.mkdir()
    mark.touch()
    os.utime(mark, (0, 0))
    (mark.parent / "build.ninja").write_text("cflags = -isystem /another/environment/torch/include\n")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    left, other, broken = examine.SLOW["DeepSpeed kernels"][0](ANY)
    assert (left.state, other.state, broken.state) == ("warn", "warn", "fail")
    assert str(mark) in left.found
    assert not mark.exists()
    assert "built by another environment" in other.found
    assert "cannot be built" in broken.found
    assert "compiler" in broken.fix


def test_library_that_takes_its_process_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bitsandbytes.py").write_text("import os; os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
    monkeypatch.setattr("pipeline.modules.python_path", lambda env: {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    finding = one(examine.SLOW["bitsandbytes"][0](ANY))
    assert finding.state == "fail"
    assert "SIGABRT" in finding.found
    assert "pip install" in finding.fix


def test_library_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bitsandbytes.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr("pipeline.modules.python_path", lambda env: {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    finding = one(device.apart("four_bit", "bitsandbytes", 0.5, "fix")(ANY))
    assert (finding.state, finding.found) == ("fail", "no answer in 0.5 s")


def test_check_that_breaks() -> None:
    finding = one(examine.guarded("memory", lambda case: [][0], ANY))
    assert (finding.check, finding.state) == ("memory", "fail")
    assert "IndexError: list index out of range" in finding.found


@pytest.mark.launch
def test_ranks_that_cannot_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    finding = one(ranks.ranks(ANY))
    assert finding.state == "fail"
    assert "nosuch0" in finding.found
    assert "GLOO_SOCKET_IFNAME" in finding.fix


@pytest.mark.launch
def test_healthy_machine(tmp_path: Path) -> None:
    """Everything, as a program reads it; here the quickstart runs, so nothing may fail."""
    line = [str(Path(sys.executable).parent / "relay"), "doctor", "quickstart", "--json"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    said = json.loads(done.stdout)
    assert (done.returncode, said["fail"]) == (0, 0), done.stdout
    found = {finding["check"]: finding for finding in said["findings"]}
    assert "2 ranks here add up right (gloo, cpu" in found["ranks"]["found"]
    assert {"torch", "DeepSpeed kernels", "C++ compiler", "disk, run directory", "shared memory"} <= {*found}
    assert "bitsandbytes" not in str([*found]), "the quickstart quantises nothing"
    assert done.stderr.count("…") == 3
    assert not [*tmp_path.iterdir()]


def test_what_a_person_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "SLOW", {"bitsandbytes": examine.SLOW["bitsandbytes"]})
    monkeypatch.setenv("CXX", "c++ -nostdinc")
    done = CliRunner().invoke(cli.commands, ["doctor"])
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("fail  C++ compiler: ")]
    assert lines[at + 1].startswith("      fix: install a C++17 compiler")
    assert any(line.startswith("ok    bitsandbytes, 4 bits on cpu: 1024 values") for line in lines)
    assert lines[-1].endswith("1 fail")
