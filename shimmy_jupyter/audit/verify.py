"""Whether the ledger is what it was: everything in it is computed again, from the records' bodies.

What it cannot see by itself is a history that was computed anew from an edited record on, or that lacks
its latest records and everything about them. A head that was published before sees both.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .erasure import ACCOUNTING, Run
from .ledger import Head
from .merkle import EMPTY, Frontier, leaf_hash, verify_inclusion
from .records import VERSION as FORMAT
from .store import VERSION, expected_schema, schema_of
from .writer import StoreFailed, open_for_reading

_STEP = 2000
"""Records from one call of `progress` to the next."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`records` is how many were looked at, of which `erased` have no body, and `head` is theirs.

    `problem` says what is wrong, and `first_bad` the number of the first record that it is wrong with,
    where that can be told. `open_requests` have begun and not ended; a crash leaves some, which is no
    fault. `anchored` when it has been compared with a head from elsewhere.
    """

    ok: bool
    records: int
    head: Head | None
    first_bad: int | None = None
    problem: str | None = None
    erased: int = 0
    open_requests: int = 0
    anchored: bool = False


class _Bad(Exception):
    def __init__(self, problem: str, first: int | None = None) -> None:
        super().__init__(problem)
        self.problem, self.first = problem, first


def verify(
    ledger: sqlite3.Connection | Path,
    against: Head | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Stops at the first thing that is wrong. With `against`, the ledger has to begin with the records of
    that head. Raises `StoreFailed` where it cannot be read, or is of a newer format.
    """
    with _connected(ledger) as connection:
        look = _Look(connection, against, progress)
        bad: _Bad | None = None
        try:
            look.run()
        except _Bad as error:
            bad = error
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _UNREADABLE:
                raise StoreFailed(f"the ledger cannot be read: {error}") from error
            bad = _Bad(f"the file is damaged: {error}")
        return Verdict(
            ok=bad is None,
            records=look.tree.size,
            head=look.head(),
            first_bad=bad.first if bad else None,
            problem=bad.problem if bad else None,
            erased=sum(last - first + 1 for first, last in look.missing),
            open_requests=len(look.open),
            anchored=against is not None,
        )


_UNREADABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
}


@contextlib.contextmanager
def _connected(ledger: sqlite3.Connection | Path) -> Iterator[sqlite3.Connection]:
    if isinstance(ledger, Path):
        with contextlib.closing(open_for_reading(ledger)) as connection:
            yield connection
    else:
        yield ledger


class _Look:
    """One pass, with what has to be remembered of it."""

    def __init__(
        self, connection: sqlite3.Connection, against: Head | None, progress: Progress | None
    ) -> None:
        self.connection, self.against, self.progress = connection, against, progress
        self.tree = Frontier()
        self.latest = ""
        self.anchor: str | None = EMPTY.hex()
        self.missing: list[Run] = []
        self.accounted: list[Run] = []
        self.open: set[str] = set()

    def head(self) -> Head:
        return Head(self.tree.size, self.tree.root().hex(), self.latest)

    def run(self) -> None:
        within = self.connection.in_transaction
        if not within:
            self.connection.execute("BEGIN")
        try:
            self._tables()
            self._records()
            self._head()
            self._nodes()
            self._removals()
            self._time()
            self._indexes()
            self._anchor()
        finally:
            if not within and self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def _tables(self) -> None:
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StoreFailed(
                f"the ledger is of format {version}; the latest known here is {VERSION}"
            )
        if version != VERSION or schema_of(self.connection) != expected_schema():
            raise _Bad("its tables are not those of a ledger")

    def _records(self) -> None:
        (total,) = self.connection.execute("SELECT count(*) FROM records").fetchone()
        rows = self.connection.execute(
            "SELECT seq, leaf_hash, typeof(body), CAST(body AS BLOB) FROM records ORDER BY seq"
        )
        for seq, leaf, kind, body in rows:
            if seq != self.tree.size:
                what = "is missing" if seq > self.tree.size else "is there twice"
                raise _Bad(f"record {self.tree.size} {what}", self.tree.size)
            if not isinstance(leaf, bytes) or len(leaf) != 32:
                raise _Bad(f"record {seq} has no hash", seq)
            if kind == "null":
                _extend(self.missing, seq)
            elif kind != "text" or leaf_hash(body) != leaf:
                raise _Bad(f"record {seq} is not what was hashed", seq)
            else:
                self._body(seq, body)
            for level, index, hash in self.tree.append(leaf):
                self._node(level, index, hash)
            if self.against is not None and self.against.size == self.tree.size:
                self.anchor = self.tree.root().hex()
            if self.progress is not None and self.tree.size % _STEP == 0:
                self.progress(self.tree.size, total)
        if self.progress is not None:
            self.progress(total, total)

    def _body(self, seq: int, body: bytes) -> None:
        record = _parsed(body)
        if record is None or record.get("seq") != seq or record.get("v") != FORMAT:
            raise _Bad(f"record {seq} does not say that it is number {seq}", seq)
        kind, request_id = record.get("kind"), str(record.get("request_id"))
        self.latest = str(record.get("timestamp"))
        if kind == "begin":
            self.open.add(request_id)
        elif kind == "end":
            self.open.discard(request_id)
        elif record.get("action") in ACCOUNTING:
            self._account(seq, record.get("detail"))

    def _account(self, seq: int, detail: object) -> None:
        runs = detail.get("erased", []) if isinstance(detail, dict) else None
        if not isinstance(runs, list) or not all(_is_run(run, seq) for run in runs):
            raise _Bad(f"record {seq} does not say which records it removed", seq)
        self.accounted += [(first, last) for first, last in runs]

    def _node(self, level: int, index: int, hash: bytes) -> None:
        row = self.connection.execute(
            "SELECT hash FROM nodes WHERE level = ? AND idx = ?", (level, index)
        ).fetchone()
        if row is None or row[0] != hash:
            first, last = index << level, self.tree.size - 1
            raise _Bad(
                f"one of the records {first} to {last}, or the hash over them, is not what it was",
                first,
            )

    def _nodes(self) -> None:
        (found,) = self.connection.execute("SELECT count(*) FROM nodes").fetchone()
        if found != self.tree.size - self.tree.size.bit_count():
            raise _Bad("it has hashes of records that are not there", self.tree.size)

    def _head(self) -> None:
        rows = self.connection.execute("SELECT size, root FROM head").fetchall()
        size = rows[0][0] if len(rows) == 1 else None
        count = self.tree.size
        if not isinstance(size, int):
            raise _Bad("it has no head")
        if size > count:
            raise _Bad(f"records from number {count} on are missing: there were {size}", count)
        if size < count:
            raise _Bad(f"records from number {size} on were not added by this program", size)
        if rows[0][1] != self.tree.root():
            # All hashes over several records are right, so that a record can only be wrong where it is
            # under none.
            if count & 1:
                raise _Bad(f"record {count - 1}, or the head, is not what it was", count - 1)
            raise _Bad("the head is not what it was")

    def _time(self) -> None:
        """The last record always has a body: that of an act, where something was removed."""
        if self.connection.execute("SELECT timestamp FROM head").fetchall() != [(self.latest,)]:
            raise _Bad("the head's time is not that of the last record")

    def _removals(self) -> None:
        accounted: list[Run] = []
        for first, last in sorted(self.accounted):
            if accounted and first <= accounted[-1][1] + 1:
                accounted[-1] = accounted[-1][0], max(last, accounted[-1][1])
            else:
                accounted.append((first, last))
        seq = _first_difference(self.missing, accounted)
        if seq is None:
            return
        if any(first <= seq <= last for first, last in self.missing):
            raise _Bad(f"record {seq} has no body, and no act says that it was removed", seq)
        raise _Bad(f"record {seq} has a body, and an act says that it was removed", seq)

    def _indexes(self) -> None:
        (found,) = self.connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise _Bad(f"the file is damaged: {found}")

    def _anchor(self) -> None:
        if self.against is None:
            return
        if self.tree.size < self.against.size:
            raise _Bad(
                f"shortened: there were {self.against.size} records, and there are {self.tree.size}",
                self.tree.size,
            )
        if self.against.root != self.anchor:
            raise _Bad(
                f"rewritten: the first {self.against.size} records are not those of the head"
            )


def verify_receipt(document: object, head: Head | None = None) -> Verdict:
    """Whether a document of `Ledger.proof` shows that its records are in a ledger of `head`. Needs no
    ledger, believes nothing that is not bound by a hash, and raises nothing.

    Without `head` it only shows that the records are in the ledger of the head in the document itself,
    which whoever made the document can have made up; then the verdict's `anchored` is False.
    """
    given = document if isinstance(document, Mapping) else {}
    try:
        own = Head.from_json(given.get("head"))
    except ValueError as error:
        return Verdict(False, 0, None, problem=f"the document has no head: {error}")
    checked = 0
    try:
        if head is not None:
            _same_head(own, head)
        for record in _records_of(given):
            _receipt(record, given.get("request_id"), own)
            checked += 1
    except _Bad as error:
        anchored = head is not None
        return Verdict(False, checked, own, error.first, error.problem, anchored=anchored)
    return Verdict(True, checked, own, anchored=head is not None)


def _records_of(document: Mapping[str, Any]) -> list[Any]:
    records = document.get("records")
    if not isinstance(records, list) or not records:
        raise _Bad("the document has no records")
    return records


def _same_head(own: Head, head: Head) -> None:
    if own.size != head.size:
        raise _Bad(
            f"the document is for a head of {own.size} records, and the given one is of {head.size}: "
            "have it made for that size"
        )
    if own.root != head.root:
        raise _Bad("rewritten: the document's head is not the given one")


def _receipt(record: object, request_id: object, head: Head) -> None:
    found = record if isinstance(record, Mapping) else {}
    seq, body, path = found.get("seq"), found.get("body"), found.get("path")
    if type(seq) is not int or not isinstance(body, str) or not isinstance(path, list):
        raise _Bad("a record of the document lacks its number, body or path")
    try:
        raw = body.encode()
        hashes = [bytes.fromhex(hash) for hash in path]
    except (ValueError, TypeError) as error:
        raise _Bad(f"record {seq}: its body is no text, or its path not hex", seq) from error
    leaf = leaf_hash(raw)
    if found.get("leaf_hash") != leaf.hex():
        raise _Bad(f"record {seq} is not what was hashed", seq)
    parsed = _parsed(raw)
    if parsed is None or parsed.get("seq") != seq or parsed.get("request_id") != request_id:
        raise _Bad(f"record {seq} is not of that request, or not of that number", seq)
    if not verify_inclusion(leaf, seq, head.size, hashes, bytes.fromhex(head.root)):
        raise _Bad(f"record {seq} is not in the ledger of that head", seq)


def _parsed(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_run(value: object, seq: int) -> bool:
    return (
        isinstance(value, list)
        and [type(number) for number in value] == [int, int]
        and 0 <= value[0] <= value[1] < seq
    )


def _extend(runs: list[Run], number: int) -> None:
    if runs and number == runs[-1][1] + 1:
        runs[-1] = runs[-1][0], number
    else:
        runs.append((number, number))


def _first_difference(some: list[Run], others: list[Run]) -> int | None:
    """The least number that is in one and not in the other. Runs ascend and do not touch."""
    for one, other in zip(some, others, strict=False):
        if one[0] != other[0]:
            return min(one[0], other[0])
        if one[1] != other[1]:
            return min(one[1], other[1]) + 1
    rest = some[len(others) :] or others[len(some) :]
    return rest[0][0] if rest else None
