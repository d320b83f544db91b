"""Models that keep crashing are not loaded again for a while: each crash costs everybody's requests."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

CRASHES = 3
WINDOW = 600.0
"""Seconds within which so many crashes lock a model up, and for which they are remembered."""

_File = tuple[Path, int, int]


class Quarantine:
    """Crashes by file: its path, size and time of change, so that a file put in its place is free."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._crashes: dict[_File, deque[tuple[float, str]]] = {}

    def record(self, path: Path, reason: str) -> None:
        self._crashes.setdefault(_identity(path), deque(maxlen=CRASHES)).append(
            (self._clock(), reason)
        )

    def reason(self, path: Path) -> str | None:
        """Why the model is locked up; None where it may be loaded."""
        if all(known != path for known, _, _ in self._crashes):
            return None  # its file is not looked at: there can be thousands
        crashes = self._crashes.get(_identity(path))
        if crashes is None or len(crashes) < CRASHES:
            return None
        free_in = crashes[0][0] + WINDOW - self._clock()
        if free_in <= 0:
            return None
        return (
            f"it crashed {CRASHES} times within {WINDOW / 60:.0f} minutes, at last because "
            f"{crashes[-1][1]}; it is loaded again in {free_in / 60:.0f} minutes, or when its file changes"
        )


def _identity(path: Path) -> _File:
    with contextlib.suppress(OSError):
        facts = path.stat()
        return path, facts.st_size, facts.st_mtime_ns
    return path, -1, -1
