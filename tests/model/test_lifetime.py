"""Loading, unloading and ending: nothing is left behind, and the event loop never waits.

Cases: fifty loads; the loop during the first load of a process, later loads, a full batch, its
cancelling, unloading, and a shut-down with work in flight; a shut-down with as many waiting as
running.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import random_gguf

import shimmy_jupyter
from shimmy_jupyter.compose import build_service
from shimmy_jupyter.config import Settings
from shimmy_jupyter.engine.backend import LoadSpec, Sharing
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import ModelNotFound, ShuttingDown
from shimmy_jupyter.health import health
from shimmy_jupyter.models.sources import Places
from shimmy_jupyter.server import answers
from shimmy_jupyter.service import Completion
from shimmy_jupyter.types import CompletionRequest, FinishReason, Principal, Sampling

from . import conftest
from .conftest import loaded, self_test_path

ME = Principal("local")
ROOT = Path(__file__).parent.parent.parent
MODES = ["none", "process"]
LONG = Sampling(temperature=1.0, top_k=40, seed=1)
"""With a model of words: no answer ends by itself."""
SHAPES = {
    "deep": random_gguf.Shape(
        layers=6, width=256, heads=8, head_width=32, hidden=1024, vocabulary=2048
    ),
    "wide": random_gguf.Shape(vocabulary=100_000, context=512),
}
"""20 MB of layers, and 25 MB of vocabulary: loading reads that in Python."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("words")
    for name, shape in SHAPES.items():
        random_gguf.write(made / f"{name}.gguf", shape, words=True)
    return made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


# Memory


CYCLES = """
import asyncio, gc, json, sys
import psutil
from shimmy_jupyter import compose
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.types import Message, Sampling

async def cycle(make, path):
    model = await LoadedModel.load(make, LoadSpec(path=path))
    prompt = await model.encode((Message("user", "What does len do?"),))
    async with model.submit("local", prompt, 64, Sampling(temperature=0), ()) as stream:
        text = "".join([piece async for piece in stream])
    assert text == "Return the number of items in a container.", text
    await model.close()

async def main(mode, path, cycles):
    make = compose.llama_backend if mode == "none" else compose.isolated_backend
    process = psutil.Process()
    for _ in range(cycles):
        await cycle(make, path)
        gc.collect()
        now = process.memory_info().rss, process.num_threads(), process.num_fds()
        print(json.dumps(now), flush=True)
    assert not process.children()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""
"""In a process of its own, whose memory nothing else has stirred."""


@pytest.mark.parametrize("mode", MODES)
def test_fifty_loads_leave_nothing(mode: str) -> None:
    cycles = 50 if mode == "none" else 15
    done = subprocess.run(
        [sys.executable, "-c", CYCLES, mode, str(self_test_path()), str(cycles)],
        capture_output=True,
        text=True,
        check=True,
    )
    memory, threads, descriptors = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    assert len(memory) == cycles
    print(f"\nmemory {memory[4] >> 20} MiB, growth {memory[-1] / memory[4] - 1:+.2%}")
    assert memory[-1] / memory[4] - 1 < 0.05
    # The loop's helper threads may become as many as there can be; nothing grows with the loads.
    assert threads[-1] <= threads[4] + 2
    assert descriptors[-1] <= descriptors[4]


# The event loop

LONGEST = 0.05
TICK = 0.005
ATTEMPTS = 3
CONTROL = """
import json, select, sys, time
ticks = [time.monotonic()]
print("ready", flush=True)
while not select.select([sys.stdin], [], [], float(sys.argv[1]))[0]:
    ticks.append(time.monotonic())
print(json.dumps(ticks))
"""


@dataclass
class Watch:
    """What held the loop: from when, for how long, and in which phase."""

    phase: str = ""
    gaps: list[tuple[float, float, str]] = field(default_factory=list)

    async def tick(self) -> None:
        last, phase = time.monotonic(), self.phase
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            if now - last > LONGEST:
                self.gaps.append((last, now - last, f"{phase or 'start'} … {self.phase}"))
            last, phase = now, self.phase


@asynccontextmanager
async def watching() -> AsyncIterator[Watch]:
    """Gaps between the loop's ticks that another process did not have at the same time."""
    control = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CONTROL, str(TICK),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 24,
    )  # fmt: skip
    assert control.stdout is not None
    assert await control.stdout.readline() == b"ready\n"
    watch = Watch()
    ticker = asyncio.create_task(watch.tick())
    await asyncio.sleep(TICK)  # it ticks from now on
    try:
        yield watch
    finally:
        await asyncio.sleep(2 * TICK)  # a gap is seen at its end
        ticker.cancel()
        ticks = json.loads((await control.communicate(b"end"))[0])
    watch.gaps = [gap for gap in watch.gaps if _ours(*gap[:2], ticks)]


def _ours(began: float, seconds: float, ticks: list[float]) -> bool:
    """Whether it is too long even without the longest while for which the control stood still."""
    inside = [began, *(t for t in ticks if began < t < began + seconds), began + seconds]
    return seconds - max(b - a for a, b in zip(inside, inside[1:], strict=False)) > LONGEST


async def never_held(life: Callable[[Watch], Awaitable[None]]) -> None:
    """One attempt without a gap will do: what blocks by itself does so each time."""
    found = []
    for _ in range(ATTEMPTS):
        async with watching() as watch:
            await life(watch)
        if not watch.gaps:
            return
        found.append([(f"{seconds * 1000:.0f} ms", phase) for _, seconds, phase in watch.gaps])
    raise AssertionError(f"something held the event loop: {found}")


async def full_batch(model: LoadedModel) -> list[asyncio.Task[list[str]]]:
    """40 sequences, all of them read as they come; of many people, as one may not have them all."""
    streams = []
    for i in range(model.engine.spec.running):
        prompt = tuple(range(60 + i, 100 + i))
        streams.append(model.submit(f"u{i % 20}", prompt, 400, LONG, ()))

    async def read(i: int) -> list[str]:
        async with streams[i] as stream:
            return [text async for text in stream]

    tasks = [asyncio.create_task(read(i)) for i in range(len(streams))]
    await until(lambda: max(model.engine.statistics.rows, default=0) == len(streams))
    return tasks


async def a_life(path: Path, watch: Watch) -> None:
    watch.phase = "load"
    model = await LoadedModel.load(conftest.making, LoadSpec(path=str(path)))
    watch.phase = "batch"
    tasks = await full_batch(model)
    watch.phase = "cancel"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: not model.active)
    watch.phase = "batch again"
    tasks = await full_batch(model)
    watch.phase = "unload amid it"
    await model.close()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, ShuttingDown) for end in ends)
    watch.phase = "end"


async def test_what_holds_the_loop_is_seen() -> None:
    for _ in range(10):  # not where the machine stands still as well
        async with watching() as watch:
            watch.phase = "busy"
            end = time.monotonic() + 4 * LONGEST
            while time.monotonic() < end:
                pass
        if watch.gaps:
            break
    ((_, seconds, phase),) = watch.gaps
    assert seconds > 4 * LONGEST
    assert phase.endswith("busy")


@pytest.mark.parametrize("shape", SHAPES)
async def test_nothing_holds_the_event_loop(shape: str, folder: Path, isolation: str) -> None:
    await never_held(lambda watch: a_life(folder / f"{shape}.gguf", watch))


@pytest.mark.parametrize("mode", MODES)
async def test_a_shutdown_does_not_hold_the_event_loop(mode: str, folder: Path) -> None:
    async def life(watch: Watch) -> None:
        service = build_service(Settings(isolation=mode, places=Places(roots=(folder,))))
        watch.phase = "start"
        tasks = [asyncio.create_task(answer(await begin(service, i))) for i in range(40)]
        watch.phase = "close"
        await service.close()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, ShuttingDown) for end in ends)

    await never_held(life)


async def test_saving_a_long_conversation_does_not_hold_the_event_loop(tmp_path: Path) -> None:
    """260 MB of KV, which are new memory for the process."""
    shape = random_gguf.Shape(
        layers=8, width=128, heads=16, kv_heads=16, head_width=256, hidden=128
    )
    path = random_gguf.write(tmp_path / "wide.gguf", shape)
    sharing, spec = Sharing(saved_bytes=1 << 30), {"kv_tokens": 2304, "context_size": 2048}

    async def life(watch: Watch) -> None:
        async with loaded(path, sharing, **spec) as model:
            assert model.facts.kv_bytes_per_token * 2000 > 260e6
            watch.phase = "read"
            await conftest.ask(model, tuple(range(60, 260)) * 10, 1)
            watch.phase = "save"
            await conftest.ask(model, tuple(range(90, 290)) * 2, 1, who="ben")
            watch.phase = "end"
            assert model.engine.scheduler.line.room.prefixes.saved_tokens > 1900

    await never_held(life)


MANY = """
import asyncio, sys
from pathlib import Path
from tests.model import test_lifetime as t
asyncio.run(t.looking(Path(sys.argv[1])))
"""


class Collections:
    """When Python collected its garbage, which holds every thread for as long as there is much in memory,
    whoever has put it there. 10,000 models are some 70,000 objects more to look at.
    """

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self._began = 0.0
        gc.callbacks.append(self._heed)

    def _heed(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.monotonic()
        else:
            self.times.append((self._began, time.monotonic()))

    def within(self, gap: tuple[float, float, str]) -> float:
        """Seconds of a gap that they took."""
        began, ended = gap[0], gap[0] + gap[1]
        return sum(max(0.0, min(ended, b) - max(began, a)) for a, b in self.times)


async def looking(folder: Path) -> None:
    """10,000 models: looking, listing, a name that nobody knows; of 2,000 what their headers say, too.
    Prints the gaps.
    """
    collections = Collections()
    service = build_service(Settings(places=Places(roots=(folder,))))
    some = build_service(Settings(places=Places(roots=tuple(sorted(folder.iterdir())[:20]))))
    async with watching() as watch:
        watch.phase = "look"
        assert len(await service.pool.catalog.look()) == 10_001
        watch.phase = "list"
        listed = await asyncio.to_thread(answers.models, await service.models(ME))
        assert len(listed) > 100_000
        watch.phase = "health"
        await health(service)
        watch.phase = "unknown"
        service.pool.catalog._looked = -1e9
        with pytest.raises(ModelNotFound):
            await service.model("nobody's", ME)
        watch.phase = "describe"
        described = await some.library.describe()
        watch.phase = "write"
        assert len(await answers.library(some.library, described)) > 100_000
    await service.close()
    await some.close()
    print(json.dumps([gap for gap in watch.gaps if gap[1] - collections.within(gap) > LONGEST]))


def test_looking_for_models_does_not_hold_the_event_loop(tmp_path: Path) -> None:
    """In a process of its own: what tests have left in memory is collected with what this leaves, and
    that takes as long as there is much of it.
    """
    data = random_gguf.write(tmp_path / "one.gguf").read_bytes()
    (tmp_path / "one.gguf").unlink()
    for number in range(10_000):
        inside = tmp_path / f"{number // 100:02}"
        inside.mkdir(exist_ok=True)
        (inside / f"m{number}.gguf").write_bytes(data if number % 100 == 0 else data[:600])
    held_nothing(MANY, str(tmp_path))


async def test_many_special_tokens_do_not_hold_the_event_loop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are models with more than six thousand."""
    import re

    import gguf

    def mark(writer: gguf.GGUFWriter, kinds: list[gguf.TokenType]) -> None:
        plain, added = kinds[:-6500], [gguf.TokenType.CONTROL] * 6500
        types(writer, [*plain, *added])

    types = gguf.GGUFWriter.add_token_types
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_types", mark)
    shape = random_gguf.Shape(vocabulary=8000)
    path = random_gguf.write(tmp_path / "special.gguf", shape)

    async def life(watch: Watch) -> None:
        re.purge()  # what was compiled before is remembered
        watch.phase = "load"
        async with loaded(path) as model:
            assert len(model.facts.special_tokens) == 6500
            watch.phase = "ask"
            await conftest.ask(model, "What is this?", 2)

    await never_held(life)


FIRST = """
import asyncio, sys
from pathlib import Path
from tests.model import test_lifetime as t
asyncio.run(t.first_load(Path(sys.argv[1]), sys.argv[2]))
"""


async def first_load(folder: Path, mode: str) -> None:
    """In a process that has imported nothing of the engine yet. Prints the gaps."""
    service = build_service(Settings(isolation=mode, places=Places(roots=(folder,))))
    assert "llama_cpp" not in sys.modules
    async with watching() as watch:
        watch.phase = "first load"
        await (await begin(service, 0, max_tokens=2)).text()
        watch.phase = "close"
        await service.close()
    print(json.dumps(watch.gaps))


@pytest.mark.parametrize("mode", MODES)
def test_the_first_load_does_not_hold_the_event_loop(mode: str, folder: Path) -> None:
    """It imports the native library and all that comes with that."""
    held_nothing(FIRST, str(folder), mode)


def held_nothing(code: str, *given: str) -> None:
    """In some attempt, in a process of its own."""
    found = []
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            [sys.executable, "-c", code, *given], cwd=ROOT, check=True,
            capture_output=True, text=True, env=with_scripts(),
        )  # fmt: skip
        found.append(json.loads(done.stdout))
        if not found[-1]:
            return
    raise AssertionError(f"something held the event loop: {found}")


def with_scripts() -> dict[str, str]:
    import os

    scripts, package = (
        Path(random_gguf.__file__).parent,
        Path(shimmy_jupyter.__file__).parent.parent,
    )
    return {**os.environ, "PYTHONPATH": f"{package}:{scripts}"}


# The end


async def begin(service, number: int, model: str = "deep", max_tokens: int = 1500) -> Completion:
    who = Principal(f"u{number % 20}")
    prompt = tuple(range(60 + number, 100 + number))
    return await service.start(CompletionRequest(str(number), who, model, prompt, max_tokens, LONG))


async def answer(completion: Completion) -> str:
    async with completion:
        return await completion.text()


def names() -> set[str]:
    # The loop's own helper threads stay until it closes.
    return {t.name for t in threading.enumerate() if not t.name.startswith("asyncio_")}


@pytest.mark.parametrize("mode", MODES)
async def test_a_shutdown_with_as_many_waiting_as_running(
    mode: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = names()
    service = build_service(
        Settings(isolation=mode, places=Places(roots=(folder,)), max_sequences=16)
    )
    completions = [await begin(service, i) for i in range(40)]
    (model,) = service.pool.loaded()
    scheduler = model.engine.scheduler
    await until(lambda: len(scheduler.running) == 20 and len(scheduler.line) == 20)
    await until(lambda: model.engine.statistics.steps > 3)
    readers = [asyncio.create_task(answer(completion)) for completion in completions]
    with caplog.at_level(logging.WARNING):
        await service.close()
        ends = await asyncio.gather(*readers, return_exceptions=True)
    for end, completion in zip(ends, completions, strict=True):
        assert isinstance(end, ShuttingDown)
        assert completion.ended.reason is FinishReason.ERROR
    with pytest.raises(ShuttingDown):
        await begin(service, 0)
    assert names() == before
    assert not psutil.Process().children()
    assert not caplog.records
    assert not scheduler.sequences
    gc.collect()
