"""From the panel's thread to where widgets may be touched.

A kernel handles what front ends say on the event loop of its main thread, or, with ipykernel 7 and comms over
subshells, on that of another thread. Widgets are changed on the loop on which a person was last heard, so that
the two do not meet in the middle of a message, and what a busy cell holds up, it holds up for both. Where there
is no such loop (a plain interpreter), or it has ended, the panel's own thread does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from . import messages as m


class Post:
    """`deliver` is given events in order; whoever calls it, one thread does so at a time."""

    def __init__(self, deliver: Callable[[list[m.Event]], None]) -> None:
        self._deliver = deliver
        self._events: deque[m.Event] = deque()
        self._lock = threading.Lock()
        self._delivering = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._called: asyncio.AbstractEventLoop | None = None
        """The loop that is going to deliver."""

    def here(self) -> None:
        """From now on on this thread's loop, if it has one."""
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            with self._lock:
                moved, self._loop = self._loop is not loop, loop
                waiting = bool(self._events)
            if moved and waiting:
                self._call()

    def put(self, event: m.Event) -> None:
        """From any thread."""
        with self._lock:
            self._events.append(event)
            loop = self._called
            # One that has stopped meanwhile delivers nothing any more.
            called = loop is not None and loop is self._loop and loop.is_running()
        if not called:
            self._call()

    def _call(self) -> None:
        with self._lock:
            loop = self._loop
            self._called = loop
        if loop is not None and loop.is_running():
            with contextlib.suppress(RuntimeError):  # it has been closed just now
                loop.call_soon_threadsafe(self.flush)
                return
        self.flush()

    def flush(self) -> None:
        """Deliver what there is."""
        with self._delivering:
            with self._lock:
                self._called = None
                events = list(self._events)
                self._events.clear()
            if events:
                self._deliver(events)
