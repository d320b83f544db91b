"""What a record says. Its JSON is stored as it is hashed, and never written again."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

VERSION = 1
LONGEST = 1000
"""Characters of a text that are kept, but for content that was opted for."""
DEEPEST = 8
"""Levels of `parameters` and `detail` that are kept."""

FIELDS: dict[str, str] = {
    "v": "Version of the record's format; 1.",
    "seq": "Number of the record in the ledger, from 0; its place among the tree's leaves.",
    "salt": "16 random bytes in hex, so that the leaf's hash says nothing once the record is erased.",
    "timestamp": "When it happened, in UTC: ISO 8601 with milliseconds.",
    "kind": "`begin` and `end` of a request, or `act` for what was done to the server.",
    "request_id": "The same in all records of a request, and in the answer's x-shimmy-request-id.",
    "user": "Name of who asked, as Jupyter has it.",
    "user_kind": "How the name is known, such as `local`, `hub` or `jwt`.",
    "groups": "Names of the groups that the user was in; not there where there were none.",
    "client_ip": "Address that the request came from, as the server sees it.",
    "request_path": "Path of the request's URL, without its query.",
    "notebook": "Path of the notebook, as the client says; not to be trusted.",
    "cell": "Id of the cell, as the client says; not to be trusted.",
    "model": "Id of the model that was asked for.",
    "model_sha256": "SHA-256 of the model's first file, in hex.",
    "prompt_tokens": "Tokens of the prompt; of one that was given up, those that steps have had.",
    "cached_tokens": "Tokens of the prompt that did not have to be computed again.",
    "tokens_generated": "Tokens of the answer.",
    "duration_ms": "Milliseconds from the request's arrival to its end.",
    "time_to_first_token_ms": "Milliseconds from the request's arrival to its first token.",
    "outcome": "`ok`, `denied`, `limited`, `cancelled` or `error`; of acts also `accepted`.",
    "code": "Code of the error, where there was one.",
    "parameters": "Parameters of the request by name; those that carry content as keyed digests.",
    "prompt_digest": "Keyed digest of the prompt: `hmac-sha256:` and 64 hex digits.",
    "output_digest": "Keyed digest of the answer, in the same form.",
    "action": "Of acts: `load`, `unload`, `pull`, `probe`, `verify`, `limits`, `policy`, `erase`, "
    "`prune` or `anchor`.",
    "detail": "Of acts: what the action was on, by name. Of `erase` and `prune`: `erased`, the first "
    "and last numbers of the runs of records whose bodies were removed; `subject`, the keyed digest "
    "of the user's name; `before`, the time before which records were removed.",
    "content": "`prompt` and `output` in clear; only where an administrator has opted for it.",
}
"""Every field of a stored record, and what it means. A field without a value is not there."""

_CONTENT = ("prompt", "output")
_NUMBERS = (
    "prompt_tokens",
    "cached_tokens",
    "tokens_generated",
    "duration_ms",
    "time_to_first_token_ms",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One record that is to be. `FIELDS` says what each field means; `time` is in seconds since 1970.

    `parameters` and `detail` are JSON. Long texts are cut, with a mark and a part of their SHA-256 after
    the cut, so that different ones stay different.
    """

    kind: str
    request_id: str
    time: float
    user: str
    user_kind: str = "local"
    groups: tuple[str, ...] = ()
    client_ip: str | None = None
    request_path: str | None = None
    notebook: str | None = None
    cell: str | None = None
    model: str | None = None
    model_sha256: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    tokens_generated: int | None = None
    duration_ms: float | None = None
    time_to_first_token_ms: float | None = None
    outcome: str | None = None
    code: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    prompt_digest: str | None = None
    output_digest: str | None = None
    action: str | None = None
    detail: Mapping[str, Any] | None = None
    content: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in {"begin", "end", "act"}:
            raise ValueError(f"kind: begin, end or act, not {self.kind!r}")
        if (self.kind == "act") != (self.action is not None):
            raise ValueError("action: acts have one, and nothing else has")
        iso(self.time)


_NAMES = tuple(f.name for f in fields(Entry) if f.name != "time")


def to_record(entry: Entry) -> dict[str, Any]:
    """An entry as JSON, without what only the ledger knows: its number and its salt."""
    record: dict[str, Any] = {"v": VERSION, "timestamp": iso(entry.time)}
    for name in _NAMES:
        value = getattr(entry, name)
        if value is None:
            continue
        if name == "content":
            record[name] = {key: _safe(value[key]) for key in _CONTENT if key in value}
        elif name in _NUMBERS:
            if math.isfinite(value):
                record[name] = round(value, 3)
        elif type(value) is str:
            record[name] = bounded(value)
        elif value:
            record[name] = cleaned(value)
    return record


def to_body(record: Mapping[str, Any], seq: int) -> str:
    """The canonical JSON that is hashed: keys in order, no blanks; with a salt of its own."""
    whole = {**record, "seq": seq, "salt": secrets.token_hex(16)}
    return _encode(whole)


_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
).encode


def iso(time: float) -> str:
    """Seconds since 1970 as text that sorts by time. Raises `ValueError` for what is no time."""
    try:
        moment = datetime.fromtimestamp(time, UTC)
    except (OverflowError, OSError) as error:
        raise ValueError(f"time: seconds since 1970, not {time!r}") from error
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def bounded(text: str) -> str:
    """As it is stored: equal texts stay equal, and different ones different."""
    if len(text) <= LONGEST:
        return _safe(text)
    whole = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{_safe(text[:LONGEST])}… ({whole[:16]})"


def cleaned(value: Any, depth: int = 0) -> Any:
    """What can be stored, and read again by anything that reads JSON."""
    if isinstance(value, str):
        return bounded(value)
    if value is None or isinstance(value, bool | int | float):
        large = isinstance(value, int) and value.bit_length() > 63
        odd = isinstance(value, float) and not math.isfinite(value)
        return "a number of more than 64 bits" if large else str(value) if odd else value
    if depth == DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return {bounded(str(key)): cleaned(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [cleaned(item, depth + 1) for item in value]
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _safe(text: str) -> str:
    """Half a surrogate pair is no text in UTF-8, and SQLite's text ends at a NUL."""
    if "\0" in text:
        text = text.replace("\0", "\\x00")
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
