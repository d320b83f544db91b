"""A backend in a process of its own, so that what kills it does not kill the server.

The process hears us over two inherited sockets: nothing listens, and there is no key to keep. It
has none of Jupyter's secrets in its environment, and ends when its sockets do. It is no sandbox: it
runs as the same user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..core.messages import Row, SlotChange, Step
from ..errors import EngineLost, Misconfigured, ModelLoadFailed
from ..types import Constraint, ModelFacts
from . import calls, wire
from .backend import Embedded, LoadSpec, StepResult
from .channel import Channel, WireError
from .last_words import LastWords, ending

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter.engine.child")

_POSIX = os.name == "posix"
_MOST_CHANGES = 256
_GRACE = 5.0
_UNLOADED = "the model has been unloaded"

_ALLOWED = re.compile(
    r"PATH|HOME|USER|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|XDG_(CACHE_HOME|RUNTIME_DIR)|VIRTUAL_ENV"
    r"|PYTHON(PATH|HOME|USERBASE|NOUSERSITE|PYCACHEPREFIX|DONTWRITEBYTECODE|UTF8|IOENCODING)"
    r"|LD_(LIBRARY_PATH|PRELOAD)|DYLD_\w+|CONDA_PREFIX|NVIDIA_(VISIBLE_DEVICES|TF32_OVERRIDE)"
    r"|(OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|GGML|CUDA|HIP|ROCR|ROCM|HSA|VK|SYCL|ONEAPI|ZE|MTL)_\w+"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What Python and the native libraries need, and nothing that could be a secret."""
    return {
        name: value
        for name, value in environment.items()
        if _ALLOWED.fullmatch(name) and not _SECRET.search(name)
    }


class IsolatedBackend:
    """The backend that `factory` ("module:callable") makes, in a child process.

    Changes wait for the next step and travel with it, so a step is one round trip, or for `flush`. A child that does
    not answer for `hang_seconds`, or has not loaded within `load_seconds`, is killed. Once it is
    lost every call says how, until it is unloaded and loaded again.
    """

    def __init__(
        self,
        factory: str = "shimmy_jupyter.engine.llama:LlamaBackend",
        *,
        hang_seconds: float = 60.0,
        load_seconds: float = 600.0,
    ) -> None:
        self._factory = factory
        self._hang_seconds, self._load_seconds = hang_seconds, load_seconds
        self._child: _Child | None = None
        self._changes: list[SlotChange] = []
        self._unsaved: tuple[int, ...] = ()
        self._number = 0
        self._stepping = 0
        """The number of the step in progress, 0 between steps."""
        self._gone = _UNLOADED
        """Why there is no child: one that was lost may be unloaded before all who use it have heard of it."""

    @property
    def pid(self) -> int | None:
        """The child's process, None where none is running."""
        return self._child.pid if self._child is not None else None

    def load(self, spec: LoadSpec) -> ModelFacts:
        if not _POSIX:
            raise Misconfigured('ShimmyEngine.isolation = "process" needs Linux or macOS')
        if self._child is not None:
            self._child.check()
            raise ModelLoadFailed("this backend has loaded a model already")
        self._child = child = _Child(self._factory, Path(spec.path).parent)
        self._changes.clear()
        try:
            with child.working:
                return child.ask(
                    child.work, calls.Load(spec), ModelFacts, self._load_seconds, wire.MAX_REPLY
                )
        except EngineLost:
            raise  # stays, to say so again
        except BaseException:
            self.unload()
            raise

    def unload(self) -> None:
        child = self._child
        if child is not None:
            self._gone = child.why or _UNLOADED
        self._child = None
        self._changes.clear()
        if child is not None:
            child.end()

    def tokenize(self, text: str) -> tuple[int, ...]:
        child = self._running()
        with child.reading:
            found = child.ask(
                child.side, calls.Tokenize(text), calls.Tokens, self._hang_seconds, wire.MAX_REPLY
            )
        return found.tokens

    def detokenize(self, tokens: tuple[int, ...]) -> bytes:
        child = self._running()
        with child.reading:
            found = child.ask(
                child.side, calls.Detokenize(tokens), calls.Text, self._hang_seconds, wire.MAX_REPLY
            )
        return found.text

    def tokenize_inputs(self, inputs: tuple[tuple[str, ...], ...]) -> tuple[tuple[int, ...], ...]:
        child = self._running()
        request = calls.TokenizeInputs(inputs)
        with child.reading:
            found = child.ask(
                child.side, request, calls.TokenLists, self._hang_seconds, wire.MAX_REPLY
            )
        if len(found.lists) != len(inputs):
            raise child.lost("tokenized other texts than it was asked to")
        return found.lists

    def compile(self, constraint: Constraint) -> None:
        child = self._running()
        request = calls.Compile(constraint)
        with child.reading:
            child.ask(child.side, request, calls.Done, self._hang_seconds, wire.MAX_STEP_REPLY)

    def check(self) -> None:
        child = self._running()
        if child.pid is None:
            raise child.lost()

    def load_adapter(self, path: str) -> None:
        child = self._running()
        request = calls.LoadAdapter(path)
        with child.working:
            child.ask(child.work, request, calls.Done, self._load_seconds, wire.MAX_STEP_REPLY)

    def apply(self, change: SlotChange) -> None:
        self._running()
        self._changes.append(change)
        if len(self._changes) >= _MOST_CHANGES:
            self._carry_out()

    def flush(self) -> tuple[int, ...]:
        if self._changes:
            self._carry_out()
        found, self._unsaved = self._unsaved, ()
        return found

    def _carry_out(self) -> None:
        self._unsaved += self._work(self._running(), calls.Work(0, self._taken())).unsaved

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        child = self._running()
        self._number += 1
        work = calls.Work(self._number, self._taken(), step, threads, limit)
        result = self._work(child, work, limit or 0.0)
        if not wire.answers(step, result):
            raise child.lost("answered for other sequences than it was asked to")
        if self._unsaved and not result.aborted:
            result = replace(result, unsaved=self._unsaved + result.unsaved)
            self._unsaved = ()
        return result

    def embed(self, rows: tuple[Row, ...], threads: int, limit: float | None = None) -> Embedded:
        child = self._running()
        self._number += 1
        request = calls.Embed(self._number, rows, threads, limit)
        seconds = self._hang_seconds + (limit or 0.0)
        with child.working:
            self._stepping = request.number
            try:
                found = child.ask(child.work, request, Embedded, seconds, wire.MAX_REPLY)
            finally:
                self._stepping = 0
        if not found.aborted and len(found.vectors) != sum(row.sample for row in rows):
            raise child.lost("made vectors of other texts than it was asked to")
        return found

    def abort(self) -> None:
        child, number = self._child, self._stepping
        if child is not None and number:
            child.side.send_now(wire.encode(calls.Abort(number)))

    def _running(self) -> _Child:
        child = self._child
        if child is None:
            raise EngineLost(self._gone)
        child.check()
        return child

    def _taken(self) -> tuple[SlotChange, ...]:
        taken, self._changes = tuple(self._changes), []
        return taken

    def _work(self, child: _Child, work: calls.Work, limit: float = 0.0) -> StepResult:
        with child.working:
            self._stepping = work.number
            try:
                seconds = self._hang_seconds + limit
                return child.ask(child.work, work, StepResult, seconds, wire.MAX_STEP_REPLY)
            finally:
                self._stepping = 0


class _Child:
    """One run of the child: its process, its sockets, and what it said last."""

    def __init__(self, factory: str, models: Path) -> None:
        self.working = threading.Lock()
        self.reading = threading.Lock()
        self._ending = threading.Lock()
        self._why: str | None = None
        pairs = socket.socketpair(), socket.socketpair()
        try:
            self._process = _start(factory, [theirs.fileno() for _, theirs in pairs])
        except BaseException:
            for ours, _ in pairs:
                ours.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        self.work, self.side = (Channel(ours) for ours, _ in pairs)
        assert self._process.stderr is not None
        self._stderr = LastWords(self._process.stderr, models)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process.poll() is None else None

    @property
    def why(self) -> str | None:
        """Why it is lost, None where it is not."""
        return self._why

    def check(self) -> None:
        if self._why is not None:
            raise EngineLost(self._why)

    def ask(self, channel: Channel, request: object, kind: type[T], seconds: float, most: int) -> T:
        """The answer, or the error that the child answers with. Anything else loses the child."""
        self.check()
        frame = wire.encode(request)
        deadline = time.monotonic() + seconds
        try:
            channel.send(frame, deadline)
            found = wire.reply(channel.receive(most, deadline), kind)
        except TimeoutError:
            raise self.lost(f"did not answer for {seconds:g} seconds and was stopped") from None
        except WireError as error:
            raise self.lost(f"sent what cannot be understood ({error}) and was stopped") from None
        except (EOFError, OSError):
            raise self.lost() from None
        except BaseException:
            # Its answer would be taken for that of the next question.
            self.lost("was stopped amid its work")
            raise
        if not isinstance(found, calls.Failed):
            return found
        if isinstance(found.error(), EngineLost):
            raise self._ended(found.message)
        raise found.error()  # by no name: its traceback has this frame

    def lost(self, why: str | None = None) -> EngineLost:
        """End it, if it has not ended. `why` completes a sentence; without it, how it ended does."""
        return self._ended(None if why is None else f"the engine's process {why}")

    def _ended(self, why: str | None) -> EngineLost:
        with self._ending:
            if self._why is None:
                self._why = why or self._how_it_ended()
                self._kill()
                log.warning("%s", self._why)
            return EngineLost(self._why)

    def _how_it_ended(self) -> str:
        """Its sockets close a moment before the process can be waited for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        code = self._process.poll()
        if code is None:
            return "the engine's process closed its connection and was stopped"
        self._stderr.join(1.0)
        return f"the engine's process {ending(code, self._stderr.last)}"

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self._stderr.join(1.0)
        # Whoever still waits for an answer wakes, even where somebody else holds the other end.
        self.work.shut()
        self.side.shut()

    def end(self) -> None:
        """Ask it to end, and see to it that it does."""
        with self._ending:
            lost, self._why = self._why, self._why or _UNLOADED
            # While somebody waits for an answer nothing can be asked.
            if lost is None and self.working.acquire(blocking=False):
                try:
                    self._ask_to_end(time.monotonic() + _GRACE)
                finally:
                    self.working.release()
            self._kill()
        with self.working:
            self.work.close()
        with self.reading:
            self.side.close()

    def _ask_to_end(self, deadline: float) -> None:
        with contextlib.suppress(EOFError, OSError, WireError, subprocess.TimeoutExpired):
            self.work.send(wire.encode(calls.Unload()), deadline)
            self.work.receive(wire.MAX_STEP_REPLY, deadline)
            self._process.wait(max(0.0, deadline - time.monotonic()))


def _start(factory: str, descriptors: list[int]) -> subprocess.Popen[bytes]:
    # -P: what lies in the working directory is not to be imported.
    command = [sys.executable, "-P", "-m", "shimmy_jupyter.engine.child"]
    level = logging.getLogger("shimmy_jupyter").getEffectiveLevel()
    try:
        return subprocess.Popen(  # noqa: S603  our own module
            [*command, *map(str, descriptors), factory, str(level)],
            pass_fds=descriptors,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a ctrl-C for the server is none for it
        )
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelLoadFailed(f"the engine's process does not start: {reason}") from error
