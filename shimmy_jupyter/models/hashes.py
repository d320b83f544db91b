"""SHA-256 of large files, remembered until they change.

A file counts as the one that was hashed while its device, inode, size and both its times are what
they were. Its time of change cannot be set back as that of its content can, so that an edit of the
same size under the old time shows. What the file system does not tell, such as a disk that has gone
bad, does not: `always` reads each time.

A file system's clock ticks up to two seconds apart. What was changed less than `SETTLED` seconds
before it was hashed could change again without a trace, and is hashed again the next time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Cancelled, ModelLoadFailed
from .gguf import shown
from .scan import SETTLED, never, stamp

log = logging.getLogger("shimmy_jupyter.models")

CHUNK_BYTES = 1 << 20
"""Read at once. `cancelled` is called before each."""
REPORT_SECONDS = 0.05
"""From one call of `progress` to the next, at least, but for the last one."""
POLL_SECONDS = 0.05
"""How often who waits for another thread calls `cancelled`."""

_VERSION = 1
_LONGEST_RECORD = 4096
_STAMP = ("device", "inode", "size", "mtime_ns", "ctime_ns")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not hold us up
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_File = tuple[int, int]
_Stamp = tuple[int, int, int, int, int]


def ignored(_done: int, _total: int) -> None:
    pass


@dataclass(slots=True)
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    wanted: int = 0


class Hashes:
    """Digests of files, as 64 hex digits in lower case. Safe to share between threads.

    Remembered in memory, and in `folder`, which is made when it is needed; None is for memory only.
    With `always` nothing is remembered. `clock` is the time of day in seconds.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        always: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = None if folder is None else _Store(folder)
        self.always = always
        self._clock = clock
        self._guard = threading.Lock()
        self._digests: dict[_File, tuple[_Stamp, str]] = {}
        self._turns: dict[_File, _Turn] = {}

    def known(self, path: Path) -> str | None:
        """The digest, if it is remembered and the file has not changed since."""
        try:
            return self._remembered(path, _stamp_of(path))
        except ModelLoadFailed:  # whoever has it hashed is told why
            return None

    def sha256(
        self,
        path: Path,
        progress: Callable[[int, int], None] = ignored,
        cancelled: Callable[[], bool] = never,
    ) -> str:
        """The digest, remembered or computed, which blocks: for a thread of the caller's.

        `progress` gets the bytes done and those in all; at the end they are equal. Of threads that
        want the same file at once one reads, and the others wait; what it could not remember each
        reads in its turn. Raises `Cancelled`, and `ModelLoadFailed` for a link, what is no regular
        file, what cannot be read, and what changes meanwhile.
        """
        now = _stamp_of(path)
        digest = self._remembered(path, now)
        if digest is None:
            with self._turn(now[:2], path, cancelled):
                now = _stamp_of(path)
                digest = self._remembered(path, now)
                if digest is None:
                    return self._computed(path, progress, cancelled)
        progress(now[2], now[2])
        return digest

    def forget(self, path: Path) -> None:
        """Have the file that this path leads to, or led to, hashed again."""
        resolved = os.path.realpath(path)
        with contextlib.suppress(ModelLoadFailed):  # another file there is not taken for it anyway
            file = _stamp_of(Path(resolved))[:2]
            with self._guard:
                self._digests.pop(file, None)
        if self._store is not None:
            self._store.remove(resolved)

    def _remembered(self, path: Path, now: _Stamp) -> str | None:
        if self.always:
            return None
        with self._guard:
            seen = self._digests.get(now[:2])
        if (seen is None or seen[0] != now) and self._store is not None:
            seen = self._store.read(os.path.realpath(path))
        if seen is None or seen[0] != now:
            return None
        with self._guard:
            self._digests[now[:2]] = seen
        return seen[1]

    def _computed(
        self, path: Path, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> str:
        # Before it is opened: a change after that must show against all changes before.
        began = self._clock()
        seen, digest = _read(path, progress, cancelled)
        if not self.always and began - max(seen[3:]) / 1e9 > SETTLED:
            with self._guard:
                self._digests[seen[:2]] = seen, digest
            if self._store is not None:
                self._store.write(os.path.realpath(path), seen, digest)
        return digest

    @contextlib.contextmanager
    def _turn(self, file: _File, path: Path, cancelled: Callable[[], bool]) -> Iterator[None]:
        with self._guard:
            turn = self._turns.setdefault(file, _Turn())
            turn.wanted += 1
        try:
            while not turn.lock.acquire(timeout=POLL_SECONDS):
                _check(path, cancelled)
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            with self._guard:
                turn.wanted -= 1
                if not turn.wanted:
                    del self._turns[file]


def key_of(digests: Sequence[str]) -> str:
    """One key for a model of several files, in their order: of one file its digest, of more the
    SHA-256 of their digests, each on a line of its own.
    """
    wrong = [digest for digest in digests if not _DIGEST.fullmatch(digest)]
    if wrong or not digests:
        raise ValueError("a model's files have one SHA-256 each, of 64 hex digits in lower case")
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def _read(
    path: Path, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
) -> tuple[_Stamp, str]:
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(CHUNK_BYTES))
    done, due = 0, 0.0
    with contextlib.ExitStack() as stack:
        with _explained(path):
            handle = os.open(path, _READ)
            stack.callback(os.close, handle)
            before = os.fstat(handle)
        _refuse_odd(before, path)
        _announce(handle)
        total = before.st_size
        while True:
            _check(path, cancelled)
            with _explained(path):
                count = os.readv(handle, [chunk])
            done += count
            # What grows as fast as it is read would have no end.
            if not count or done > total:
                break
            digest.update(chunk[:count])
            now = time.monotonic()
            if now >= due and done < total:
                due = now + REPORT_SECONDS
                progress(done, total)
        with _explained(path):
            after = os.fstat(handle)
    if done != total or stamp(after) != stamp(before):
        raise ModelLoadFailed(f"{shown(path.name)} changed while it was read")
    progress(total, total)
    return stamp(before), digest.hexdigest()


def _announce(handle: int) -> None:
    """Has the kernel read further ahead, where it can be told to."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint, which not every file system takes
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _stamp_of(path: Path) -> _Stamp:
    with _explained(path):
        status = os.lstat(path)
    _refuse_odd(status, path)
    return stamp(status)


def _refuse_odd(status: os.stat_result, path: Path) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ModelLoadFailed(f"{shown(path.name)} is a link; name the file that it leads to")
    if not stat.S_ISREG(status.st_mode):
        raise ModelLoadFailed(f"{shown(path.name)} is no regular file")


def _check(path: Path, cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled(f"the hashing of {shown(path.name)} was stopped")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the file system refuses, without its paths."""
    try:
        yield
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ModelLoadFailed(f"{shown(path.name)} cannot be read: {why}") from None


class _Store:
    """A folder with a record for each file, named by the SHA-256 of the file's path, which must have
    no links in it. What is wrong with it is logged, once each; nothing else comes of it than that
    files are hashed again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._said: set[str] = set()

    def read(self, path: str) -> tuple[_Stamp, str] | None:
        try:
            with self._opened() as folder:
                handle = os.open(_name(path), _READ, dir_fd=folder)
                try:
                    data = os.read(handle, _LONGEST_RECORD + 1)
                finally:
                    os.close(handle)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"known digests of models cannot be read: {error.strerror}")
            return None
        try:
            return _parsed(data)
        except (ValueError, RecursionError) as error:
            self._say(f"what is known of {shown(Path(path).name)} is damaged: {str(error)[:200]}")
            return None

    def write(self, path: str, seen: _Stamp, digest: str) -> None:
        record = {"version": _VERSION, **dict(zip(_STAMP, seen, strict=True)), "sha256": digest}
        name = _name(path)
        temporary = f".{name}.{secrets.token_hex(8)}"
        try:
            for one in (self._folder.parent, self._folder):
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened() as folder:
                try:
                    # Not synced: a record that a power cut tears is damaged, and as none.
                    with os.fdopen(os.open(temporary, _WRITE, 0o600, dir_fd=folder), "wb") as file:
                        file.write(json.dumps(record).encode())
                    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                finally:
                    with contextlib.suppress(FileNotFoundError):  # where it has its name
                        os.unlink(temporary, dir_fd=folder)
        except OSError as error:
            self._say(f"digests of models are lost when the server ends: {error.strerror}")

    def remove(self, path: str) -> None:
        try:
            with self._opened() as folder:
                os.unlink(_name(path), dir_fd=folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            name = shown(Path(path).name)
            log.warning("the known digest of %s cannot be removed: %s", name, error.strerror)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            # Whoever may write there could have any file pass for another.
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise OSError(
                    errno.EPERM, "others may write to their folder, or it is another user's"
                )
            yield handle
        finally:
            os.close(handle)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _name(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def _parsed(data: bytes) -> tuple[_Stamp, str]:
    """Raises ValueError."""
    if len(data) > _LONGEST_RECORD:
        raise ValueError(f"it has more than {_LONGEST_RECORD} bytes")
    record = json.loads(data)
    if not isinstance(record, dict) or set(record) != {"version", *_STAMP, "sha256"}:
        raise ValueError(f"it holds something else than version, {', '.join(_STAMP)} and sha256")
    device, inode, size, mtime, ctime, version = (record[name] for name in (*_STAMP, "version"))
    digest = record["sha256"]
    numbers = (device, inode, size, mtime, ctime, version)
    if any(type(number) is not int for number in numbers) or version != _VERSION:
        raise ValueError(f"version must be {_VERSION}, and the file's numbers integers")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("sha256 must be 64 hex digits in lower case")
    return (device, inode, size, mtime, ctime), digest
