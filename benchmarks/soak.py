"""A randomised soak: what must hold however requests come, go, wait and are killed.

    python benchmarks/soak.py [--minutes 10] [--seed N] [--isolation process] [--model PATH]

Requests of several people arrive at random: with beginnings in common, with and without
`reproducible` and deadlines; some are cancelled, some read slowly. With processes, the engine's is
killed now and then during the first half. In the end each request has ended exactly once, nobody
has a sequence left, and memory, threads and descriptors are level; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import re
import signal
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))

import prompts

from shimmy_jupyter.compose import build_service
from shimmy_jupyter.config import Settings
from shimmy_jupyter.engine.stream import TokenStream
from shimmy_jupyter.engine.worker import Engine
from shimmy_jupyter.errors import DeadlineExceeded, EngineCrashed, QueueFull
from shimmy_jupyter.models.quarantine import WINDOW, Quarantine
from shimmy_jupyter.models.sources import Places, Scanner
from shimmy_jupyter.service import CompletionService
from shimmy_jupyter.types import CompletionRequest, Ended, Principal, Sampling

OUTCOMES = ("ok", "cancelled", "deadline", "crashed", "refused")
REPORT_SECONDS = 15.0
WARM_SECONDS = 60.0
GROWTH = 0.05
HELPERS = 6
"""Threads that the event loop may add to its pool later on."""
KILL_SECONDS = 10.0
CAPACITY = 16
"""Pieces of text that may be unread: so few that slow readers hold their sequences up."""
OPEN = 90
"""Requests open at once, at most: more than there are places, so that some are refused."""


@dataclass(frozen=True)
class Plan:
    """One request, decided before it starts."""

    request: CompletionRequest
    cancel_after: float | None
    read_pause: float


@dataclass(frozen=True)
class Usage:
    """Of a process."""

    memory: int
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        process = psutil.Process(pid)
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_threads(), process.num_fds())


@dataclass
class Life:
    """A process: as it was idle at first, when it was warm, and last."""

    began: float
    first: Usage
    warm: Usage
    last: Usage

    @property
    def growth(self) -> float:
        return self.last.memory / self.warm.memory - 1


@dataclass
class Report:
    started: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    problems: list[str] = field(default_factory=list)
    """What does not hold of requests and sequences."""
    lives: dict[str, Life] = field(default_factory=dict)

    @property
    def growing(self) -> list[str]:
        """What does not hold of the processes."""
        found = []
        for name, life in self.lives.items():
            if life.growth >= GROWTH:
                found.append(f"{name}: memory grew by {life.growth:.1%}")
            if life.last.threads > life.first.threads + HELPERS:
                found.append(f"{name}: {life.first.threads} threads became {life.last.threads}")
            if life.last.descriptors > life.first.descriptors:
                now = life.last.descriptors
                found.append(f"{name}: {life.first.descriptors} descriptors became {now}")
        return found


class Soak:
    """`run` once."""

    def __init__(self, service: CompletionService, model: str, *, seed: int, kills: bool) -> None:
        self.service = service
        self.report = Report()
        self._model = model
        self._random = Random(seed)
        self._kills = kills
        # A byte for each stream, and streams weakly: what the soak itself holds on to would look like a leak.
        self._ends = bytearray()
        """How often each has ended."""
        self._streams: weakref.WeakSet[TokenStream] = weakref.WeakSet()
        self._serials: weakref.WeakKeyDictionary[TokenStream, int] = weakref.WeakKeyDictionary()
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._shared = [prompts.text(120 + 40 * i, f"shared {seed} {i}") for i in range(6)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._end_came = asyncio.Event()
        self._began = 0.0

    async def run(self, seconds: float) -> Report:
        with self._counting_ends():
            await self._one(self._warm_up())
            self._began = time.monotonic()
            self._note("server", os.getpid())
            helpers = [
                asyncio.create_task(self._report_progress()),
                asyncio.create_task(self._measure(seconds)),
            ]
            if self._kills:
                helpers.append(asyncio.create_task(self._kill(seconds / 2)))
            try:
                await self._arrivals(seconds)
                await asyncio.gather(*self._tasks)
                await self._all_ended()
            finally:
                for task in (*helpers, *self._tasks):
                    task.cancel()
                await asyncio.gather(*helpers, *self._tasks, return_exceptions=True)
        self._check()
        gc.collect()
        self._look()
        return self.report

    # Requests

    def _warm_up(self) -> Plan:
        request = CompletionRequest("first", Principal("ann"), self._model, "first", 4)
        return Plan(request, None, 0.0)

    def _plan(self, number: int) -> Plan:
        random = self._random
        reproducible = random.random() < 0.04
        beginning = random.choice(self._shared) if random.random() < 0.6 else ""
        prompt = beginning + prompts.text(random.randrange(4, 200), f"own {number}")
        most = random.choice((1, 8, 32, 32, 64, 64, 200))
        return Plan(
            CompletionRequest(
                str(number),
                Principal(random.choice(("ann", "ben", "ben", "cat", "cat", "cat", "dan"))),
                self._model,
                prompt,
                0 if random.random() < 0.01 else most,
                Sampling(seed=number, temperature=random.choice((0.0, 0.8))),
                ("7",) if random.random() < 0.1 else (),
                reproducible=reproducible,
                max_seconds=random.uniform(0.01, 2.0) if random.random() < 0.1 else None,
            ),
            random.expovariate(2.0) if random.random() < 0.25 else None,
            random.uniform(0.05, 0.5) if random.random() < 0.15 else 0.0,
        )

    async def _arrivals(self, seconds: float) -> None:
        """Bursts and lulls, about as much as can be answered and sometimes too much."""
        for number in itertools.count():
            if time.monotonic() - self._began > seconds:
                return
            lull = self._random.random() < 0.02
            pause = 1.0 if lull else self._random.choice((0.0, 0.02, 0.05, 0.1, 0.3))
            plan = self._plan(number)
            if len(self._tasks) < OPEN:
                task = asyncio.create_task(self._one(plan))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(pause)

    async def _one(self, plan: Plan) -> None:
        self.report.started += 1
        try:
            outcome = await self._outcome(plan)
        except Exception as defect:  # noqa: BLE001  nothing else may happen, so it is reported
            outcome = f"{type(defect).__name__}: {defect}"
        self.report.outcomes[outcome] += 1

    async def _outcome(self, plan: Plan) -> str:
        try:
            async with asyncio.timeout(plan.cancel_after):
                await self._read(plan)
        except TimeoutError:
            return "cancelled"
        except DeadlineExceeded:
            return "deadline"
        except EngineCrashed as error:
            if not re.search(r"\(SIG[A-Z]+\)", error.message):
                raise  # nobody has done that
            return "crashed"
        except QueueFull:
            return "refused"
        return "ok"

    async def _read(self, plan: Plan) -> None:
        async with await self.service.start(plan.request) as completion:
            for stream in completion.streams:
                self._streams.add(stream)
                self._serial(stream)
                assert isinstance(stream._upstream, Engine)
                self._engines.add(stream._upstream)
            while await completion.read():
                if plan.read_pause:
                    await asyncio.sleep(plan.read_pause)

    # Accounting

    def _serial(self, stream: TokenStream) -> int:
        if stream not in self._serials:
            self._serials[stream] = len(self._ends)
            self._ends.append(0)
        return self._serials[stream]

    @contextlib.contextmanager
    def _counting_ends(self) -> Iterator[None]:
        original = TokenStream.deliver

        def deliver(stream: TokenStream, item: Any) -> None:
            if isinstance(item, Ended):
                self._ends[self._serial(stream)] += 1
                self._end_came.set()
            original(stream, item)

        TokenStream.deliver = deliver  # type: ignore[method-assign]
        try:
            yield
        finally:
            TokenStream.deliver = original  # type: ignore[method-assign]

    async def _all_ended(self) -> None:
        """What was cancelled ends within the step in progress."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(30):
                while any(stream.ended is None for stream in list(self._streams)):
                    self._end_came.clear()
                    await self._end_came.wait()

    def _check(self) -> None:
        report, say = self.report, self.report.problems.append
        unknown = {what: n for what, n in report.outcomes.items() if what not in OUTCOMES}
        if unknown:
            say(f"ended as nothing should: {unknown}")
        if report.outcomes.total() != report.started:
            say(f"{report.started} requests, {report.outcomes.total()} outcomes")
        wrong = Counter(self._ends)
        wrong.pop(1, None)
        if wrong:
            say(f"streams by how often they ended: {dict(wrong)}")
        for engine in list(self._engines):
            scheduler = engine.scheduler
            try:
                scheduler.check_invariants()
            except AssertionError as broken:
                say(f"an invariant does not hold: {broken!r}")
            if scheduler.sequences or engine.active:
                say(f"left over: {scheduler!r}, {engine.active} streams")

    # Processes

    def _child(self) -> int | None:
        for model in self.service.pool.loaded():
            pid = getattr(model.engine.backend, "pid", None)
            if model.failure is None and pid is not None:
                return int(pid)
        return None

    async def _kill(self, until: float) -> None:
        while True:
            pause = self._random.expovariate(1 / KILL_SECONDS)
            if time.monotonic() - self._began + pause > until:
                return
            await asyncio.sleep(pause)
            pid = self._child()
            if pid is not None:
                self.report.kills += 1
                os.kill(pid, self._random.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)))

    async def _measure(self, seconds: float) -> None:
        """Each process is warm after a minute, or half of what is left where that is less."""
        warm: dict[str, float] = {}
        while True:
            self._look()
            for name, life in self.report.lives.items():
                rest = seconds - life.began
                due = warm.setdefault(name, life.began + min(WARM_SECONDS, rest / 2))
                if time.monotonic() - self._began <= due:
                    life.warm = life.last
            await asyncio.sleep(0.5)

    def _look(self) -> None:
        for model in self.service.pool.loaded():
            model.engine._stream_capacity = CAPACITY
        self._note("server", os.getpid())
        if (pid := self._child()) is not None:
            self._note(f"engine {pid}", pid)
            # Only the last one lives to the end.
            for name in [n for n in self.report.lives if n not in ("server", f"engine {pid}")]:
                del self.report.lives[name]

    def _note(self, name: str, pid: int) -> None:
        with contextlib.suppress(psutil.Error):
            usage, lives = Usage.of(pid), self.report.lives
            if name in lives:
                lives[name].last = usage
            else:
                lives[name] = Life(time.monotonic() - self._began, usage, usage, usage)

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            passed, report = time.monotonic() - self._began, self.report
            memory = ", ".join(f"{n} {x.last.memory >> 20} MiB" for n, x in report.lives.items())
            print(
                f"{passed:4.0f} s: {report.started} requests, {dict(report.outcomes)}, "
                f"{report.kills} kills; {memory}",
                file=sys.stderr, flush=True,
            )  # fmt: skip


async def soak(path: Path, seconds: float, *, seed: int = 0, isolation: str = "none") -> Report:
    service, model = _service(path, isolation)
    try:
        run = Soak(service, model, seed=seed, kills=isolation == "process")
        return await run.run(seconds)
    finally:
        await service.close()


def _service(path: Path, isolation: str) -> tuple[CompletionService, str]:
    """With a pool of cells that is too small for everybody, so that they wait, share and are saved;
    and the name of the model.
    """
    places = Places(roots=(path.parent,))
    settings = Settings(
        isolation=isolation,
        places=places,
        context_size=1024,
        kv_tokens=8192,
        max_sequences=24,
        max_queue=40,
        saved_kv_bytes=2 << 20,
    )
    service = build_service(settings)
    # Kills are meant here: a clock on which they lie far apart.
    service.pool._quarantine = Quarantine(_rushing())
    return service, next(
        found.id for found in Scanner(places).scan().found if found.path == path.resolve()
    )


def _rushing() -> Callable[[], float]:
    moments = itertools.count(0, WINDOW)
    return lambda: float(next(moments))


def show(report: Report) -> None:
    counts = ", ".join(f"{report.outcomes[outcome]} {outcome}" for outcome in OUTCOMES)
    print(f"{report.started} requests: {counts}; {report.kills} kills")
    for name, life in report.lives.items():
        print(
            f"{name}: memory {life.warm.memory / 2**20:.1f} MiB when warm, growth {life.growth:+.2%}; "
            f"threads {life.first.threads} → {life.last.threads}, "
            f"descriptors {life.first.descriptors} → {life.last.descriptors}"
        )
    for problem in (*report.problems, *report.growing):
        print(f"WRONG: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isolation", choices=("none", "process"), default="none")
    parser.add_argument("--model", type=Path, help="a GGUF file; otherwise small random weights")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or prompts.models()["check"].file(Path(folder))
        seconds = 60 * options.minutes
        report = asyncio.run(soak(path, seconds, seed=options.seed, isolation=options.isolation))
    show(report)
    return 1 if report.problems or report.growing else 0


if __name__ == "__main__":
    sys.exit(main())
