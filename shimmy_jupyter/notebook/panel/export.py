"""Records as lines of a file, in the formats of `shimmy/api/audit/export`; here the newest comes first."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "seq", "leaf_hash", "timestamp", "kind", "request_id", "user", "user_kind", "groups",
    "client_ip", "request_path", "notebook", "cell", "model", "model_sha256", "prompt_tokens",
    "cached_tokens", "tokens_generated", "duration_ms", "time_to_first_token_ms", "outcome", "code",
    "parameters", "prompt_digest", "output_digest", "action", "detail", "content",
)  # fmt: skip
"""Of the CSV, in this order, whatever the records have."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_canonical = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
).encode


def heading(format: str) -> str:
    return _csv([COLUMNS]) if format == "csv" else ""


def lines(records: Sequence[Mapping[str, Any]], format: str) -> str:
    """Records as `GET shimmy/api/audit` gives them. CSV has `COLUMNS`, and a cell that a spreadsheet would
    take for a formula begins with an apostrophe; JSONL has `seq`, `leaf_hash` and `body` as
    it was hashed; of a record whose body is gone the last two are null.
    """
    if format == "csv":
        return _csv([[_cell(record.get(name)) for name in COLUMNS] for record in records])
    return "".join(map(_line, records))


def _line(record: Mapping[str, Any]) -> str:
    if record.get("erased"):
        return f'{{"seq":{record["seq"]},"leaf_hash":null,"body":null}}\n'
    body = _canonical({name: value for name, value in record.items() if name != "leaf_hash"})
    return f'{{"seq":{record["seq"]},"leaf_hash":"{record["leaf_hash"]}","body":{body}}}\n'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return json.dumps(value, ensure_ascii=False)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
