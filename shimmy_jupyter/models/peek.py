"""What a file says it is, by its beginning. Whether it is true is for the validator to find out.

Readers raise OSError where the disk does, which may be another matter next time, and return a
`Problem` where the file is at fault.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from .scan import Disk, File, stamp, why

Kind = Literal["model", "adapter", "projector", "unknown"]
T = TypeVar("T")

_PEEKS = 4096, 65536  # mostly the first few hundred bytes say it
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ASKED = {b"general.type", b"general.architecture"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file cannot be used, in words without a path: "is no GGUF file"."""

    reason: str


def attempt(disk: Disk, what: str, file: File, look: Callable[[File], T | Problem]) -> T | Problem:
    """`look(file)`, remembered as `what` where the disk let it be read."""
    try:
        return disk.once(what, file, look)
    except OSError as error:
        return Problem(why(error))


def read(file: File, limit: int) -> bytes:
    """At most `limit` bytes of its beginning. Raises OSError, also where it is another file now."""
    # Not blocking: it could have become a FIFO that nobody writes to.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(file.path, flags)
    try:
        if stamp(os.fstat(handle)) != file.stamp:
            raise OSError(errno.EAGAIN, "it changed while it was looked at")
        return os.pread(handle, limit, 0)
    finally:
        os.close(handle)


def kind_of(file: File) -> Kind | Problem:
    """By the header's `general.type` and `general.architecture`, as far as they stand in the first
    64 KiB. Raises OSError.
    """
    told: dict[bytes, bytes] = {}
    for size in _PEEKS:
        head = read(file, size)
        if not head.startswith(b"GGUF"):
            return Problem(_instead(head))
        told, enough = _told(head)
        if enough or len(head) < size:
            break
    type, architecture = told.get(b"general.type"), told.get(b"general.architecture")
    if type == b"adapter":
        return "adapter"
    if type == b"mmproj" or architecture == b"clip":
        return "projector"
    return "model" if architecture and type in {None, b"model"} else "unknown"


def _instead(head: bytes) -> str:
    """What a file is that should have been a model: the usual mishaps of downloads."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself: `git lfs pull` gets it"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, saved under a model's name"
    return "is empty" if not head else "is no GGUF file"


class _Cursor:
    """Reads little-endian numbers and strings. Raises EOFError past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise EOFError
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> bytes:
        return self.take(self.number(8))


def _told(head: bytes) -> tuple[dict[bytes, bytes], bool]:
    """The two keys as far as they are there, and whether more of the file would say no more."""
    told: dict[bytes, bytes] = {}
    cursor = _Cursor(head)
    try:
        cursor.take(4)
        if cursor.number(4) not in {2, 3}:
            return told, True
        cursor.take(8)
        for _ in range(cursor.number(8)):
            key, type = cursor.string(), cursor.number(4)
            if type == _STRING:
                value = cursor.string()
                if key in _ASKED:
                    told[key] = value
            elif type == _ARRAY:
                _skip_array(cursor)
            else:
                cursor.take(_SIZES[type])
            if len(told) == len(_ASKED):
                break
    except EOFError:
        return told, False
    except KeyError:  # a type that GGUF does not have
        return told, True
    return told, True


def _skip_array(cursor: _Cursor) -> None:
    type, count = cursor.number(4), cursor.number(8)
    if type != _STRING:
        cursor.take(_SIZES[type] * count)
        return
    for _ in range(count):  # ends with the data, of which each takes eight bytes at least
        cursor.string()
