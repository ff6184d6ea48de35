"""What ended a rank, told once: by the rank at fault, in a paragraph where the machine is to blame, else by its traceback."""

from __future__ import annotations

import errno
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import Trouble

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
    (re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs"), errno.ENOSPC),
)
"""How libraries put such an error in words alone; torch does not say which."""

MEMORY = re.compile(r"out of memory|can't allocate memory|Unable to allocate|Cannot allocate memory", re.IGNORECASE)

LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|NCCL.*(remote|unhandled system) error|"
    r"Socket (closed|Timeout)|connectFullMesh failed|Timed out waiting \d+ms|Connection refused|"
    r"recvValue failed|No route to host|Network is unreachable|ncclRemoteError",
    re.IGNORECASE,
)


def machine(error: BaseException, folder: Path) -> Trouble | None:
    """The paragraph for an error that the machine is to blame for: its disk or its memory. `folder` is what was written to."""
    for cause in _causes(error):
        text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        if (number := _disk_error(cause)) is not None:
            place = getattr(cause, "filename", None) or folder
            return Trouble(
                f"{place}: {DISK[number]}\n"
                f"  found {text}; {_free(folder)}\n"
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


def told(error: BaseException, rank: int, world_size: int) -> str:
    """An error as a programmer wants it: whose, and its traceback."""
    whole = "".join(traceback.format_exception(error))
    return f"rank {rank} of {world_size} failed:\n{whole}"


def _disk_error(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno in DISK:
        return error.errno
    found = (number for pattern, number in UNSAID if pattern.search(str(error)))
    return None if isinstance(error, OSError) and error.errno is not None else next(found, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from or during."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free there"
