"""Records as files for other programs, page by page, the oldest first."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from .ledger import Ledger
from .reading import Query, Stored, as_json
from .records import FIELDS

COLUMNS = ("seq", "leaf_hash", *(name for name in FIELDS if name not in {"v", "seq", "salt"}))
"""Of the CSV, in this order, whatever the records have."""
_PAGE = 500
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def export(ledger: Ledger, query: Query, format: Literal["csv", "jsonl"]) -> Iterator[bytes]:
    """What there is when the first piece is asked for. Raises `ValueError` at once for another format,
    and `StoreFailed` at any piece.

    JSONL has an object for each record: `seq`, `leaf_hash`, and `body` as it was hashed, byte for byte,
    or null where it is gone. CSV has `COLUMNS`; groups, parameters, detail and content are JSON, and a
    cell that a spreadsheet would take for a formula begins with an apostrophe. Both are UTF-8.
    """
    if format not in {"csv", "jsonl"}:
        raise ValueError(f"format: csv or jsonl, not {format!r}")
    return _csv(ledger, query) if format == "csv" else _jsonl(ledger, query)


def _jsonl(ledger: Ledger, query: Query) -> Iterator[bytes]:
    for page in _pages(ledger, query):
        yield "".join(map(_line, page)).encode()


def _csv(ledger: Ledger, query: Query) -> Iterator[bytes]:
    yield _table([COLUMNS])
    for page in _pages(ledger, query):
        yield _table([_cells(record) for record in page])


def _pages(ledger: Ledger, query: Query) -> Iterator[list[Stored]]:
    end, last = ledger.size, -1
    while page := [one for one in ledger.stored(query, last, _PAGE) if one.seq < end]:
        last = page[-1].seq
        yield page


def _line(record: Stored) -> str:
    body = record.body if record.body is not None else "null"
    return f'{{"seq":{record.seq},"leaf_hash":"{record.leaf_hash}","body":{body}}}\n'


def _cells(record: Stored) -> list[str]:
    fields = {**as_json(record), "leaf_hash": record.leaf_hash}
    return [_cell(fields.get(name)) for name in COLUMNS]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return json.dumps(value, ensure_ascii=False)


def _table(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
