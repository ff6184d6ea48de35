"""Paths to rows: every format gives the same rows with their numbers; files, folders, globs, hub ids, and what is refused."""

import csv
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.read import Row, files, fingerprint, inside, rows
from pipeline.data.shape import recognise
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

TEXT = [{"prompt": "Say ü.", "completion": "ü"}, {"prompt": 'Two\nlines, "quoted"', "completion": "yes"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TEXT)


def write_json(path: Path) -> None:
    path.write_text(json.dumps(TEXT, indent=1), encoding="utf-8")


def write_jsonl(path: Path) -> None:
    path.write_text(LINES, encoding="utf-8")


def write_csv(path: Path) -> None:
    path.write_text('prompt,completion\nSay ü.,ü\n"Two\nlines, ""quoted""",yes\n', encoding="utf-8")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(TEXT), path)


def write_tsv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter="\t")
        writer.writeheader()
        writer.writerows(TEXT)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(TEXT)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(TEXT)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def packed(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same content, compressed by what the suffix says."""

    def write_packed(path: Path) -> None:
        plain = path.with_suffix("")
        write(plain)
        codec = pa.Codec({".gz": "gzip", ".zst": "zstd"}[path.suffix])
        path.write_bytes(codec.compress(plain.read_bytes(), asbytes=True))
        plain.unlink()

    return write_packed


PLAIN = {"json": write_json, "jsonl": write_jsonl, "ndjson": write_jsonl, "csv": write_csv, "tsv": write_tsv}
WRITERS = (
    {f"a.{kind}": write for kind, write in PLAIN.items()}
    | {f"a.{kind}.{packing}": packed(write) for kind, write in PLAIN.items() for packing in ("gz", "zst")}
    | {"A.JSONL": write_jsonl, "lines.json": write_jsonl, "a.parquet": write_parquet}
    | {"a.arrow": write_arrow, "stream.arrow": write_arrow_stream}
)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_and_numbers(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    read = list(rows(str(path)))
    assert [row.fields for row in read] == TEXT
    assert [row.number for row in read] == [1, 2]
    assert [row.where for row in read] == [f"{path}, row 1", f"{path}, row 2"]


def test_row_number_of_jsonl_is_its_line(tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text('\n{"text": "second line"}\n\n  \n{"text": "fifth line"}\n', encoding="utf-8")
    assert [(row.number, row.fields["text"]) for row in rows(str(path))] == [(2, "second line"), (5, "fifth line")]


def test_line_separators_of_unicode_do_not_end_a_jsonl_line(tmp_path: Path) -> None:
    path = tmp_path / "unicode.jsonl"
    path.write_text('{"text": "a\u2028b\u2029c\u0085d"}\n{"text": "e"}\n', encoding="utf-8")
    assert [(row.number, row.fields["text"]) for row in rows(str(path))] == [(1, "a\u2028b\u2029c\u0085d"), (2, "e")]


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    """A byte-order mark before the first column's name, and a cell longer than the csv module's default limit."""
    path = tmp_path / "sheet.csv"
    path.write_text("\ufefftext,other\n" + "x" * 200_000 + ",y\n", encoding="utf-8")
    assert [row.fields for row in rows(str(path))] == [{"text": "x" * 200_000, "other": "y"}]


def test_folder_is_its_data_files_in_order_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deeper/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    (tmp_path / "LICENSE").write_text("not data", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not data", encoding="utf-8")
    assert [row.fields["text"] for row in rows(str(tmp_path))] == ["a.jsonl", "b.jsonl", "deeper/c.jsonl"]
    assert files(str(tmp_path / "*.jsonl")) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_is_nothing_of_the_kind_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=rf"{name}: cannot be read"):
        list(rows(str(tmp_path / name)))


def test_utf16_and_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_bytes("text\nhello\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16 text\n  expected UTF-8\n  fix: iconv"):
        list(rows(str(tmp_path / "wide.csv")))
    (tmp_path / "book.docx").write_text("Once upon a time.")
    with pytest.raises(UserError, match=r"no format is known by the suffix \.docx"):
        list(rows(str(tmp_path / "book.docx")))


def test_a_file_deleted_before_its_turn_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name)
    reading = rows(str(tmp_path))
    assert next(reading).number == 1
    (tmp_path / "b.jsonl").unlink()
    assert next(reading).number == 2
    with pytest.raises(UserError, match=r"b\.jsonl: cannot be read: .*No such file"):
        next(reading)


def test_saved_data_sets_are_read_by_split_and_without_what_lies_beside(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = {"text": [f"row {n}" for n in range(3)]}
    Dataset.from_dict(data).save_to_disk(str(tmp_path / "one"))
    assert [row.fields["text"] for row in rows(str(tmp_path / "one"))] == data["text"]
    splits = DatasetDict(train=Dataset.from_dict(data), test=Dataset.from_dict({"text": ["held"]}))
    splits.save_to_disk(str(tmp_path / "both"))
    assert [row.fields["text"] for row in rows(str(tmp_path / "both"))] == data["text"]
    assert [row.fields["text"] for row in rows(str(tmp_path / "both"), split="test")] == ["held"]
    assert fingerprint(str(tmp_path / "both")) != fingerprint(str(tmp_path / "both"), split="test")
    with pytest.raises(UserError, match="no data file of split dev"):
        list(rows(str(tmp_path / "both"), split="dev"))


def test_hidden_files_of_a_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    for name in (".a.jsonl", ".cache/b.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name)
    assert files(str(tmp_path)) == [tmp_path / "c.jsonl"]


@pytest.mark.parametrize("offline", [False, True], ids=["no network", "offline"])
def test_a_hub_id_that_cannot_be_reached_is_refused_at_once(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(UserError) as raised:
        list(rows("someone/some-data", revision="v1"))
    assert time.monotonic() - began < 10
    for word in ("data someone/some-data: no such local file, and the hub did not give it", "HF_HUB_OFFLINE=1"):
        assert word in str(raised.value)
    assert "\n\n" not in str(raised.value)


def test_hub_rows_are_streamed_with_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself cannot be had in a test: what is asked of the libraries is looked at, and a loss midway."""
    asked: dict[str, Any] = {}

    def load_dataset(path: str, subset: str | None, **options: Any) -> Any:
        asked.update(options, path=path, subset=subset)
        yield {"text": "a"}
        raise ConnectionError("gone")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, path, **options: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reading = rows("someone/some-data", "v1", "test", "en")
    assert next(reading) == Row({"text": "a"}, "someone/some-data", 1)
    assert asked == {
        "path": "someone/some-data",
        "subset": "en",
        "revision": "v1",
        "split": "test",
        "streaming": True,
    }
    with pytest.raises(UserError, match="the hub gave 1 rows and then failed: gone"):
        next(reading)
    assert fingerprint("someone/some-data") != fingerprint("someone/some-data", "v1")


@pytest.fixture
def yard(tmp_path: Path) -> Path:
    """root/ (in/a.jsonl, leak.jsonl -> outside, door -> outside folder) beside secret/s.jsonl."""
    for name in ("root/in/a.jsonl", "secret/s.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_jsonl(tmp_path / name)
    (tmp_path / "root/leak.jsonl").symlink_to(tmp_path / "secret/s.jsonl")
    (tmp_path / "root/door").symlink_to(tmp_path / "secret")
    return tmp_path


@pytest.mark.parametrize(
    "path", ["root/in", "root/in/a.jsonl", "root/in/*.jsonl", "root/in/../in/a.jsonl", "someone/data"]
)
def test_paths_inside_the_allowed_folder_pass(path: str, yard: Path) -> None:
    inside(path if path == "someone/data" else str(yard / path), yard / "root", "recipe r.yaml: stages.sft.data")


@pytest.mark.parametrize(
    "path",
    [
        "secret/s.jsonl",
        "root/../secret/s.jsonl",
        "root/leak.jsonl",
        "root/door/s.jsonl",
        "root/door",
        "root/*.jsonl",
        "root",
        "root/../*/s.jsonl",
        "secret/not there.jsonl",
        "root/../secret/none/*.jsonl",
    ],
)
def test_paths_that_lead_outside_are_refused(path: str, yard: Path) -> None:
    with pytest.raises(UserError, match=r"recipe r\.yaml: stages\.sft\.data: .* outside "):
        inside(str(yard / path), yard / "root", "recipe r.yaml: stages.sft.data")


def test_relative_paths_are_judged_by_where_they_lead(yard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(yard / "root")
    inside("in/a.jsonl", yard / "root", "key")
    for path in ("../secret", "../secret/s.jsonl", "a/../../secret/s.jsonl", "../secret"):
        with pytest.raises(UserError, match="outside"):
            inside(path, yard / "root", "key")


@pytest.mark.parametrize("path", ["/nowhere/rows.jsonl", "./nowhere", "nowhere.jsonl", "nowhere/*.jsonl"])
def test_missing_path_says_what_could_be_there(path: str) -> None:
    with pytest.raises(UserError) as raised:
        list(rows(path))
    for word in (path, "no such file, folder or glob", ".jsonl", ".parquet", "relative to the recipe file"):
        assert word in str(raised.value)


def test_fingerprint_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
        (place / "rows.jsonl").write_text(LINES, encoding="utf-8")
    first, second = (fingerprint(str(place)) for place in places)
    assert first == second
    assert len(first) == 64
    (places[1] / "rows.jsonl").write_text(LINES + "\n", encoding="utf-8")
    assert fingerprint(str(places[1])) != first


# Counted by zcat and wc -l; for lists by the number of `"instruction":` (polite-pref) and by the data's README.
REAL = {
    "hh-rlhf/harmless-base.test.jsonl.gz": (2312, "HH-RLHF transcript pair"),
    "hh-rlhf/helpful-base.test.jsonl.gz": (2354, "HH-RLHF transcript pair"),
    "hh-rlhf/helpful-online.test.jsonl.gz": (1137, "HH-RLHF transcript pair"),
    "hh-rlhf/helpful-rejection-sampled.test.jsonl.gz": (2749, "HH-RLHF transcript pair"),
    "polite-pref/instruction-data.json": (1100, "Alpaca"),
    "polite-pref/instruction-data-with-preference.json": (1100, "Alpaca pair"),
    "tinystories/tinystories_1000.json": (1000, "text"),
    "self-instruct/user_oriented_instructions.jsonl": (252, "Self-Instruct"),
    "self-instruct/seed_tasks.jsonl": (175, "Self-Instruct"),
    "gsm8k/train.jsonl.gz": (7473, "question + answer"),
    "gsm8k/test.jsonl.gz": (1319, "question + answer"),
    "human-eval/HumanEval.jsonl.gz": (164, "prompt"),
    "truthfulqa/TruthfulQA.csv": (817, "None"),
    "mt-bench/question.jsonl": (80, "None"),
    "mt-bench/gpt-4.jsonl": (30, "None"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole_and_recognised(name: str, test_data: Path) -> None:
    shapes: Counter[str] = Counter()
    for row in rows(str(test_data / name)):
        assert isinstance(row, Row)
        shapes[str(recognise(row.fields))] += 1
    count, shape = REAL[name]
    assert shapes == {shape: count}
