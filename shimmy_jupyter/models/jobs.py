"""Long work that a person can look at, wait for and stop: loading, hashing, trying out, downloading."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import Cancelled, InternalError, NotFound, QueueFull, ShimmyError, ShuttingDown
from ..types import Principal

log = logging.getLogger("shimmy_jupyter.models")

MOST_RUNNING = 16
"""Of one user."""
KEEP = 600.0
"""Seconds for which a job that has ended can be asked for."""
_MOST_KEPT = 64
"""Of one user, those that ended last."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far work is, in words, and in `unit` where something is counted; `total` is None where
    nobody knows it.
    """

    message: str
    done: int = 0
    total: int | None = None
    unit: str = ""


Report = Callable[[Progress], None]
"""For any thread."""
Stopped = Callable[[], bool]
"""Whether somebody has asked for the work to end."""


def unheard(_progress: Progress) -> None:
    """A report that nobody listens to."""


async def in_thread(work: Callable[[Stopped], T]) -> T:
    """What blocking work returns, in a thread of its own: the loop's are few, and a download can take
    hours. Who is cancelled meanwhile waits until the work has noticed.
    """
    loop, stop = asyncio.get_running_loop(), threading.Event()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work(stop.is_set)
        except BaseException as error:  # noqa: BLE001  raised again where it is waited for
            failure = error
        # A loop that has been closed meanwhile has nobody who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)
        del failure  # its traceback has this frame

    threading.Thread(target=run, name="shimmy-work", daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stop.set()
        await settled(done)
        if not done.cancelled():
            done.exception()
        raise


async def settled(future: asyncio.Future[Any]) -> bool:
    """Waits until it is done, whoever cancels meanwhile, and however often. Whether anybody has: then the
    caller raises `CancelledError`.
    """
    stopped = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            stopped = True
    return stopped


def asked_to_stop() -> bool:
    """Whether the current task has been cancelled."""
    return (task := asyncio.current_task()) is not None and task.cancelling() > 0


class Job:
    """`state` is running, done, failed or cancelled; then `result` or `error` is there."""

    def __init__(self, kind: str, subject: str, owner: str, now: float) -> None:
        self.id = uuid.uuid4().hex
        self.kind, self.subject, self.owner = kind, subject, owner
        self.state = "running"
        self.progress = Progress("starting")
        self.result: Mapping[str, Any] | None = None
        self.error: ShimmyError | None = None
        self.ended: float | None = None
        self.began = now
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._waiting: Progress | None = None
        self._lock = threading.Lock()

    def report(self, progress: Progress) -> None:
        """For any thread; what comes faster than the loop turns is passed over."""
        with self._lock:
            scheduled, self._waiting = self._waiting is not None, progress
        if not scheduled:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._heed)

    def _heed(self) -> None:
        with self._lock:
            progress, self._waiting = self._waiting, None
        if progress is not None and self.state == "running":
            self.progress = progress
            self._announce()

    def end(self, state: str, now: float) -> None:
        self._heed()
        self.state, self.ended = state, now
        self.progress = replace(self.progress, message=state)
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def looks(self, pause: float = 0.1, most: float = 15.0) -> AsyncIterator[dict[str, Any]]:
        """As it is now, then after each change, the end included, and after `most` seconds without one;
        `pause` seconds between two.
        """
        while True:
            changed = self._changed
            yield self.to_json()
            if self.state != "running":
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(most):
                    await changed.wait()
            if self.state == "running":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._ended()

    async def _ended(self) -> None:
        while self.state == "running":
            await self._changed.wait()

    async def wait(self) -> None:
        """Until it has ended, however it does."""
        await self._ended()

    def to_json(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "id": self.id,
            "kind": self.kind,
            "model": self.subject,
            "state": self.state,
            "message": progress.message,
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
            "error": self.error.to_json(self.id)["error"] if self.error is not None else None,
            "result": self.result,
        }


def _stopped() -> Cancelled:
    return Cancelled("it was stopped")


class Jobs:
    """Each user's own; an administrator sees all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.watchers: list[Callable[[Job], None]] = []
        """Hear of every job that has ended, on the event loop."""
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def start(
        self,
        kind: str,
        subject: str,
        principal: Principal,
        work: Callable[[Report], Awaitable[Mapping[str, Any] | None]],
    ) -> Job:
        """Raises `QueueFull` where so many of the user's are running, and `ShuttingDown`."""
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        self._forget()
        running = [j for j in self._jobs.values() if j.state == "running"]
        if sum(job.owner == principal.name for job in running) >= MOST_RUNNING:
            raise QueueFull(f"{MOST_RUNNING} jobs of yours are running already, the most")
        job = Job(kind, subject, principal.name, self._clock())
        self._jobs[job.id] = job
        task = self._tasks[job.id] = asyncio.create_task(self._run(job, work))
        task.add_done_callback(lambda _: self._settle(job))
        return job

    def _settle(self, job: Job) -> None:
        del self._tasks[job.id]
        if job.state == "running":  # stopped before it began
            job.error = _stopped()
            self._end(job, "cancelled")

    async def _run(
        self, job: Job, work: Callable[[Report], Awaitable[Mapping[str, Any] | None]]
    ) -> None:
        state = "failed"
        try:
            job.result = await work(job.report)
            state = "done"
        except (asyncio.CancelledError, Cancelled):
            job.error = _stopped()
            state = "cancelled"
        except ShimmyError as error:
            job.error = error
        except Exception as defect:
            log.exception("a job failed in a way that nobody foresaw")
            job.error = InternalError(f"{type(defect).__name__}; the server's log says more")
        self._end(job, state)

    def _end(self, job: Job, state: str) -> None:
        job.end(state, self._clock())
        for watcher in self.watchers:
            try:
                watcher(job)
            except Exception:  # who listens must not keep a job from having ended
                log.exception("a job's end was not heard of by all")

    def get(self, id: str, principal: Principal) -> Job:
        """Raises `NotFound`, also for another user's."""
        self._forget()
        job = self._jobs.get(id)
        if job is None or not (principal.admin or job.owner == principal.name):
            raise NotFound(f"there is no job {id[:40]!r}, or not any more")
        return job

    def of(self, principal: Principal) -> list[Job]:
        """The oldest first."""
        self._forget()
        return [j for j in self._jobs.values() if principal.admin or j.owner == principal.name]

    def cancel(self, id: str, principal: Principal) -> Job:
        """Ask it to end, if it is running; it may take a moment. Raises `NotFound`."""
        job = self.get(id, principal)
        if task := self._tasks.get(id):
            task.cancel()
        return job

    def _forget(self) -> None:
        ended = [(job.ended, job) for job in self._jobs.values() if job.ended is not None]
        counts: Counter[str] = Counter()
        for when, job in sorted(ended, key=lambda one: one[0], reverse=True):
            counts[job.owner] += 1
            if counts[job.owner] > _MOST_KEPT or self._clock() - when > KEEP:
                del self._jobs[job.id]

    @property
    def active(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """End them all, and wait until they have."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
