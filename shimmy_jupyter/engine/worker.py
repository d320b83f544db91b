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
from ..errors import EngineCrashed, QueueFull, ShimmyError, from_failure
from ..types import Ended, Failure, ModelFacts, Sampling
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
        self._scheduler: Scheduler | None = None
        self._thread = threading.Thread(target=self._run, name="shimmy-engine", daemon=True)

    # For any thread

    async def start(self) -> ModelFacts:
        """Load the model on the engine's thread. Raises `ModelLoadFailed`."""
        self._thread.start()
        return await asyncio.wrap_future(self._facts)

    @property
    def facts(self) -> ModelFacts:
        return self._facts.result(timeout=0)

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

    def reader_ready(self, id: int) -> None:
        self._inbox.put(m.ReaderReady(id))

    async def stop(self) -> None:
        """End every sequence with `shutting_down`, free the model, end the thread."""
        if self._thread.ident is None:
            return
        self._inbox.put(m.Halted(_STOPPED))
        await asyncio.to_thread(self._thread.join)

    # The engine's thread

    def _run(self) -> None:
        try:
            facts = self.backend.load(self.spec)
        except ShimmyError as error:
            self._facts.set_exception(error)
            return
        except Exception as defect:
            log.exception("loading failed in a way that nobody foresaw")
            self._facts.set_exception(EngineCrashed("the engine failed while loading the model"))
            self.failure = Failure("engine_crashed", str(defect))
            return
        capacity = m.Capacity(
            slots=self.spec.slots,
            kv_tokens=facts.kv_tokens,
            context_size=facts.context_size,
            batch_tokens=self.spec.batch_tokens,
            queue=self._queue_size,
        )
        self._scheduler = scheduler = Scheduler(capacity)
        self._facts.set_result(facts)
        try:
            self._serve(scheduler)
        except Exception:
            log.exception("the engine's thread failed; its sequences end with engine_crashed")
            self._halt(scheduler, Failure("engine_crashed", "the engine failed; see the log"))
        finally:
            self.backend.unload()

    def _serve(self, scheduler: Scheduler) -> None:
        idle = True
        while True:
            for event in self._events(wait=idle):
                if isinstance(event, m.Halted):
                    return self._halt(scheduler, event.failure)
                self._carry_out(scheduler.handle(event, self._clock()))
            step = self._carry_out(scheduler.handle(m.EngineReady(), self._clock()))
            self._flush()
            idle = step is None
            if step is not None:
                self._carry_out(scheduler.handle(self._decode(step), self._clock()))
                self._flush()

    def _events(self, *, wait: bool) -> Iterable[m.Event]:
        if wait:
            yield self._inbox.get()
        while not self._inbox.empty():
            yield self._inbox.get()

    def _decode(self, step: m.Step) -> m.Event:
        try:
            sampled = self.backend.step(step)
        except EngineCrashed as error:
            return m.StepFailed(Failure(error.code, error.message))
        self.statistics.steps += 1
        self.statistics.tokens += len(sampled)
        self.statistics.rows[len(step.rows)] = self.statistics.rows.get(len(step.rows), 0) + 1
        return m.Stepped(sampled)

    def _carry_out(self, instructions: list[m.Instruction]) -> m.Step | None:
        for instruction in instructions:
            match instruction:
                case m.Emit():
                    self._emit(instruction)
                case m.Finish():
                    stream = self._streams.pop(instruction.id)
                    self._outbox.append((stream, instruction.ended))
                case m.OpenSlot():
                    self.backend.open(instruction)
                case m.CloseSlot():
                    self.backend.close(instruction.slot)
                case m.Step():
                    return instruction
        return None

    def _emit(self, emit: m.Emit) -> None:
        stream = self._streams[emit.id]
        self._outbox.append((stream, emit.text))
        if stream.count_sent():
            self._inbox.put(m.ReaderFull(emit.id))

    def _halt(self, scheduler: Scheduler, failure: Failure) -> None:
        self.failure = failure
        self._carry_out(scheduler.handle(m.Halted(failure), self._clock()))
        # A submission may have passed the check on `failure` just before it was set.
        for event in self._events(wait=False):
            self._carry_out(scheduler.handle(event, self._clock()))
        self._flush()

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
