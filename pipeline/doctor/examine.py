"""All checks, in order, each on its own: one that breaks is a line like any other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from pipeline.doctor import device, machine, outside, packages
from pipeline.doctor.finding import Case, Check, Finding, fail
from pipeline.doctor.ranks import LOAD, TALK, ranks
from pipeline.errors import UserError

QUICK: dict[str, Check] = {
    "Python": packages.python,
    "packages": packages.versions,
    "C++ compiler": machine.compiler,
    "ninja": machine.ninja,
    "disks": machine.disks,
    "shared memory": machine.shared_memory,
    "memory": machine.memory,
    "limits": machine.limits,
    "model hub": outside.hub,
    "W&B": outside.wandb,
    "hosts": outside.hostfiles,
    "sandbox": machine.cage,
}

REINSTALL = "pip install --force-reinstall what the line names, by the versions of constraints.txt"

SLOW: dict[str, tuple[Check, str]] = {
    "torch": (device.apart("torch", "torch", 60.0, REINSTALL), "imports it; up to 60 s"),
    "DeepSpeed kernels": (
        device.apart("kernels", "DeepSpeed kernels", 300.0, device.KERNELS_FIX),
        "builds and loads; seconds, or up to 300 where they are not built yet",
    ),
    "bitsandbytes": (device.apart("four_bit", "bitsandbytes", 60.0, device.FOUR_BIT_FIX), "quantises; up to 60 s"),
    "ranks": (ranks, f"starts them under the launcher; up to {LOAD:g} s to load and {TALK:g} s to talk"),
}


def examine(case: Case, announce: Callable[[str], None]) -> Iterator[Finding]:
    """Findings as they come; slow checks are announced before they start."""
    for name, check in QUICK.items():
        yield from guarded(name, check, case)
    for name, (check, what) in SLOW.items():
        if name == "bitsandbytes" and not case.wants(lambda block: block.base and block.base.quantization):
            continue
        announce(f"{name}: {what}")
        yield from guarded(name, check, case)


def guarded(name: str, check: Check, case: Case) -> list[Finding]:
    """What a check finds; a mistake of the user's, or its own collapse, is a finding too."""
    began = time.monotonic()
    try:
        return check(case)
    except UserError as error:
        expected = f"; expected {error.expected}" if error.expected else ""
        return [fail(name, f"{error.where}: {error.found}{expected}", error.fix or "see the line itself")]
    except Exception as error:  # the doctor must speak whatever is broken
        text = " ".join(str(error).split())[:300]
        return [
            fail(
                name,
                f"the check itself broke after {time.monotonic() - began:.1f} s: {type(error).__name__}: {text}",
                "mend the lines that failed before it; if there are none, report this one",
            )
        ]
