"""Golden numbers, found through RELAY_GOLDEN; hypothesis keeps nothing in the working tree."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"relay-hypothesis-{os.getuid()}")


@pytest.fixture(scope="session")
def read_golden() -> Callable[[str], dict[str, Any]]:
    """`read_golden(name)`: inputs and outputs of DeepSpeed-Chat's own functions (commit 3d83278f, fp32)."""
    folder = Path(os.environ.get("RELAY_GOLDEN") or Path(__file__).parents[3] / "shared" / "golden")

    def read(name: str) -> dict[str, Any]:
        file = folder / f"{name}.json"
        if not file.is_file():
            pytest.skip(f"golden numbers are not there: {file}; set RELAY_GOLDEN to their folder")
        return dict(json.loads(file.read_text(encoding="utf-8")))

    return read
