"""A run's folder as a page reads it: whole, under way, killed, torn, old, damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.lock import run_lock
from pipeline.report.read import is_run, read_run, running, summary
from pipeline.report.series import BUCKETS, Series, thin
from tests.support import runs

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run(tmp_path_factory.mktemp("read") / "hh")


def test_a_finished_run(finished: Path) -> None:
    view = read_run(finished)
    assert (view["name"], view["state"], view["order"]) == (
        "quickstart",
        "done",
        ["sft", "reward", "ppo", "evaluate"],
    )
    assert "kind: ppo" in view["recipe"]
    assert view["keys"]["seed"] == 0
    assert view["command"] == ["relay", "run", "quickstart"]
    assert {"python", "torch", "relay-rlhf", "host"} <= view["environment"].keys()
    sft, ppo, tested = (view["stages"][name] for name in ("sft", "ppo", "evaluate"))
    assert ppo["parents"]["sft"] == sft["hash"]
    assert set(ppo["upstream"]) == {"sft", "reward"}
    assert (ppo["step"], ppo["total"], ppo["launches"], ppo["devices"]) == (30, 30, 1, 2)
    assert ppo["series"]["objective/kl"] == {"x": list(range(1, 31)), "y": [0.05 * step for step in range(1, 31)]}
    assert ppo["samples"]["columns"] == ["step", "prompt", "reply", "score", "kl"]
    assert [row[0] for row in ppo["samples"]["rows"]] == [10, 20, 30]
    assert tested["tables"]["wins"] == [
        {"judge": "judge", "what": "win rate", "value": 0.75, "low": 0.65, "high": 0.85}
    ]
    assert tested["tables"]["changes"] == [{"what": "judge", "before": 1.5, "after": 2.5}]
    assert tested["tables"]["forgetting"] == [runs.FORGOTTEN]
    assert tested["tables"]["calibration"] == runs.CURVE
    assert tested["tables"]["judges"][0]["ece"] == 0.03
    assert tested["samples"]["columns"] == ["prompt", "before", "after", "scores.judge"]
    json.dumps(view, allow_nan=False)


def test_a_failed_stage_says_why_and_others_wait(tmp_path: Path) -> None:
    view = read_run(runs.run(tmp_path / "hh", until="ppo"))
    ppo = view["stages"]["ppo"]
    assert (view["state"], ppo["state"]) == ("failed", "failed")
    assert ppo["why"] == "the reward source gave no number for row 7"
    assert ppo["warnings"] == [{"step": 15, "text": "replies grow longer"}]
    assert (ppo["step"], ppo["total"]) == (15, 30)
    assert view["stages"]["evaluate"]["state"] == "not run"


def launches(folder: Path, *events: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / "launches.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_time_counts_every_launch(tmp_path: Path) -> None:
    """100 s to a kill, of which 60 s until the last metrics are known, then 40 s on four ranks to a stop: 100 s."""
    start = {"event": "start", "ranks": 4}
    launches(
        tmp_path / "sft",
        start | {"time": 1000.0},
        {"event": "steps", "time": 1060.0, "first": 0, "last": 9},
        start | {"time": 1100.0},
        {"event": "end", "time": 1140.0, "error": "Stopped"},
    )
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 3, "time": 1130.0, "loss": 1.0}\n')
    stage = read_run(tmp_path)["stages"]["sft"]
    assert (stage["seconds"], stage["launches"], stage["state"]) == (100.0, 2, "stopped")
    assert stage["device_hours"] == pytest.approx(100 * 4 / 3600)


def test_a_killed_launch_lasted_until_its_last_metrics(tmp_path: Path) -> None:
    launches(tmp_path / "sft", {"event": "start", "ranks": 1, "time": 1000.0})
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 3, "time": 1030.0, "loss": 1.0}\n')
    stage = read_run(tmp_path)["stages"]["sft"]
    assert (stage["seconds"], stage["state"]) == (30.0, "failed")
    assert "killed" in stage["why"]


def test_a_run_under_way_is_seen_and_its_lock_left_alone(tmp_path: Path) -> None:
    launches(tmp_path / "run" / "sft", {"event": "start", "ranks": 1, "time": 1000.0})
    assert not running(tmp_path / "run")
    with run_lock(tmp_path / "run"):
        assert running(tmp_path / "run")
        assert read_run(tmp_path / "run")["stages"]["sft"]["state"] == "running"
        assert summary(tmp_path / "run")["state"] == "running"
    assert not running(tmp_path / "run")


def test_a_torn_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    series = Series(file)
    series.update()
    assert series.columns["loss"] == ([1], [3.0])
    with file.open("a") as stream:
        stream.write('ss": 2.0}\nnot json\n{"step": 3, "loss": NaN, "kl": 1.0}\n')
    series.update()
    assert series.columns == {"loss": ([1, 2], [3.0, 2.0]), "kl": ([3], [1.0])}


def test_a_resume_that_drops_rows_is_read_anew(tmp_path: Path) -> None:
    series = Series(tmp_path / "metrics.jsonl")
    with runs.tracker(tmp_path, 9) as stream:
        for step in (1, 2, 3):
            stream.log(step, {"loss": float(step)})
    series.update()
    with runs.tracker(tmp_path, 9, resume=1) as stream:
        stream.log(2, {"loss": 20.0})
        series.update()
    assert series.columns["loss"] == ([1, 2], [1.0, 20.0])


def test_thinning_keeps_ends_and_extremes() -> None:
    steps = list(range(10_000))
    values = [math.sin(step / 50) for step in steps]
    values[4321], values[77] = 9.0, -9.0
    kept, numbers = thin(steps, values, BUCKETS)
    assert len(kept) <= 2 * BUCKETS + 2
    assert (kept[0], kept[-1]) == (0, 9_999)
    assert kept == sorted(set(kept))
    assert {4321: 9.0, 77: -9.0}.items() <= dict(zip(kept, numbers, strict=True)).items()
    assert thin([1, 2], [3.0, 4.0], 1) == ([1, 2], [3.0, 4.0])


def test_an_altered_manifest_is_said(tmp_path: Path) -> None:
    folder = runs.run(tmp_path / "hh", steps=2)
    manifest = folder / "sft" / "output" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    view = read_run(folder)
    assert (view["state"], view["stages"]["sft"]["state"]) == ("damaged", "damaged")
    assert "altered" in view["stages"]["sft"]["why"]
    assert view["stages"]["reward"]["state"] == "done"


def test_a_run_of_before_there_were_records(tmp_path: Path) -> None:
    folder = runs.run(tmp_path / "hh", steps=2)
    (folder / "run.json").unlink()
    for file in folder.glob("*/launches.jsonl"):
        file.unlink()
    view = read_run(folder)
    assert view["state"] == "done"
    assert set(view["order"]) == {"sft", "reward", "ppo", "evaluate"}
    assert view["environment"] == {"torch": "2.13.0"}
    assert view["recipe"] is None


def test_what_is_no_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    assert read_run(tmp_path)["order"] == []
    assert read_run(tmp_path / "none")["state"] == "unfinished"
