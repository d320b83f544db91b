"""Backends for tests of the engine's process: each does one thing that a native library might.

Those that go wrong amid a call first say so, by a line in the FIFO that is their model's path.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from shimmy_jupyter.core.messages import OpenSlot, Sampled, SlotChange, Step
from shimmy_jupyter.engine.backend import LoadSpec, StepResult
from shimmy_jupyter.errors import EngineCrashed, EngineLost, ModelLoadFailed
from shimmy_jupyter.types import ModelFacts

FACTS = ModelFacts(
    architecture="scripted",
    description="",
    parameters=0,
    size_bytes=0,
    context_size=4096,
    kv_tokens=1 << 16,
    vocabulary=1000,
    chat_template=None,
)


class Good:
    """Samples each slot's count of changes; tokenizes to bytes."""

    def __init__(self) -> None:
        self.path = ""
        self.changes: dict[int, int] = {}
        self.aborted = threading.Event()
        self.unloads = 0

    def load(self, spec: LoadSpec) -> ModelFacts:
        self.path = spec.path
        return FACTS

    def unload(self) -> None:
        self.unloads += 1

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def apply(self, change: SlotChange) -> None:
        slot = getattr(change, "slot", 0)
        if isinstance(change, OpenSlot) and change.recent == (13,):
            raise EngineCrashed("thirteen")
        self.changes[slot] = self.changes.get(slot, 0) + 1

    def flush(self) -> tuple[int, ...]:
        """The sum of all changes."""
        return (sum(self.changes.values()),)

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        asked = [row.slot for row in step.rows if row.sample]
        sampled = [
            Sampled(slot, self.changes.get(slot, 0), bytes([255, slot]), end_of_generation=False)
            for slot in asked
        ]
        return StepResult(tuple(sampled), float(threads))

    def abort(self) -> None:
        self.aborted.set()

    def say(self) -> None:
        Path(self.path).write_text("here\n")


class Waits(Good):
    """Each step, and each tokenization of "wait", lasts until it is aborted."""

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        self.aborted.clear()
        self.say()
        self.aborted.wait()
        return StepResult((), 1.0, aborted=True)

    def tokenize(self, text: str) -> tuple[int, ...]:
        if text == "wait":
            self.say()
            threading.Event().wait()
        return super().tokenize(text)


class Forgets(Waits):
    """Forgets an abort that comes before its step is under way, and is told while it starts."""

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        self.say()
        self.aborted.wait()
        self.aborted.clear()
        self.aborted.wait()
        return StepResult((), 1.0, aborted=True)


class Deaf(Good):
    """Its steps last until they are released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        self.released.wait()
        return StepResult((), 1.0)


class Fails(Good):
    def __init__(self, *, lost: bool = False) -> None:
        super().__init__()
        self.lost = lost

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        raise (EngineLost if self.lost else EngineCrashed)("no room")

    def tokenize(self, text: str) -> tuple[int, ...]:
        raise EngineCrashed("no words")


def loses() -> Fails:
    return Fails(lost=True)


class Defective(Good):
    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        raise ValueError("a defect with a secret in it")


class Refuses(Good):
    def load(self, spec: LoadSpec) -> ModelFacts:
        raise ModelLoadFailed("llama.cpp refused the file: no tensors")


class Surprises(Good):
    def load(self, spec: LoadSpec) -> ModelFacts:
        raise ValueError("what nobody foresaw")


def cannot_be_made() -> NoReturn:
    raise RuntimeError("no such library")


class Ends(Good):
    """Its end is the model's file name: in a step, or in loading where that begins with "load-"."""

    def load(self, spec: LoadSpec) -> ModelFacts:
        found = super().load(spec)
        name = Path(spec.path).name
        if name.startswith("load-"):
            self.end(name.removeprefix("load-"))
        return found

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        self.end(Path(self.path).name)

    def tokenize(self, text: str) -> tuple[int, ...]:
        self.end(text)

    def end(self, how: str) -> NoReturn:
        if how == "exit":
            sys.exit(3)
        if how == "assert":
            os.write(2, f"{Path(self.path).parent}/ggml.c:1: GGML_ASSERT(a/b) failed\n".encode())
            how = "SIGABRT"
        logging.getLogger("shimmy_jupyter.native").info("ending with %s", how)
        if how == "SIGABRT":
            os.abort()
        os.kill(os.getpid(), signal.Signals[how])
        threading.Event().wait()  # another thread may be the one that it reaches
        raise AssertionError


class Tells(Good):
    """Describes its process."""

    def load(self, spec: LoadSpec) -> ModelFacts:
        import resource

        told = {
            "environment": list(os.environ),
            "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),  # noqa: PTH208
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "session": os.getsid(0) == os.getpid(),
            "interrupt": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
            "safe_path": sys.flags.safe_path,
        }
        return ModelFacts("", json.dumps(told), 0, 0, 1, 1, 1, None)


class Babbles(Good):
    """Writes what is in the model's file into its work socket, instead of an answer."""

    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        os.write(int(sys.argv[1]), Path(self.path).read_bytes())
        threading.Event().wait()
        raise AssertionError


class Lies(Good):
    def step(self, step: Step, threads: int, limit: float | None = None) -> StepResult:
        return StepResult((Sampled(7, 1, b"", end_of_generation=False),), 0.0)
