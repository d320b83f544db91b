"""Answers of rows, kept from one run to the next in a SQLite file that only its owner can open.

Its key is a digest: the answer is in the file, the prompt is not. Whatever is wrong with the file is said
once, as a `CacheWarning`, and the rows are asked without it. Several kernels may use it at once: each
reads and writes in short transactions, and what another has written first stays. A file system of a
network may not share memory, as a write-ahead log has to, so there is none; answers are written about
once a second instead, together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidValue

T = TypeVar("T")

NAME = "rows.sqlite"
MAX_BYTES = 512 << 20
"""Of the file, by default."""
EVERY = 1.0
"""Seconds from one writing to the next, at least."""
_MOST = 256
"""Answers that wait to be written."""
_BUSY = 5.0
"""Seconds for which another kernel's writing is waited for."""
_TOUCHED_EVERY = 3600
"""Seconds: how exactly it is known when an answer was last wanted."""
_APPLICATION = 0x53686D79
_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, text TEXT NOT NULL, tokens INTEGER NOT NULL, finish TEXT NOT NULL,
    used INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON answers (used);
"""


class CacheWarning(UserWarning):
    """Rows are asked without the cache, or not all of their answers are kept."""


def _warned(said: str) -> None:
    warnings.warn(said, CacheWarning, stacklevel=5)


class _NotOurs(Exception):
    """The file or its folder is not to be used; says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer. `finish` is "stop", or "length" where it was cut off."""

    text: str
    tokens: int = 0
    finish: str = "stop"


class Key:
    """Of all rows that are asked in the same way, of the same `model`, which is its SHA-256."""

    def __init__(self, task: str, model: str, body: Mapping[str, Any]) -> None:
        # What is nested keeps its order: of a schema's fields it changes the prompt and the answer.
        asked = [_VERSION, task, model, sorted(body.items())]
        shared = json.dumps(asked, ensure_ascii=False, default=str)
        self._shared = hashlib.sha256(_bytes(shared) + b"\0")

    def of(self, prompt: str, occurrence: int = 0) -> bytes:
        """`occurrence` tells rows apart that ask the same and are to have answers of their own."""
        digest = self._shared.copy()
        digest.update(f"{occurrence}\0".encode() + _bytes(prompt))
        return digest.digest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Cache:
    """For one thread at a time. Opened when it is first used; nothing here raises but `clear`.

    Over `max_bytes` the answers that have not been wanted for the longest go. `clock` is the time of day
    in seconds; `warn` hears what is wrong.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.time,
        warn: Callable[[str], None] = _warned,
    ) -> None:
        if max_bytes < 1 << 16:
            raise InvalidValue("a cache of less than 64 KiB holds nothing", param="max_bytes")
        self.path = folder / NAME
        self.failure: str | None = None
        """Why there is no cache, if that is so."""
        self._max, self._clock, self._warn = max_bytes, clock, warn
        self._connection: sqlite3.Connection | None = None
        self._new: dict[bytes, Reply] = {}
        self._wanted: set[bytes] = set()
        self._written = clock()

    def get(self, key: bytes) -> Reply | None:
        return self._new.get(key) or self._try(lambda connection: self._read(connection, key), None)

    def put(self, key: bytes, reply: Reply) -> None:
        try:
            size = len(reply.text.encode())
        except UnicodeEncodeError:
            return  # half of a surrogate pair: SQLite has no such text
        if self.failure is None and size < self._max // 16:
            self._new[key] = reply
            # A clock that was set back must not keep everything waiting.
            if len(self._new) >= _MOST or not 0 <= self._clock() - self._written < EVERY:
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        self._written = self._clock()
        if self._new or self._wanted:
            self._try(self._write, None)
            self._new, self._wanted = {}, set()

    def size(self) -> tuple[int, int]:
        """Answers in the file, and bytes that they take."""

        def measured(connection: sqlite3.Connection) -> tuple[int, int]:
            (rows,) = connection.execute("SELECT count(*) FROM answers").fetchone()
            return int(rows), _used_bytes(connection)

        return self._try(measured, (0, 0))

    def clear(self) -> int:
        """Remove all answers; returns how many they were. A file of ours that is damaged goes, too.

        Raises `InvalidValue` where the file is another program's, or cannot be emptied.
        """
        self._new, self._wanted = {}, set()
        try:
            connection = self._open()
            with _transaction(connection):
                gone = connection.execute("DELETE FROM answers").rowcount
            with contextlib.suppress(sqlite3.OperationalError):  # another kernel is reading
                connection.execute("VACUUM")
        except (_NotOurs, sqlite3.OperationalError, OSError) as error:
            raise InvalidValue(
                f"{NAME} cannot be emptied: {_words(error)}", param="cache"
            ) from error
        except sqlite3.DatabaseError:
            self._drop()
            for path in (self.path, self.path.with_name(f"{NAME}-journal")):
                path.unlink(missing_ok=True)
            gone = 0
        self.failure = None
        return gone

    def close(self) -> None:
        """Write what waits, and let go of the file. Closing twice is fine."""
        self.flush()
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # it may be what failed
                connection.close()

    def _read(self, connection: sqlite3.Connection, key: bytes) -> Reply | None:
        found = connection.execute(
            "SELECT text, tokens, finish, used FROM answers WHERE key = ?", (key,)
        )
        # All of it, or the read lock would stay.
        for text, tokens, finish, used in found.fetchall():
            if self._clock() - used > _TOUCHED_EVERY:
                self._wanted.add(key)
            return Reply(text, tokens, finish)
        return None

    def _write(self, connection: sqlite3.Connection) -> None:
        now = int(self._clock())
        rows = ((key, r.text, r.tokens, r.finish, now) for key, r in self._new.items())
        touched = ((now, key) for key in self._wanted)
        with _transaction(connection):
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", rows)
            connection.executemany("UPDATE answers SET used = ? WHERE key = ?", touched)
            if _used_bytes(connection) > self._max:
                self._shrink(connection)

    def _shrink(self, connection: sqlite3.Connection) -> None:
        # Well below, or each answer that comes would make room for itself alone.
        while _used_bytes(connection) > self._max * 0.9:
            gone = connection.execute(
                "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used LIMIT 64)"
            )
            if not gone.rowcount:
                break

    def _try(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        if self.failure is None:
            try:
                return work(self._open())
            except (sqlite3.Error, OSError, _NotOurs) as error:
                self.failure = f"rows are asked without {NAME}: {_words(error)}"
                self._new, self._wanted = {}, set()
                self._drop()
                self._warn(self.failure)
        return otherwise

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            _make_private(self.path)
            connection = sqlite3.connect(
                self.path, timeout=_BUSY, isolation_level=None, check_same_thread=False
            )
            try:
                _set_up(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


def _make_private(path: Path) -> None:
    """The folder and the file, where they are not there yet."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        # With its mode from the beginning, not after others could open it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    for place, wanted, open_to in (
        (path.parent, stat.S_IFDIR, "0700"),
        (path, stat.S_IFREG, "0600"),
    ):
        found = place.stat(follow_symlinks=place is not path)
        what = "the file" if place is path else f"its folder {place.name}"
        if stat.S_IFMT(found.st_mode) != wanted:
            raise _NotOurs(f"{what} is something else")
        if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
            raise _NotOurs(f"{what} is another user's")
        if os.name == "posix" and found.st_mode & 0o077:
            raise _NotOurs(f"others can open {what}: its mode has to be {open_to}")


def _set_up(connection: sqlite3.Connection) -> None:
    with _transaction(connection):
        # In one transaction: another kernel may be making the file.
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION and (application or tables):
            raise _NotOurs("it is another program's database")
        if version > _VERSION:
            raise _NotOurs("a newer version of this package has written it")
        if not tables:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA journal_mode = TRUNCATE")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite has undone it already
            connection.execute("ROLLBACK")
        raise


def _used_bytes(connection: sqlite3.Connection) -> int:
    one = {}
    for name in ("page_count", "freelist_count", "page_size"):
        (one[name],) = connection.execute(f"PRAGMA {name}").fetchone()
    return int((one["page_count"] - one["freelist_count"]) * one["page_size"])


def _words(error: BaseException) -> str:
    """Without the folder."""
    return str(getattr(error, "strerror", None) or error)
