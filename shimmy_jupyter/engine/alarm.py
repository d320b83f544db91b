"""Calls something when a moment has passed, unless it is disarmed before. Cheap to arm each step.

Its thread is not told of each arming: it sleeps until the moment that it knew last, and looks again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_IDLE = 1.0
"""Seconds without an alarm after which the thread sleeps until it is told."""


class Alarm:
    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._changed = threading.Condition()
        self._due: float | None = None
        self._wakes = float("inf")
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float) -> None:
        """Ring once in so many seconds; replaces an alarm that is armed."""
        with self._changed:
            if self._closed:
                return
            self._due = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shimmy-alarm", daemon=True)
                self._thread.start()
            elif self._due < self._wakes:
                self._changed.notify()

    def disarm(self) -> None:
        """The alarm does not ring any more, once this has returned."""
        with self._changed:
            self._due = None

    def close(self) -> None:
        with self._changed:
            self._closed, self._due = True, None
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with self._changed:
            idle_since = time.monotonic()
            while not self._closed:
                now = time.monotonic()
                if self._due is not None:
                    idle_since = now
                    if self._due <= now:
                        self._due = None
                        self._ring()
                        continue
                    timeout: float | None = self._due - now
                else:
                    timeout = _IDLE if now - idle_since < _IDLE else None
                self._wakes = float("inf") if timeout is None else now + timeout
                self._changed.wait(timeout)
