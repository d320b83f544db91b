"""The event loop in the background, and streams that are read outside of it.

Cases: a result, an error, context variables; an interrupt cancels and waits for the end, also one that wakes nobody; one that does
not end is not waited for for ever; from inside the loop; awaited from another loop, and from the same;
cancelled there; closing: twice, with work under way, what comes last, beginning anew; after a fork; a
process that ends with work under way; a stream: in order, lazy, an error after pieces, closed early,
before it is read, twice, let go of, left, interrupted; result too early; the same for `async for`.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import Cancelled, InvalidValue, QueueFull
from shimmy_jupyter.notebook import portal as module
from shimmy_jupyter.notebook.portal import AsyncStream, Portal, Stream, Work

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal()
    yield made
    made.close()
    assert made._thread is None


class Waits:
    """Work that goes on until it is cancelled, and says so."""

    def __init__(self, on_start: Callable[[], None] = lambda: None) -> None:
        self.started, self.cancelled = threading.Event(), threading.Event()
        self._on_start = on_start

    async def __call__(self) -> None:
        self.started.set()
        self._on_start()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            # Not at once: whoever cancels waits for this.
            for _ in range(100):
                await asyncio.sleep(0)
            self.cancelled.set()
            raise


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Whoever starts the tests in the background of a shell has SIGINT ignored, also in a child."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    """As Jupyter's button does."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


class TestRun:
    def test_a_result(self, portal: Portal) -> None:
        async def work() -> tuple[str, int]:
            return VARIABLE.get(), threading.get_ident()

        VARIABLE.set("mine")
        said, thread = portal.run(work)
        assert said == "mine"
        assert thread != threading.get_ident()
        assert portal.run(work) == ("mine", thread)

    def test_an_error(self, portal: Portal) -> None:
        async def work() -> None:
            raise QueueFull("no")

        for _ in range(2):
            with pytest.raises(QueueFull):
                portal.run(work)

    def test_what_cannot_even_be_made(self, portal: Portal) -> None:
        def make() -> Any:
            raise TypeError("no such keyword")

        with pytest.raises(TypeError, match="no such keyword"):
            portal.run(make)

    def test_an_interrupt_cancels_and_waits_for_the_end(self, portal: Portal) -> None:
        work = Waits(interrupt)
        with pytest.raises(KeyboardInterrupt):
            portal.run(work)
        assert work.cancelled.is_set()

    def test_an_interrupt_that_wakes_nobody_is_heard(self, portal: Portal) -> None:
        """Another thread's, as one is that comes just before the main thread falls asleep."""
        work = Waits(lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            portal.run(work)
        assert work.cancelled.is_set()

    def test_what_does_not_end_is_not_waited_for(
        self, portal: Portal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_PATIENCE", 0.01)
        gate = asyncio.Event()

        async def stubborn() -> None:
            interrupt()
            try:
                await asyncio.Event().wait()
            finally:
                await gate.wait()

        with pytest.raises(KeyboardInterrupt):
            portal.run(stubborn)

        async def let_go() -> None:
            gate.set()

        portal.run(let_go)

    def test_from_inside_it_would_wait_for_itself(self, portal: Portal) -> None:
        async def nothing() -> None: ...

        async def inside() -> None:
            portal.run(nothing)

        with pytest.raises(InvalidValue, match="twin"):
            portal.run(inside)

    def test_many_threads_share_one_loop(self, portal: Portal) -> None:
        found: set[int] = set()

        async def work() -> None:
            found.add(threading.get_ident())

        threads = [threading.Thread(target=portal.run, args=(work,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 1

    def test_an_interrupt_before_it_has_begun(self, portal: Portal) -> None:
        """Between any two lines: what was to begin never does, or is cancelled."""

        async def nothing() -> None: ...

        portal.run(nothing)
        work, early = Waits(), Work(Waits())
        loop = portal._running()
        early._loop = loop
        early.stop()
        assert isinstance(early.future.exception(0), Cancelled)
        early.begin(loop)
        late = Work(work)
        late.begin(loop)
        late.stop()
        portal.run(nothing)
        assert work.cancelled.is_set() or not work.started.is_set()
        assert early._task is None
        Work(work).stop()


class TestAwaited:
    async def test_a_result(self, portal: Portal) -> None:
        async def work() -> tuple[str, int]:
            return VARIABLE.get(), threading.get_ident()

        VARIABLE.set("awaited")
        said, thread = await portal.arun(work)
        assert said == "awaited"
        assert thread != threading.get_ident()

    async def test_an_error(self, portal: Portal) -> None:
        async def work() -> None:
            raise QueueFull("no")

        with pytest.raises(QueueFull):
            await portal.arun(work)

    async def test_cancelling_goes_through(self, portal: Portal) -> None:
        work = Waits()
        task = asyncio.create_task(portal.arun(work))
        await asyncio.to_thread(work.started.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.cancelled.is_set()

    async def test_a_timeout_goes_through(self, portal: Portal) -> None:
        work = Waits()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(portal.arun(work), 0.05)
        assert work.cancelled.is_set() or not work.started.is_set()

    async def test_an_interrupt_is_noticed_in_a_quiet_loop(self, portal: Portal) -> None:
        """As ipykernel sees to it: from a handler of Python's, which does not wake up the loop."""
        loop, late = asyncio.get_running_loop(), []
        work = Waits(interrupt)
        task = asyncio.create_task(portal.arun(work))
        before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon(task.cancel))
        timer = loop.call_later(10, late.append, "woken up by chance")
        try:
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            timer.cancel()
            signal.signal(signal.SIGINT, before)
        assert late == []
        assert work.cancelled.is_set()

    async def test_in_its_own_loop(self, portal: Portal) -> None:
        async def inner() -> int:
            return threading.get_ident()

        async def outer() -> bool:
            return await portal.arun(inner) == threading.get_ident()

        assert await portal.arun(outer)


class TestClosing:
    def test_twice_and_before_anything(self) -> None:
        portal = Portal()
        portal.close()
        portal.run(asyncio.tasks.sleep.__get__(0))  # any coroutine function
        portal.close()
        portal.close()

    def test_with_work_under_way(self) -> None:
        portal, work = Portal(), Waits()
        failed: list[BaseException] = []

        def waiting() -> None:
            try:
                portal.run(work)
            except Cancelled as error:
                failed.append(error)

        thread = threading.Thread(target=waiting)
        thread.start()
        work.started.wait(5)
        portal.close()
        thread.join(5)
        assert len(failed) == 1
        assert work.cancelled.is_set()

    def test_what_comes_last_and_beginning_anew(self) -> None:
        portal = Portal()
        loops: list[asyncio.AbstractEventLoop] = []

        async def last() -> None:
            loops.append(asyncio.get_running_loop())

        async def loop() -> asyncio.AbstractEventLoop:
            return asyncio.get_running_loop()

        portal.last.append(last)
        first = portal.run(loop)
        portal.close()
        assert first.is_closed()
        second = portal.run(loop)
        assert second is not first
        portal.close()
        assert loops == [first, second]


PRELUDE = """
import asyncio, os, sys
from shimmy_jupyter.notebook.portal import Portal, Stream, Work
portal = Portal()
async def number(): return 7
async def forever():
    try: await asyncio.Event().wait()
    finally: print("cancelled", flush=True)
"""


def script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


class TestProcesses:
    def test_after_a_fork_it_is_made_anew(self) -> None:
        done = script(
            """
assert portal.run(number) == 7
child = os.fork()
if not child:
    os._exit(portal.run(number) + (portal._left != []))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), portal.run(number))
"""
        )
        assert (done.stdout, done.stderr) == ("8 7\n", "")

    def test_a_lock_that_the_fork_has_copied(self) -> None:
        done = script(
            """
portal._lock.acquire()
child = os.fork()
if not child:
    os._exit(portal.run(number))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        )
        assert (done.stdout, done.stderr) == ("7\n", "")

    @pytest.mark.parametrize("way", ["", "sys.exit(0)", "raise KeyboardInterrupt", "os._exit(0)"])
    def test_a_process_ends_with_work_under_way(self, way: str) -> None:
        done = script(f"portal.begin(Work(forever))\nassert portal.run(number) == 7\n{way}\n")
        orderly = way != "os._exit(0)"
        assert done.stdout == ("cancelled\n" if orderly else "")
        assert "KeyboardInterrupt" in done.stderr if "raise" in way else not done.stderr

    def test_a_process_ends_with_a_stream_half_read(self) -> None:
        done = script(
            """
class Source:
    result = None
    async def pieces(self):
        try:
            while True:
                yield "x"
                await asyncio.sleep(0)
        finally:
            print("left", flush=True)
stream = Stream(portal, Source())
print(next(stream))
"""
        )
        assert (done.stdout, done.stderr) == ("x\nleft\n", "")


class Told:
    """A source that yields what it is told to, then fails, waits or ends. `closed` when it has."""

    def __init__(self, *texts: str, error: Exception | None = None, waits: bool = False) -> None:
        self.texts, self.error, self.waits = texts, error, waits
        self.began = 0
        self.closed = threading.Event()
        self.waiting = threading.Event()
        self.result = "".join(texts)

    @staticmethod
    async def wait_for_ever() -> list[str]:
        await asyncio.Event().wait()
        return []

    async def pieces(self) -> AsyncIterator[str]:
        self.began += 1
        try:
            for text in self.texts:
                yield text
                await asyncio.sleep(0)
            if self.waits:
                self.waiting.set()
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()


class TestStream:
    @given(st.lists(st.text(max_size=3), max_size=20))
    def test_in_order(self, texts: list[str]) -> None:
        portal = Portal()
        try:
            stream = Stream(portal, Told(*texts))
            assert list(stream) == texts
            assert list(stream) == []
            assert stream.result == "".join(texts)
        finally:
            portal.close()

    def test_nothing_is_asked_before_it_is_read(self, portal: Portal) -> None:
        told = Told("a")
        stream = Stream(portal, told)
        assert portal._thread is None
        stream.close()
        assert list(stream) == []
        assert told.began == 0

    def test_an_error_comes_after_the_pieces_before_it(self, portal: Portal) -> None:
        stream = Stream(portal, Told("a", "b", error=QueueFull("no")))
        got: list[str] = []
        with pytest.raises(QueueFull):
            got.extend(stream)
        assert got == ["a", "b"]
        assert list(stream) == []

    def test_closing_it_early_cancels(self, portal: Portal) -> None:
        told = Told("a", waits=True)
        stream = Stream(portal, told)
        assert next(stream) == "a"
        stream.close()
        assert told.closed.is_set()
        stream.close()
        assert list(stream) == []

    def test_leaving_its_block_cancels(self, portal: Portal) -> None:
        told = Told("a", waits=True)
        with Stream(portal, told) as stream:
            assert next(stream) == "a"
        assert told.closed.is_set()

    def test_letting_go_of_it_cancels(self, portal: Portal) -> None:
        told = Told("a", waits=True)
        for _ in Stream(portal, told):
            break
        gc.collect()
        assert told.closed.wait(5)

    def test_an_interrupt_cancels(self, portal: Portal) -> None:
        told = Told("a", waits=True)
        stream = Stream(portal, told)
        assert next(stream) == "a"

        told.waiting.wait()

        async def take() -> list[str]:
            interrupt()
            return await Told.wait_for_ever()

        stream._feed.take = take  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert told.closed.is_set()
        assert list(stream) == []

    def test_a_portal_that_closes_is_no_end(self, portal: Portal) -> None:
        stream = Stream(portal, Told("a", waits=True))
        assert next(stream) == "a"
        portal.close()
        with pytest.raises(Cancelled):
            portal.run(stream._feed.take)

    def test_a_slow_reader_holds_up_nothing(self, portal: Portal) -> None:
        told = Told(*"abcdef")
        stream = Stream(portal, told)
        assert next(stream) == "a"
        assert told.closed.wait(5)
        assert list(stream) == list("bcdef")


class TestAsyncStream:
    async def test_in_order(self, portal: Portal) -> None:
        async with AsyncStream(portal, Told("a", "", "b")) as stream:
            assert [piece async for piece in stream] == ["a", "", "b"]
        assert stream.result == "ab"

    async def test_an_error(self, portal: Portal) -> None:
        stream = AsyncStream(portal, Told("a", error=QueueFull("no")))
        assert await anext(stream) == "a"
        with pytest.raises(QueueFull):
            await anext(stream)
        assert [piece async for piece in stream] == []

    async def test_closing_it_early_cancels(self, portal: Portal) -> None:
        told = Told("a", waits=True)
        async with AsyncStream(portal, told) as stream:
            assert await anext(stream) == "a"
        assert told.closed.is_set()
        await stream.aclose()

    async def test_cancelling_its_reader_cancels(self, portal: Portal) -> None:
        told = Told("a", waits=True)
        stream = AsyncStream(portal, told)
        assert await anext(stream) == "a"
        task = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(told.waiting.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert told.closed.is_set()

    async def test_letting_go_of_it_cancels(self, portal: Portal) -> None:
        told = Told("a", waits=True)
        async for _ in AsyncStream(portal, told):
            break
        gc.collect()
        assert await asyncio.to_thread(told.closed.wait, 5)


def test_it_is_a_daemon(portal: Portal) -> None:
    async def work() -> bool:
        return threading.current_thread().daemon

    assert portal.run(work)
    assert os.getpid() == portal._pid
