"""What becomes of a process that loads these bytes, found out in one that nobody needs.

The first time that a model's bytes are seen they are loaded, tokenized with and one token is decoded
in a child process: with limits of memory and time, an environment of the caller's making, and
confined as far as the system can (`engine/confine.py`). A crash, an illegal instruction and a hang
are verdicts, and remembered.

It finds files that break the engine. Whoever gets to run code in the child can have it say "ok": then
its bytes are as dangerous as they are without a probe.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .probe_child import STAGES, Child
from .probe_verdict import ABOUT_THE_BYTES, Notes, Outcome, Verdict, plain

__all__ = ["ALLOWANCE_BYTES", "STAGES", "Outcome", "Prober", "Verdict", "engine_build"]

log = logging.getLogger("shimmy_jupyter.probe")

ALLOWANCE_BYTES = 1 << 30
"""For what loading takes beside what the model needs: most of all its vocabulary, in llama.cpp and in
Python. With one of 300,000 tokens it is 140 MiB. What Python and its libraries had before is free.
"""
_BYTES_A_SECOND = 32 << 20
_CONTEXT_TOKENS = 512
_THREADS = 2
_KEY = re.compile(r"[0-9a-f]{64}")
_PROCESSOR = re.compile(
    r"vendor_id|model name|cpu family|model|stepping|flags|features|isa|uarch|cpu"
    r"|cpu (?:implementer|architecture|variant|part|revision)",
    re.IGNORECASE,
)


def never() -> bool:
    return False


def ignored(stage: str) -> None:
    pass


class Prober:
    """Probes, and remembers verdicts by the bytes' SHA-256 and the engine's `build`: in `folder`, made
    where it is missing, or in memory where that is None.

    A child has `wall_seconds` and another for each 32 MiB of its files, as a slow disk is not their
    fault; as much processor time; and `allowance_bytes` of memory beside what the model needs. Its
    environment is `environment` and nothing else. `clock` is in seconds since 1970. Any thread may call.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        build: str,
        environment: Mapping[str, str],
        command: Sequence[str] = (sys.executable, "-P", "-m", "shimmy_jupyter.engine.vet"),
        wall_seconds: float = 300.0,
        allowance_bytes: int = ALLOWANCE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._notes = Notes(folder, build)
        self._environment = dict(environment)
        self._command = tuple(command)
        self._wall_seconds = wall_seconds
        self._allowance_bytes = allowance_bytes
        self._clock = clock

    def known(self, key: str) -> Verdict | None:
        """The verdict on these bytes with this build; None where there is none."""
        return self._notes.read(_digest(key))

    def forget(self, key: str) -> None:
        """Raises OSError where the folder cannot be written to."""
        self._notes.remove(_digest(key))

    def probe(
        self,
        key: str,
        files: Sequence[Path],
        memory_bytes: int,
        *,
        adapter: Path | None = None,
        cancelled: Callable[[], bool] = never,
        stage: Callable[[str], None] = ignored,
    ) -> Verdict:
        """Try a model of these files, the first part first, and with it the adapter, if there is one.

        `key` stands for the bytes of all of them; `memory_bytes` is what the model needs. Blocks
        until the child has ended, and calls `stage` with each of `STAGES` that it comes to. Raises
        `Cancelled` soon after `cancelled()` is true. What has to do with the bytes is remembered.
        """
        _digest(key)
        if not files or memory_bytes < 0:
            raise ValueError("files must begin with the model's first, memory_bytes be at least 0")
        every = [path.absolute() for path in (*files, *([adapter] if adapter else ()))]
        try:
            before = _stamps(every)
            found, about_the_bytes = self._tried(every, adapter, memory_bytes, cancelled, stage)
            if _stamps(every) != before:
                found, about_the_bytes = _failed("its file changed meanwhile"), False
        except OSError as error:
            reason = error.strerror or type(error).__name__
            found, about_the_bytes = _failed(f"it cannot be tried: {reason}"), False
        verdict = Verdict(**found, at=int(self._clock()))
        level = logging.INFO if verdict.ok else logging.WARNING
        name = plain(every[0].name)
        log.log(level, "the probe of %s: %s %s", name, verdict.outcome, verdict.reason)
        if about_the_bytes:
            self._notes.write(key, verdict)
        return verdict

    def _tried(
        self,
        files: Sequence[Path],
        adapter: Path | None,
        memory_bytes: int,
        cancelled: Callable[[], bool],
        stage: Callable[[str], None],
    ) -> tuple[dict[str, Any], bool]:
        """The fields of a `Verdict`, and whether they are about the bytes. Raises OSError."""
        if os.name != "posix":
            return _failed("it needs Linux or macOS"), False
        size = sum(path.stat().st_size for path in files)
        seconds = self._wall_seconds + size / _BYTES_A_SECOND
        cpu_seconds, memory = math.ceil(seconds), memory_bytes + self._allowance_bytes
        models = files[:-1] if adapter else files
        request = {
            "model": str(models[0]),
            "parts": [str(path) for path in models[1:]],
            "adapter": str(files[-1]) if adapter else None,
            "context_tokens": _CONTEXT_TOKENS,
            "threads": _THREADS,
            "memory_bytes": memory,
            "cpu_seconds": cpu_seconds,
            "parent": os.getpid(),
        }
        with Child(self._command, self._environment, request, stage) as child:
            ending = child.run(seconds, cancelled)
        folders = [str(path.parent) for path in files]
        found = child.judged(ending, cpu_seconds, memory, folders)
        return found, found["outcome"] in ABOUT_THE_BYTES


def engine_build(
    package: str = "llama_cpp",
    distribution: str = "llama-cpp-python",
    cpuinfo: Path = Path("/proc/cpuinfo"),
) -> str:
    """What a verdict depends on beside the bytes, as 64 hexadecimal digits: the binding's version,
    its native libraries' sizes and times, the processor and what it can do. Nothing is imported.
    """
    said = "\n".join([_version(distribution), *_libraries(package), *_processor(cpuinfo)])
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libraries(package: str) -> Iterator[str]:
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        for path in sorted(Path(folder).rglob("*")):
            if {".so", ".dylib", ".dll", ".pyd"} & set(path.suffixes) and path.is_file():
                facts = path.stat()
                yield f"{path.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}"


def _processor(cpuinfo: Path) -> list[str]:
    """Of all processors together, each thing once."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [f"cpu: {platform.processor()}"]
    told = {line for line in lines if _PROCESSOR.fullmatch(line.partition(":")[0].strip())}
    return [platform.machine(), *sorted(told)]


def _digest(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError("key must be 64 hexadecimal digits, the SHA-256 of the bytes")
    return key


def _failed(reason: str) -> dict[str, Any]:
    return {"outcome": "failed", "reason": reason}


def _stamps(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """What changes with a file. Raises OSError, also where it is none."""
    found = []
    for path in files:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(0, "it is no regular file")
        found.append((facts.st_ino, facts.st_size, facts.st_mtime_ns))
    return found
