"""The engine's thread and its streams, on the scripted backend.

Cases: a slow reader pauses its own sequence and goes on, at every capacity; the reader that catches
up just as it is paused; a closed reader; what breaks in each backend call, at any time, ends every
stream with an error and the thread; a submission that meets the end; a load that fails; a caller
that stops waiting for a load; a loop that is gone; what is done while nobody asks for anything.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from dataclasses import replace
from typing import Any

import pytest

from shimmy_jupyter.core.messages import Emit, SlotChange, Step
from shimmy_jupyter.engine import worker
from shimmy_jupyter.engine.backend import LoadSpec, Sharing, StepResult
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.engine.stream import TokenStream
from shimmy_jupyter.engine.worker import Engine
from shimmy_jupyter.errors import EngineCrashed, ModelLoadFailed, ShimmyError, ShuttingDown
from shimmy_jupyter.types import Failure, FinishReason, ModelFacts, Sampling

PROMPT = tuple(b">x")
SPEC = LoadSpec(path="", sequences=4)


def words(count: int) -> Any:
    return lambda _: [f"w{i} " for i in range(count)]


async def started(backend: FakeBackend, **options: Any) -> Engine:
    engine = Engine(backend, SPEC, **options)
    await engine.start()
    return engine


def submit(engine: Engine, max_tokens: int = 1000) -> TokenStream:
    return engine.submit("local", PROMPT, max_tokens, Sampling())


async def text(stream: TokenStream) -> str:
    return "".join([piece async for piece in stream])


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
async def test_a_slow_reader_gets_everything(capacity: int) -> None:
    engine = await started(FakeBackend(words(200)), stream_capacity=capacity)
    streams = [submit(engine) for _ in range(3)]
    found = await asyncio.gather(*map(text, streams))
    assert found == ["".join(f"w{i} " for i in range(200))] * 3
    assert all(s.ended and s.ended.reason is FinishReason.STOP for s in streams)
    # With room for several pieces a reader may keep up.
    assert capacity > 1 or all(s.statistics().pauses for s in streams)
    await engine.stop()


async def test_a_stream_that_nobody_reads_stays_bounded_and_stops_nobody() -> None:
    backend = FakeBackend(words(500))
    engine = await started(backend, stream_capacity=8)
    unread, read = submit(engine), submit(engine)
    assert len((await text(read)).split()) == 500
    assert unread.statistics().unread <= 9  # one more may be on its way when it is paused
    unread.close()
    unread.close()
    assert unread.statistics().closed
    await engine.stop()
    assert engine.active == 0


async def test_what_is_left_is_copied_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the thread sleeps until somebody does."""
    monkeypatch.setattr(worker, "_IDLE_SECONDS", 0.001)
    waits: list[float | None] = []

    class Inbox(queue.SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            waits.append(timeout)
            return super().get(block, timeout)

    backend = FakeBackend(words(2))
    engine = Engine(backend, SPEC, sharing=Sharing(saved_bytes=1 << 30))
    engine._inbox = Inbox()
    await engine.start()
    for _ in range(2):
        prompt = tuple(b">" + b"x" * 50)
        await text(engine.submit("local", prompt, 10, Sampling()))
        while not (engine._tidy and waits[-1] is None):
            await asyncio.sleep(0)
    saved = engine.scheduler.line.room.prefixes.saved
    assert [entry.size for entry in saved.values()] == [53]
    assert set(backend.saved) == set(saved)
    await engine.stop()


async def test_what_a_backend_has_deferred_is_done_while_nobody_asks() -> None:
    class Deferring(FakeBackend):
        def __init__(self) -> None:
            super().__init__(words(2))
            self.deferred: list[SlotChange] = []

        def apply(self, change: SlotChange) -> None:
            self.deferred.append(change)

        def flush(self) -> tuple[int, ...]:
            deferred, self.deferred = self.deferred, []
            for change in deferred:
                super().apply(change)
            return ()

        def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
            self.flush()
            return super().step(step, threads, limit)

    backend = Deferring()
    engine = await started(backend)
    await text(submit(engine))
    async with asyncio.timeout(10):
        while backend.open_slots:
            await asyncio.sleep(0)
    await engine.stop()


async def test_giving_up_amid_one_s_prompt_is_not_free() -> None:
    """Nobody may keep others out by hanging up in each of its steps."""
    backend = FakeBackend(words(5), gate=threading.Semaphore(0))
    engine = Engine(backend, LoadSpec(path="", sequences=4, context_size=4096))
    await engine.start()
    counters = engine.scheduler.line.counters
    for times in range(1, 4):
        stream = engine.submit("rude", tuple([64 + times] * 2000), 100, Sampling())
        while not engine._stepping:
            await asyncio.sleep(0)
        (row,) = engine.scheduler.step.rows if engine.scheduler.step else ()
        before = counters["rude"] - 2000
        stream.close()
        while engine.active:
            await asyncio.sleep(0)
        assert counters["rude"] - before == len(row.tokens) > 0
        assert engine.statistics.aborted == times
    await engine.stop()


async def test_times_are_from_the_submission() -> None:
    now = [0.0]
    gate = threading.Semaphore(0)
    engine = await started(FakeBackend(words(2), gate=gate), clock=lambda: now[0])
    submit(engine)
    while not engine._stepping:
        await asyncio.sleep(0)
    stream = submit(engine)
    now[0] = 8.0
    gate.release(100)
    await text(stream)
    assert stream.ended is not None
    assert (stream.ended.timings.queue_ms, stream.ended.timings.ttft_ms) == (8000, 8000)
    await engine.stop()


class Order:
    """Records what a stream tells the engine."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def cancel(self, id: int) -> None:
        self.said.append("cancel")

    def reader_full(self, id: int) -> None:
        self.said.append("full")

    def reader_ready(self, id: int) -> None:
        self.said.append("ready")


async def test_ready_never_overtakes_full() -> None:
    """From many threads' sendings and one reader's readings: each full is followed by a ready."""
    order = Order()
    stream = TokenStream(1, 2, order)
    total = 3000

    def send() -> None:
        for _ in range(total):
            stream.count_sent()
            stream.loop.call_soon_threadsafe(stream.deliver, "x")

    sender = threading.Thread(target=send)
    sender.start()
    seen = 0
    while seen < total:
        seen += len(await stream.read())
    sender.join()
    assert order.said == ["full", "ready"] * (len(order.said) // 2)
    assert order.said


class Broken(FakeBackend):
    """Fails in the named call, the nth time that it is made, in a way that nobody foresaw."""

    def __init__(self, call: str, at: int) -> None:
        super().__init__(words(20))
        self.call, self.left = call, at

    def _maybe(self, call: str) -> None:
        if call == self.call:
            self.left -= 1
            if self.left <= 0:
                raise MemoryError(call)

    def apply(self, change: SlotChange) -> None:
        self._maybe(type(change).__name__)
        super().apply(change)

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        self._maybe("step")
        return super().step(step, threads, limit)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("call", ["OpenSlot", "step", "CloseSlot"])
async def test_whatever_breaks_every_stream_ends(call: str, at: int) -> None:
    engine = await started(Broken(call, at))
    streams = [submit(engine) for _ in range(8)]
    ends = await asyncio.wait_for(
        asyncio.gather(*map(text, streams), return_exceptions=True), timeout=20
    )
    failed = [end for end in ends if isinstance(end, BaseException)]
    assert failed
    assert engine.backend.left <= 0  # type: ignore[attr-defined]
    assert all(isinstance(end, EngineCrashed) for end in failed), failed
    assert engine.active == 0
    assert engine.failure is not None
    with pytest.raises(EngineCrashed):
        submit(engine)
    await engine.stop()
    assert not engine._thread.is_alive()
    assert not engine.backend.loaded  # type: ignore[attr-defined]


async def test_submissions_that_meet_the_end_all_end() -> None:
    engine = await started(FakeBackend(words(3)))
    outcomes: list[str] = []

    async def client() -> None:
        try:
            outcomes.append(await text(submit(engine)))
        except ShimmyError as error:
            outcomes.append(error.code)

    clients = [asyncio.create_task(client()) for _ in range(150)]
    await asyncio.sleep(0)
    await engine.stop()
    await asyncio.wait_for(asyncio.gather(*clients), timeout=20)
    assert set(outcomes) <= {"w0 w1 w2 ", "shutting_down"}
    assert len(outcomes) == 150


async def test_a_load_that_fails() -> None:
    class Refusing(FakeBackend):
        def load(self, spec: LoadSpec) -> ModelFacts:
            raise ModelLoadFailed("no such thing")

    class Bursting(FakeBackend):
        def load(self, spec: LoadSpec) -> ModelFacts:
            raise ZeroDivisionError

    for backend, reason in ((Refusing(), "no such thing"), (Bursting(), "server's log")):
        engine = Engine(backend, SPEC)
        with pytest.raises(ModelLoadFailed, match=reason):
            await engine.start()
        await engine.stop()
        assert not engine._thread.is_alive()


async def test_a_caller_that_stops_waiting_for_a_load() -> None:
    gate = threading.Event()

    class Slow(FakeBackend):
        def load(self, spec: LoadSpec) -> ModelFacts:
            gate.wait(20)
            return super().load(spec)

    engine = Engine(Slow(words(2)), SPEC)
    waiting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    waiting.cancel()
    gate.set()
    await engine.stop()
    assert not engine.backend.loaded  # type: ignore[attr-defined]
    with pytest.raises(ShuttingDown):
        submit(engine)


def test_a_loop_that_is_gone_frees_its_sequences() -> None:
    gate = threading.Semaphore(0)
    backend = FakeBackend(words(1000), gate=gate)

    async def leave_it_running() -> Engine:
        engine = await started(backend)
        submit(engine)
        return engine

    engine = asyncio.run(leave_it_running())
    gate.release(2000)

    async def others_are_served() -> None:
        assert len((await text(submit(engine))).split()) == 1000
        await engine.stop()

    asyncio.run(others_are_served())
    assert engine.active == 0


class TestBadBackends:
    """What a backend says is not believed: another process may be behind it."""

    async def test_facts_that_cannot_be(self) -> None:
        class Odd(FakeBackend):
            def load(self, spec: LoadSpec) -> ModelFacts:
                return replace(super().load(spec), kv_bytes_per_token=0)

        backend = Odd()
        engine = Engine(backend, SPEC)
        with pytest.raises(ModelLoadFailed, match="server's log"):
            await engine.start()
        await engine.stop()
        assert not backend.loaded

    async def test_steps_aborted_for_ever(self) -> None:
        class Lazy(FakeBackend):
            def step(self, step: Any, threads: int, limit: float | None = None) -> StepResult:
                return StepResult((), 0.0, aborted=True)

        engine = await started(Lazy())
        with pytest.raises(EngineCrashed, match="again and again"):
            await text(submit(engine))
        await engine.stop()

    async def test_the_scheduler_fails_and_everybody_hears_of_it(self) -> None:
        gate = threading.Semaphore(0)
        engine = await started(FakeBackend(words(3), gate=gate))
        streams = [submit(engine) for _ in range(3)]

        def fails(*_: Any) -> None:
            raise ArithmeticError

        while not engine._stepping:
            await asyncio.sleep(0)
        engine.scheduler.handle = fails  # type: ignore[method-assign]
        gate.release()
        for stream in streams:
            with pytest.raises(EngineCrashed):
                await text(stream)
        await engine.stop()

    async def test_a_prefix_that_does_not_tokenize_leaves_no_engine(self) -> None:
        class Dumb(FakeBackend):
            def tokenize(self, text: str) -> tuple[int, ...]:
                raise EngineCrashed("no words")

        backend = Dumb()
        with pytest.raises(EngineCrashed):
            await LoadedModel.load(lambda: backend, SPEC, sharing=Sharing(public=("x",)))
        assert not backend.loaded


async def test_a_lost_engine_takes_no_more() -> None:
    engine = await started(FakeBackend(words(3)))
    engine.lose(Failure("engine_crashed", "gone"))
    with pytest.raises(EngineCrashed, match="gone"):
        submit(engine)
    await engine.stop()


async def test_reading_nothing_makes_no_room() -> None:
    """What is on its way counts: a loop that was busy must not let it pile up."""
    said: list[str] = []

    class Upstream:
        def __getattr__(self, name: str) -> Any:
            return lambda _id: said.append(name)

    stream = TokenStream(1, 2, Upstream())
    stream.count_sent()
    stream.count_sent()
    assert stream.take() == []
    assert said == ["reader_full"]
    stream.deliver(Emit(1, "a"))
    stream.deliver(Emit(1, "b"))
    assert [piece.text for piece in stream.take()] == ["a", "b"]
    assert said == ["reader_full", "reader_ready"]


class TestErrands:
    async def test_between_steps_on_the_engines_thread(self) -> None:
        engine = await started(FakeBackend(words(50)))
        stream = submit(engine)
        names = [await engine.errand(lambda: threading.current_thread().name) for _ in range(3)]
        assert names == ["shimmy-engine"] * 3
        assert await text(stream) == "".join(f"w{i} " for i in range(50))
        await engine.stop()

    async def test_a_typed_error_is_its_own(self) -> None:
        engine = await started(FakeBackend())

        def fail() -> None:
            raise ModelLoadFailed("why")

        with pytest.raises(ModelLoadFailed, match="why"):
            await engine.errand(fail)
        assert await engine.errand(lambda: 5) == 5
        await engine.stop()

    async def test_what_nobody_foresaw_ends_the_engine(self) -> None:
        engine = await started(FakeBackend(words(1000)))
        stream = submit(engine)
        with pytest.raises(EngineCrashed):
            await engine.errand(lambda: 1 // 0)
        assert engine.failure is not None
        with pytest.raises(EngineCrashed):
            await text(stream)
        with pytest.raises(EngineCrashed):
            await engine.errand(lambda: 5)
        await engine.stop()

    async def test_those_that_wait_hear_of_the_end(self) -> None:
        gate = threading.Semaphore(0)
        engine = await started(FakeBackend(words(5), gate=gate))
        stream = submit(engine)
        waiting = [asyncio.create_task(engine.errand(lambda: 5)) for _ in range(3)]
        await asyncio.sleep(0)
        await engine.stop()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(one == 5 or isinstance(one, ShuttingDown) for one in found)
        assert isinstance(found[-1], ShuttingDown)
        stream.close()
