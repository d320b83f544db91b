"""The panel's one thread: it carries out requests, so that the kernel's own never waits for a server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from . import messages as m
from .errands import Errand, errand_of, problem_of
from .reach import Transport


@dataclass(slots=True)
class _Task:
    number: int
    lane: str
    errand: Errand
    steps: Iterator[m.Event | None] | None = None


class Work:
    """Several errands go on by turns, a step each: the next words of an answer, or one short question. A
    step blocks until the server has said something, which while an answer is awaited it does every second.

    `transport` is called for each errand, in the thread; `heard` is told everything, in the thread.
    Requests, `tick_at` and `close` come from any thread. Without `start` it has no thread, and whoever
    made it calls `step`.
    """

    def __init__(
        self,
        transport: Callable[[], Transport],
        heard: Callable[[m.Event], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        start: bool = True,
    ) -> None:
        self._transport, self._heard, self._clock = transport, heard, clock
        self._changed = threading.Condition()
        self._new: deque[m.Request] = deque()
        self._closed = False
        self._tick: float | None = None
        self._waiting: deque[_Task] = deque()
        """Not begun yet, as another of the same lane has not ended."""
        self._running: deque[_Task] = deque()
        self.thread: threading.Thread | None = None
        if start:
            self.thread = threading.Thread(target=self._run, name="shimmy-panel", daemon=True)
            self.thread.start()

    def ask(self, requests: Iterable[m.Request]) -> None:
        """Carry these out. After `close` nothing is."""
        with self._changed:
            self._new += requests
            self._changed.notify()

    def tick_at(self, when: float | None) -> None:
        """Say `Tick` then, once; None: not at all."""
        with self._changed:
            self._tick = when
            self._changed.notify()

    def close(self) -> None:
        """Cancel everything and end the thread, once the step in progress has returned; it is not waited
        for. Closing twice is fine.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while self.step():
            pass

    def step(self, *, wait: bool = True) -> bool:
        """One turn; with `wait` until there is something to do. False once it is closed."""
        new, tick, closed = self._next(wait=wait)
        if closed:
            for task in (*self._running, *self._waiting):
                self._leave(task)
            self._running.clear()
            self._waiting.clear()
            return False
        for request in new:
            self._take(request)
        if tick:
            self._heard(m.Tick())
        self._begin()
        if self._running:
            self._go_on(self._running.popleft())
        return True

    def _next(self, *, wait: bool) -> tuple[list[m.Request], bool, bool]:
        """What has come, whether it is time for a tick, and whether all is over."""
        with self._changed:
            while wait and not (self._new or self._running or self._closed or self._due()):
                left = None if self._tick is None else max(0.0, self._tick - self._clock())
                self._changed.wait(left)
            new, tick = list(self._new), self._due()
            self._new.clear()
            if tick:
                self._tick = None
            return new, tick, self._closed

    def _due(self) -> bool:
        return self._tick is not None and self._clock() >= self._tick

    def _take(self, request: m.Request) -> None:
        if not isinstance(request, m.Cancel):
            lane = request.lane if isinstance(request, m.Generate) else ""
            self._waiting.append(_Task(request.number, lane, errand_of(request, self._clock)))
            return
        for tasks in (self._running, self._waiting):
            for task in [one for one in tasks if one.number == request.number]:
                tasks.remove(task)
                self._leave(task)
                self._heard(task.errand.stopped())

    def _begin(self) -> None:
        """Those for whom nobody of the same lane is in the way."""
        busy = {task.lane for task in self._running}
        for task in list(self._waiting):
            if not task.lane or task.lane not in busy:
                self._waiting.remove(task)
                self._running.append(task)
                busy.add(task.lane)

    def _go_on(self, task: _Task) -> None:
        """A step of it. However it ends, it is answered."""
        try:
            if task.steps is None:
                task.steps = task.errand.steps(self._transport())
            event = next(task.steps)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  people see it, with its code
            self._heard(m.Refused(task.number, problem_of(error)))
            return
        self._running.append(task)
        if event is not None:
            self._heard(event)

    def _leave(self, task: _Task) -> None:
        """Closing a generator leaves its blocks, which cancels what the server does for it."""
        close = getattr(task.steps, "close", None)
        if close is None:
            return
        try:
            close()
        except Exception as error:  # noqa: BLE001  people see it, with its code
            self._heard(m.Defect(problem_of(error)))
