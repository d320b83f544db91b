"""One thread that writes a SQLite file, many writers' work in one transaction.

Committing costs far more than inserting, so whatever has come while a transaction was being committed
goes into the next one together (group commit). Several processes may have the file open; each
transaction takes the write lock at its beginning, so what it reads is the latest there is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter.audit")

_MOST = 512
"""Pieces of work in one transaction."""
_BUSY = 10.0
"""Seconds for which another process's transaction is waited for."""
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "fuse",
    "lustre",
    "gpfs",
    "ceph",
    "afs",
    "beegfs",
    "glusterfs",
)


class StoreFailed(Exception):
    """The file cannot be opened, or nothing can be written to it; says why, without its folder."""


class _Work(Generic[T]):
    def __init__(self, run: Callable[[sqlite3.Connection], T]) -> None:
        self.run = run
        self.done: Future[T] = Future()
        self.result: T
        self.error: Exception | None = None

    def settle(self, failure: StoreFailed | None) -> None:
        if not self.done.set_running_or_notify_cancel():
            return  # committed or not, nobody waits for it
        error = failure or self.error
        if error is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(self.result)


class Writer:
    """`schema` is run when the file is opened, which happens at the first piece of work and again after
    a failure; `opened` then hears of the connection. The file is the owner's alone.

    `durable` makes a commit survive a power cut; otherwise it survives the end of the process.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        *,
        durable: bool = False,
        opened: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        self.path = path
        self.failure: str | None = None
        """Why the last transaction failed, if it did."""
        self._schema, self._durable, self._opened = schema, durable, opened
        self._inbox: queue.SimpleQueue[_Work[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self.network = on_network(path)
        """Whether the file is on a network's file system, where a write-ahead log does not work."""

    def submit(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """For any thread. The result is there when it has been committed; what `work` raises undoes its
        own writing only. `StoreFailed` where nothing can be written.
        """
        asked = _Work(work)
        with self._lock:
            if self._closed:
                asked.settle(StoreFailed("it is closed"))
                return asked.done
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shimmy-ledger", daemon=True)
                self._thread.start()
            self._inbox.put(asked)
        return asked.done

    @property
    def lag(self) -> int:
        """Pieces of work that wait to be committed, about."""
        return self._inbox.qsize()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that cannot write, for the thread that asks. Raises `StoreFailed`."""
        try:
            connection = sqlite3.connect(
                f"file:{_quoted(self.path)}?mode=ro", uri=True, timeout=_BUSY, isolation_level=None
            )
        except sqlite3.Error as error:
            raise StoreFailed(f"{self.path.name} cannot be read: {error}") from error
        try:
            yield connection
        except sqlite3.Error as error:
            raise StoreFailed(f"{self.path.name} cannot be read: {error}") from error
        finally:
            connection.close()

    def close(self) -> None:
        """Commit what has come, and end the thread. Closing twice is fine."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._inbox.put(None)
        if thread is not None:
            thread.join()

    # The thread

    def _run(self) -> None:
        ending = False
        while not ending:
            batch = [self._inbox.get()]
            while len(batch) < _MOST and not self._inbox.empty():
                batch.append(self._inbox.get())
            ending = batch[-1] is None
            if works := [work for work in batch if work is not None]:
                self._transact(works)
        self._drop()

    def _transact(self, works: list[_Work[Any]]) -> None:
        failure = None
        try:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            for work in works:
                _attempt(connection, work)
            connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            failure = StoreFailed(f"{self.path.name} cannot be written: {_words(error)}")
            if str(failure) != self.failure:
                log.error("%s", failure)  # noqa: TRY400  what was being done has nothing to do with it
            self._drop()
        self.failure = str(failure) if failure is not None else None
        for work in works:
            work.settle(failure)

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity != _identity(self.path):
            log.warning("%s was removed or replaced; it is opened anew", self.path.name)
            self._drop()
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # With the mode it is to have from the beginning, not after others could open it.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY, isolation_level=None, check_same_thread=False
            )
            self._identity = _identity(self.path)
            self._connection.execute(f"PRAGMA journal_mode={'TRUNCATE' if self.network else 'WAL'}")
            full = self._durable or self.network
            self._connection.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
            self._connection.execute("PRAGMA secure_delete=ON")
            self._connection.executescript(self._schema)
            if self._opened is not None:
                self._opened(self._connection)
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # it may be what failed
                connection.close()


def _attempt(connection: sqlite3.Connection, work: _Work[Any]) -> None:
    """Its error is its own, unless it is the file's."""
    connection.execute("SAVEPOINT one")
    try:
        work.result = work.run(connection)
    except sqlite3.Error:
        raise
    except Exception as error:  # noqa: BLE001  raised where it is waited for
        work.error = error
        connection.execute("ROLLBACK TO one")
    connection.execute("RELEASE one")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _words(error: Exception) -> str:
    """An operating system's error names the file, with its folder."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def on_network(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a path is on a network's file system, as the mount table has it; False where there is none."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    where = path.resolve()
    best, kind = -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        if where.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind.startswith(_NETWORK)
