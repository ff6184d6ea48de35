"""One rank of the doctor: it joins the others as a stage does, and adds up with them.

It says `ready` before it joins, so that the time its libraries and kernels take to load is not the network's, and then what
came out: the sum through DeepSpeed, as training has it, and through torch alone, as checkpoints have it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

SIZE = 1_000_000
"""Numbers that each rank gives: 4 MB, more than any library sends without its large path."""


def main() -> None:
    parser = argparse.ArgumentParser(description="One rank of `relay doctor`.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    folder, rank = parser.parse_args().folder, os.environ["RANK"]
    import deepspeed.comm
    import torch
    import torch.distributed as dist

    from pipeline import engine
    from pipeline.doctor import device as devices
    from pipeline.lifeline import die_with_parents

    die_with_parents()
    devices.kernels()
    (folder / f"ready-{rank}").touch()
    device = engine.start(0)
    sums = []
    for add in (deepspeed.comm.all_reduce, dist.all_reduce):
        numbers = torch.full((SIZE,), float(2 ** int(rank)), device=device)
        add(numbers)
        low, high = float(numbers.min()), float(numbers.max())
        sums.append(high if low == high else None)
    part = folder / f"part-{rank}"
    part.write_text(json.dumps({"sums": sums, "device": str(device), "backend": dist.get_backend()}))
    part.rename(folder / f"sum-{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
