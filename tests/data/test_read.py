"""Files to rows: every format gives the same rows with their numbers, and a bad row is named by file and number."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.read import files, fingerprint, rows
from pipeline.errors import UserError

pytestmark = pytest.mark.fast

TEXT = [{"prompt": "Say ü.", "completion": "ü"}, {"prompt": 'Two\nlines, "quoted"', "completion": "yes"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TEXT)


def write_json(path: Path) -> None:
    path.write_text(json.dumps(TEXT, indent=1), encoding="utf-8")


def write_jsonl(path: Path) -> None:
    path.write_text(LINES, encoding="utf-8")


def write_gz(path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write(LINES if path.name.endswith(".jsonl.gz") else json.dumps(TEXT))


def write_csv(path: Path) -> None:
    path.write_text('prompt,completion\nSay ü.,ü\n"Two\nlines, ""quoted""",yes\n', encoding="utf-8")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(TEXT), path)


WRITERS = {
    "a.json": write_json,
    "a.jsonl": write_jsonl,
    "a.json.gz": write_gz,
    "a.jsonl.gz": write_gz,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


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


@pytest.mark.parametrize(
    ("name", "text", "place", "words"),
    [
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "bad.jsonl, row 2", "not valid JSON"),
        ("cut.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{"te', "cut.jsonl, row 4", "not valid JSON"),
        ("list.jsonl", '{"text": "a"}\n[1, 2]\n', "list.jsonl, row 2", "found list"),
        ("number.json", '[{"text": "a"}, 7]', "number.json, row 2", "found int"),
        ("wide.csv", "prompt,completion\na,b\nc,d,e\n", "wide.csv, row 2", "1 more cells than columns"),
        ("bad.json", '[{"text": "a"},\n {"text": }]', "bad.json, line 2", "not valid JSON"),
    ],
)
def test_bad_row_is_named_by_file_and_number(name: str, text: str, place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        list(rows(str(tmp_path / name)))
    assert place in str(raised.value)
    assert words in str(raised.value)


def test_rows_before_the_bad_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\nnothing\n', encoding="utf-8")
    reading = rows(str(path))
    assert next(reading).fields == {"text": "a"}
    with pytest.raises(UserError, match="row 2"):
        next(reading)


ZIPPED = bytearray(gzip.compress(LINES.encode() * 50))
ZIPPED[20] ^= 0xFF


@pytest.mark.parametrize(
    "content", [gzip.compress(LINES.encode())[:-20], b"plain text", bytes(ZIPPED)], ids=["cut", "not gzip", "altered"]
)
def test_broken_gzip_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.jsonl\.gz: cannot be read"):
        list(rows(str(path)))


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"broken\.parquet: cannot be read"):
        list(rows(str(path)))


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "ü"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl: cannot be read"):
        list(rows(str(path)))


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


def test_real_preferences_are_read_whole(hh_rlhf: Path) -> None:
    per_file: dict[str, int] = {}
    for row in rows(str(hh_rlhf)):
        assert row.fields.keys() == {"chosen", "rejected"}
        per_file[Path(row.file).name] = row.number
    # Lines of each file, counted with zcat and wc.
    assert per_file == {
        "harmless-base.test.jsonl.gz": 2312,
        "helpful-base.test.jsonl.gz": 2354,
        "helpful-online.test.jsonl.gz": 1137,
        "helpful-rejection-sampled.test.jsonl.gz": 2749,
    }
