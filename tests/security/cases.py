"""A chain in warm ranks whose environment holds secrets, while somebody looks at the list of processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tests.support import stages


def chain(recipe: str, run_dir: str, secrets: dict[str, str]) -> list[str]:
    """Run the recipe; the command lines, of any process at any time meanwhile, that held one of the secrets."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for line in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    text = line.read_bytes().decode(errors="replace")
                except OSError:  # it has ended
                    continue
                if any(value in text for value in secrets.values()):
                    seen.add(text.replace("\0", " "))

    before = dict(os.environ)
    os.environ.update(secrets)
    watching = threading.Thread(target=look)
    watching.start()
    try:
        stages.chain(recipe, run_dir)
    finally:
        over.set()
        watching.join()
        os.environ.clear()
        os.environ.update(before)
    return sorted(seen)
