"""The engine's process: a backend that answers what comes over two sockets, and ends with them.

`work` is answered in order by the main thread. `side` has a thread of its own, so that an abort or
somebody's prompt need not wait for the step in progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from ..core.messages import Step
from ..errors import EngineCrashed, InternalError, ModelLoadFailed, ShimmyError
from . import calls, wire
from .backend import Backend, Embedded, LoadSpec, StepResult
from .channel import Channel, Frames, WireError
from .deep import bounded, in_deep_thread, longest

log = logging.getLogger("shimmy_jupyter.engine")

_AGAIN = 0.01
_GRACE = 2.0
_CHUNK = 1 << 16
_EXPENDABLE = "500"
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # of glibc's malloc.h


def serve(
    make: Callable[[], Backend],
    work: socket.socket,
    side: socket.socket,
    leave: Callable[[], object] = lambda: None,
) -> None:
    """Serve a backend until it was unloaded or a socket ends. `leave` is called where a backend does
    not come back although nobody is left to answer.
    """
    _Server(make, work, side, leave).run()


class _Server:
    def __init__(
        self,
        make: Callable[[], Backend],
        work: socket.socket,
        side: socket.socket,
        leave: Callable[[], object],
    ) -> None:
        self._make, self._side, self._leave = make, side, leave
        self._work = Channel(work)
        self._backend: Backend | None = None
        self._stepping = threading.Lock()
        """Held where a step begins or ends, and while it is being aborted."""
        self._current: int | None = None
        self._aborted = 0
        self._finished = threading.Event()

    def run(self) -> None:
        attendant = threading.Thread(target=self._attend, name="shimmy-side", daemon=True)
        attendant.start()
        try:
            while self._answer_one():
                pass
        finally:
            if self._backend is not None:
                self._backend.unload()
            self._finished.set()
            for end in (self._work.shut, lambda: self._side.shutdown(socket.SHUT_RDWR)):
                with contextlib.suppress(OSError):
                    end()
            attendant.join()

    # Work

    def _answer_one(self) -> bool:
        try:
            request = wire.work_request(self._work.receive(wire.MAX_REQUEST))
            reply = self._reply(request)
            self._work.send(wire.encode(reply))
        except (EOFError, OSError):
            return False  # nobody is left
        except WireError:
            log.exception("what the server asks cannot be understood")
            return False
        return not isinstance(request, calls.Unload)

    def _reply(self, request: calls.WorkRequest) -> object:
        try:
            match request:
                case calls.Load():
                    return self._load(request.spec)
                case calls.Work():
                    return self._carry_out(request)
                case calls.Embed():
                    return self._embed(request)
                case calls.LoadAdapter(path):
                    self._loaded().load_adapter(path)
                case calls.Unload():
                    self._loaded().unload()
            return calls.Done()
        except ShimmyError as error:
            return calls.Failed.of(error)
        except Exception:
            log.exception("the engine failed in a way that nobody foresaw")
            return calls.Failed.of(InternalError("the engine failed; the server's log says how"))

    def _load(self, spec: LoadSpec) -> object:
        try:
            self._backend = self._make()
        except (ImportError, OSError, RuntimeError) as error:
            log.exception("the backend does not load")
            raise ModelLoadFailed(f"llama-cpp-python does not load here: {error}") from error
        try:
            return self._backend.load(spec)
        except ShimmyError:
            raise
        except Exception as error:
            log.exception("loading failed in a way that nobody foresaw")
            raise ModelLoadFailed("loading it failed; see the server's log") from error

    def _loaded(self) -> Backend:
        if self._backend is None:
            raise EngineCrashed("no model is loaded")
        return self._backend

    def _carry_out(self, work: calls.Work) -> StepResult:
        failed: ShimmyError | None = None
        for change in work.changes:
            try:
                self._loaded().apply(change)
            except ShimmyError as error:
                failed = failed or error  # the other slots' changes still have to happen
        if failed is not None:
            raise failed
        if work.step is None:
            return StepResult((), 0.0, unsaved=self._loaded().flush())
        return self._step(work, work.step)

    def _step(self, work: calls.Work, step: Step) -> StepResult:
        with self._at_work(work.number) as wanted:
            if not wanted:
                return StepResult((), 0.0, aborted=True)
            return self._loaded().step(step, work.threads, work.limit)

    def _embed(self, request: calls.Embed) -> Embedded:
        with self._at_work(request.number) as wanted:
            if not wanted:
                return Embedded((), 0.0, aborted=True)
            return self._loaded().embed(request.rows, request.threads, request.limit)

    @contextlib.contextmanager
    def _at_work(self, number: int) -> Iterator[bool]:
        """While it can be aborted. False where that came before the work itself did."""
        with self._stepping:
            wanted = self._aborted < number
            self._current = number if wanted else None
        try:
            yield wanted
        finally:
            with self._stepping:
                self._current = None

    # Meanwhile

    def _attend(self) -> None:
        try:
            asyncio.run(self._listen())
        except Exception:
            log.exception("the side channel failed")
        with self._stepping:
            if self._backend is not None and self._current is not None:
                self._backend.abort()
        self._work.shut()
        if not self._finished.wait(_GRACE):
            self._leave()

    async def _listen(self) -> None:
        frames, tasks = Frames(), set[asyncio.Task[None]]()
        self._side.setblocking(False)
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._side, _CHUNK):
            frames.feed(data)
            while (payload := frames.next(wire.MAX_REQUEST)) is not None:
                request = wire.side_request(payload)
                if isinstance(request, calls.Abort):
                    self._abort(loop, request.number)
                else:
                    tasks.add(task := loop.create_task(self._read_for(request)))
                    task.add_done_callback(tasks.discard)

    def _abort(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        """Again and again until the step has ended, for a backend may forget an abort that comes
        just before its step begins.
        """
        with self._stepping:
            self._aborted = max(self._aborted, number)
            if self._current == number:
                self._loaded().abort()
                loop.call_later(_AGAIN, self._abort, loop, number)

    async def _read_for(
        self,
        request: calls.Tokenize | calls.TokenizeInputs | calls.Detokenize | calls.Compile,
    ) -> None:
        reply: object
        try:
            match request:
                case calls.Tokenize(text):
                    size = len(text.encode("utf-8", "surrogatepass"))
                    found = await in_deep_thread(lambda: self._loaded().tokenize(text), size)
                    reply = calls.Tokens(found)
                case calls.TokenizeInputs(inputs):
                    lists = await in_deep_thread(
                        lambda: self._loaded().tokenize_inputs(inputs), longest(inputs)
                    )
                    reply = calls.TokenLists(lists)
                case calls.Detokenize(ids):
                    data = await in_deep_thread(lambda: self._loaded().detokenize(ids), 0)
                    reply = calls.Text(bounded(data))
                case calls.Compile(constraint):
                    await in_deep_thread(lambda: self._loaded().compile(constraint), 0)
                    reply = calls.Done()
        except ShimmyError as error:
            reply = calls.Failed.of(error)
        except Exception:
            log.exception("reading failed in a way that nobody foresaw")
            reply = calls.Failed.of(InternalError("the engine failed; the server's log says how"))
        await asyncio.get_running_loop().sock_sendall(self._side, wire.encode(reply))


class _Lines(logging.Formatter):
    """Each line begins with its level, as the server expects."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"<{record.levelno}>{line}" for line in super().format(record).split("\n"))


def _keep_to_itself() -> None:
    """What a crash writes down must not hold prompts, and a crash must take nobody along."""
    import resource

    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    # On Linux 1 means none at all, while 0 still pipes one to a crash reporter.
    most = 1 if sys.platform == "linux" and hard else 0
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    # Every prompt is tokenized by a thread of its own; each would get a heap that is never given back.
    # And a context of its own, once freed, would teach malloc to keep what is as large from then on.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    # When memory runs out, a model can be loaded again; a notebook's variables cannot.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_EXPENDABLE)


def main() -> NoReturn:
    """`WORK_FD SIDE_FD MODULE:CALLABLE LEVEL`: serve what the callable makes, then end at once."""
    work_fd, side_fd, factory, level = sys.argv[1:]
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(message)s"))
    logging.basicConfig(level=int(level), handlers=[handler])
    logging.raiseExceptions = False  # standard error may end before we do
    _keep_to_itself()
    work, side = socket.socket(fileno=int(work_fd)), socket.socket(fileno=int(side_fd))
    for end in (work, side):
        end.set_inheritable(False)
    module, _, name = factory.partition(":")
    code = 1
    try:
        serve(lambda: _made(module, name), work, side, leave=lambda: os._exit(1))
        code = 0
    except SystemExit as end_it:
        code = end_it.code if isinstance(end_it.code, int) else 1
    except BaseException:
        log.exception("the engine's process failed")
    finally:
        # Without destructors: a native library that is torn down twice crashes.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def _made(module: str, name: str) -> Backend:
    backend: Backend = getattr(importlib.import_module(module), name)()
    return backend


if __name__ == "__main__":
    main()
