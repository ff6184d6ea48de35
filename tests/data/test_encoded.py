"""Rows on disk: found again when they are the same, made anew when anything that decides them is not, whole or not there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.config.recipe import Recipe
from pipeline.data import encode
from pipeline.data.encoded import ROWS, Encoded, demonstrations, load, preferences, prompts
from pipeline.data.parallel import ordered
from pipeline.data.split import fingerprints
from pipeline.data.workers import FEW
from pipeline.errors import UserError
from pipeline.stage import Context
from tests.support.tiny import QUICKSTART

pytestmark = pytest.mark.fast

Maker = Callable[..., Recipe]
WHOLE = {"data": [{"path": "rows.jsonl"}]}


@pytest.fixture(scope="module")
def tok() -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / "base")


def write(folder: Path, count: int, name: str = "rows.jsonl", word: str = "say") -> None:
    rows = [{"prompt": f"{word} {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def context(recipe: Recipe, stage: str = "sft") -> Context:
    folder = recipe.path.parent
    inputs = {"data": fingerprints(recipe, stage, {}), "parents": {}}
    return Context(recipe, stage, folder / "run", 0, 1, inputs, {})


def folders(found: Context) -> list[Path]:
    return sorted((found.run_dir / ROWS).glob("*/*"))


def texts(tok: Any, found: Encoded, part: str = "train") -> list[str]:
    return [tok.decode(row["input_ids"], skip_special_tokens=True) for row in getattr(found, part)]


def test_the_same_rows_are_not_read_again(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    write(tmp_path, 40)
    here = context(make_recipe(sft=WHOLE))
    first = demonstrations(here, tok, 64, "completion")
    (folder,) = folders(here)
    made = (folder / "train.arrow").stat()
    (tmp_path / "rows.jsonl").unlink()
    again = demonstrations(here, tok, 64, "completion")
    assert (folder / "train.arrow").stat() == made
    assert (again.train[:], again.held_out[:], again.counts) == (first.train[:], first.held_out[:], first.counts)


def test_an_edited_file_is_read_and_the_old_rows_go(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    write(tmp_path, 40)
    recipe = make_recipe(holdout=0.0, sft=WHOLE)
    before = texts(tok, demonstrations(context(recipe), tok, 64, "completion"))
    (old,) = folders(context(recipe))
    text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    times = (tmp_path / "rows.jsonl").stat()
    (tmp_path / "rows.jsonl").write_text(text.replace("good 7", "fine 7"), encoding="utf-8")
    os.utime(tmp_path / "rows.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))  # no clock tells it apart
    after = texts(tok, demonstrations(context(recipe), tok, 64, "completion"))
    assert [a for a, b in zip(before, after, strict=True) if a != b] == ["say 7good 7"]
    assert "say 7fine 7" in after
    (new,) = folders(context(recipe))
    assert new != old


def test_what_decides_the_rows_is_in_the_key(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    write(tmp_path, 20)
    other = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    other.chat_template = "{{ messages[0].content }}"
    source = WHOLE["data"][0]
    keys = []
    for changes, tokenizer, length, loss_on in (
        ({}, tok, 64, "completion"),
        ({"share": 0.9}, tok, 64, "completion"),
        ({"limit": 3}, tok, 64, "completion"),
        ({"take": "rejected"}, tok, 64, "completion"),
        ({}, tok, 63, "completion"),
        ({}, tok, 64, "all"),
        ({}, other, 64, "completion"),
    ):
        recipe = make_recipe(
            sft={"data": [{**source, **changes}]}, reward={"data": WHOLE["data"]}, ppo={"prompts": WHOLE["data"]}
        )
        demonstrations(context(recipe), tokenizer, length, loss_on)
        keys += folders(context(recipe))
    demonstrations(context(make_recipe(holdout=0.1, sft=WHOLE)), tok, 64, "completion")
    keys += folders(context(make_recipe()))
    assert len(set(keys)) == len(keys) == 8


def test_lists_of_one_stage_do_not_remove_each_other(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    write(tmp_path, 40)
    ptx = {"data": [{"path": "rows.jsonl", "share": 0.1}]}
    here = context(make_recipe(ppo={"ptx": ptx}, reward={"data": [{"path": "rows.jsonl", "share": 0.2}]}), "ppo")
    prompts(here, tok, 64)
    demonstrations(here, tok, 64, "completion", "ptx.data")
    assert [folder.parent.name for folder in folders(here)] == ["ppo.prompts", "ppo.ptx.data"]


def told_to_end(state: None, item: int) -> bool:
    return signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_forked_process_ends_when_it_is_told_to() -> None:
    """A rank only makes a note of SIGTERM; a process that is forked from it must not have taken that over."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert all(ordered(None, told_to_end, range(20), 2, start="fork"))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_many_rows_by_processes_are_those_of_one(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    count = FEW + 700
    write(tmp_path, count)
    found = demonstrations(context(make_recipe(holdout=0.0, sft=WHOLE)), tok, 64, "completion")
    encoder = encode.Encoder(tok)
    assert len(found.train) == count
    for n in (0, 1, FEW - 1, FEW, FEW + 255, FEW + 256, count - 1):
        prompt, reply = encoder.prompt(f"say {n}"), encoder.reply(f"good {n}")
        assert found.train[n] == {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
    assert texts(tok, found) == [f"say {n}good {n}" for n in range(count)]


def test_every_row_is_counted_once_and_bad_ones_are_listed(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    write(tmp_path, 30)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "x", "chosen": "same", "rejected": "same"}) + "\n")
        stream.write(json.dumps({"prompt": "long", "chosen": "word " * 90, "rejected": "b"}) + "\n")
    rules = {"data": [{"path": "rows.jsonl", "limit": 5}]}
    here = context(make_recipe(holdout=0.2, reward=rules), "reward")
    found = preferences(here, tok, 64)
    counts = found.counts["rows.jsonl"]
    assert counts["rows"] == 32 == sum(counts.values()) - counts["rows"]
    assert counts["used"] == 5 == len(found.train)
    assert counts["held out"] == len(found.held_out)
    assert counts["over the limit"] > 0
    assert (counts["chosen equals rejected"], counts["too long"]) == (1, 1)
    (folder,) = folders(here)
    listed = [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["reason"]) for row in listed] == [(31, "chosen equals rejected"), (32, "too long")]


def test_killed_while_writing(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    write(tmp_path, 1000)
    here = context(make_recipe(holdout=0.0, sft=WHOLE))
    encoder = encode.Encoder(tok)

    def make(example: Any, dies: bool = False) -> dict[str, Any]:
        if dies and example.prompt == "say 700":
            os.kill(os.getpid(), signal.SIGKILL)
        return encode.demonstration(encoder, example, 64, "all")

    child = os.fork()
    if child == 0:
        try:
            load(here, encoder, lambda example: make(example, dies=True), {})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = folders(here)
    assert left.suffix == ".writing"
    assert texts(tok, load(here, encoder, make, {})) == [f"say {n}good {n}" for n in range(1000)]
    assert [folder.suffix for folder in folders(here)] == [""]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    write(tmp_path, 20)
    here = context(make_recipe(holdout=0.0, sft=WHOLE))
    encoder = encode.Encoder(tok)

    def make(example: Any, change: bool = True) -> dict[str, Any]:
        if change and example.prompt == "say 5":
            with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as stream:
                stream.write('{"prompt": "new", "chosen": "row", "rejected": "x"}\n')
        return encode.demonstration(encoder, example, 64, "all")

    with pytest.raises(UserError, match=r"data rows.jsonl[\s\S]*changed while"):
        load(here, encoder, make, {})
    assert [folder for folder in folders(here) if folder.suffix != ".writing"] == []
    here = context(here.recipe)
    assert texts(tok, load(here, encoder, lambda example: make(example, change=False), {}))[-1] == "newrow"


def both(make_recipe: Maker, weights: tuple[float, float] | None = None, **changes: Any) -> Recipe:
    """50 rows of `rows.jsonl` and 10 of `more.jsonl`, all of them training rows unless there is a holdout."""
    data: list[dict[str, Any]] = [{"path": "rows.jsonl"}, {"path": "more.jsonl"}]
    for source, weight in zip(data, weights or (), strict=False):
        source["weight"] = weight
    holdout = changes.pop("holdout", 0.0)
    return make_recipe(holdout=holdout, sft={"data": data, **changes})


@pytest.fixture
def two_files(tmp_path: Path) -> None:
    write(tmp_path, 50)
    write(tmp_path, 10, "more.jsonl", "tell")


@pytest.mark.usefixtures("two_files")
def test_sources_as_they_are(make_recipe: Maker, tok: Any) -> None:
    found = demonstrations(context(both(make_recipe)), tok, 64, "completion")
    assert texts(tok, found) == [f"say {n}good {n}" for n in range(50)] + [f"tell {n}good {n}" for n in range(10)]
    assert found.names == ["rows", "more"]
    assert found.train_from.tolist() == [0] * 50 + [1] * 10
    assert found.train.column_names == ["input_ids", "labels"]
    assert "drawn" not in found.counts["rows.jsonl"]


@pytest.mark.usefixtures("two_files")
@pytest.mark.parametrize(
    ("how", "rows", "more"),
    [
        ({"weights": (1.0, 3.0)}, 15, 45),  # of 60 draws
        ({"mix": {"temperature": 1.0}}, 50, 10),
        # The square roots of 50 and 10 are 7.071 and 3.162: of 60 draws 41.46 and 18.54.
        ({"mix": {"temperature": 2.0}}, 41, 19),
    ],
)
def test_mixtures(make_recipe: Maker, tok: Any, how: dict[str, Any], rows: int, more: int) -> None:
    found = demonstrations(context(both(make_recipe, **how)), tok, 64, "completion")
    said = texts(tok, found)
    assert (sum(t.startswith("say") for t in said), sum(t.startswith("tell") for t in said)) == (rows, more)
    assert np.bincount(found.train_from).tolist() == [rows, more]
    assert (found.counts["rows.jsonl"]["drawn"], found.counts["more.jsonl"]["drawn"]) == (rows, more)
    assert {said.count(t) for t in said if t.startswith("tell")} <= {more // 10, more // 10 + 1}
    assert {said.count(t) for t in said if t.startswith("say")} == {1}
    starts = [t.startswith("tell") for t in said]
    assert sorted(starts) != starts


@pytest.mark.usefixtures("two_files")
def test_another_mixture_encodes_nothing_again(make_recipe: Maker, tok: Any) -> None:
    first = demonstrations(context(both(make_recipe, (1.0, 3.0))), tok, 64, "completion")
    second = demonstrations(context(both(make_recipe, (3.0, 1.0), seed=1)), tok, 64, "completion")
    assert first.folder == second.folder


@pytest.mark.usefixtures("two_files")
def test_held_out_rows_of_all_sources_come_first(make_recipe: Maker, tok: Any) -> None:
    """Half of 60 prompts, about 25 and 5: the first 12 are of both sources."""
    found = demonstrations(context(both(make_recipe, holdout=0.5)), tok, 64, "completion")
    places = found.held_out_by_source(12)
    assert set(places) == {"rows", "more"}
    assert sorted(places["rows"] + places["more"]) == list(range(12))
    said = texts(tok, found, "held_out")
    assert all(said[place].startswith("tell") for place in places["more"])
    assert all(said[place].startswith("say") for place in places["rows"])
    assert demonstrations(context(make_recipe(sft=WHOLE)), tok, 64, "completion").held_out_by_source(12) == {}


@pytest.mark.usefixtures("two_files")
def test_prompts_know_their_source(make_recipe: Maker, tok: Any) -> None:
    data = [{"path": "rows.jsonl", "weight": 1}, {"path": "more.jsonl", "weight": 1}]
    train, _, counts = prompts(context(make_recipe(holdout=0.0, ppo={"prompts": data}), "ppo"), tok, 64)
    assert [prompt.source for prompt in train] == [
        "rows" if p.row["prompt"].startswith("say") else "more" for p in train
    ]
    assert sum(prompt.source == "more" for prompt in train) == 30 == counts["more.jsonl"]["drawn"]


@pytest.mark.usefixtures("two_files")
def test_a_weight_and_no_row_left(tmp_path: Path, make_recipe: Maker, tok: Any) -> None:
    row = json.dumps({"prompt": "a", "chosen": "word " * 90, "rejected": "b"})
    (tmp_path / "more.jsonl").write_text(f"{row}\n" * 3, encoding="utf-8")
    with pytest.raises(UserError, match=r"a weight for more.jsonl.*3 too long"):
        demonstrations(context(both(make_recipe, (1.0, 1.0))), tok, 64, "completion")
