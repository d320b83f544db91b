"""The append-only log of records: a Merkle tree in SQLite that several processes may add to."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from . import erasure, reading
from .key import Digests
from .merkle import Frontier, consistency_proof, inclusion_proof, leaf_hash, root_of
from .reading import Page, Query, Stored
from .records import Entry, bounded, to_body, to_record
from .store import SCHEMA, VERSION, load_frontier, node_in, read_head
from .writer import Writer

__all__ = ["Entry", "Erased", "Head", "Ledger", "Page", "Query", "Receipt", "Stored"]

_ROOT = re.compile(r"[0-9a-f]{64}")
_Data = bytes | str


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a record is in the ledger. `leaf_hash` is 64 hex digits."""

    request_id: str
    seq: int
    leaf_hash: str


@dataclass(frozen=True, slots=True)
class Head:
    """What a ledger is: `root` (64 hex digits) binds its first `size` records. `timestamp` is the last
    record's, or empty; nothing binds it but that record.
    """

    size: int
    root: str
    timestamp: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises `ValueError`."""
        found = value if isinstance(value, Mapping) else {}
        size, root, timestamp = (found.get(name) for name in ("size", "root", "timestamp"))
        if type(size) is not int or size < 0:
            raise ValueError("size: how many records the head is of")
        if not isinstance(root, str) or not _ROOT.fullmatch(root):
            raise ValueError("root: 64 hex digits in lower case")
        if not isinstance(timestamp, str):
            raise ValueError("timestamp: a text")  # noqa: TRY004  one error for a bad head
        return cls(size, root, timestamp)


@dataclass(frozen=True, slots=True)
class Erased:
    """How many bodies were removed, and the acts that say so. `wiped`: no byte of them is left in the
    ledger's files; False where others' reading has prevented that, or a full disk.
    """

    records: int
    acts: tuple[Receipt, ...]
    wiped: bool


class Ledger:
    """Opened at its first use. What changes it is for any thread, and done by one of its own; what
    reads it is done by the thread that asks. Raises `StoreFailed`, its futures too.

    With `durable`, what is acknowledged survives a power cut; else it survives the process's end.
    """

    def __init__(
        self, path: Path, *, durable: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._clock = clock
        self._digests = Digests(path.with_name("ledger.key"))
        self._notes: tuple[str, ...] = ()
        self._tree: Frontier | None = None
        self._at: tuple[int, bytes] | None = None
        self._writer = Writer(path, SCHEMA, durable=durable, opened=self._forget, version=VERSION)

    # Writing

    def append(self, entries: Sequence[Entry]) -> Future[list[Receipt]]:
        """Resolved once all of them are committed, in this order and with nothing between them."""
        records = [to_record(entry) for entry in entries]
        return self._writer.submit(partial(self._add, records))

    def _forget(self, _connection: sqlite3.Connection) -> None:
        self._tree = None

    def _add(
        self, records: Sequence[Mapping[str, Any]], connection: sqlite3.Connection
    ) -> list[Receipt]:
        if not records:
            return []
        # Another process may have added to it, and what was added here may have been rolled back.
        size, root, _ = read_head(connection)
        tree, self._tree = self._tree, None
        if tree is None or self._at != (size, root):
            tree = load_frontier(connection)
        receipts, leaves, nodes = [], [], []
        for record in records:
            body = to_body(record, tree.size)
            leaf = leaf_hash(body.encode())
            leaves.append((tree.size, leaf, body))
            receipts.append(Receipt(record["request_id"], tree.size, leaf.hex()))
            nodes += tree.append(leaf)
        connection.executemany(
            "INSERT INTO records (seq, leaf_hash, body) VALUES (?, ?, ?)", leaves
        )
        connection.executemany("INSERT INTO nodes (level, idx, hash) VALUES (?, ?, ?)", nodes)
        self._at = tree.size, tree.root()
        connection.execute(
            "UPDATE head SET size = ?, root = ?, timestamp = ?",
            (*self._at, records[-1]["timestamp"]),
        )
        self._tree = tree
        return receipts

    def digest(self, data: _Data, user: str = "") -> str:
        """HMAC-SHA-256 with the ledger's key, as `hmac-sha256:` and hex; two users' are not comparable."""
        return self._digests.of(data, user)

    def pseudonym(self, user: str) -> str:
        """What acts of erasing call a user: a digest that only who has the key can compare a name with."""
        return self._digests.of_name(user)

    # Removing

    def erase(
        self, user: str, *, by: Entry, request_ids: Sequence[str] | None = None
    ) -> Future[Erased]:
        """Remove the bodies of a user's records, or of those requests of theirs, and keep their hashes.

        `by` says who does it, when and from where: its user, user_kind, groups, client_ip, request_path,
        request_id and time are taken. The act names the erased user by `pseudonym` only, also where
        they did it themselves. What stays: acts of erasing and pruning, which account for the bodies
        that are missing, and acts on the user by others, which are the others' records.
        """
        name = bounded(user)
        subject = self.pseudonym(user)
        if by.user == user:
            by = Entry("act", by.request_id, by.time, subject, by.user_kind, action="erase")
        chosen = erasure.of_user(name, request_ids)
        return self._remove(chosen, by, "erase", {"subject": subject}, always=True)

    def prune(self, before: float, *, by: Entry | None = None) -> Future[Erased]:
        """Remove the bodies of records from before a time, in seconds since 1970, and keep their hashes.

        Acts of erasing and pruning stay. Where there is nothing to remove, nothing is recorded.
        """
        chosen, detail = erasure.before(before)
        by = by or erasure.by_itself(self._clock())
        return self._remove(chosen, by, "prune", detail, always=False)

    def _remove(
        self,
        chosen: erasure.Chosen,
        by: Entry,
        action: str,
        detail: Mapping[str, Any],
        *,
        always: bool,
    ) -> Future[Erased]:
        """A part per transaction, so that requests' records get in between."""

        def part(connection: sqlite3.Connection, *, first: bool) -> tuple[int, list[Receipt]]:
            runs = erasure.remove(connection, chosen)
            if not runs and not (always and first):
                return 0, []
            acts = erasure.acts(by, action, detail, runs)
            receipts = self._add([to_record(act) for act in acts], connection)
            return sum(last - first + 1 for first, last in runs), receipts

        whole: Future[Erased] = Future()
        whole.set_running_or_notify_cancel()  # what has begun cannot be called off
        acts: list[Receipt] = []
        removed = 0

        def go_on(done: Future[tuple[int, list[Receipt]]]) -> None:
            nonlocal removed
            if (error := done.exception()) is not None:
                whole.set_exception(error)
                return
            count, receipts = done.result()
            removed += count
            acts.extend(receipts)
            if count:
                self._writer.submit(partial(part, first=False)).add_done_callback(go_on)
            elif removed:
                self._writer.submit_apart(erasure.wipe).add_done_callback(finish)
            else:
                whole.set_result(Erased(0, tuple(acts), wiped=True))

        def finish(done: Future[bool]) -> None:
            wiped = done.exception() is None and done.result()
            self._notes = () if wiped else (_UNWIPED,)
            whole.set_result(Erased(removed, tuple(acts), wiped))

        self._writer.submit(partial(part, first=True)).add_done_callback(go_on)
        return whole

    # Reading

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """The ledger as it is now, whatever is added meanwhile."""
        if not os.path.exists(self.path):  # noqa: PTH110  False where it cannot be told
            self._writer.submit(lambda _connection: None).result()
        with self._writer.reading() as connection:
            connection.execute("BEGIN")
            yield connection

    def head(self) -> Head:
        with self.snapshot() as connection:
            return _head(connection)

    def query(self, query: Query, cursor: int | None = None, limit: int = 100) -> Page:
        """The newest first; `cursor` is the `next_cursor` of the page before. Records whose bodies are
        gone match only a query for everything, as `{"seq", "erased": true}`. Raises `ValueError`.
        """
        with self.snapshot() as connection:
            return reading.page(connection, query, cursor, limit)

    def stored(self, query: Query, after: int = -1, limit: int = 1000) -> list[Stored]:
        """Records as they are stored, the oldest first, from beyond number `after`."""
        with self.snapshot() as connection:
            return reading.stored(connection, query, after, limit)

    def usage(
        self,
        since: float | None = None,
        until: float | None = None,
        by: Sequence[str] = ("user", "group", "model"),
    ) -> list[dict[str, Any]]:
        """Who used what, a row for each combination of `by`: the requests that have ended, those of them
        that were denied, limited or failed, and tokens. A user in several groups counts in each of
        them, so that rows by group add up to more than there was; one in none has the group None.
        Records whose bodies are gone are not counted.
        """
        with self.snapshot() as connection:
            return reading.usage(connection, since, until, by)

    def proof(self, request_id: str, size: int | None = None) -> dict[str, Any] | None:
        """A document that shows a request's records to be in the ledger: see `verify_receipt`.

        `size` is that of an earlier head to be checked against; records after it are left out. None
        where there is no such record, or it is erased. Raises `ValueError` for a size there never was.
        """
        with self.snapshot() as connection:
            now, node = _head(connection), node_in(connection)
            if size is not None and not 0 < size <= now.size:
                raise ValueError(f"size: 1 to {now.size}, the number of records there are")
            if size is None or size == now.size:
                head = now
            else:
                head = Head(size, root_of(node, size).hex(), "")
            found = reading.of_request(connection, request_id, head.size)
            records = [
                {
                    "seq": one.seq,
                    "leaf_hash": one.leaf_hash,
                    "body": one.body,
                    "path": [hash.hex() for hash in inclusion_proof(node, one.seq, head.size)],
                }
                for one in found
            ]
        if not records:
            return None
        return {"version": 1, "request_id": request_id, "records": records, "head": head.to_json()}

    def consistency(self, old: int, new: int | None = None) -> list[str]:
        """Hashes (hex) that show the first `old` records to be the same in the head of `new`, or of now."""
        with self.snapshot() as connection:
            size = _head(connection).size
            new = size if new is None else new
            if new > size:
                raise ValueError(f"new: at most {size}, the number of records there are")
            return [hash.hex() for hash in consistency_proof(node_in(connection), old, new)]

    @property
    def size(self) -> int:
        """Records, erased ones included."""
        return self.head().size

    @property
    def bytes(self) -> int:
        """Of the file and the journals beside it."""
        found = 0
        for end in ("", "-wal", "-journal"):
            with contextlib.suppress(OSError):
                found += self.path.with_name(self.path.name + end).stat().st_size
        return found

    @property
    def lag(self) -> int:
        """Pieces of work that are not committed yet, about."""
        return self._writer.lag

    @property
    def failure(self) -> str | None:
        """Why the last attempt to write has failed, if it has."""
        return self._writer.failure

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever runs the server should know about the files."""
        return (*self._writer.notes, *self._digests.notes, *self._notes)

    def close(self) -> None:
        """Commit what has come. Closing twice is fine."""
        self._writer.close()


_UNWIPED = (
    "bodies were removed from the ledger, but their bytes may still be in its files: others were "
    "reading it, or the disk was full; the next removal tries again"
)


def _head(connection: sqlite3.Connection) -> Head:
    size, root, timestamp = read_head(connection)
    return Head(size, root.hex(), timestamp)
