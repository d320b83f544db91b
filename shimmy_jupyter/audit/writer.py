"""One thread that writes a SQLite file, many writers' work in one transaction.

Committing costs far more than inserting, so whatever has come while a transaction was being committed
goes into the next one together (group commit). Several processes may have the file open; each
transaction takes the write lock at its beginning, so what it reads is the latest there is.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import without_folders

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter.audit")

_MOST = 512
"""Pieces of work in one transaction."""
_QUEUED = 20_000
"""Pieces of work that may wait; each has somebody who waits for it."""
_BUSY = 10.0
"""Seconds for which another process's transaction is waited for."""
_LEAST = (3, 31, 0)
"""The first SQLite with generated columns."""
_NETWORK = (
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "smb",
    "vboxsf", "virtiofs",
)  # fmt: skip
_LOCAL_FUSE = {"fuseblk", "fuse.fuse-overlayfs"}
_OTHERS_FAULT = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_PERM, sqlite3.SQLITE_INTERRUPT,
}  # fmt: skip
"""The file's or the machine's, not that of the piece of work that met it."""
_BESIDE = ("", "-wal", "-shm", "-journal")
_CREATING = threading.Lock()


class StoreFailed(Exception):
    """The file cannot be opened, or nothing can be written to it; says why, without its folder."""


class _Work(Generic[T]):
    def __init__(self, run: Callable[[sqlite3.Connection], T], *, apart: bool) -> None:
        self.run, self.apart = run, apart
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
    a failure; `opened` then hears of the connection. The file is the owner's alone. One whose schema is
    of a newer `version`, or another program's, is left as it is.

    `durable` makes a commit survive a power cut; otherwise it survives the end of the process.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        *,
        durable: bool = False,
        opened: Callable[[sqlite3.Connection], None] | None = None,
        version: int = 1,
    ) -> None:
        self.path = path
        self.failure: str | None = None
        """Why the last transaction failed, if it did."""
        self.notes: tuple[str, ...] = ()
        """What was not as it should be with the file, and what was done about it."""
        self._schema, self._durable, self._opened = schema, durable, opened
        self._version = version
        self._inbox: queue.SimpleQueue[_Work[Any] | None] = queue.SimpleQueue()
        self._in_hand = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self.network = on_network(path)
        """Whether the file is on a network's file system, where a write-ahead log does not work."""
        if self.network:
            self._note(
                f"{path.name} is on a network's file system, so each commit waits for it: "
                "a local folder would be faster"
            )

    def submit(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """For any thread. The result is there when it has been committed; what `work` raises undoes its
        own writing only. `StoreFailed` where nothing can be written.
        """
        return self._put(_Work(work, apart=False))

    def submit_apart(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """The same for what cannot be done within a transaction, such as giving space back."""
        return self._put(_Work(work, apart=True))

    def _put(self, asked: _Work[T]) -> Future[T]:
        refused = None
        with self._lock:
            if self._closed:
                refused = StoreFailed(f"{self.path.name} is closed")
            elif self._inbox.qsize() >= _QUEUED:
                refused = StoreFailed(f"{self.path.name}: {_QUEUED} records wait to be written")
            else:
                if self._thread is None:
                    name = f"shimmy-{self.path.stem}"
                    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                    self._thread.start()
                self._inbox.put(asked)
        if refused is not None:
            asked.settle(refused)  # not under the lock: it may call whoever waits
        return asked.done

    @property
    def lag(self) -> int:
        """Pieces of work that are not committed yet, about."""
        return self._inbox.qsize() + self._in_hand

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that cannot write, for the thread that asks. Raises `StoreFailed`."""
        try:
            with contextlib.closing(open_for_reading(self.path)) as connection:
                self._check_version(connection)
                yield connection
        except sqlite3.Error as error:
            raise StoreFailed(f"{self.path.name} cannot be read: {_words(error)}") from error

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
            works = [work for work in batch if work is not None]
            self._in_hand = len(works)
            for apart, some in itertools.groupby(works, lambda work: work.apart):
                self._do(list(some), apart=apart)
        self._drop()

    def _do(self, works: list[_Work[Any]], *, apart: bool) -> None:
        failure = None
        try:
            connection = self._open()
            if apart:
                for work in works:
                    _attempt_apart(connection, work)
            else:
                connection.execute("BEGIN IMMEDIATE")
                for work in works:
                    _attempt(connection, work)
                connection.execute("COMMIT")
            self._check_identity()
        except StoreFailed as error:
            failure = error
        except Exception as error:  # noqa: BLE001  the thread has to live, and who waits to hear of it
            failure = StoreFailed(f"{self.path.name} cannot be written: {_words(error)}")
        self._report(failure, works)
        if failure is not None:
            self._drop()
        self._in_hand -= len(works)
        for work in works:
            work.settle(failure)

    def _report(self, failure: StoreFailed | None, works: list[_Work[Any]]) -> None:
        errors = (failure, *(work.error for work in works))
        reason = next((str(error) for error in errors if isinstance(error, StoreFailed)), None)
        if reason is not None and reason != self.failure:
            log.error("%s", reason)
        self.failure = reason

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            self._check_identity()
        else:
            if sqlite3.sqlite_version_info < _LEAST:
                raise StoreFailed(
                    f"{self.path.name} needs SQLite 3.31 or later, not {sqlite3.sqlite_version}"
                )
            self._make_private()
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY, isolation_level=None, check_same_thread=False
            )
            self._identity = _identity(self.path)
            self._check_version(self._connection)
            self._set_journal(self._connection)
            self._connection.execute("PRAGMA secure_delete=ON")
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {self._schema}; PRAGMA user_version={self._version}; COMMIT;"
            )
            if self._opened is not None:
                self._opened(self._connection)
        return self._connection

    def _check_identity(self) -> None:
        """What goes into a file that has lost its name is lost; the next one is opened anew."""
        if self._identity != _identity(self.path):
            raise StoreFailed(f"{self.path.name} was removed or replaced while it was in use")

    def _make_private(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # With the mode it is to have from the beginning, not after others could open it. One that is
        # there is not opened here: closing it would undo the locks of whoever reads it in this process.
        with _CREATING, contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        for suffix in _BESIDE:
            with contextlib.suppress(FileNotFoundError):
                path = self.path.with_name(self.path.name + suffix)
                if stat.S_IMODE(path.stat().st_mode) & 0o077:
                    path.chmod(0o600)
                    kept = not stat.S_IMODE(path.stat().st_mode) & 0o077
                    self._note(
                        f"others could open {path.name}; now they cannot"
                        if kept
                        else f"others can open {path.name}, and its file system keeps it so"
                    )

    def _check_version(self, connection: sqlite3.Connection) -> None:
        # In this order: another process that makes the file writes both in one transaction.
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found > self._version:
            raise StoreFailed(
                f"{self.path.name} was written by a newer version of this package: its format is "
                f"{found}, and {self._version} is the latest known here"
            )
        if found == 0 and tables:
            raise StoreFailed(f"{self.path.name} is another program's database")

    def _set_journal(self, connection: sqlite3.Connection) -> None:
        wanted = "truncate" if self.network else "wal"
        deadline = time.monotonic() + _BUSY
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
                if mode != wanted:
                    (mode,) = connection.execute(f"PRAGMA journal_mode={wanted}").fetchone()
                break
            except sqlite3.OperationalError as error:
                # SQLite does not wait here for another process that does the same.
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != wanted:
            self._note(f"{self.path.name} has no write-ahead log here, so each commit waits for it")
        full = self._durable or mode != "wal"
        connection.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            log.warning("%s", text)
            self.notes += (text,)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # it may be what failed
                connection.close()


def open_for_reading(path: Path) -> sqlite3.Connection:
    """One that cannot write. Raises `StoreFailed` where there is no such file."""
    # Not mode=ro: what a killed process left in its journal has to be put right before it is read.
    where = f"file:{_quoted(path)}?mode=rw"
    try:
        connection = sqlite3.connect(where, uri=True, timeout=_BUSY, isolation_level=None)
    except sqlite3.Error as error:
        raise StoreFailed(f"{path.name} cannot be read: {_words(error)}") from error
    connection.execute("PRAGMA query_only=ON")
    return connection


def _attempt(connection: sqlite3.Connection, work: _Work[Any]) -> None:
    """Its error is its own, unless it is the file's."""
    connection.execute("SAVEPOINT one")
    try:
        work.result = work.run(connection)
    except Exception as error:
        if _code(error) in _OTHERS_FAULT or not connection.in_transaction:
            raise
        work.error = _own(error)
        connection.execute("ROLLBACK TO one")
    connection.execute("RELEASE one")


def _attempt_apart(connection: sqlite3.Connection, work: _Work[Any]) -> None:
    try:
        work.result = work.run(connection)
    except Exception as error:
        if _code(error) in _OTHERS_FAULT:
            raise
        work.error = _own(error)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _own(error: Exception) -> Exception:
    return StoreFailed(_words(error)) if isinstance(error, sqlite3.Error) else error


def _code(error: Exception) -> int | None:
    """SQLite's primary code of an error, where it has one."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _words(error: Exception) -> str:
    """An operating system's error names the file, with its folder."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return without_folders(str(error))


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def on_network(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a path is on a network's file system, as the mount table has it; False where there is none."""
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return False
    where = Path(os.path.realpath(path))
    best, kind = -1, ""
    for line in lines:
        before, _, after = line.partition(b" - ")
        fields = before.split()
        if len(fields) < 5 or not after.split():
            continue
        point = Path(os.fsdecode(_OCTAL.sub(lambda code: bytes([int(code[1], 8)]), fields[4])))
        # Of two mounts at one place the later one is seen.
        if where.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), os.fsdecode(after.split()[0])
    return kind.startswith(_NETWORK) and kind not in _LOCAL_FUSE


_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")
"""Blanks and the like in the mount table."""
