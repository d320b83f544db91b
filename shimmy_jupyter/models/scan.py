"""Looking at folders, and remembering what was seen in them and in their files.

A second look at what has not changed costs one `lstat` per folder and one per file that is listed:
no folder is listed and no file opened. The folder's alone would not do: its times change when an
entry comes, goes or is renamed, but not when a file in it grows or is written over. Links are
resolved each time, because what they lead to can change anywhere on the way.

A file system's clock ticks up to two seconds apart, and a change within the tick of a look would not
show: what was changed less than `SETTLED` seconds before it was looked at is looked at again.

Everything here says what there was. Whoever opens a file later must look for himself.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast

from ..errors import Cancelled

SETTLED = 2.5
"""Seconds."""
MOST_FOLDERS = 100_000
"""Looked into below one place; the rest is passed over, with a warning."""
MOST_ENTRIES = 100_000
"""Of interest in one folder; a folder with more is passed over, with a warning."""
MOST_WARNINGS = 200
_Stamp = tuple[int, int, int, int, int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Warning:
    """What was passed over, and why. `place` is as the disk has it, line breaks and all: show its
    `repr`, and only to who may see the server's paths.
    """

    place: str
    reason: str


class Entry(NamedTuple):
    """What a folder holds under `name`, by the folder's own listing."""

    name: str
    type: Literal["folder", "file", "link"]


@dataclass(frozen=True, slots=True)
class File:
    """A regular file; `path` is without links, and `size` in bytes."""

    path: str
    size: int
    changed: float
    stamp: _Stamp


def never() -> bool:
    return False


class Disk:
    """Folders and files, and what is known of them. For one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._known: dict[tuple[str, str], tuple[_Stamp, bool, object]] = {}
        self._before: dict[tuple[str, str], tuple[_Stamp, bool, object]] = {}
        self._stop: Callable[[], bool] = never
        self._warnings: list[Warning] = []
        self._unsaid = 0
        self._folders = 0

    def begin(self, stop: Callable[[], bool]) -> None:
        """Start a look. `stop` is called before each folder and each file, and every so often while a
        long folder is listed; where it says true, `Cancelled` is raised. What was learned
        until then is kept.
        """
        self._before.update(self._known)
        self._known = {}
        self._stop = stop
        self._warnings = []
        self._unsaid = self._folders = 0

    def finish(self) -> tuple[Warning, ...]:
        """End a look: forget what it did not come by."""
        self._before = {}
        if self._unsaid:
            self._warnings.append(Warning("", f"and {self._unsaid} more warnings"))
        return tuple(self._warnings)

    def next_place(self) -> None:
        self._folders = 0

    def warn(self, place: str, reason: str) -> None:
        if len(self._warnings) < MOST_WARNINGS:
            self._warnings.append(Warning(place, reason))
        else:
            self._unsaid += 1

    def entries(self, folder: str, suffix: str = "") -> tuple[Entry, ...]:
        """Folders, and files whose names end in `suffix`, sorted by name; hidden ones left out.
        Nothing, and a warning, where the folder cannot be read or is a link.
        """
        self._check()
        self._folders += 1
        if self._folders > MOST_FOLDERS:
            if self._folders == MOST_FOLDERS + 1:
                self.warn(folder, f"and what comes after it: more than {MOST_FOLDERS} folders")
            return ()
        try:
            now = stamp(os.lstat(folder))
            return self._once((folder, suffix), now, lambda: self._list(folder, suffix))
        except FileNotFoundError:  # gone since somebody listed it
            return ()
        except OSError as error:
            self.warn(folder, why(error))
            return ()

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        return [entry.name for entry in self.entries(folder) if entry.type == "folder"]

    def file(self, folder: str, entry: Entry, root: str) -> File | None:
        """The file of an entry. None, and a warning, where it is none, cannot be looked at, or is a
        link out of `root`, which must be resolved.
        """
        self._check()
        path = join(folder, entry.name)
        try:
            return self.find(path, root) if entry.type == "link" else _regular(path)
        except OSError as error:
            self.warn(path, why(error))
            return None

    def find(self, path: str, root: str) -> File:
        """The file that `path` leads to. Raises OSError where there is none inside `root`."""
        resolved = os.path.realpath(path, strict=True)
        if not Path(resolved).is_relative_to(root):
            raise OSError(errno.EXDEV, "it leads out of its folder")
        return _regular(resolved)

    def once(self, what: str, file: File, look: Callable[[File], T]) -> T:
        """`look(file)`, or what it said last time where the file has not changed since."""
        return self._once((file.path, f"/{what}"), file.stamp, lambda: self._look(file, look))

    def _look(self, file: File, look: Callable[[File], T]) -> T:
        self._check()
        return look(file)

    def _once(self, key: tuple[str, str], stamp: _Stamp, look: Callable[[], T]) -> T:
        known = self._known.get(key) or self._before.get(key)
        if known is None or known[0] != stamp or not known[1]:
            now = self._clock()
            # The later of both: few file systems set the second, and anybody can set the first.
            known = stamp, now - max(stamp[3:]) / 1e9 > SETTLED, look()
        self._known[key] = known
        return cast("T", known[2])

    def _list(self, folder: str, suffix: str) -> tuple[Entry, ...]:
        # By a descriptor, which a link does not give.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        found: list[Entry] = []
        try:
            with os.scandir(handle) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % 1024 == 0:
                        self._check()
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        found.append(Entry(entry.name, "folder"))
                    elif entry.name.lower().endswith(suffix):
                        found.append(Entry(entry.name, "link" if entry.is_symlink() else "file"))
                    if len(found) > MOST_ENTRIES:
                        raise OSError(errno.EFBIG, f"it has more than {MOST_ENTRIES} entries")
        finally:
            os.close(handle)
        return tuple(sorted(found))

    def _check(self) -> None:
        if self._stop():
            raise Cancelled("the search for models was stopped")


def join(folder: str, *names: str) -> str:
    """As text: `Path` takes several times as long, and thousands of files are looked at each time."""
    return "/".join((folder.rstrip("/"), *names))


def why(error: OSError) -> str:
    return f"cannot be read: {error.strerror or type(error).__name__}"


def stamp(status: os.stat_result) -> _Stamp:
    # The last one changes with permissions, too, and cannot be set back as the one before it can.
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _regular(path: str) -> File:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return File(path, status.st_size, status.st_mtime, stamp(status))
