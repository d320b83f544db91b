"""A Hugging Face cache, as far as a pull needs it: what is there, and how a model's files come to be
listed in it, all at once and only when they are right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import Cancelled, ShimmyError
from .fetch import Fetcher
from .fetch_errors import FetchInterrupted, FetchRefused, FileExists
from .references import plain_name

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"\.part(\.json(\.new)?)?$")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_TURN = 0.05
"""Seconds between two tries to be the one that lists."""


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file of a repository that is wanted: its path there, bytes, and their SHA-256."""

    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return plain_name(self.path.rpartition("/")[2])


class CachedRepository:
    """What the cache has of one repository."""

    def __init__(self, cache: Path, repo: str) -> None:
        self._folder = cache / f"models--{repo.replace('/', '--')}"
        self._own = self._folder / ".shimmy"
        self._locks = cache / ".locks" / self._folder.name

    def blob(self, file: WantedFile) -> Path:
        return self._folder / "blobs" / file.sha256

    def private(self, file: WantedFile) -> Path:
        return self._own / file.sha256 / file.name

    def missing(self, file: WantedFile) -> int:
        """Bytes that the disk must still take."""
        private = self.private(file)
        if file.size in {size_of(self.blob(file)), size_of(private)}:
            return 0
        return max(0, file.size - (size_of(private.with_name(f"{private.name}.part")) or 0))

    def make(self) -> None:
        # Without its snapshots, huggingface_hub would call the repository damaged.
        for name in ("blobs", "snapshots"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)

    def refuse_others(self, files: Sequence[WantedFile], commit: str) -> None:
        """Raises `FileExists` where a name is another file's, before that is downloaded for nothing."""
        for file in files:
            self._refuse_other(self._snapshot(commit) / file.path, file)

    def _refuse_other(self, link: Path, file: WantedFile) -> None:
        blob = self.blob(file)
        if link.exists() and not (blob.exists() and link.samefile(blob)):
            raise FileExists(f"the cache has another file as {file.path} of that commit; remove it")

    def _snapshot(self, commit: str) -> Path:
        return self._folder / "snapshots" / commit

    @contextlib.contextmanager
    def tidied(self, files: Sequence[WantedFile]) -> Iterator[None]:
        """Empty folders of ours do not stay."""
        try:
            yield
        finally:
            for folder in (*(self.private(file).parent for file in files), self._own):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def publish(
        self,
        files: Sequence[WantedFile],
        commit: str,
        revision: str,
        validate: Callable[[Path], object],
        cancelled: Callable[[], bool],
    ) -> tuple[Path, ...]:
        """The files' names in the cache, once `validate` has taken them. Raises `FetchRefused`, and
        removes what was ours alone, where it has not.
        """
        with self._turn(cancelled), contextlib.ExitStack() as stack:
            for name in ("check", "new", "ref"):
                stack.callback(self._remove, self._own / name)
            places = [self._place(file) for file in files]
            check = self._linked("check", zip(files, places, strict=True))
            try:
                check_by(validate, check / files[0].path, files[0].path)
            except FetchRefused:
                for file in files:
                    self._remove(self.private(file).parent)
                raise
            # A folder just made has the umask's mode: whoever shares the cache can read the files.
            mode = check.stat().st_mode & 0o666
            blobs = [self.blob(file) for file in files]
            for place, blob in zip(places, blobs, strict=True):
                if place != blob:
                    place.chmod(mode)
                    place.replace(blob)
            new = self._linked("new", zip(files, blobs, strict=True))
            self._list(new, self._snapshot(commit), files)
            if revision != commit:
                self._refer(revision, commit)
        return tuple(self._snapshot(commit) / file.path for file in files)

    @contextlib.contextmanager
    def _turn(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        self._locks.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self._locks / "shimmy.lock", flags, 0o666)
        try:
            while not _locked(lock):
                stop(cancelled)
                time.sleep(_TURN)
            yield
        finally:
            os.close(lock)

    def _place(self, file: WantedFile) -> Path:
        for path in (self.private(file), self.blob(file)):
            if size_of(path) == file.size:
                return path
        raise FetchInterrupted(f"{file.name} was taken away meanwhile; ask again")

    def _linked(self, name: str, files: Iterable[tuple[WantedFile, Path]]) -> Path:
        """A folder like a snapshot's, and as deep, so that its links hold when it is moved there."""
        folder = self._own / name
        self._remove(folder)
        for file, target in files:
            link = folder / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent))
        return folder

    def _list(self, new: Path, snapshot: Path, files: Sequence[WantedFile]) -> None:
        """All files of a model are in one folder: it, or one above it, appears with them in it. Where all
        these are there, the links come one right after the other.
        """
        folder = PurePosixPath(files[0].path).parent
        for level in (*reversed(folder.parents), folder):
            try:
                (new / level).rename(snapshot / level)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                return
        with contextlib.ExitStack() as stack:
            for file in files:
                link = snapshot / file.path
                try:
                    link.symlink_to((new / file.path).readlink())
                    stack.callback(link.unlink, missing_ok=True)
                except FileExistsError:
                    self._refuse_other(link, file)
                    if not link.exists():  # it leads nowhere
                        (new / file.path).replace(link)
            stack.pop_all()

    def _refer(self, revision: str, commit: str) -> None:
        path, new = self._folder / "refs" / revision, self._own / "ref"
        if path.is_file() and path.read_bytes() == commit.encode():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._own.mkdir(exist_ok=True)
        new.write_text(commit)
        new.replace(path)

    def discard(self, fetcher: Fetcher) -> None:
        """What was kept for a later pull. Raises `FetchRefused`, and leaves what is complete, while one
        is under way.
        """
        if not self._own.is_dir():
            return
        with self._turn(lambda: False):
            folders = [path for path in self._own.iterdir() if _SHA256.fullmatch(path.name)]
            for folder in folders:
                for name in {_PART.sub("", path.name) for path in folder.iterdir()}:
                    fetcher.discard(folder, name)
            for folder in folders:
                self._remove(folder)
        with contextlib.suppress(OSError):
            self._own.rmdir()

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def stop(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("the pull was cancelled")


def check_by(validate: Callable[[Path], object], path: Path, name: str) -> None:
    try:
        validate(path)
    except ShimmyError as error:
        raise FetchRefused(f"{name} cannot be used: {error.message}") from None


def size_of(path: Path) -> int | None:
    """Bytes; None where there is no regular file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _locked(descriptor: int) -> bool:
    """Where a file system has no locks, nobody waits."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
