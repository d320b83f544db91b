"""The one thread that owns a loaded model: it carries events in and instructions out.

It decides nothing; `core.scheduler` does. Between two steps it drains its inbox, so a
cancellation takes effect within the step in progress. What a step produced crosses to each
event loop in one `call_soon_threadsafe`, whoever may have gone meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..core import messages as m
from ..core.scheduler import Scheduler
from ..errors import EngineCrashed, ModelLoadFailed, QueueFull, ShimmyError, from_failure
from ..types import Ended, Failure, FinishReason, ModelFacts, Sampling, Timings, Usage
from .backend import Backend, LoadSpec
from .stream import TokenStream

log = logging.getLogger("shimmy_jupyter.engine")

_STOPPED = Failure("shutting_down", "the engine is shutting down")
_Delivery = tuple[TokenStream, "str | Ended"]


@dataclass(slots=True)
class EngineStatistics:
    """Counters since the model was loaded. `rows[n]` is how many steps held n sequences."""

    steps: int = 0
    tokens: int = 0
    rows: dict[int, int] = field(default_factory=dict)


class Engine:
    """A model with a thread of its own. `start`, then `submit` from any event loop, then `stop`."""

    def __init__(
        self,
        backend: Backend,
        spec: LoadSpec,
        *,
        queue_size: int = 256,
        stream_capacity: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.spec = spec
        self.statistics = EngineStatistics()
        self.failure: Failure | None = None
        self._queue_size = queue_size
        self._stream_capacity = stream_capacity
        self._clock = clock
        self._ids = itertools.count(1)
        self._inbox: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
        self._streams: dict[int, TokenStream] = {}
        self._outbox: list[_Delivery] = []
        self._facts: Future[ModelFacts] = Future()
        self._freed: Future[None] = Future()
        self._gate = threading.Lock()
        """Between a submission's check of `failure` and its queueing, `failure` must not appear."""
        self.scheduler: Scheduler
        self._thread = threading.Thread(target=self._run, name="shimmy-engine", daemon=True)

    # For any thread

    async def start(self) -> ModelFacts:
        """Load the model on the engine's thread. Raises `ModelLoadFailed`."""
        self._thread.start()
        return await asyncio.wrap_future(self._facts)

    @property
    def active(self) -> int:
        """Sequences queued or running."""
        return len(self._streams)

    def submit(
        self,
        principal: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...] = (),
    ) -> TokenStream:
        """Queue a prompt that is known to fit. Raises `QueueFull`, or what ended the engine."""
        with self._gate:
            if self.failure is not None:
                raise from_failure(self.failure)
            if len(self._streams) >= self.spec.slots + self._queue_size:
                raise QueueFull(f"{len(self._streams)} requests are open already; try again later")
            stream = TokenStream(next(self._ids), self._stream_capacity, self)
            self._streams[stream.id] = stream
            self._inbox.put(m.Submitted(stream.id, principal, prompt, max_tokens, sampling, stop))
        return stream

    def cancel(self, id: int) -> None:
        self._inbox.put(m.CancelRequested(id))

    def reader_full(self, id: int) -> None:
        self._inbox.put(m.ReaderFull(id))

    def reader_ready(self, id: int) -> None:
        self._inbox.put(m.ReaderReady(id))

    async def stop(self) -> None:
        """End every sequence with `shutting_down`, free the model, end the thread."""
        if self._thread.ident is None:
            return
        self._inbox.put(m.Halted(_STOPPED))
        await asyncio.wrap_future(self._freed)
        self._thread.join()  # it has nothing left to do

    # The engine's thread

    def _run(self) -> None:
        self._facts.set_running_or_notify_cancel()  # whoever waits may go; the load goes on
        self._freed.set_running_or_notify_cancel()
        try:
            if self._load():
                self._finish(self._serve_until_it_ends())
        finally:
            self._free()

    def _load(self) -> bool:
        try:
            facts = self.backend.load(self.spec)
        except ShimmyError as error:
            self._facts.set_exception(error)
            return False
        except Exception:
            log.exception("loading failed in a way that nobody foresaw")
            self._facts.set_exception(ModelLoadFailed("loading it failed; see the server's log"))
            return False
        capacity = m.Capacity(
            slots=self.spec.slots,
            kv_tokens=facts.kv_tokens,
            context_size=facts.context_size,
            batch_tokens=self.spec.batch_tokens,
            queue=self._queue_size,
        )
        self.scheduler = Scheduler(capacity)
        self._facts.set_result(facts)
        return True

    def _serve_until_it_ends(self) -> Failure:
        try:
            return self._serve(self.scheduler)
        except Exception:
            log.exception("the engine's thread failed; its sequences end with engine_crashed")
            return Failure("engine_crashed", "the engine failed; the server's log says how")

    def _serve(self, scheduler: Scheduler) -> Failure:
        idle = True
        while True:
            for event in self._events(wait=idle):
                if isinstance(event, m.Halted):
                    return event.failure
                self._carry_out(scheduler.handle(event, self._clock()))
            step = self._carry_out(scheduler.handle(m.EngineReady(), self._clock()))
            self._flush()
            idle = step is None
            if step is not None:
                self._carry_out(scheduler.handle(self._decode(step), self._clock()))
                self._flush()

    def _events(self, *, wait: bool) -> Iterable[m.Event]:
        if wait:
            try:
                # Those who are paused are looked at once a second; otherwise nothing happens.
                yield self._inbox.get(timeout=1.0 if self._streams else None)
            except queue.Empty:
                return
        while not self._inbox.empty():
            yield self._inbox.get()

    def _decode(self, step: m.Step) -> m.Event:
        try:
            sampled = self.backend.step(step)
        except EngineCrashed as error:
            log.warning("a step of %d sequences failed: %s", len(step.rows), error.message)
            return m.StepFailed(Failure(error.code, error.message))
        self.statistics.steps += 1
        self.statistics.tokens += len(sampled)
        self.statistics.rows[len(step.rows)] = self.statistics.rows.get(len(step.rows), 0) + 1
        return m.Stepped(sampled)

    def _carry_out(self, instructions: list[m.Instruction]) -> m.Step | None:
        for instruction in instructions:
            match instruction:
                case m.Emit() | m.Finish():
                    self._send(instruction)
                case m.OpenSlot():
                    self.backend.open(instruction)
                case m.CloseSlot():
                    self.backend.close(instruction.slot)
                case m.Step():
                    return instruction
        return None

    def _send(self, instruction: m.Emit | m.Finish) -> None:
        if isinstance(instruction, m.Finish):
            self._outbox.append((self._streams.pop(instruction.id), instruction.ended))
        else:
            stream = self._streams[instruction.id]
            self._outbox.append((stream, instruction.text))
            stream.count_sent()

    def _finish(self, failure: Failure) -> None:
        """Tell everybody. Native slots are left to `unload`: what failed may have been one."""
        with self._gate:
            self.failure = failure
        events = [m.Halted(failure), *self._events(wait=False)]
        for event in events:
            for instruction in self.scheduler.handle(event, self._clock()):
                if isinstance(instruction, m.Emit | m.Finish):
                    self._send(instruction)
        # Those whose last word was lost with the failure.
        nothing = Timings(0.0, None, None)
        for id in list(self._streams):
            ended = Ended(FinishReason.ERROR, Usage(0, 0), nothing, failure)
            self._send(m.Finish(id, ended))
        self._flush()

    def _free(self) -> None:
        try:
            self.backend.unload()
        finally:
            self._freed.set_result(None)

    def _flush(self) -> None:
        if not self._outbox:
            return
        deliveries, self._outbox = self._outbox, []
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}
        for stream, item in deliveries:
            by_loop.setdefault(stream.loop, []).append((stream, item))
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                # The loop is closed, so nobody is left to read; free what its streams hold.
                for stream, item in items:
                    if not isinstance(item, Ended):
                        self.cancel(stream.id)


def _deliver(items: list[_Delivery]) -> None:
    for stream, item in items:
        stream.deliver(item)
