"""Checks that import torch and what stands on it. Each runs as `python -m pipeline.doctor.device NAME FD` in a process of its
own: a library that takes its process down, or hangs, is a line of the report like any other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline import launch
from pipeline.doctor.finding import Case, Finding, fail, ok, warn

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values of NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""


def apart(name: str, title: str, seconds: float, fix: str) -> Callable[[Case], list[Finding]]:
    """The check that runs `name` of CHECKS in a process of its own, for at most `seconds`."""

    def check(case: Case) -> list[Finding]:
        end, theirs = os.pipe()
        line = [sys.executable, "-m", "pipeline.doctor.device", name, str(theirs)]
        env = launch.environment()
        with subprocess.Popen(  # nosec B603 # this interpreter, on this module
            line, env=env, pass_fds=[theirs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            os.close(theirs)
            try:
                said = process.communicate(timeout=seconds)[0].decode(errors="replace")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                os.close(end)
                return [fail(title, f"no answer in {seconds:g} s", fix)]
        with os.fdopen(end) as stream:
            findings = [Finding(**json.loads(text)) for text in stream]
        if process.returncode != 0:
            last = (said.strip().splitlines() or [""])[-1][:300]
            how = launch.ended(process.returncode) if process.returncode < 0 else f"exit code {process.returncode}"
            findings.append(fail(title, f"{how}{': ' * bool(last)}{last}", fix))
        return findings

    return check


def torch_() -> list[Finding]:
    """torch, its CUDA and NCCL beside the driver and the GPUs, each GPU by a product of known value."""
    import torch

    built = f"torch {torch.__version__}" + (
        f", CUDA {torch.version.cuda}" if torch.version.cuda else ", built for CPUs"
    )
    seen, have = launch.devices(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen is None:
        return [ok("torch", f"{built}; no GPU in use, ranks run on the CPU ({len(os.sched_getaffinity(0))} cores)")]
    if have == 0:
        why = _why_no_cuda(torch.version.cuda)
        return [
            fail("torch", f"{built}; the driver shows {seen} GPUs and torch none: {why}", _match(torch.version.cuda))
        ]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    findings = [ok("torch", f"{built}, driver for CUDA up to {_driver()}, NCCL {nccl}, {have} GPUs")]
    names = torch.cuda.get_arch_list()
    for number in range(have):
        major, minor = torch.cuda.get_device_capability(number)
        gpu = f"GPU {number}: {torch.cuda.get_device_name(number)}, sm_{major}{minor}"
        if not _runs_on(names, major, minor):
            findings.append(
                fail("torch", f"{gpu}; this torch is built for {', '.join(names)}", _match(torch.version.cuda))
            )
            continue
        ones = torch.ones(256, 256, device=f"cuda:{number}", dtype=torch.bfloat16)
        if (found := float((ones @ ones).sum())) != 256.0**3:
            findings.append(
                fail("torch", f"{gpu}; a product of ones sums to {found:g}, not {256**3}", "try another GPU")
            )
            continue
        free, size = (value / 2**30 for value in torch.cuda.mem_get_info(number))
        line = f"{gpu}, {free:.1f} of {size:.1f} GiB free"
        busy = (
            warn("torch", line, "end the programs that `nvidia-smi` lists there")
            if free < size / 2
            else ok("torch", line)
        )
        findings.append(busy)
    return findings


def _runs_on(built: list[str], major: int, minor: int) -> bool:
    """Machine code runs on its major version from its minor one on; PTX (`compute_…`) on anything newer."""
    for name in built:
        kind, _, number = name.partition("_")
        digits = "".join(sign for sign in number if sign.isdigit())
        theirs = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and theirs[0] == major and theirs[1] <= minor and (number == digits or theirs[1] == minor):
            return True
        if kind == "compute" and theirs <= (major, minor) and number == digits:
            return True
    return False


def _driver() -> str:
    listed = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout  # nosec B603 B607
    return listed.partition("CUDA Version:")[2].split("|")[0].strip() or "unknown"


def _why_no_cuda(built: str | None) -> str:
    if built is None:
        return "it is built for CPUs"
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no reason given"


def _match(cuda: str | None) -> str:
    return (
        f"install the build of torch for this driver (CUDA up to {_driver()}): https://pytorch.org/get-started/locally, "
        "or raise the driver" + (f" to CUDA {cuda}" if cuda else "") + "; DS_ACCELERATOR=cpu runs without GPUs"
    )


def kernels() -> list[Finding]:
    """DeepSpeed's kernels that shipped configurations use: on CPUs the all-reduce; and what an earlier build left behind."""
    from pipeline.extensions import free_builds, left_behind

    findings = []
    if marks := left_behind():
        findings = [
            warn(
                "DeepSpeed kernels",
                f"a compilation was killed and left {', '.join(map(str, marks))}",
                "none needed: it is removed now, as every stage does, once it is two minutes old",
            )
        ]
        free_builds()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return [*findings, ok("DeepSpeed kernels", "none is needed on GPUs; offloaded steps are torch's own")]
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if not builder.is_compatible(verbose=False):
        return [*findings, warn("DeepSpeed kernels", "no shared-memory all-reduce here; ranks use gloo", "none needed")]
    if other := _built_elsewhere(builder.NAME):
        findings.append(
            warn(
                "DeepSpeed kernels",
                f"{other} was built by another environment than this; each builds it anew when its turn comes",
                "give each environment a TORCH_EXTENSIONS_DIR of its own",
            )
        )
    began = time.monotonic()
    try:
        builder.load(verbose=False)
    except Exception as error:  # whatever the compiler, the linker or the loader says
        why = " ".join(str(error).split())[:300]
        return [*findings, fail("DeepSpeed kernels", f"{builder.NAME} cannot be built: {why}", KERNELS_FIX)]
    return [*findings, ok("DeepSpeed kernels", f"{builder.NAME} loads ({time.monotonic() - began:.1f} s)")]


def _built_elsewhere(name: str) -> Path | None:
    """The folder of a kernel that was compiled against another torch than this process has."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for rules in [*root.glob(f"{name}/build.ninja"), *root.glob(f"*/{name}/build.ninja")]:
        if str(Path(torch.__file__).parent / "include") not in rules.read_text(encoding="utf-8"):
            return rules.parent
    return None


KERNELS_FIX = (
    "mend the lines on the compiler, ninja and the disk first; else remove the folder of kernels to build them anew"
)


def four_bit() -> list[Finding]:
    """A matrix of NF4's own values, scaled by block, comes back as it was."""
    import torch
    from bitsandbytes import functional

    device = "cpu" if launch.devices() is None else "cuda"
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(4)
    given = (torch.tensor(LEVELS).repeat(4) * scales[:, None]).to(device)
    packed, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4")
    back = functional.dequantize_4bit(packed, state)
    worst = float((back - given).abs().max())
    name = f"bitsandbytes, 4 bits on {device}"
    if packed.numel() * 2 != given.numel() or worst > 1e-5:
        return [fail(name, f"values of NF4 come back wrong by {worst:g}", FOUR_BIT_FIX)]
    return [
        ok(name, f"{given.numel()} values of NF4 come back from {packed.numel()} bytes (off by at most {worst:.0e})")
    ]


FOUR_BIT_FIX = (
    "pip install --force-reinstall bitsandbytes; only recipes with `quantization: nf4` need it (`python -m bitsandbytes` "
    "says what it finds)"
)

CHECKS: dict[str, Callable[[], list[Finding]]] = {"torch": torch_, "kernels": kernels, "four_bit": four_bit}


def main() -> None:
    findings = CHECKS[sys.argv[1]]()
    with os.fdopen(int(sys.argv[2]), "w") as stream:
        for finding in findings:
            stream.write(json.dumps(asdict(finding)) + "\n")


if __name__ == "__main__":
    main()
