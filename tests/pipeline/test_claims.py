"""Which work the checkpoints of a stage belong to, and under which sizes a training has run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import chain, checkpoint, handoff
from pipeline.stage import _claim_checkpoints
from tests.support.disk import no_room

pytestmark = pytest.mark.fast

TWO = {"ranks": 2, "config": "zero2", "config_hash": None, "micro_batch": None}
ONE = {**TWO, "ranks": 1}


def record(ranks: int = 2, config: str = "zero2", lr: float = 0.1, micro_batch: int | None = None) -> dict[str, Any]:
    place = {"num_gpus": ranks, "config": config}
    block = {"lr": lr, "batch": 8, "micro_batch": micro_batch, "deepspeed": place}
    return {"block": block, "base": "b", "deepspeed": None if config == "zero2" else config}


def claim(stage: Path, of: dict[str, Any]) -> None:
    _claim_checkpoints(stage, chain.key(of), chain.work(of))


def saved(stage: Path) -> Path:
    folder = stage / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    return folder


def published(stage: Path, of: dict[str, Any]) -> None:
    handoff.publish(stage, lambda folder: None, {"inputs_hash": chain.key(of)})


@pytest.mark.parametrize("other", [record(1), record(config="mine"), record(micro_batch=4)])
def test_an_interrupted_training_is_gone_on_with_under_another_size(tmp_path: Path, other: dict[str, Any]) -> None:
    claim(tmp_path, record())
    kept = saved(tmp_path)
    for size in (other, record(), other):
        claim(tmp_path, size)
        assert kept.is_dir()
    assert not list(tmp_path.glob("checkpoints.*"))


def test_other_work_begins_anew_and_gets_its_checkpoints_back(tmp_path: Path) -> None:
    claim(tmp_path, record())
    kept = saved(tmp_path)
    claim(tmp_path, record(1, lr=0.2))
    assert not kept.exists()
    claim(tmp_path, record())
    assert kept.is_dir()


def test_a_published_training_is_not_gone_on_with_under_another_size(tmp_path: Path) -> None:
    """Other ranks are asked for after it has ended: the stage trains again, and is then interrupted and resized itself."""
    claim(tmp_path, record())
    first = saved(tmp_path)
    published(tmp_path, record())
    claim(tmp_path, record())
    assert first.is_dir()
    claim(tmp_path, record(1))
    assert not first.exists()
    second = saved(tmp_path)
    claim(tmp_path, record(2, config="mine"))
    assert second.is_dir()


def test_a_redone_training_is_gone_on_with(tmp_path: Path) -> None:
    """`--from` deletes the published training's checkpoints; those there are since then are not finished."""
    claim(tmp_path, record())
    published(tmp_path, record())
    (tmp_path / chain.REDO).touch()
    kept = saved(tmp_path)
    claim(tmp_path, record(1))
    assert kept.is_dir()


def test_a_damaged_output_does_not_stop_what_makes_it_anew(tmp_path: Path) -> None:
    claim(tmp_path, record())
    published(tmp_path, record())
    (tmp_path / "output" / handoff.MANIFEST).write_text("{")
    (tmp_path / chain.REDO).touch()
    kept = saved(tmp_path)
    claim(tmp_path, record(1))
    assert kept.is_dir()


def test_a_full_disk_takes_no_checkpoint_from_its_owner(tmp_path: Path) -> None:
    claim(tmp_path, record())
    kept = saved(tmp_path)
    with no_room(), pytest.raises(OSError, match="File too large"):
        claim(tmp_path, record())
    claim(tmp_path, record())
    assert kept.is_dir()


def test_checkpoints_of_an_earlier_relay_are_kept(tmp_path: Path) -> None:
    kept = saved(tmp_path)
    (tmp_path / "checkpoints" / "inputs_hash").write_text(chain.key(record()), encoding="utf-8")
    checkpoint.complete(kept, {"step": 3})
    claim(tmp_path, record())
    assert kept.is_dir()
    assert not checkpoint.resized(kept, TWO)
    assert checkpoint.sizes(kept, TWO) == [{"from_step": 0, **TWO}]


def test_sizes_are_recorded_with_their_first_step(tmp_path: Path) -> None:
    first, second = tmp_path / "step-3", tmp_path / "step-7"
    first.mkdir()
    second.mkdir()
    checkpoint.complete(first, {"step": 3, "sizes": [{"from_step": 0, **TWO}]})
    assert not checkpoint.resized(first, TWO)
    assert checkpoint.resized(first, ONE)
    history = checkpoint.sizes(first, ONE)
    assert history == [{"from_step": 0, **TWO}, {"from_step": 3, **ONE}]
    checkpoint.complete(second, {"step": 7, "sizes": history})
    assert checkpoint.sizes(second, ONE) == history
    assert [size["from_step"] for size in checkpoint.sizes(second, TWO)] == [0, 3, 7]
