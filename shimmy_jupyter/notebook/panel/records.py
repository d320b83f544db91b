"""Values of the audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .fetched import IDLE, NOTHING, Fetched


@dataclass(frozen=True, slots=True)
class Record:
    """As the ledger has it; `fields` are those that are there. `erased`: only its number is left."""

    seq: int
    fields: Mapping[str, Any]
    erased: bool = False

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        return "" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Page:
    """The newest record first; `next_cursor` None on the last page."""

    records: tuple[Record, ...]
    next_cursor: int | None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """`by` are the values that it is for, in the order of `Usage.by`."""

    by: tuple[str, ...]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    tokens_generated: int
    denied: int
    limited: int
    errors: int


@dataclass(frozen=True, slots=True)
class Usage:
    by: tuple[str, ...]
    rows: tuple[UsageRow, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """What a ledger is: `root` binds its first `size` records."""

    size: int
    root: str
    timestamp: str


@dataclass(frozen=True, slots=True)
class Verdict:
    ok: bool
    records: int
    problem: str | None
    first_bad: int | None
    erased: int
    open_requests: int
    anchored: bool
    head: Head | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """`document` is the proof as the server gave it, for `shimmy audit verify-receipt`."""

    request_id: str
    records: int
    head: Head
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Exported:
    """`whole`: all of it is written."""

    name: str
    records: int
    whole: bool


FILTERS = ("user", "model", "outcome", "kind", "action", "request_id", "since", "until")
GROUPINGS = ("user,model", "user", "group", "model", "user,group,model")


@dataclass(frozen=True, slots=True)
class Audit:
    """`cursors` are those of the pages before this one. `user` is who the records of this panel's own answers
    are of, once one has been looked at. `head` is the last that was verified, to be compared with.
    """

    filters: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    cursors: tuple[int | None, ...] = ()
    cursor: int | None = None
    page: Fetched[Page] = IDLE
    record: Fetched[Page] = IDLE
    by: str = GROUPINGS[0]
    usage: Fetched[Usage] = IDLE
    verdict: Fetched[Verdict] = IDLE
    head: Head | None = None
    receipt: Fetched[Receipt] = IDLE
    export: Fetched[Exported] = IDLE
    user: str | None = None
