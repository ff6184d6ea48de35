"""Fixtures: real test data found through RELAY_TEST_DATA, golden numbers through RELAY_GOLDEN, warm ranks, tiny models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.session import Ranks

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("RELAY_TEST_DATA", str(ROOT.parent / "shared" / "data"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What computes on ranks wants the machine to itself: side by side such tests would take far longer."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()) or item.get_closest_marker("launch"):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n warm ranks, started at first use; restarted when a failed case took them down."""
    started: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in started or not started[world].alive:
            started[world] = Ranks(world, tmp_path_factory.mktemp(f"ranks{world}"))
        return started[world]

    yield get
    for session in started.values():
        session.close()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real data and a real tiny model; tests that need it are skipped, visibly, where it is absent."""
    folder = Path(os.environ["RELAY_TEST_DATA"])
    if not (folder / "stories260K").is_dir():
        pytest.skip(f"no test data in {folder}; set RELAY_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def read_golden() -> Callable[[str], dict[str, Any]]:
    """`read_golden(name)`: inputs and outputs of DeepSpeed-Chat's own functions (commit 3d83278f, fp32), from the folder
    RELAY_GOLDEN, by default `shared/golden` beside the repository; tests are skipped, visibly, where they are absent."""
    folder = Path(os.environ.get("RELAY_GOLDEN") or ROOT.parent / "shared" / "golden")

    def read(name: str) -> dict[str, Any]:
        file = folder / f"{name}.json"
        if not file.is_file():
            pytest.skip(f"golden numbers are not there: {file}; set RELAY_GOLDEN to their folder")
        return dict(json.loads(file.read_text(encoding="utf-8")))

    return read
