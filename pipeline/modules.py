"""Which file a module's name means: Relay's own before all, and the working directory's, where recipes name functions, last.

`python -m` looks in the working directory first. A folder `pipeline` or `stages` there would be taken for Relay's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The folder that Relay's packages are in: site-packages, or a checkout."""

OWN = ("pipeline", "stages", "ds_configs")


def python_path(env: dict[str, str]) -> dict[str, str]:
    """What makes `python -m stages.…` take Relay's own: no working directory, and a checkout before anything else."""
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if ROOT.name not in ("site-packages", "dist-packages"):  # those come after the standard library, and stay there
        paths = [str(ROOT), *(path for path in paths if path != str(ROOT))]
    return {"PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def add_working_directory() -> None:
    """Let this process and those it spawns import the working directory's modules, after all others."""
    for place in (str(ROOT), os.getcwd()):
        if place not in sys.path:
            sys.path.append(place)


def check_working_directory() -> None:
    """Refuse a working directory that hides Relay's packages, where Python has no way around it."""
    here = Path.cwd()
    if sys.version_info >= (3, 11) or here == ROOT:
        return
    for name in OWN:
        for hiding in (here / name / "__init__.py", here / f"{name}.py"):
            if hiding.exists():
                raise UserError(
                    str(hiding),
                    f"Python {sys.version_info.major}.{sys.version_info.minor} takes it for Relay's own {name}",
                    fix="run from another directory, rename it, or use Python 3.11",
                )
