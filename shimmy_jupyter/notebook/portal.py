"""One event loop in the background, for everything that a kernel asks: functions that wait and
functions that are awaited run the same coroutines there.

`anyio.from_thread.start_blocking_portal` is not used: it is a generator whose end joins its thread,
and an interpreter that finalizes it after its threads have stopped would hang.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from typing import Any, Generic, Protocol, Self, TypeVar

from ..errors import Cancelled, InvalidValue

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_PATIENCE = 5.0
"""Seconds for which what was cancelled may take to end."""
_TICK = 0.2
"""Seconds until an interrupt is noticed."""


class Work(Generic[T]):
    """A task of the background's loop, seen from outside. `future` is done when the task has really
    ended, also where it was cancelled. It is there before it begins, so that an interrupt at any
    moment finds what to cancel.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.future: Future[T] = Future()
        self._make = make
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """With the context variables of whoever calls this."""
        self._loop = loop
        loop.call_soon_threadsafe(self._begin, loop)

    def cancel(self) -> None:
        """Does not wait. Fine where it has not begun, or has ended, or its loop has."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel)

    def stop(self) -> None:
        """Cancel it, and wait for its end."""
        self.cancel()
        if self._loop is not None:
            with contextlib.suppress(TimeoutError):
                self.future.exception(_PATIENCE)

    async def astop(self) -> None:
        """The same, without holding up an event loop."""
        self.cancel()
        if self._loop is not None:
            with contextlib.suppress(Exception):  # whoever waited for its result is gone
                async with asyncio.timeout(_PATIENCE):
                    await asyncio.shield(asyncio.wrap_future(self.future))

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.future.done():
            return
        self._task = loop.create_task(self._whole())
        self._task.add_done_callback(self._end)

    async def _whole(self) -> T:
        # What cannot even be made is an error of the task's, too.
        return await self._make()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif not self.future.done():
            self.future.set_exception(Cancelled("this has been cancelled"))

    def _end(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.future.set_exception(Cancelled("this has been cancelled"))
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())


class Portal:
    """Its thread begins when it is first needed, and anew in a process that was forked off. It is a
    daemon: whatever it does, the process can end. What is in `last` is awaited before the loop ends.
    """

    def __init__(self) -> None:
        self.last: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._left: list[asyncio.AbstractEventLoop] = []

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for a coroutine's result. Interrupting this cancels it, and waits for its end."""
        work = Work(make)
        try:
            self.begin(work)
            # An interrupt that comes just before this thread falls asleep does not wake it.
            while not work.future.done():
                wait([work.future], timeout=_TICK)
            return work.future.result()
        except BaseException:
            if not work.future.done():
                work.stop()
            raise

    async def arun(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await a coroutine's result in any event loop. Cancelling this cancels it, and waits for its
        end.
        """
        if asyncio.get_running_loop() is self._loop:
            return await make()
        work = Work(make)
        self.begin(work)
        waiter = asyncio.wrap_future(work.future)
        waiter.add_done_callback(_seen)
        try:
            # An interrupt of a cell that awaits is seen by ipykernel when its loop next wakes up.
            while not waiter.done():
                await asyncio.wait([waiter], timeout=_TICK)
            return waiter.result()
        except asyncio.CancelledError:
            await work.astop()
            raise

    def begin(self, work: Work[Any]) -> None:
        """Does not wait for it. Raises `InvalidValue` in the background's own thread."""
        loop = self._running()
        if self._thread is threading.current_thread():
            raise InvalidValue("this would wait for itself: await its twin, whose name has an `a`")
        work.begin(loop)

    def close(self) -> None:
        """Cancel what is running, and end the thread. Closing twice is fine; a later call begins anew."""
        if self._pid != os.getpid():
            return
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        atexit.unregister(self.close)
        ending = asyncio.run_coroutine_threadsafe(self._end(), loop)
        with contextlib.suppress(TimeoutError):
            ending.result(_PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_PATIENCE)
        if not thread.is_alive():
            loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(last() for last in self.last), return_exceptions=True)
        loop = asyncio.get_running_loop()
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._pid != os.getpid():
            # The fork has copied a loop without its thread, sockets that are the parent's, and maybe a
            # lock that is held: none of them is touched, nor let go of.
            self._left += [self._loop] if self._loop is not None else []
            self._pid, self._lock, self._loop = os.getpid(), threading.Lock(), None
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="shimmy-requests", daemon=True
                )
                self._thread.start()
                # A daemon still runs then: what is open is closed in order, the requests on the server too.
                atexit.register(self.close)
            return self._loop


def _seen(future: asyncio.Future[Any]) -> None:
    """Its error is no surprise, where whoever waited for it is gone."""
    if not future.cancelled():
        future.exception()


class Source(Protocol[R_co]):
    """A text that is being made, in the background's loop; and afterwards what it has come to."""

    def pieces(self) -> AsyncIterator[str]: ...

    @property
    def result(self) -> R_co: ...


class _Feed(Generic[R]):
    """What a source yields, for a reader outside of its loop. The answer's own length is its bound: a
    slow reader does not keep the engine busy.
    """

    def __init__(self, portal: Portal, source: Source[R]) -> None:
        self._portal, self.source = portal, source
        self._pieces: list[str] = []
        self._more = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None
        self.work = Work(self._pump)
        self._begun = False

    def begin(self) -> None:
        """When it is first read."""
        if not self._begun:
            self._begun = True
            self._portal.begin(self.work)

    async def take(self) -> list[str]:
        """At least a piece; nothing when it has ended. Raises, once, what ended it."""
        while not self._pieces and not self._ended:
            self._more.clear()
            await self._more.wait()
        if not self._pieces and self._error is not None:
            error, self._error = self._error, None
            raise error
        taken, self._pieces = self._pieces, []
        return taken

    async def _pump(self) -> None:
        try:
            async for piece in self.source.pieces():
                self._pieces.append(piece)
                self._more.set()
        except asyncio.CancelledError:
            self._error = Cancelled("this has been cancelled")
            raise
        except Exception as error:  # noqa: BLE001  its reader raises it
            self._error = error
        finally:
            self._ended = True
            self._more.set()


class _Reading(Generic[R]):
    """What both kinds of streams have. A stream that nobody holds any more is cancelled."""

    def __init__(self, portal: Portal, source: Source[R]) -> None:
        self._portal = portal
        self._feed = _Feed(portal, source)
        self._ready: deque[str] = deque()
        self._over = False

    @property
    def result(self) -> R:
        """The whole answer. Raises `InvalidValue` as long as it is not."""
        return self._feed.source.result

    def _next(self) -> str | None:
        """A piece that has come already."""
        return self._ready.popleft() if self._ready else None

    def __del__(self) -> None:
        self._feed.work.cancel()


class Stream(_Reading[R], Iterator[str]):
    """Pieces of text as they are made. Asks when it is first read; closing it, or leaving a `with` block,
    cancels the request.
    """

    def __next__(self) -> str:
        if not self._ready and not self._over:
            try:
                self._feed.begin()
                self._ready.extend(self._portal.run(self._feed.take))
            except BaseException:
                self.close()
                raise
            self._over = not self._ready
        if (piece := self._next()) is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Closing twice is fine."""
        self._over = True
        self._ready.clear()
        self._feed.work.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncStream(_Reading[R], AsyncIterator[str]):
    """The same, for `async for` and `async with`."""

    async def __anext__(self) -> str:
        if not self._ready and not self._over:
            try:
                self._feed.begin()
                self._ready.extend(await self._portal.arun(self._feed.take))
            except BaseException:
                await self.aclose()
                raise
            self._over = not self._ready
        if (piece := self._next()) is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Closing twice is fine."""
        self._over = True
        self._ready.clear()
        await self._feed.work.astop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
