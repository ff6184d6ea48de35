"""Parquet and Arrow files to rows, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.data.row import Bad, Row
from pipeline.errors import UserError

ROWS = 256
"""Rows that are Python objects at one time."""


def parquet_rows(file: Path) -> Iterator[Row | Bad]:
    """Rows of a Parquet file. Raises OSError, without errno, where the file is broken."""
    import pyarrow.parquet as parquet

    with _arrow_faults(), parquet.ParquetFile(str(file), pre_buffer=False) as table:
        _no_column_twice(table.schema_arrow.names, file)
        # One row group after the other, so that no batch holds rows of a sound group and a broken one.
        groups = range(table.num_row_groups)
        batches = (b for n in groups for b in table.iter_batches(batch_size=ROWS, row_groups=[n]))
        yield from _numbered(batches, str(file))


def arrow_rows(file: Path) -> Iterator[Row | Bad]:
    """Rows of an Arrow file, in the file or the stream format (which `datasets` writes), memory-mapped."""
    import pyarrow

    with _arrow_faults(), pyarrow.memory_map(str(file)) as source:
        seekable = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if seekable else pyarrow.ipc.open_stream(source)
        _no_column_twice(reader.schema.names, file)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if seekable else iter(reader)
        yield from _numbered(batches, str(file))


@contextmanager
def _arrow_faults() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise OSError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _no_column_twice(names: list[str], file: Path) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"data {file}", f"column {twice!r} is there twice", fix="rename one of them")


def _numbered(batches: Iterator[Any], name: str) -> Iterator[Row | Bad]:
    number = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, ROWS):
            for fields in _fields(batch.slice(begin, ROWS)):
                number += 1
                yield (
                    Bad(name, number, "values that are broken", fields)
                    if isinstance(fields, str)
                    else Row(fields, name, number)
                )


def _fields(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a batch; in place of one that is broken (text that is not UTF-8, a date out of range), what is wrong."""
    import pyarrow

    from pipeline.data.shards import decoded

    try:
        batch.validate(full=True)
        return list(decoded(batch.schema, batch.to_pylist()))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [str(error).splitlines()[0] if str(error) else type(error).__name__]
    return [fields for number in range(batch.num_rows) for fields in _fields(batch.slice(number, 1))]
