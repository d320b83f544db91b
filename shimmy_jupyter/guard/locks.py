"""Locks by which servers that share a file know of each other's end: the system lets go of them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock_file(path: Path, owner: str) -> Path:
    return path.with_name(f"{path.name}.{owner}.lock")


def hold(path: Path) -> int:
    """A descriptor that has the lock; another server may remove the file while it does not."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            raise
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_gone(path: Path) -> bool:
    """Whether no server has this lock any more; then its file is removed. One that cannot be asked for
    counts as held.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = is_at(descriptor, path)
        if gone:
            path.unlink()
    except OSError:
        return False
    else:
        return gone
    finally:
        os.close(descriptor)
