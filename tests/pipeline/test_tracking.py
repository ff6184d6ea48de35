"""One metric stream: rewound on resume, readable in TensorBoard and W&B, and never stopped by W&B."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.schema import Tracking, Wandb
from pipeline.tracking import Tracker
from tests.support.disk import no_room

pytestmark = pytest.mark.fast

SAMPLE = {"prompt": "Why?", "reply": "Because.", "score": 1.5, "kl": 0.25}


@contextmanager
def tracker(folder: Path, *, resume: int = 0, enabled: bool = True, **tracking: Any) -> Iterator[Tracker]:
    """As a stage has it, to the end of the stage."""
    made = Tracker(
        folder,
        Tracking(**tracking),
        run="hh",
        stage="sft",
        kind="sft",
        config={"lr": 0.1},
        total_steps=10,
        resume_step=resume,
        enabled=enabled,
    )
    with closing(made), made:
        yield made


def log(folder: Path, first: int, last: int, *, resume: int = 0, **tracking: Any) -> None:
    """Log steps `first` to `last` with loss = 10 - step."""
    with tracker(folder, resume=resume, **tracking) as stream:
        for step in range(first, last + 1):
            stream.log(step, {"loss": 10.0 - step})
            stream.samples(step, [SAMPLE])
            stream.warn(step, "replies grow longer")


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]


# JSONL.


def test_rows_hold_step_time_and_metrics(tmp_path: Path) -> None:
    log(tmp_path, 1, 3)
    found = rows(tmp_path)
    assert [(row["step"], row["loss"]) for row in found] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert all(set(row) == {"step", "time", "loss"} for row in found)
    assert rows(tmp_path, "samples.jsonl")[0] == {"step": 1, **SAMPLE}


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with tracker(tmp_path) as stream:
        stream.log(1, {"loss": 1.0})
        assert rows(tmp_path)[0]["loss"] == 1.0


def test_a_resume_rewinds_to_its_step(tmp_path: Path) -> None:
    """Killed after step 5, resumed from the checkpoint of step 3: steps 4 and 5 are there once."""
    log(tmp_path, 1, 5)
    log(tmp_path, 4, 6, resume=3)
    for name in ("metrics.jsonl", "samples.jsonl", "warnings.jsonl"):
        assert [row["step"] for row in rows(tmp_path, name)] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_at_a_resume_takes_nothing(tmp_path: Path) -> None:
    log(tmp_path, 1, 5)
    with no_room(), pytest.raises(OSError, match="File too large"), tracker(tmp_path, resume=3):
        pass
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_start_from_nothing_drops_what_was_there(tmp_path: Path) -> None:
    log(tmp_path, 1, 5)
    log(tmp_path, 1, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("torn", ['{"step": 3, "ti', '{"step": 3, "loss": 7', "{", "3", "null", '{"time": 1}'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    log(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(torn)
    log(tmp_path, 3, 4, resume=3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_line_torn_inside_a_character_is_dropped(tmp_path: Path) -> None:
    """Samples are written in UTF-8; a kill may leave half of a character."""
    log(tmp_path, 1, 2)
    with (tmp_path / "samples.jsonl").open("ab") as stream:
        stream.write('{"step": 3, "prompt": "é'.encode()[:-1])
    log(tmp_path, 3, 3, resume=2)
    assert [row["step"] for row in rows(tmp_path, "samples.jsonl")] == [1, 2, 3]


def test_a_reply_with_unicode_line_separators_survives_a_resume(tmp_path: Path) -> None:
    reply = "one\u2028two\u2029three\u0085four"
    with tracker(tmp_path) as stream:
        stream.samples(1, [{**SAMPLE, "reply": reply}])
    with tracker(tmp_path, resume=1):
        pass
    assert [row["reply"] for row in rows(tmp_path, "samples.jsonl")] == [reply]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with tracker(tmp_path, enabled=False, tensorboard=True, wandb=Wandb(mode="offline")) as stream:
        stream.log(1, {"loss": 1.0})
        stream.samples(1, [SAMPLE])
    assert list(tmp_path.iterdir()) == []


def test_progress_is_a_plain_line_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path) as stream:
        stream.log(10, {"loss": 0.5, "objective/kl": 0.125, "lr/policy": 1.0})
    assert capsys.readouterr().out.startswith("sft  step 10/10  loss 0.5  kl 0.125  left 0 s")


# TensorBoard.


def curve(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_reads_the_rows_back(tmp_path: Path) -> None:
    with tracker(tmp_path, tensorboard=True) as stream:
        stream.log(1, {"loss": 2.0, "objective/kl": 0.5})
        stream.log(2, {"loss": 1.0, "objective/kl": 0.25})
        stream.samples(2, [SAMPLE])
    assert curve(tmp_path) == [(1, 2.0), (2, 1.0)]
    assert curve(tmp_path, "objective/kl") == [(1, 0.5), (2, 0.25)]


def test_tensorboard_shows_replies_side_by_side(tmp_path: Path) -> None:
    row = {"prompt": "p", "before": "b", "after": "a", "scores_after": {"reward": 0.5}}
    with tracker(tmp_path, tensorboard=True) as stream:
        stream.samples(1, [row])
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    (event,) = accumulator.Tensors("samples/text_summary")
    assert event.tensor_proto.string_val[0].decode() == (
        '**prompt** p  \n**before** b  \n**after** a  \n**scores_after** {"reward": 0.5}'
    )


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    log(tmp_path, 1, 5, tensorboard=True)
    log(tmp_path, 4, 6, resume=3, tensorboard=True)
    assert [step for step, _ in curve(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_shows_a_restarted_run_as_one(tmp_path: Path) -> None:
    """Killed before the first checkpoint, or run again by a changed recipe."""
    log(tmp_path, 1, 5, tensorboard=True)
    log(tmp_path, 1, 2, tensorboard=True)
    assert [step for step, _ in curve(tmp_path)] == [1, 2]


def test_tensorboard_holds_the_configuration(tmp_path: Path) -> None:
    log(tmp_path, 1, 2, tensorboard=True)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    (event,) = accumulator.Tensors("config/text_summary")
    assert '"lr": 0.1' in event.tensor_proto.string_val[0].decode()


def test_tensorboard_that_cannot_write_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder would be")
    log(tmp_path, 1, 3, tensorboard=True)
    assert len(rows(tmp_path)) == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("TensorBoard")]
    assert len(told) == 1
