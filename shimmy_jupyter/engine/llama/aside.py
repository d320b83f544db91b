"""One prompt read in a context of its own, on a thread of its own, held wherever it is told to.

llama.cpp asks an abort callback between any two nodes of a graph, and waits for its answer: with that
the thread is kept from going on while a step of the others has the processors. The other threads of its
team sleep meanwhile, as OpenMP's do; llama.cpp's own would spin.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from ...core import messages as m
from ...errors import EngineCrashed
from .binding import available_memory, native
from .constraints import Constraints
from .context import Context, ContextSpec

log = logging.getLogger("shimmy_jupyter.llama")

_AT_ONCE = 512
"""Tokens whose KV is copied before others have another turn."""
BATCH = 256
"""More than any part has."""
_MEMORY_SHARE = 2
"""Of the memory that is free a cache may be one part in so many."""
_A_MOMENT = 0.01
_OWN = 0
"""The prompt's slot in its own cache."""


def possible() -> bool:
    """Whether threads sleep that wait for one that is held."""
    return b"OPENMP = 1" in native.llama_print_system_info()


class Turnstile:
    """Lets one computing thread go on between two nodes, holds it there, or sends it away."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = self._going = self._ended = False
        self._left = 0
        self.reached = threading.Event()
        """Whether it has ever come here."""
        # Kept, as llama.cpp has only its address.
        self._callback = native.ggml_abort_callback(self._pass)

    def attach(self, context: Any) -> None:
        native.llama_set_abort_callback(context, self._callback, None)

    # For the thread that computes

    def enter(self) -> bool:
        """Wait until it is open. False where it never will be again."""
        return not self._pass(None)

    def leave(self) -> None:
        """Nothing more is computed before `enter`."""
        with self._changed:
            self.reached.set()
            self._going = False
            self._left += 1
            self._changed.notify_all()

    def _pass(self, _data: object) -> bool:
        """True ends the decode. Asked hundreds of times in a slice, so mostly it takes no lock."""
        if self._open and self._going:
            return self._ended
        with self._changed:
            self.reached.set()
            self._going = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open or self._ended)
            self._going = not self._ended
            return self._ended

    # For others

    def let(self, seconds: float) -> float:
        """Let it go on for so long, or until it leaves. Returns the seconds after which it stood still."""
        began = time.perf_counter()
        with self._changed:
            left = self._left
            self._open = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._left != left, seconds)
            self._open = False
            self._changed.wait_for(lambda: not self._going)
        return time.perf_counter() - began

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Work:
    part: m.Aside
    threads: int
    adapter: Any
    done: Future[bool] = field(default_factory=Future)
    """False where it could not be computed."""


class _Reader:
    """Reads the prompt in one slot of `shared`, in a context of the shape `spec`.

    One thread calls `go`, `collect` and `close`, and is the only one to use `shared` otherwise.
    """

    def __init__(
        self, model: Any, constraints: Constraints, shared: Context, slot: int, spec: ContextSpec
    ) -> None:
        self.slot = slot
        self._model, self._constraints, self._spec = model, constraints, spec
        self._shared = shared
        self._context: Context | None = None
        self._held = 0
        """Tokens of the prompt that its own cache has."""
        self._turnstile = Turnstile()
        self._jobs: SimpleQueue[_Work | None] = SimpleQueue()
        self._work: _Work | None = None
        self._thread = threading.Thread(target=self._run, name="shimmy-aside", daemon=True)
        self._thread.start()
        # A thread that comes out of a decode when Python is gone would take the process with it.
        atexit.register(self.close)

    def go(self, part: m.Aside, threads: int, adapter: Any) -> float:
        """Compute for `part.seconds` at most. Returns the seconds that it took."""
        if self._work is None:
            self._work = _Work(part, threads, adapter)
            self._jobs.put(self._work)
        if part.seconds <= 0 or self._work.done.done():
            return 0.0
        # Others go on while its context is made, which cannot be held.
        if not self._turnstile.reached.wait(min(part.seconds, _A_MOMENT)):
            return _A_MOMENT
        return self._turnstile.let(part.seconds)

    def collect(self, seconds: float) -> m.AsideRead:
        """What `go` has come to in so many seconds; of what is done, the KV is in the slot now. Raises what
        its thread has not foreseen.
        """
        work = self._work
        if work is None or not work.done.done():
            return m.AsideRead(seconds, making=self._context is None)
        self._work = None
        if not work.done.result():
            return m.AsideRead(seconds, refused=True)
        assert self._context is not None
        start = work.part.start
        try:
            moved = self._context.part(_OWN, start, start + len(work.part.tokens))
        except OSError as error:
            log.warning("a prompt could not be read aside: %s", error.strerror)
            return m.AsideRead(seconds, refused=True)
        self._shared.add(self.slot, *moved)
        if work.part.last:
            self._jobs.put(None)
        return m.AsideRead(seconds, done=True)

    def end(self) -> None:
        """Stop amid whatever it does, and free its context. While that is made nothing stops it: it is
        waited for by `close` alone.
        """
        self._turnstile.end()
        self._jobs.put(None)
        if self._context is not None or self._work is None:
            self.close()

    def ended(self, seconds: float) -> bool:
        """Whether its context is free, in so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        atexit.unregister(self.close)
        self._turnstile.end()
        self._jobs.put(None)
        self._thread.join()

    # Its thread

    def _run(self) -> None:
        while (work := self._jobs.get()) is not None:
            try:
                work.done.set_result(self._compute(work))
            except (EngineCrashed, OSError) as error:
                log.warning("a prompt could not be read aside: %s", error)
                work.done.set_result(False)
            except Exception as error:
                log.exception("reading a prompt aside failed in a way that nobody foresaw")
                work.done.set_exception(error)
            finally:
                self._turnstile.leave()
        if self._context is not None:
            self._context.close()

    def _compute(self, work: _Work) -> bool:
        if self._context is None:
            self._context = Context(self._model, self._constraints, self._spec, self._turnstile)
        if not self._context.ok or not self._catch_up(self._context, work.part.start):
            return False
        row = m.Row(_OWN, work.part.start, work.part.tokens, sample=False)
        if self._context.decode([row], work.threads, work.adapter) is None:
            return False
        self._held = row.start + len(row.tokens)
        return True

    def _catch_up(self, context: Context, start: int) -> bool:
        """Have the KV of what comes before, which others have read or steps have."""
        if self._held > start:
            context.trim(_OWN, start)
            self._held = start
        while self._turnstile.enter():
            if self._held == start:
                return True
            end = min(self._held + _AT_ONCE, start)
            context.add(_OWN, *self._shared.part(self.slot, self._held, end))
            self._held = end
        return False


class Asides:
    """The prompt that is read aside, if there is one: its context is made for it, and freed after it."""

    def __init__(
        self, model: Any, constraints: Constraints, shared: Context, spec: ContextSpec, cell: int
    ) -> None:
        self._model, self._constraints, self._shared = model, constraints, shared
        self._spec, self._cell = spec, cell
        """The largest shape; a `cell` of the cache has so many bytes."""
        self._reader: _Reader | None = None
        self._left: _Reader | None = None
        """One that was given up while its context was made: there is none beside it."""

    def go(self, part: m.Aside, threads: int, adapter: Any) -> float:
        """Compute for `part.seconds` at most. Returns the seconds that it took."""
        if self._reader is not None and self._reader.slot != part.slot:
            self._leave(self._reader)
        if self._left is not None:
            began = time.perf_counter()
            if not self._left.ended(min(part.seconds, _A_MOMENT)):
                return time.perf_counter() - began
            self._left.close()
            self._left = None
        if self._reader is None:
            self._reader = self._opened(part)
        return 0.0 if self._reader is None else self._reader.go(part, threads, adapter)

    def collect(self, seconds: float) -> m.AsideRead:
        """What `go` has come to."""
        if self._left is not None:
            return m.AsideRead(seconds, making=True)
        if self._reader is None:
            return m.AsideRead(seconds, refused=True)
        return self._reader.collect(seconds)

    def closing(self, slot: int) -> None:
        if self._reader is not None and self._reader.slot == slot:
            self._leave(self._reader)

    def close(self) -> None:
        for reader in (self._reader, self._left):
            if reader is not None:
                reader.close()
        self._reader = self._left = None

    def _leave(self, reader: _Reader) -> None:
        reader.end()
        self._reader = None
        if not reader.ended(0):
            self._left = reader

    def _opened(self, part: m.Aside) -> _Reader | None:
        tokens = math.ceil(part.end / 256) * 256
        if (
            tokens > self._spec.kv_tokens
            or _MEMORY_SHARE * tokens * self._cell > available_memory()
        ):
            log.info("no memory to read %d tokens aside: they are read in small slices", part.end)
            return None
        spec = replace(self._spec, kv_tokens=tokens)
        return _Reader(self._model, self._constraints, self._shared, part.slot, spec)
