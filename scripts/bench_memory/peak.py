"""Run a stage as its own module would, and write this rank's peak memory when it ends.

RELAY_PEAKS=FOLDER deepspeed --num_gpus 2 peak.py MODULE --recipe … --stage … --run-dir …
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from pathlib import Path


def peak() -> dict[str, int]:
    """Bytes: on CPUs the process's highest resident size, on GPUs what torch allocated and reserved at most."""
    import torch

    if torch.cuda.is_available():
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    module, sys.argv = arguments[0], arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        out = Path(os.environ["RELAY_PEAKS"]) / f"rank{os.environ.get('RANK', '0')}.json"
        out.write_text(json.dumps(peak()), encoding="utf-8")


if __name__ == "__main__":
    main()
