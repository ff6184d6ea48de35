"""A row that cannot be read is one `Bad` with its place, and the rows around it are read."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import lines
from pipeline.data.read import Bad, Row, rows
from pipeline.errors import UserError

pytestmark = pytest.mark.fast


def read(path: Path, content: str | bytes) -> list[Row | Bad]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(rows(str(path)))


def outcome(path: Path, content: str | bytes) -> list[tuple[int, str]]:
    """(row number, its `text` or why it is bad) of every row."""
    return [
        (row.number, row.fields.get("text", "") if isinstance(row, Row) else row.reason) for row in read(path, content)
    ]


A, B = '{"text": "a"}', '{"text": "b"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ', "not valid JSON"),
        ("[1, 2]", "a list, not a JSON object"),
        ("7", "a number, not a JSON object"),
        ("null", "nothing, not a JSON object"),
        (A + A, "not valid JSON"),
        ('{"text": "a", "text": "b"}', "an object has a key twice"),
        ('{"text": "\\ud83d"}', "half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "not valid JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not valid JSON"),
        (b'{"text": "\xfc"}', "not UTF-8"),
        (b'{"text": "\0"}', "not valid JSON"),
    ],
    ids=["cut", "list", "number", "null", "two", "key twice", "surrogate", "deep", "digits", "latin-1", "NUL"],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_bad_json_is_one_row(kind: str, line: str | bytes, reason: str, tmp_path: Path) -> None:
    bad = line.encode() if isinstance(line, str) else line
    if kind == "jsonl":
        assert outcome(tmp_path / "a.jsonl", b"%b\n\n%b\n%b\n" % (A.encode(), bad, B.encode())) == [
            (1, "a"),
            (3, reason),
            (4, "b"),
        ]
    elif b"[[" not in bad and bad != b'{"text": ':  # these two swallow what follows: see below
        assert outcome(tmp_path / "a.json", b"[%b, %b,\n%b]" % (A.encode(), bad, B.encode())) == [
            (1, "a"),
            (2, reason),
            (3, "b"),
        ]


def test_the_byte_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """Bytes count from 0 in the unpacked file, the byte-order mark included."""
    content = b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xfc"}\n'
    assert content[3 + 14 + 10] == 0xFC
    for name, data in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content))):
        good, bad = read(tmp_path / name, data)
        assert isinstance(good, Row)
        assert bad == Bad(str(tmp_path / name), 2, "not UTF-8", "byte 27")
    (bad,) = read(tmp_path / "a.json", b'[ {"text": "\xfc"}]')
    assert bad == Bad(str(tmp_path / "a.json"), 1, "not UTF-8", "byte 12")
    bad = read(tmp_path / "a.csv", b"text,other\na,b\na,\xfc\n")[1]
    assert bad == Bad(str(tmp_path / "a.csv"), 2, "not UTF-8", "byte 17")


def test_what_json_leaves_open(tmp_path: Path) -> None:
    """A pair of surrogates is a character; a bare string is a text; NaN and Infinity are numbers as Python writes them."""
    assert outcome(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n"alone"\n') == [
        (1, "\N{GRINNING FACE}"),
        (2, "alone"),
    ]
    (row,) = read(tmp_path / "a.jsonl", '{"margin": Infinity, "other": NaN}')
    assert isinstance(row, Row)
    assert row.fields["margin"] == float("inf")
    assert row.fields["other"] != row.fields["other"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        (" \n", []),
        ("[]", []),
        (" [ ] \n", []),
        (f"[{A}]", [(1, "a")]),
        (f"[{A},]", [(1, "a"), (2, "not valid JSON")]),
        (f"[{A},,{B}]", [(1, "a"), (2, "not valid JSON"), (3, "b")]),
        (f"[{A} {A}, {B}]", [(1, "not valid JSON"), (2, "b")]),
        (f"[{A}, {B}", [(1, "a"), (2, "LOST")]),
        (f"[{A}, ", [(1, "a"), (2, "LOST")]),
        ("[", [(1, "LOST")]),
        ('[{"text": "a]}, {', [(1, "LOST")]),
        (f"[{A}] {B}", [(1, "a"), (2, "text after the end of the list")]),
        ('[{"text": "]},[{\\"\\\\"}, "\\\\"]', [(1, ']},[{"\\'), (2, "\\")]),
        ("[{]}]", [(1, "not valid JSON")]),
        (f"[{A}}}, {B}]", [(1, "not valid JSON"), (2, "b")]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_json_lists(
    content: str, expected: list[tuple[int, str]], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK", chunk)
    lost = lines.LOST + ": the list is not closed"
    assert outcome(tmp_path / "a.json", content) == [(n, lost if text == "LOST" else text) for n, text in expected]


@pytest.mark.parametrize("content", ['{\n "text": "a"\n}\n', "(1)"])
def test_json_that_is_no_rows_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a JSON list of objects, or one JSON object a line"):
        read(tmp_path / "a.json", content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufefftext,other\r\na,b\r\n", [(1, "a")]),
        ("text,other\na,b\n\nc,d", [(1, "a"), (2, "c")]),
        ("text,other\na\nb,c\nd,e,f\n", [(1, "RAGGED"), (2, "b"), (3, "RAGGED")]),
        ('text,other\n"a""b\n,c",d\n', [(1, 'a"b\n,c')]),
        ('text,other\n"a"b,c\nd,e\n', [(1, "not valid CSV"), (2, "d")]),
        ('text,other\na,b\n"c,d\ne,f\n', [(1, "a"), (2, "LOST")]),
        ("text,other\na\0,b\nc,d\n", [(1, "a NUL byte"), (2, "c")]),
        (b'text,other\n"\xfc\nx",b\nc,d\n', [(1, "not UTF-8"), (2, "c")]),
        ('text\n""\na\n', [(1, ""), (2, "a")]),
        ("text,other\n", []),
        ("", []),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_csv(kind: str, content: str | bytes, expected: list[tuple[int, str]], tmp_path: Path) -> None:
    data = content.encode() if isinstance(content, str) else content
    if kind == "tsv":
        data, expected = data.replace(b",", b"\t"), [(n, text.replace(",", "\t")) for n, text in expected]
    names = {"RAGGED": "not one cell for each column", "LOST": lines.LOST + ": a quotation is not closed"}
    assert outcome(tmp_path / f"a.{kind}", data) == [(n, names.get(text, text)) for n, text in expected]


@pytest.mark.parametrize("content", [b"text,text\na,b\n", b"te\xfct,other\na,b\n", b'"text,other\na,b\n'])
def test_csv_without_a_sound_header_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.csv, header"):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", f'{A}\n{{"text": "{"x" * 200}"}}\n{B}\n', ["a", "LONG", "b"]),
        ("a.jsonl", f'{A}\n{{"text": "{"x" * 200}"}}', ["a", "LONG"]),
        ("a.json", f'[{A}, {{"text": "{"x" * 200}"}}, {B}]', ["a", "LONG", "b"]),
        ("a.csv", f"text,other\na,b\n{'x' * 200},d\nb,d\n", ["a", "LONG", "b"]),
        ("a.csv", f'text,other\na,b\n"{"x" * 200}\nmore,\n",d\nb,d\n', ["a", "LONG", "b"]),
        ("a.csv", f'text,other\na,b\n"c\n{"x" * 200}",d\nb,d\n', ["a", "LONG", "b"]),
        ("a.csv", f'text,other\na,b\n"c\n{"x" * 200}\nmore",d\nb,d\n', ["a", "LONG", "b"]),
        ("a.csv", "text,other\na,b\n" + '"' + "x\n" * 200, ["a", "LOST"]),
    ],
)
def test_a_row_above_the_limit_is_passed_over(
    name: str, content: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LIMIT", 100)
    monkeypatch.setattr(lines, "CHUNK", 16)
    words = {"LONG": f"longer than {100 / 2**20:g} MiB", "LOST": lines.LOST + ": a quotation is not closed"}
    assert [text for _, text in outcome(tmp_path / name, content)] == [words.get(text, text) for text in expected]


def test_a_line_of_100_megabytes_is_passed_over_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LIMIT", 2**20)
    with (tmp_path / "a.jsonl").open("wb") as stream:
        stream.write(A.encode() + b'\n{"text": "')
        for _ in range(100):
            stream.write(b"x" * 10**6)
        stream.write(b'"}\n' + B.encode())
    tracemalloc.start()
    assert [row.number for row in rows(str(tmp_path / "a.jsonl"))] == [1, 2, 3]
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


LINES = "".join(f'{{"text": "{os.urandom(40).hex()}"}}\n' for _ in range(5000)).encode()


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files_give_the_rows_before_they_break(codec: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl.{'gz' if codec == 'gzip' else 'zst'}"
    whole = pa.Codec(codec).compress(LINES, asbytes=True)
    *before, bad = read(path, whole[: len(whole) // 2])
    assert isinstance(bad, Bad)
    assert bad.reason == lines.LOST
    assert bad.number == len(before) + 1
    assert 1000 < len(before) < 4000
    texts = [json.loads(line)["text"] for line in LINES.splitlines()]
    assert [row.fields["text"] for row in before if isinstance(row, Row)] == texts[: len(before)]
    if codec == "gzip":  # Zstandard as Arrow writes it has no checksum: altered bytes may be other sound text
        broken = bytearray(whole)
        broken[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
        assert any(isinstance(row, Bad) for row in read(path, bytes(broken)))
    assert len(read(path, whole + whole)) == 10_000  # compressed files may be joined


def test_columns_of_other_types_and_broken_values(tmp_path: Path) -> None:
    """Text that is not UTF-8 is one bad row among 600, in Parquet and in Arrow."""
    raw = [b"fine"] * 600
    raw[300] = b"\xfc"
    text = pa.Array.from_buffers(pa.string(), 600, pa.array(raw, pa.binary()).buffers())
    table = pa.table({"text": text, "n": list(range(600))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=250)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        found = list(rows(str(tmp_path / name)))
        assert [row.number for row in found] == list(range(1, 601))
        assert [row.number for row in found if isinstance(row, Bad)] == [301]
        assert [row.fields["n"] for row in found if isinstance(row, Row)] == [n for n in range(600) if n != 300]


def test_a_broken_page_of_parquet_is_told_after_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [os.urandom(40).hex() for _ in range(4000)]})
    pq.write_table(table, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[place + 40 : place + 400] = bytes(360)
    *before, bad = read(path, bytes(data))
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.number, len(before)) == (lines.LOST, 2001, 2000)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'text' is there twice"):
        list(rows(str(tmp_path / "a.parquet")))


def test_a_large_parquet_file_is_streamed(tmp_path: Path) -> None:
    """64 MB of text in 16 row groups: Arrow holds a fraction of them at a time."""
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="none", use_dictionary=False) as writer:
        for _ in range(16):
            writer.write_table(pa.table({"text": ["x" * 4000] * 1000}, schema), row_group_size=1000)
    before, most = pa.total_allocated_bytes(), 0
    for count, _ in enumerate(rows(str(tmp_path / "a.parquet")), 1):
        if count % 500 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert count == 16_000
    assert most < 16 * 2**20
