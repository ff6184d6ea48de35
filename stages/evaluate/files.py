"""Files that suites read as they are."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.read import rows
from pipeline.data.row import Bad
from pipeline.errors import UserError


def texts(path: str, columns: Sequence[str], where: str) -> list[dict[str, str]]:
    """The rows of a data file, of each its `columns`. Raises UserError for a row that has no text in one of them."""
    found = []
    for row in rows(path):
        fields = {} if isinstance(row, Bad) else row.fields
        missing = [name for name in columns if not isinstance(fields.get(name), str)]
        if missing:
            reason = row.reason if isinstance(row, Bad) else f"no text in {missing[0]}"
            raise UserError(where, f"row {row.number} of {path}: {reason}", expected="text in " + ", ".join(columns))
        found.append({name: fields[name] for name in columns})
    return found
