"""Whatever stands in a file: no crash, and every row is a `Row` or a `Bad`."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import lines
from pipeline.data.check import Rejections, examples
from pipeline.data.messages import transcript
from pipeline.data.read import Bad, Row, rows
from pipeline.data.shape import Example, Skip, demonstration, plain, preference, prompt_only, recognise, unpaired
from pipeline.errors import UserError

pytestmark = pytest.mark.fast
QUICK = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TOKENS = [
    b'{"text": "a"}',
    b'"',
    b"\\",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b"\n",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\0",
]
BYTES = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(TOKENS), max_size=20).map(b"".join))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read(path: Path, content: bytes) -> list[Row | Bad] | None:
    """All rows; None when the file is refused."""
    path.write_bytes(content)
    try:
        return list(rows(str(path)))
    except UserError:
        return None


def rising(found: list[Row | Bad]) -> bool:
    """Numbers begin at 1 and rise; a line that is blank has a number and is no row."""
    numbers = [row.number for row in found]
    return numbers == sorted(set(numbers)) and all(number >= 1 for number in numbers)


def json_bytes_match(found: list[Row | Bad], lines: list[bytes]) -> bool:
    """Each row is what Python's own parser makes of its line."""
    return all(
        isinstance(row, Bad) or row.fields == (v if isinstance(v := json.loads(line), dict) else {"text": v})
        for row, line in zip(found, lines, strict=True)
    )


@QUICK
@given(content=BYTES)
def test_jsonl_yields_as_many_as_there_are_lines_that_are_not_blank(folder: Path, content: bytes) -> None:
    found = read(folder / "a.jsonl", content)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        assert found is None
        return
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert found is not None
    assert len(found) == len(lines)
    assert json_bytes_match(found, lines)


@QUICK
@given(content=BYTES, chunk=st.integers(1, 30), limit=st.integers(10, 100))
def test_any_bytes_in_every_text_format(
    folder: Path, content: bytes, chunk: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK", chunk)
    monkeypatch.setattr(lines, "LIMIT", limit)
    for name in ("a.json", "a.csv", "a.tsv"):
        for found in (read(folder / name, content), read(folder / f"{name}.gz", gzip.compress(content))):
            assert found is None or rising(found)
    for name in ("a.json.gz", "a.csv.zst", "a.parquet", "a.arrow"):
        read(folder / name, content)


JSON_LEAF = st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from(['"', "\\", "]},"])
JSON = st.recursive(JSON_LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))


@settings(QUICK, max_examples=60)
@given(values=st.lists(JSON, max_size=6), chunk=st.integers(1, 30), indent=st.sampled_from([None, 1]))
def test_every_element_of_a_json_list_is_told_apart(
    folder: Path, values: list[Any], chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK", chunk)
    found = read(folder / "a.json", json.dumps(values, indent=indent).encode())
    assert found is not None
    for row, value in zip(found, values, strict=True):
        if isinstance(value, dict) and not re.search(r"\\ud[89a-f]", json.dumps(value)):
            assert isinstance(row, Row)
            assert repr(row.fields) == repr(value)  # NaN is not equal to itself


@QUICK
@given(
    table=st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")), min_size=2, max_size=2),
        max_size=8,
    )
)
def test_what_csv_writers_write_is_read(folder: Path, table: list[list[str]]) -> None:
    import csv

    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter=delimiter).writerows([["prompt", "completion"], *table])
        found = list(rows(str(folder / name)))
        assert [list(row.fields.values()) for row in found if isinstance(row, Row)] == table


def _sound(folder: Path) -> dict[str, bytes]:
    table = pa.table({"prompt": ["p" * n for n in range(30)], "n": list(range(30)), "l": [[{"role": "user"}]] * 30})
    pq.write_table(table, folder / "s.parquet")
    with pa.OSFile(str(folder / "s.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(folder / "f.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    text = b"".join(b'{"text": "%d"}\n' % n for n in range(2000))
    codecs = {"gz": "gzip", "zst": "zstd"}
    packed = {f"p.jsonl.{end}": pa.Codec(codec).compress(text, asbytes=True) for end, codec in codecs.items()}
    return {name: (folder / name).read_bytes() for name in ("s.parquet", "s.arrow", "f.arrow")} | packed


@QUICK
@given(data=st.data())
def test_damaged_files(folder: Path, data: st.DataObject) -> None:
    """Sound files cut short, or with bytes overwritten: refused, or read."""
    for name, content in _sound(folder).items():
        damaged = bytearray(content)
        for place, byte in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
        ):
            damaged[place] = byte
        end = data.draw(st.integers(0, len(content)))
        found = read(folder / name, bytes(damaged[:end]))
        assert found is None or rising(found)


NAMES = ["text", "messages", "prompt", "completion", "chosen", "rejected", "label", "margin", "instruction", "input"]
NAMES += ["output", "conversations", "system", "question", "answer", "instances", "tools", "id"]
TURNS = st.lists(
    st.fixed_dictionaries(
        {}, optional={k: st.text(max_size=3) | st.none() for k in ("role", "content", "from", "value", "tool_calls")}
    ),
    max_size=3,
)
HH = ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"]
SAID = st.sampled_from([*HH, "", " ", "a b", "a c", "[]", "{", "\ud800"])
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=2) | SAID | st.text(max_size=5)
NESTED = st.recursive(LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=5)
VALUE = st.one_of(LEAF, TURNS, NESTED)
READERS: list[Callable[[Row], Example]] = [
    lambda row: demonstration(row, "chosen"),
    lambda row: demonstration(row, "rejected"),
    preference,
    prompt_only,
    unpaired,
]


@settings(QUICK, max_examples=300)
@given(fields=st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=6))
def test_any_fields_are_an_example_or_a_reason(fields: dict[str, Any]) -> None:
    row = Row(fields, "a.jsonl", 1)
    shape = recognise(fields)
    for reader in READERS:
        try:
            example = reader(row)
        except Skip:
            continue
        assert shape is not None
        for text in (example.prompt, example.chosen, example.rejected):
            if isinstance(text, list):
                assert text
                assert all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in text)
            assert text is None or isinstance(plain(text), str)


@QUICK
@given(listed=st.lists(st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=4), min_size=1, max_size=8))
def test_no_row_goes_uncounted(folder: Path, listed: list[dict[str, Any]]) -> None:
    rejections = Rejections(folder / "rejected.jsonl", most=1.0)
    given_rows = [Row(fields, "a.jsonl", number) for number, fields in enumerate(listed, 1)]
    try:
        used = list(examples("s", given_rows, prompt_only, rejections))
    except UserError:  # none has a shape
        assert not any(recognise(fields) for fields in listed)
        return
    rejections.close()
    assert len(used) + rejections.reasons.get("s", {}).get("missing: prompt", 0) <= len(listed)
    assert len(used) + sum(rejections.reasons.get("s", {}).values()) == len(listed)
    listed_bad = (folder / "rejected.jsonl").read_text(encoding="utf-8") if rejections.bad.get("s") else ""
    for line in listed_bad.strip("\n").split("\n") if listed_bad else []:
        assert {"source", "file", "row", "reason", "content"} <= json.loads(line).keys()


@QUICK
@given(parts=st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", "\n", "Human: "])))
def test_transcripts_lose_no_word(parts: list[str]) -> None:
    text = "".join(parts)
    turns = transcript(text)
    if turns is not None:
        words = " ".join(turn["content"] for turn in turns).split()
        assert words == re.sub(r"\n\n(Human|Assistant):", " ", text).split()
