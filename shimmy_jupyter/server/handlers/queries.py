"""Values of an address's query."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from ...audit.ledger import Query
from ...errors import InvalidValue

_LARGEST = 2**53
_FILTERS = ("user", "model", "outcome", "kind", "action", "request_id")


def number(name: str, text: str | None) -> int | None:
    """Raises `InvalidValue`."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 17 and int(text) <= _LARGEST):
        raise InvalidValue("a whole number, 0 or more", param=name)
    return int(text)


def moment(name: str, text: str | None) -> float | None:
    """Seconds since 1970, of a number of them or of a date; one without a zone is in UTC. Raises
    `InvalidValue`.
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is not None:
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    try:
        seconds = float(text)
        datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise InvalidValue("a date such as 2026-11-21, or seconds since 1970", param=name) from None
    return seconds


def of_records(value: Callable[[str], str | None]) -> Query:
    """Which records are wanted. Raises `InvalidValue`."""
    given = {name: value(name) for name in _FILTERS}
    since, until = (moment(name, value(name)) for name in ("since", "until"))
    return Query(**given, since=since, until=until)


def file_format(value: Callable[[str], str | None]) -> Literal["csv", "jsonl"]:
    """Raises `InvalidValue`."""
    match value("format"):
        case None | "jsonl":
            return "jsonl"
        case "csv":
            return "csv"
    raise InvalidValue("csv or jsonl", param="format")
