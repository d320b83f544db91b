"""One child of the probe: started, listened to, ended, and judged. See probe.py and engine/vet.py.

Nothing that it says, does or leaves behind holds the caller up for longer than the time it is given,
and nothing of it stays: no process, no descriptor. Only where seccomp does not forbid to fork can
something survive, by leaving the process group.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ..errors import Cancelled
from .probe_verdict import Garbled, Outcome, facts, json_object, mechanisms, plain

log = logging.getLogger("shimmy_jupyter.probe")

STAGES = ("confined", "loading", "loaded", "decoding")
"""What a child says of itself, in this order. From "loading" on its end is about the bytes."""

_TICK = 0.05
_GRACE = 5.0
_MOST_SAID = 1 << 14
_MOST_NOISE = 4 << 20
_TAIL = 1 << 13
_CHUNK = 1 << 16
_MAY_SAY: tuple[Outcome, ...] = ("refused", "out_of_memory", "failed")
"""Beside "ok"."""
_SHORT = re.compile(
    r"bad_alloc|allocat|memoryerror|insufficient memory|out of memory|thread creation|mem_buffer",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the child ended: its exit code, or minus a signal; None where nobody knows, or where we
    ended it, and then `outcome` and `reason` are why. `cpu_seconds` are all its threads'.
    """

    code: int | None = None
    cpu_seconds: float = 0.0
    outcome: Outcome = "failed"
    reason: str = "ended, nobody knows how"


class Child:
    """A process that was asked `request`, with this environment and nothing else. Leaving the block
    ends it.

    `stage` is called with each stage that it comes to. Raises OSError where it does not start.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        request: Mapping[str, object],
        stage: Callable[[str], None],
    ) -> None:
        self.stages: list[str] = []
        self.confined: tuple[str, ...] = ()
        self.result: dict[str, Any] | None = None
        """What it says itself of how it went: fields of a `Verdict`."""
        self._stage = stage
        self._said = self._noise = b""
        self._said_bytes = self._noise_bytes = 0
        self._ending: Ending | None = None
        self._messages, theirs = os.pipe()
        try:
            self._process = _started([*command, str(theirs)], environment, request, theirs)
        except BaseException:
            os.close(self._messages)
            raise
        finally:
            os.close(theirs)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._heeding = {self._messages: self._hear, self._output.fileno(): self._overhear}
        for descriptor in self._heeding:
            os.set_blocking(descriptor, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _GRACE
        while self._ended() is None and time.monotonic() < deadline:
            select.select([], [], [], _TICK / 10)
        if self._ending is None:
            log.warning("the probe's process %d was killed, but does not end", self._process.pid)
        os.close(self._messages)
        self._output.close()

    def run(self, seconds: float, cancelled: Callable[[], bool]) -> Ending:
        """Listen until it ends, its time is over, or it talks nonsense. Raises `Cancelled`."""
        deadline = time.monotonic() + seconds
        try:
            while (ending := self._ended()) is None:
                if cancelled():
                    raise Cancelled("the probe was cancelled")
                if time.monotonic() >= deadline:
                    reason = f"was stopped after {seconds:.0f} seconds"
                    return Ending(outcome="hung", reason=reason)
                self._listen(_TICK)
            # What there is; somebody it started may hold the other end, and say more for ever.
            while self._listen(0.0):
                pass
        except Garbled as error:
            return Ending(outcome="crashed", reason=f"was stopped, as it sent {error}")
        return ending

    def _ended(self) -> Ending | None:
        if self._ending is None:
            try:
                pid, status, used = os.wait4(self._process.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                self._ending, self._process.returncode = Ending(), -int(signal.SIGKILL)
            else:
                if pid:
                    code = self._process.returncode = os.waitstatus_to_exitcode(status)
                    self._ending = Ending(code, used.ru_utime + used.ru_stime)
        return self._ending

    # What it says

    def _listen(self, seconds: float) -> bool:
        """Whether there was anything. Raises `Garbled`."""
        poll = select.poll()
        for descriptor in self._heeding:
            poll.register(descriptor, select.POLLIN)
        ready = poll.poll(seconds * 1000)
        for descriptor, _ in ready:
            data = os.read(descriptor, _CHUNK)
            if data:
                self._heeding[descriptor](data)
            else:
                del self._heeding[descriptor]
        return bool(ready)

    def _overhear(self, data: bytes) -> None:
        self._noise_bytes += len(data)
        self._noise = (self._noise + data)[-_TAIL:]
        if self._noise_bytes > _MOST_NOISE:
            raise Garbled("megabytes of complaints")

    def _hear(self, data: bytes) -> None:
        self._said_bytes += len(data)
        *lines, self._said = (self._said + data).split(b"\n")
        # First what it has said, as the same words may come in more or fewer pieces.
        for line in lines:
            self._heed(json_object(line))
        if self._said_bytes > _MOST_SAID:
            raise Garbled("more than it has to say")

    def _heed(self, message: Mapping[str, Any]) -> None:
        if self.result is not None:
            raise Garbled("more after its result")
        if "stage" not in message:
            self.result = self._checked(message)
            return
        due = STAGES[len(self.stages) : len(self.stages) + 1]
        if [message["stage"]] != [*due]:
            raise Garbled("another stage than the next one")
        if due == ("confined",):
            self.confined = mechanisms(message.get("by"))
        self.stages += due
        self._stage(*due)

    def _checked(self, message: Mapping[str, Any]) -> dict[str, Any]:
        outcome, reason = message.get("outcome"), message.get("reason")
        if outcome == "ok" and self.stages == [*STAGES]:
            return {"outcome": outcome, "reason": "", **facts(message.get("facts"))}
        if outcome not in _MAY_SAY or not isinstance(reason, str):
            raise Garbled("no result that it can have")
        return {"outcome": outcome, "reason": reason if plain(reason) else "it gave no reason"}

    # What it comes to

    def judged(
        self, ending: Ending, cpu_seconds: int, memory_bytes: int, folders: Sequence[str]
    ) -> dict[str, Any]:
        """The fields of a `Verdict`: what it said, where it ended well, else how it ended."""
        if ending.code == 0 and self.result is not None:
            found = dict(self.result)
        else:
            outcome, how = _how(ending, cpu_seconds, self._last_words(folders))
            found = {"outcome": outcome, "reason": f"its process {how}"}
        if "loading" not in self.stages and found["outcome"] != "failed":
            found = {"outcome": "failed", "reason": f"before it read the file {found['reason']}"}
        if found["outcome"] == "out_of_memory":
            found["reason"] = (
                f"{memory_bytes / 1e9:.1f} GB of memory were not enough: {found['reason']}"
            )
        return {**found, "reason": plain(found["reason"], folders), "confined": self.confined}

    def _last_words(self, folders: Sequence[str]) -> str:
        """What it complained of last, in brief."""
        lines = self._noise.decode("utf-8", "replace").splitlines()
        return next((said for line in reversed(lines) if (said := plain(line, folders))), "")


def _started(
    command: Sequence[str], environment: Mapping[str, str], request: object, messages: int
) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as asked:  # a pipe that nobody reads could hold us up
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        return subprocess.Popen(  # noqa: S603  the caller's own command
            command,
            pass_fds=[messages],
            env=dict(environment),
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to be killed with whatever it starts
        )


_SIGNALS: dict[str, tuple[Outcome, str]] = {
    "SIGILL": ("illegal_instruction", "used an instruction that this processor lacks (SIGILL)"),
    "SIGKILL": ("out_of_memory", "was killed (SIGKILL)"),
    "SIGABRT": ("crashed", "gave up (SIGABRT)"),
    "SIGSEGV": ("crashed", "crashed (SIGSEGV)"),
    "SIGBUS": ("crashed", "could not read its memory (SIGBUS)"),
    "SIGFPE": ("crashed", "failed in arithmetic (SIGFPE)"),
    "SIGTRAP": ("crashed", "crashed (SIGTRAP)"),
    "SIGSYS": ("crashed", "tried what it must not (SIGSYS)"),
}
"""By whom others are sent, and why, has nothing to do with the bytes."""


def _how(ending: Ending, cpu_seconds: int, said: str) -> tuple[Outcome, str]:
    """What a process that did not come to a result has come to; the words follow "its process"."""
    code = ending.code
    if code is None:
        return ending.outcome, ending.reason
    name = {one.value: one.name for one in signal.Signals}.get(-code, f"signal {-code}")
    told = f": {said}" if said and (code >= 0 or name == "SIGABRT") else ""
    if told and _SHORT.search(told):
        return "out_of_memory", f"gave up{told}"
    if code >= 0:
        return "crashed", f"ended with exit code {code}{told}"
    if name == "SIGXCPU" or (name == "SIGKILL" and ending.cpu_seconds >= cpu_seconds):
        return "hung", f"was stopped after {cpu_seconds} seconds of computing"
    outcome, words = _SIGNALS.get(name, ("failed", f"was ended by {name}"))
    return outcome, f"{words}{told}"
