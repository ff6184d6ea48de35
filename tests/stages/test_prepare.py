"""The prepare stage from files to a baton: counts, reports, the same bytes from any processes, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import chain, handoff
from pipeline.config.recipe import load
from pipeline.data import read, split
from pipeline.data.row import Row
from pipeline.errors import UserError
from pipeline.stage import Stopped, execute
from stages.prepare import prepare

pytestmark = pytest.mark.fast

WORDS = [f"word{n}" for n in range(40)]
PLANTED = " ".join(WORDS[10:23])
STEPS: list[Any] = [
    "unicode",
    "control",
    "html",
    {"whitespace": {"strip": True}},
    {"length": {"min": 5}},
    "exact_duplicates",
    {"near_duplicates": {"threshold": 0.7}},
    {"decontaminate": {"against": "eval.jsonl"}},
    "mask",
]
LONG = "The cafÃ© by the harbour opens at nine every day but Monday, when the old man who keeps it goes out to fish with a son"
ROWS: list[dict[str, Any]] = [
    {"prompt": "<b>When</b>  does it open?\u200b", "completion": LONG, "id": 1},
    {"prompt": "When  does it open? ", "completion": LONG, "id": 2},  # the first again, once cleaned
    {"prompt": "When does it open?", "completion": LONG + " now", "id": 3},  # nearly the first
    {"prompt": "Hi", "completion": "", "id": 4},  # too short
    {"messages": [{"role": "user", "content": "Write to me@example.org"}, {"role": "assistant", "content": "Yes."}]},
    {"prompt": "Say", "chosen": PLANTED, "rejected": "no no no"},  # contaminated
    {"prompt": "Which?", "chosen": "This one", "rejected": "That one"},
    {"prompt": "Which?", "chosen": "That one", "rejected": "This one"},  # swapped: another row
]


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A stage answers signals itself; the tests' process does not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def recipe(folder: Path, steps: list[Any] = STEPS, rows: list[dict[str, Any]] = ROWS, **block: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "eval.jsonl").write_text(json.dumps({"question": " ".join(WORDS)}) + "\n", encoding="utf-8")
    text = {
        "name": "data",
        "base": {"model": "no/model"},
        "stages": {
            "clean": {"kind": "prepare", "data": [{"path": "rows.jsonl"}], "steps": steps, "workers": 1, **block}
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    return file


def run(file: Path, run_dir: Path, *overrides: str, stage: str = "clean") -> handoff.Baton:
    execute(prepare, str(file), stage, run_dir, list(overrides), 0, 1)
    return handoff.open_baton(run_dir / stage)


def published(baton: handoff.Baton) -> list[dict[str, Any]]:
    found = [row.fields for row in read.rows(str(baton.path / "data")) if isinstance(row, Row)]
    return sorted(found, key=lambda row: (row["relay_file"], row["relay_row"]))


def test_rows_are_cleaned_filtered_counted_and_handed_on(tmp_path: Path) -> None:
    baton = run(recipe(tmp_path), tmp_path / "run")
    kept = published(baton)
    assert [row["relay_row"] for row in kept] == [1, 5, 7, 8]
    assert kept[0] == {
        "prompt": "When  does it open?",
        "completion": LONG.replace("Ã©", "é"),
        "id": 1,
        "relay_source": "rows.jsonl",
        "relay_file": "rows.jsonl",
        "relay_row": 1,
    }
    assert kept[1]["messages"][0] == {"role": "user", "content": "Write to [EMAIL]"}

    report = json.loads((baton.path / "report.json").read_text(encoding="utf-8"))
    assert report["rows"] == {"read": 8, "kept": 4}
    table = {
        step["step"]: (step["before"], step["changed"], sum(step["removed"].values()), step["after"])
        for step in report["steps"]
    }
    assert table == {
        "read": (8, 0, 0, 8),
        "unicode": (8, 3, 0, 8),
        "control": (8, 1, 0, 8),
        "html": (8, 1, 0, 8),
        "whitespace": (8, 1, 0, 8),
        "length": (8, 0, 1, 7),
        "exact_duplicates": (7, 0, 1, 6),
        "near_duplicates": (6, 0, 1, 5),
        "decontaminate": (5, 0, 1, 4),
        "mask": (4, 1, 0, 4),
    }
    assert report["steps"][3]["examples"][0]["after"].startswith("When  does")

    gone = [json.loads(line) for line in (baton.path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["row"], r["reason"], r["source"], r["file"]) for r in gone] == [
        (2, "exact_duplicates: same text as an earlier row", "rows.jsonl", "rows.jsonl"),
        (3, "near_duplicates: much like an earlier row", "rows.jsonl", "rows.jsonl"),
        (4, "length: fewer than 5 characters", "rows.jsonl", "rows.jsonl"),
        (6, "decontaminate: in eval.jsonl", "rows.jsonl", "rows.jsonl"),
    ]
    assert gone[0]["detail"] == "rows.jsonl, row 1"
    assert "| decontaminate | 5 | 0 | 1 | 4 |" in (baton.path / "report.md").read_text(encoding="utf-8")

    data, evaluation = baton.manifest["data"]
    assert (data["path"], data["rows"], data["kept"], data["exact_duplicates: same text as an earlier row"]) == (
        "rows.jsonl",
        8,
        4,
        1,
    )
    assert sum(n for key, n in data.items() if key not in ("path", "sha256", "rows")) == 8
    assert (evaluation["path"], evaluation["for"]) == ("eval.jsonl", "decontaminate")
    assert baton.manifest["metrics"] == {"rows/kept": 4.0, "rows/read": 8.0}
    assert not (tmp_path / "run" / "clean" / "work").exists()


def test_another_folder_and_more_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.prepare.CHUNK_ROWS", 1)
    hashes = []
    for name, workers in (("here", 1), ("there", 2)):
        (tmp_path / name).mkdir()
        hashes.append(run(recipe(tmp_path / name, workers=workers), tmp_path / name / "run").content_hash)
    assert hashes[0] == hashes[1]


def test_a_changed_evaluation_file_is_other_work(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    run(file, tmp_path / "run")
    assert chain.state(load(file), "clean", tmp_path / "run").done
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": "another"}) + "\n", encoding="utf-8")
    state = chain.state(load(file), "clean", tmp_path / "run")
    assert not state.done
    assert "data" in state.why


def test_a_prepare_stage_reads_another(tmp_path: Path) -> None:
    """Cleaning again changes nothing, and each row still says where it was first read."""
    file = recipe(tmp_path)
    text = yaml.safe_load(file.read_text(encoding="utf-8"))
    text["stages"]["again"] = {"kind": "prepare", "data": [{"stage": "clean"}], "steps": STEPS, "workers": 1}
    file.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    first = run(file, tmp_path / "run")
    second = run(file, tmp_path / "run", stage="again")
    assert published(second) == published(first)
    assert second.manifest["parents"] == {"clean": first.content_hash}


def test_a_training_stage_reads_what_was_prepared(tmp_path: Path) -> None:
    """Tool calls too: a Parquet column of their own would have given each the arguments of all others."""
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("weather", {"city": "Oslo"}), ("add", {"a": 1, "b": [2, {}]}))
    ]
    asked = {"role": "user", "content": "What is it?"}
    rows: list[dict[str, Any]] = [
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [call]}
        for call in calls
    ]
    rows += [{"prompt": "What is it?", "completion": "It is that."}, {"text": "Once upon a time."}]
    file = recipe(tmp_path, ["unicode"], rows)
    text = yaml.safe_load(file.read_text(encoding="utf-8"))
    text["data"] = {"holdout": 0.0}
    text["stages"]["sft"] = {"kind": "sft", "data": [{"stage": "clean"}], "lr": 1e-4}
    file.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    run(file, tmp_path / "run")
    placed = list(split.place(load(file), "sft", tmp_path / "run"))
    assert [row.part for row in placed] == ["train"] * 4, [row.reason for row in placed]
    found = [row.example for row in placed if row.example is not None and row.example.tools]
    assert [(e.tools, e.chosen) for e in found] == [(row["tools"], row["messages"][1:]) for row in rows[:2]]


def test_a_stop_request_leaves_nothing_published(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    (tmp_path / "run" / "clean").mkdir(parents=True)
    (tmp_path / "run" / "clean" / "STOP").touch()
    with pytest.raises(Stopped):
        run(file, tmp_path / "run")
    assert handoff.read_manifest(tmp_path / "run" / "clean") is None
    (tmp_path / "run" / "clean" / "STOP").unlink()
    assert len(published(run(file, tmp_path / "run"))) == 4


def test_bad_rows_are_counted_or_stop_the_stage(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("{broken\n")
    with pytest.raises(UserError, match="1 of 9 rows are bad"):
        run(file, tmp_path / "run")
    with pytest.raises(UserError, match=r"rows\.jsonl, row 9"):
        run(file, tmp_path / "run", "data.on_bad_row=stop")
    baton = run(file, tmp_path / "run", "data.max_bad=0.2")
    assert baton.manifest["data"][0]["rows"] == 9


def test_columns_of_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no field holds text") as error:
        run(recipe(tmp_path, rows=[{"Question": "Is it?", "Best Answer": "It is."}]), tmp_path / "run")
    assert "its columns: Best Answer, Question" in str(error.value)


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row is left") as error:
        run(recipe(tmp_path, [{"length": {"min": 10000}}]), tmp_path / "run")
    assert "fewer than 10000 characters" in str(error.value)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["unicod"], ["stages.clean.steps.0", "unicod", "one of: unicode, control, html", "write `unicode`"]),
        ([{"length": {"min": 5, "mx": 7}}], ["stages.clean.steps.0.length.mx", "one of: min, max, unit"]),
        ([{"length": {"min": "five"}}], ["stages.clean.steps.0.length.min", "five", "valid integer"]),
        ([{"length": {"min": 9, "max": 7}}], ["stages.clean.steps.0", "7 is less than min, 9"]),
        (
            ["html", {"near_duplicates": {"threshold": 2}}],
            ["stages.clean.steps.1.near_duplicates.threshold", "less than or equal to 1"],
        ),
        ([{"html": {}, "mask": {}}], ["stages.clean.steps.0", "expected one step"]),
        ([{"language": {"keep": ["xx"]}}], ["stages.clean.steps.0.language.keep", "xx", "en"]),
        ([{"decontaminate": {"against": "none.jsonl"}}], ["none.jsonl", "no such file"]),
        ([{"decontaminate": {}}], ["stages.clean.steps.0.decontaminate.against", "missing"]),
    ],
)
def test_mistakes_name_the_step(tmp_path: Path, steps: list[Any], said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        run(recipe(tmp_path, steps), tmp_path / "run")
    for part in said:
        assert part in str(error.value)


def test_shares_belong_to_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not split or mix"):
        load(recipe(tmp_path, data=[{"path": "rows.jsonl", "share": 0.5}]))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").split()[2] != "Z"
    except OSError:
        return False


def test_workers_die_with_a_killed_stage(tmp_path: Path) -> None:
    """SIGKILL, half-way through more rows than can be done meanwhile; then its processes go too."""
    rows = [{"text": " ".join(WORDS[n % 7 :]) + f" {n} &amp; <p>more</p> " * 20} for n in range(20000)]
    file = recipe(tmp_path, ["unicode", "html"], rows, workers=2)
    line = f"{sys.executable} -m stages.prepare --recipe {file} --stage clean --run-dir {tmp_path / 'run'}"
    stage = subprocess.Popen(line.split(), cwd=Path(__file__).resolve().parents[2])
    workers: list[int] = []
    while len(workers) < 3 and stage.poll() is None:  # two, and Python's resource tracker
        workers = children(stage.pid)
        time.sleep(0.02)
    assert stage.poll() is None
    stage.kill()
    stage.wait()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in workers)
