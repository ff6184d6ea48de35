"""What ended a rank, told once: by the rank at fault, in a paragraph where the machine is to blame, else by its traceback."""

from __future__ import annotations

import errno
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import EXIT_TROUBLE, EXIT_USER_ERROR, Trouble, UserError
from pipeline.watchdog import PATIENCE

DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk fails to read or write",
    errno.ESTALE: "the network file system lost this file",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
}
"""Errors of the operating system that the user, not the programmer, mends."""

UNSAID = (
    (re.compile(r"No space left on device|os error 28"), errno.ENOSPC),
    (re.compile(r"Disk quota exceeded|os error 122"), errno.EDQUOT),
    (re.compile(r"Read-only file system|os error 30"), errno.EROFS),
    (re.compile(r"Input/output error|os error 5\b"), errno.EIO),
)
"""How libraries put such an error in words alone."""

TORCH = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs")
"""What torch says of a file that it could not write, whatever the reason."""

LITTLE = 16 * 2**20
"""Bytes of room below which the reason is that there is none."""

MEMORY = re.compile(r"out of memory|can't allocate memory|Unable to allocate|Cannot allocate memory", re.IGNORECASE)

LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|NCCL.*(remote|unhandled system) error|"
    r"Socket (closed|Timeout)|connectFullMesh failed|Timed out waiting \d+ms|Connection refused|"
    r"recvValue failed|No route to host|Network is unreachable|ncclRemoteError",
    re.IGNORECASE,
)


def tell(error: Exception, run_dir: Path, rank: int, world_size: int) -> int:
    """Say what ended this rank, unless another one has; the exit code.

    The launcher ends all ranks as soon as one has ended. So a rank that only lost another leaves that one the word, and of
    ranks with the same mistake rank 0 speaks.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    named = f"rank {rank} of {world_size}: " if world_size > 1 else ""
    code, said = 1, f"rank {rank} of {world_size} failed:\n{''.join(traceback.format_exception(error))}"
    if isinstance(error, UserError):
        code, said = EXIT_USER_ERROR, str(error)
    elif isinstance(error, Trouble):  # also of an endpoint that cannot be reached, which is no rank
        code, said = EXIT_TROUBLE, str(error)
    elif lost_peer(error):
        said = f"{named}lost another rank: {str(error).splitlines()[0]}"
        time.sleep(3 * PATIENCE)
    elif trouble := machine(error, run_dir):
        code, said = EXIT_TROUBLE, f"{named}{trouble}"
    if rank != 0:
        time.sleep(PATIENCE)
    print(f"\n{said}", file=sys.stderr, flush=True)
    return code


def machine(error: BaseException, folder: Path) -> Trouble | None:
    """The paragraph for an error that the machine is to blame for: its disk or its memory. `folder` is what was written to."""
    for cause in _causes(error):
        text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        if (number := _disk_error(cause, folder)) is not None:
            place = getattr(cause, "filename", None) or folder
            return Trouble(
                f"{place}: {DISK[number]}\n"
                f"  found {text}; {_free(folder) / 2**20:.1f} MiB free there\n"
                "  fix: mend that and run the same command again: it goes on from the last complete checkpoint, and nothing "
                "published changed"
            )
        if isinstance(cause, MemoryError) or MEMORY.search(str(cause)):
            return Trouble(
                f"out of memory: {text}\n"
                "  fix: lower micro_batch or max_length, or take another ZeRO configuration (`relay plan` counts each "
                "phase's bytes), and run again: it goes on from the last complete checkpoint"
            )
    return None


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone, which tells the cause itself."""
    return any(
        isinstance(cause, (RuntimeError, ConnectionError)) and LOST.search(str(cause)) for cause in _causes(error)
    )


def _disk_error(error: BaseException, folder: Path) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK else None
    if TORCH.search(str(error)):
        return errno.ENOSPC if _free(folder) < LITTLE else errno.EIO
    return next((number for pattern, number in UNSAID if pattern.search(str(error))), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from or during."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _free(folder: Path) -> int:
    """Bytes free where `folder` is, or is to be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
