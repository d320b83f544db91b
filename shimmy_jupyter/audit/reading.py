"""What is asked of the ledger, as SQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .records import bounded, iso
from .store import damaged

MOST = 1000
"""Records on one page."""
_NAMES = ("user", "model", "outcome", "kind", "action", "request_id")
_GROUPINGS = {"user": "user", "group": "named.value", "model": "model"}
_COUNTS = ("prompt_tokens", "cached_tokens", "tokens_generated")
_OUTCOMES = {"denied": "denied", "limited": "limited", "errors": "error"}


@dataclass(frozen=True, slots=True)
class Query:
    """None matches everything. Times are seconds since 1970; `since` is included, `until` is not."""

    user: str | None = None
    model: str | None = None
    outcome: str | None = None
    kind: str | None = None
    action: str | None = None
    since: float | None = None
    until: float | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Records as JSON, each with its `leaf_hash`; `next_cursor` is None on the last page."""

    records: list[dict[str, Any]]
    next_cursor: int | None


@dataclass(frozen=True, slots=True)
class Stored:
    """`body` is the text that was hashed, None where it is gone; `leaf_hash` is hex."""

    seq: int
    leaf_hash: str
    body: str | None


def page(connection: sqlite3.Connection, query: Query, cursor: int | None, limit: int) -> Page:
    if not 1 <= limit <= MOST:
        raise ValueError(f"limit: 1 to {MOST}")
    where, values = _conditions(query)
    if cursor is not None:
        where, values = [*where, "seq < ?"], [*values, _number("cursor", cursor)]
    rows = _rows(connection, where, values, f"ORDER BY seq DESC LIMIT {limit + 1}")
    more = len(rows) > limit
    rows = rows[:limit]
    return Page([as_json(row) for row in rows], rows[-1].seq if more else None)


def stored(connection: sqlite3.Connection, query: Query, after: int, limit: int) -> list[Stored]:
    where, values = _conditions(query)
    where, values = [*where, "seq > ?"], [*values, _number("after", after)]
    return _rows(connection, where, values, f"ORDER BY seq LIMIT {limit:d}")


def of_request(connection: sqlite3.Connection, request_id: str, size: int) -> list[Stored]:
    where, values = ["request_id = ?", "seq < ?"], [bounded(request_id), size]
    return _rows(connection, where, values, "ORDER BY seq")


def as_json(row: Stored) -> dict[str, Any]:
    if row.body is None:
        return {"seq": row.seq, "erased": True}
    try:
        return {**json.loads(row.body), "leaf_hash": row.leaf_hash}
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(f"record {row.seq} is no JSON object") from error


def usage(
    connection: sqlite3.Connection, since: float | None, until: float | None, by: Sequence[str]
) -> list[dict[str, Any]]:
    if unknown := set(by) - set(_GROUPINGS):
        raise ValueError(f"by: {', '.join(_GROUPINGS)}, not {min(unknown)}")
    if len(set(by)) < len(by):
        raise ValueError("by: each at most once")
    where, values = _conditions(Query(kind="end", since=since, until=until))
    columns = [f"{_GROUPINGS[name]} AS '{name}'" for name in by]
    columns.append("count(*) AS requests")
    columns += [f"total(json_extract(body, '$.{name}')) AS {name}" for name in _COUNTS]
    columns += [f"total(outcome = '{is_}') AS {name}" for name, is_ in _OUTCOMES.items()]
    groups = "LEFT JOIN json_each(body, '$.groups') AS named" if "group" in by else ""
    order = ", ".join(str(place + 1) for place in range(len(by)))
    grouped = f"GROUP BY {order} ORDER BY {order}" if order else ""
    what, which = ", ".join(columns), " AND ".join(where)
    rows = connection.execute(
        f"SELECT {what} FROM records {groups} WHERE {which} {grouped}",  # noqa: S608  names of ours
        values,
    )
    names = [*by, "requests", *_COUNTS, *_OUTCOMES]
    found = [dict(zip(names, row, strict=True)) for row in rows]
    for row in found:
        for name in names[len(by) :]:
            row[name] = int(row[name])
    return found


def _conditions(query: Query) -> tuple[list[str], list[Any]]:
    where, values = [], []
    for name in _NAMES:
        if (value := getattr(query, name)) is not None:
            where.append(f"{name} = ?")
            values.append(bounded(value))
    for name, sign in (("since", ">="), ("until", "<")):
        if (value := getattr(query, name)) is not None:
            where.append(f"timestamp {sign} ?")
            values.append(iso(value))
    return where, values


def _rows(
    connection: sqlite3.Connection, where: Sequence[str], values: Sequence[Any], order: str
) -> list[Stored]:
    which = " AND ".join(where) or "TRUE"
    rows = connection.execute(
        f"SELECT seq, leaf_hash, body FROM records WHERE {which} {order}",  # noqa: S608  names of ours
        values,
    )
    return [Stored(seq, bytes(leaf).hex(), body) for seq, leaf, body in rows]


def _number(name: str, value: int) -> int:
    if not -1 <= value < 1 << 63:
        raise ValueError(f"{name}: a record's number")
    return value
