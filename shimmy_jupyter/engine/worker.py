"""The one thread that owns a loaded model: it carries events in and instructions out.

It decides nothing; `core.scheduler` and `core.governor` do. Between two steps it drains its inbox, so
a cancellation takes effect within the step in progress; a step that nobody wants any more is aborted.
What a step produced crosses to each event loop in one `call_soon_threadsafe`.
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
from typing import TypeVar

from ..core import messages as m
from ..core.governor import Governor
from ..core.scheduler import Scheduler
from ..errors import (
    EngineCrashed,
    EngineLost,
    ModelLoadFailed,
    QueueFull,
    ShimmyError,
    from_failure,
)
from ..types import Ended, Failure, FinishReason, ModelFacts, Sampling, Timings, Usage
from .backend import Backend, LoadSpec, Sharing, capacity_of, guess_of
from .errands import Errand, Errands
from .outbox import Outbox
from .statistics import EngineSnapshot, EngineStatistics, snapshot_of
from .stream import TokenStream

log = logging.getLogger("shimmy_jupyter.engine")

T = TypeVar("T")

_STOPPED = Failure("shutting_down", "the engine is shutting down")
_ATTEMPTS = 64
"""Of one step: far more than there are numbers of threads to fall back to."""
_IDLE_SECONDS = 1.0
"""Without any event; then what is left is looked after."""


class Engine:
    """A model with a thread of its own. `start`, then `submit` from any event loop, then `stop`."""

    def __init__(
        self,
        backend: Backend,
        spec: LoadSpec,
        *,
        queue_size: int = 256,
        stream_capacity: int = 256,
        sharing: Sharing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.spec = spec
        self.statistics = EngineStatistics()
        self.failure: Failure | None = None
        self._sharing = sharing or Sharing()
        self._queue_size = queue_size
        self._stream_capacity = stream_capacity
        self._clock = clock
        self._ids = itertools.count(1)
        self._inbox: queue.SimpleQueue[m.Event | Errand] = queue.SimpleQueue()
        self._errands = Errands()
        self._streams: dict[int, TokenStream] = {}
        self._outbox = Outbox()
        self._facts: Future[ModelFacts] = Future()
        self._freed: Future[None] = Future()
        self._gate = threading.Lock()
        """Between a submission's check of `failure` and its queueing, `failure` must not appear."""
        self._stepping: frozenset[int] = frozenset()
        """Who is in the step in progress; those who want no more of it are in `_unwanted`."""
        self._unwanted: set[int] = set()
        self._stopping = False
        self._tidy = False
        """There was nothing to do when it was last idle, and nothing has happened since."""
        self.scheduler: Scheduler
        self.governor: Governor
        self._thread = threading.Thread(target=self._run, name="shimmy-engine", daemon=True)

    # For any thread

    async def start(self) -> ModelFacts:
        """Load the model on the engine's thread. Raises `ModelLoadFailed`, or `EngineLost`."""
        self._thread.start()
        return await asyncio.wrap_future(self._facts)

    @property
    def active(self) -> int:
        """Sequences queued or running."""
        return len(self._streams)

    def snapshot(self) -> EngineSnapshot:
        """How it is now, at once."""
        beat, alive = self.statistics.beat, self._thread.is_alive()
        if self.failure is not None or not self._facts.done():
            return EngineSnapshot(alive)
        busy = 0.0 if beat is None else self._clock() - beat
        return snapshot_of(self.scheduler, self.active, alive=alive, busy=busy)

    def submit(
        self,
        principal: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...] = (),
        *,
        reproducible: bool = False,
        adapter: str = "",
        max_seconds: float | None = None,
    ) -> TokenStream:
        """Queue a prompt that is known to fit. Raises `QueueFull`, or what ended the engine.

        After `max_seconds` it ends with `deadline_exceeded`, wherever it is.
        """
        with self._gate:
            if self.failure is not None:
                raise from_failure(self.failure)
            theirs = sum(stream.principal == principal for stream in self._streams.values())
            own_most = self.spec.sequences + max(1, 3 * self._queue_size // 4)
            if theirs >= own_most or len(self._streams) >= self.spec.running + self._queue_size:
                raise QueueFull(f"{len(self._streams)} requests are open already; try again later")
            stream = TokenStream(next(self._ids), self._stream_capacity, self, principal)
            self._streams[stream.id] = stream
            asked = prompt, max_tokens, sampling, stop, reproducible, adapter, self._clock()
            self._inbox.put(m.Submitted(stream.id, principal, *asked))
        if max_seconds is not None:
            stream.expires = stream.loop.call_later(max_seconds, self.expire, stream.id)
        return stream

    def lose(self, failure: Failure) -> None:
        """Somebody else than its own thread has found the backend to be lost."""
        with self._gate:
            self.failure = self.failure or failure
        self._inbox.put(m.Halted(failure))

    def cancel(self, id: int) -> None:
        self._inbox.put(m.CancelRequested(id))
        self._abandon(id)

    def expire(self, id: int) -> None:
        """Its time is over."""
        self._inbox.put(m.DeadlinePassed(id))
        self._abandon(id)

    async def errand(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, on the engine's thread between two steps. One errand a step:
        keep it as short as a step. Raises what ended the engine.
        """
        return await asyncio.wrap_future(self._sent(work))  # by no name: see `Errand.run`

    def _sent(self, work: Callable[[], T]) -> Future[T]:
        errand = Errand(work)
        with self._gate:
            if self.failure is not None:
                raise from_failure(self.failure)
            self._inbox.put(errand)
        return errand.done

    def ask_progress(self, id: int) -> None:
        """What it is waiting for comes to its stream."""
        self._inbox.put(m.ProgressAsked(id))

    def publish(self, prefixes: tuple[tuple[int, ...], ...]) -> None:
        """Token sequences that all principals may share, from now on."""
        self._inbox.put(m.PublicDeclared(prefixes))

    def reader_full(self, id: int) -> None:
        self._inbox.put(m.ReaderFull(id))

    def reader_ready(self, id: int) -> None:
        self._inbox.put(m.ReaderReady(id))

    async def stop(self) -> None:
        """End every sequence with `shutting_down`, free the model, end the thread."""
        if self._thread.ident is None:
            return
        self._inbox.put(m.Halted(_STOPPED))
        with self._gate:
            self._stopping = True
            if self._stepping:
                self.backend.abort()
        await asyncio.wrap_future(self._freed)
        self._thread.join()  # it has nothing left to do

    def _abandon(self, id: int) -> None:
        """Abort the step in progress if nobody in it wants it any more."""
        with self._gate:
            if id in self._streams:
                self._unwanted.add(id)
                if self._stepping and self._stepping <= self._unwanted:
                    self.backend.abort()

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
            self._plan_for(facts)
        except ShimmyError as error:
            self._facts.set_exception(error)
            return False
        except Exception:
            log.exception("loading failed in a way that nobody foresaw")
            self._facts.set_exception(ModelLoadFailed("loading it failed; see the server's log"))
            return False
        self._facts.set_result(facts)
        return True

    def _plan_for(self, facts: ModelFacts) -> None:
        capacity = capacity_of(facts, self.spec, self._sharing, self._queue_size)
        self.scheduler = Scheduler(capacity, guess=guess_of(facts))
        self.governor = Governor(facts.threads, fixed=self.spec.threads > 0)

    def _serve_until_it_ends(self) -> Failure:
        try:
            return self._serve(self.scheduler)
        except EngineLost as error:
            log.error("the engine is lost: %s", error.message)  # noqa: TRY400
            return Failure(error.code, error.message)
        except Exception:
            log.exception("the engine's thread failed; its sequences end with engine_crashed")
            return Failure("engine_crashed", "the engine failed; the server's log says how")

    def _serve(self, scheduler: Scheduler) -> Failure:
        idle = True
        while (failure := self._hear(scheduler, wait=idle)) is None:
            step = self._carry_out(scheduler.handle(m.EngineReady(), self._clock()))
            self._flush()
            self._errands.run_one()
            idle = step is None and not self._errands
            if step is not None:
                done = self._decode(step)
                if isinstance(done, m.StepAborted):
                    # Who gave it up has said so by now, and is charged for it.
                    failure = self._hear(scheduler, wait=False)
                    if failure is not None:
                        break
                # Flushed with the next step: whoever reads would take the GIL while that is planned.
                self._carry_out(scheduler.handle(done, self._clock()))
            elif idle:
                scheduler.handle(m.Flushed(self.backend.flush()), self._clock())
        return failure

    def _hear(self, scheduler: Scheduler, *, wait: bool) -> Failure | None:
        """Nothing of what has been heard is kept meanwhile: what ended it, if it has."""
        for event in self._events(wait=wait):
            if isinstance(event, Errand):
                self._errands.add(event)
                continue
            if isinstance(event, m.Halted):
                return event.failure
            said = scheduler.handle(event, self._clock())
            self._carry_out(said)
            self._tidy = isinstance(event, m.Idle) and not said
        return None

    def _events(self, *, wait: bool) -> Iterable[m.Event | Errand]:
        self.statistics.beat = None if wait else self._clock()
        if wait:
            try:
                # Those who are paused are looked at again and again; what they left is tidied up.
                watched = self._streams or not self._tidy
                event = self._inbox.get(timeout=_IDLE_SECONDS if watched else None)
            except queue.Empty:
                yield m.Idle()
                return
            self.statistics.beat = self._clock()
            yield event
        while not self._inbox.empty():
            yield self._inbox.get()

    def _decode(self, step: m.Step) -> m.Event:
        ids = self.scheduler.stepping()
        with self._gate:
            unwanted = self._stopping or ids <= self._unwanted
            self._stepping = ids
        try:
            return m.StepAborted() if unwanted else self._attempt(step)
        except EngineLost:
            raise
        except EngineCrashed as error:
            log.warning("a step of %d sequences failed: %s", len(step.rows), error.message)
            return m.StepFailed(Failure(error.code, error.message))
        finally:
            with self._gate:
                self._stepping = frozenset()

    def _attempt(self, step: m.Step) -> m.Event:
        """Run the step; again with fewer threads where it took longer than it may."""
        # A reproducible sequence's threads are always the same, and its times others.
        private = self.scheduler.capacity.private_slot in [row.slot for row in step.rows]
        work = sum(len(row.tokens) for row in step.rows)
        cells = sum(row.start for row in step.rows)
        for _ in range(_ATTEMPTS):
            plan = self.governor.plan(work, self._clock(), cells=cells, beside=step.has_company)
            result = self.backend.step(step, plan.threads, None if private else plan.limit)
            if result.aborted:
                self.statistics.aborted += 1
                with self._gate:
                    if self._stopping or self._stepping <= self._unwanted:
                        return m.StepAborted()
            # An abort that came late, meant for the step before, says nothing of the machine.
            late = result.aborted and (plan.limit is None or result.seconds < plan.limit)
            if step.rows and not private and not late:
                now = self._clock()
                self.governor.observe(plan, result.seconds, now, aborted=result.aborted)
            if not result.aborted:
                break
            step = step.without_time_aside()
        else:
            raise EngineLost("its steps are aborted again and again, though nobody asks for it")
        self.statistics.count(len(step.rows), len(result.sampled))
        seconds, threads = result.seconds, plan.threads
        read = result.prompts, result.aside, result.unsaved
        return m.Stepped(result.sampled, seconds, threads, *read)

    def _carry_out(self, instructions: list[m.Instruction]) -> m.Step | None:
        for instruction in instructions:
            match instruction:
                case m.Emit() | m.Finish() | m.Progress():
                    self._send(instruction)
                case m.Step():
                    return instruction
                case _:
                    self.backend.apply(instruction)
        return None

    def _send(self, instruction: m.Emit | m.Finish | m.Progress) -> None:
        if isinstance(instruction, m.Finish):
            with self._gate:
                stream = self._streams.pop(instruction.id)
                self._unwanted.discard(instruction.id)
            self._outbox.add(stream, instruction.ended)
        elif isinstance(instruction, m.Progress):
            self._outbox.add(self._streams[instruction.id], instruction)
        else:
            stream = self._streams[instruction.id]
            self._outbox.add(stream, instruction)
            stream.count_sent()

    def _finish(self, failure: Failure) -> None:
        """Tell everybody. Native slots are left to `unload`: what failed may have been one."""
        with self._gate:
            self.failure = failure
        left = list(self._events(wait=False))
        self._errands.add(*(event for event in left if isinstance(event, Errand)))
        gone = failure.code == EngineLost.code
        self._errands.give_up(EngineLost(failure.message) if gone else from_failure(failure))
        try:
            for event in [m.Halted(failure), *left]:
                if not isinstance(event, Errand):
                    for instruction in self.scheduler.handle(event, self._clock()):
                        if isinstance(instruction, m.Emit | m.Finish):
                            self._send(instruction)
        except Exception:
            # It may be the scheduler that failed.
            log.exception("the engine's end failed too")
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
        for id in self._outbox.flush():
            self._inbox.put(m.CancelRequested(id))
