"""A file in the making: `name.part`, with `name.part.json` beside it that says what it is part of.

All names are looked up in one open folder, links are never followed, and one process at a time has
the part (a lock on it). What counts as there is what has reached the disk: after a kill or a power
cut the bytes beyond that are dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .fetch_errors import DiskFull, FetchFailed, FetchRefused, FileExists, in_words

CHECK_BYTES = 64 << 20
"""After so many bytes they are put on the disk, noted, and the free space is looked at again."""
READ_BYTES = 1 << 20

_LONGEST_NOTE = 65_536
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not hold us up


@dataclass(frozen=True, slots=True)
class Note:
    """What a part is part of. `url` has no query, or is the request's `identity`; `size` and `safe`
    are bytes, of the whole file and of what has reached the disk.
    """

    url: str
    etag: str
    size: int
    safe: int = 0


class PartFile:
    """The part of `name` in `folder`, open and locked while the block lasts.

    On leaving, a part that can be continued is kept with its note, any other is removed. Raises
    `FetchRefused` if something else has its name or another process is at it.
    """

    def __init__(self, folder: Path, name: str, reserve: int) -> None:
        self.path = folder / f"{name}.part"
        self.size = 0
        self.note: Note | None = None
        self._folder = folder
        self._name = name
        self._part = f"{name}.part"
        self._note = f"{name}.part.json"
        self._reserve = reserve
        self._unchecked = 0
        self._fd = -1
        self._folder_fd = -1
        self._done = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder_fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, self._folder_fd)
            self._fd = self._opened()
            stack.callback(os.close, self._fd)
            self.note = self._read_note()
            if self.note is None:
                self.restart(None)
            else:
                self.size = min(os.fstat(self._fd).st_size, self.note.safe)
                os.ftruncate(self._fd, self.size)
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._done:
                if self.note is not None and self.size:
                    # The note before this one holds as well, and another error is on its way.
                    with contextlib.suppress(OSError):
                        self.save()
                else:
                    self.discard()
        finally:
            os.close(self._fd)
            os.close(self._folder_fd)

    def _opened(self) -> int:
        for _ in range(8):  # others come and go
            try:
                fd = os.open(self._part, _OPEN, dir_fd=self._folder_fd)
            except FileNotFoundError:
                try:
                    flags = _OPEN | os.O_CREAT | os.O_EXCL
                    fd = os.open(self._part, flags, 0o600, dir_fd=self._folder_fd)
                except FileExistsError:
                    continue
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, fd)
                if self._ours(fd):
                    stack.pop_all()
                    return fd
        raise FetchRefused(f"{self._part} keeps changing; is something else working on it?")

    def _ours(self, fd: int) -> bool:
        """Locked, and still what has the name; False if another process has finished it meanwhile.
        Raises `FetchRefused` if it is at it now, or if this is no file of ours alone.
        """
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FetchRefused(f"{self._name} is already being fetched") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        facts = os.fstat(fd)
        try:
            named = os.stat(self._part, dir_fd=self._folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not os.path.samestat(named, facts):
            return False
        final = self.existing()
        if final is not None and os.path.samestat(final, facts):
            # Killed while the file had both names: it is finished, only this one is left over.
            os.unlink(self._part, dir_fd=self._folder_fd)
            return False
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_uid != os.geteuid():
            raise FetchRefused(f"{self._part} is not ours to write to; remove it")
        os.fchmod(fd, 0o600)
        return True

    def existing(self) -> os.stat_result | None:
        """What has the file's own name already."""
        try:
            return os.stat(self._name, dir_fd=self._folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def digest_of_existing(self, step: Callable[[int], None]) -> str | None:
        """SHA-256 of what has the file's own name; None if that is no regular file."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self._name, flags, dir_fd=self._folder_fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EACCES, errno.ENXIO):
                return None
            raise
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            digest = hashlib.sha256()
            for block in _blocks(fd):
                digest.update(block)
                step(len(block))
            return digest.hexdigest()
        finally:
            os.close(fd)

    def blocks(self) -> Iterator[bytes]:
        """The bytes that are there, from the start. Then writing continues behind them."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        return _blocks(self._fd)

    def restart(self, note: Note | None) -> None:
        """Empty again, as the beginning of what `note` says. Without one nothing can be resumed."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.size = 0
        self._unchecked = 0
        self.note = note
        if note is None:
            self._remove(self._note)

    def room_for(self, more: int) -> None:
        """Raises `DiskFull` if so many bytes more would touch the reserve."""
        free = shutil.disk_usage(self._folder).free
        if free - more < self._reserve:
            needs = f"needs {in_words(more)}, " if more else ""
            raise DiskFull(
                f"{self._name} {needs}the disk has {in_words(free)} free, of which "
                f"{in_words(self._reserve)} are kept; make room and ask again"
            )

    def write(self, data: bytes) -> None:
        """Raises `DiskFull`; if the disk really ran full, the part is given up to free it."""
        try:
            _write_all(self._fd, data)
        except OSError as error:
            if error.errno in _FULL:
                self.note = None
                raise DiskFull(f"the disk or the quota is full; {self._part} is removed") from None
            raise
        self.size += len(data)
        self._unchecked += len(data)
        if self._unchecked >= CHECK_BYTES:
            self._unchecked = 0
            self.room_for(0)
            self.save()

    def save(self) -> None:
        """What is there has reached the disk, and the note says so."""
        os.fsync(self._fd)
        if self.note is None:
            return
        text = json.dumps(asdict(self.note) | {"safe": self.size})
        new = f"{self._note}.new"
        self._remove(new)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(new, flags, 0o600, dir_fd=self._folder_fd)
        try:
            _write_all(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(new, self._note, src_dir_fd=self._folder_fd, dst_dir_fd=self._folder_fd)

    def _read_note(self) -> Note | None:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(self._note, flags, dir_fd=self._folder_fd)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            fields = json.loads(os.read(fd, _LONGEST_NOTE))
            url, etag, size, safe = (fields[name] for name in ("url", "etag", "size", "safe"))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        finally:
            os.close(fd)
        texts = isinstance(url, str) and isinstance(etag, str)
        counts = type(size) is int and type(safe) is int and 0 <= safe <= size
        return Note(url, etag, size, safe) if texts and counts else None

    def discard(self) -> None:
        """Removes the part and its note."""
        self._done = True
        self._remove(self._part)
        self._remove(self._note)
        self._remove(f"{self._note}.new")

    def publish(self) -> None:
        """The part gets the file's own name, if that is free. Raises `FileExists` otherwise."""
        os.fsync(self._fd)
        folder = self._folder_fd
        try:
            # A second name fails where the first is taken, unlike a rename, which would replace it.
            os.link(
                self._part,
                self._name,
                src_dir_fd=folder,
                dst_dir_fd=folder,
                follow_symlinks=False,
            )
        except FileExistsError:
            raise FileExists(f"{self._name} has appeared while it was fetched") from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._publish_without_links()
        final = self.existing()
        if final is None or not os.path.samestat(final, os.fstat(self._fd)):
            raise FetchFailed(f"{self._part} was exchanged by something else; remove {self._name}")
        self.discard()
        os.fsync(folder)

    def _publish_without_links(self) -> None:
        """Where a file has one name only (exFAT, some network file systems): takes the free name
        by an empty file, and renames over that.
        """
        folder = self._folder_fd
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.close(os.open(self._name, flags, 0o600, dir_fd=folder))
        except FileExistsError:
            raise FileExists(f"{self._name} has appeared while it was fetched") from None
        os.rename(self._part, self._name, src_dir_fd=folder, dst_dir_fd=folder)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder_fd)


def _blocks(fd: int) -> Iterator[bytes]:
    while block := os.read(fd, READ_BYTES):
        yield block


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """What the file system refuses, without its paths."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"the disk or the quota is full; {name} was not fetched") from None
        if error.errno == errno.ELOOP:
            raise FetchRefused(f"a link has the name {name}.part; remove it") from None
        reason = os.strerror(error.errno) if error.errno else "input or output error"
        raise FetchRefused(f"{name} cannot be kept in the models' folder: {reason}") from None
