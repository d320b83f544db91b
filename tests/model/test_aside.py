"""Prompts read in a context of their own, on the real engine.

Cases: an answer is as alone, and so is that of whoever streams meanwhile; with a beginning that is in the cache
already; with an adapter's name it is one's own; given up amid a slice, and the next one is read all the same; the
engine ends amid a slice; no memory: slices, and the same answer; nobody decodes any more; steps that are aborted; what
is held stands still, and ends when it is told to.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import random_gguf

from shimmy_jupyter.core import messages as m
from shimmy_jupyter.engine.backend import Backend, StepResult
from shimmy_jupyter.engine.llama import aside
from shimmy_jupyter.engine.llama.context import Context
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import EngineCrashed

from .conftest import ask, loaded
from .test_sharing import NO_END, SHAPE, agree, tokens, until

LEAST = 100
pytestmark = pytest.mark.skipif(
    not aside.possible(), reason="llama.cpp's threads would spin: it is built without OpenMP"
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gguf.write(tmp_path_factory.mktemp("m") / "m.gguf", SHAPE, quantized=True)


class Recorded:
    """A backend, and what its steps had to read aside and made of it."""

    def __init__(self, backend: Backend) -> None:
        self.step_ = backend.step
        self.asked: list[m.Aside] = []
        self.read: list[m.AsideRead] = []
        backend.step = self.step  # type: ignore[method-assign]

    def step(self, step: m.Step, threads: int, limit: float | None = None) -> StepResult:
        result = self.step_(step, threads, limit)
        if step.aside is not None and result.aside is not None:
            self.asked.append(step.aside)
            self.read.append(result.aside)
        return result

    @property
    def done(self) -> list[m.Aside]:
        pairs = zip(self.asked, self.read, strict=True)
        return [part for part, read in pairs if read.done]


@asynccontextmanager
async def slow(path: Path, **spec: int) -> AsyncIterator[tuple[LoadedModel, Recorded]]:
    """A model of whose prompts hardly any fits beside a step, so that a slice takes several."""
    async with loaded(path, kv_tokens=4096, **spec) as model:
        assert model.facts.can_read_aside
        planner = model.engine.scheduler._planner
        planner._pace._step_seconds = 1e-3
        # Not by how long rows have taken: one that was held up would leave time for a whole slice.
        planner._pace.aside_seconds = lambda *_: 5e-4  # type: ignore[method-assign]
        planner._aside._least = LEAST
        yield model, Recorded(model.engine.backend)


@asynccontextmanager
async def streaming(model: LoadedModel, prompt: tuple[int, ...]) -> AsyncIterator[list[str]]:
    """Somebody has an answer meanwhile; what it is, once that is over."""
    pieces: list[str] = []
    async with model.submit("ann", prompt, 1200, NO_END, ()) as stream:

        async def read() -> None:
            async for piece in stream:
                pieces.append(piece)  # noqa: PERF401  others look meanwhile

        reading = asyncio.ensure_future(read())
        await until(lambda: len(pieces) > 3)
        yield pieces
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: stream.id not in model.engine.scheduler.sequences)


@pytest.mark.usefixtures("isolation")
class TestAnswers:
    async def test_as_alone(self, model_path: Path) -> None:
        prompt, theirs = tokens(1, 450), tokens(2, 40)
        async with slow(model_path) as (model, recorded):
            async with streaming(model, theirs) as pieces:
                answer, ended = await ask(model, prompt, 16, NO_END)
            read = [token for part in recorded.done for token in part.tokens]
            assert tuple(read) == prompt[:-1]
            assert len(recorded.read) > len(recorded.done)
            assert ended.usage.cached_tokens == 0
            streamed = "".join(pieces)[:300]
        async with loaded(model_path, kv_tokens=4096) as fresh:
            agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)
            alone, _ = await ask(fresh, theirs, len(streamed), NO_END)
            agree(model_path, theirs, alone, streamed)

    async def test_after_a_beginning_that_is_in_the_cache(self, model_path: Path) -> None:
        begin = tokens(1, 200)
        prompt = (*begin, *tokens(3, 250))
        async with slow(model_path) as (model, recorded):
            await ask(model, begin, 1, NO_END)
            async with streaming(model, tokens(2, 40)):
                answer, ended = await ask(model, prompt, 16, NO_END)
            assert ended.usage.cached_tokens == 200
            assert recorded.done[0].start == 200
            # What was read aside is in the cache like all else.
            _, again = await ask(model, prompt, 2, NO_END)
            assert again.usage.cached_tokens == 449
        async with loaded(model_path, kv_tokens=4096) as fresh:
            agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)

    async def test_given_up_amid_a_slice(self, model_path: Path) -> None:
        prompt = tokens(4, 450)
        async with slow(model_path) as (model, recorded):
            async with streaming(model, tokens(2, 40)) as pieces:
                async with model.submit("ben", tokens(1, 450), 16, NO_END, ()):
                    await until(lambda: len(recorded.read) > 1)
                before = len(pieces)
                answer, _ = await ask(model, prompt, 16, NO_END)
                assert len(pieces) > before
            assert any(part.tokens == prompt[: len(part.tokens)] for part in recorded.done)
        async with loaded(model_path, kv_tokens=4096) as fresh:
            agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)

    async def test_where_nobody_decodes_any_more(self, model_path: Path) -> None:
        prompt = tokens(1, 450)
        async with slow(model_path) as (model, recorded):
            async with streaming(model, tokens(2, 40)):
                asking = asyncio.ensure_future(ask(model, prompt, 16, NO_END))
                await until(lambda: len(recorded.read) > 1)
            answer, _ = await asking
            assert len(recorded.done) < 3
        async with loaded(model_path, kv_tokens=4096) as fresh:
            agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)

    async def test_steps_that_are_aborted(self, model_path: Path) -> None:
        """What the rows of a step come to is nothing to what is read aside."""
        prompt = tokens(1, 450)
        async with slow(model_path) as (model, recorded):
            for i in range(3):
                async with streaming(model, tokens(i + 5, 40)):
                    if not i:
                        asking = asyncio.ensure_future(ask(model, prompt, 16, NO_END))
                    count = len(recorded.read)
                    await until(lambda: len(recorded.read) > count or asking.done())  # noqa: B023
                    model.engine.backend.abort()
            answer, _ = await asking
        async with loaded(model_path, kv_tokens=4096) as fresh:
            agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)

    async def test_the_engine_ends_amid_a_slice(self, model_path: Path) -> None:
        async with (
            asyncio.timeout(60),
            slow(model_path) as (model, recorded),
            streaming(model, tokens(2, 40)),
        ):
            asking = asyncio.ensure_future(ask(model, tokens(1, 450), 16, NO_END))
            await until(lambda: len(recorded.read) > 1)
            asking.cancel()
            await model.close()
        assert "shimmy-aside" not in {thread.name for thread in threading.enumerate()}


async def test_without_memory_for_it(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "available_memory", lambda: 1000)
    prompt = tokens(1, 450)
    async with slow(model_path) as (model, recorded):
        async with streaming(model, tokens(2, 40)):
            answer, _ = await ask(model, prompt, 16, NO_END)
        assert [read.refused for read in recorded.read] == [True]
    async with loaded(model_path, kv_tokens=4096) as fresh:
        agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)


@pytest.mark.parametrize("where", ["from the shared cache", "into it"])
async def test_without_memory_for_a_part_of_it(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(self: Context, *_: int) -> None:
        if (self is shared) == (where == "from the shared cache"):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return part(self, *_)

    part = Context.part
    prompt = tokens(1, 450)
    async with slow(model_path) as (model, recorded):
        shared = model.engine.backend._shared  # type: ignore[attr-defined]
        await ask(model, prompt[:100], 1, NO_END)
        async with streaming(model, tokens(2, 40)):
            monkeypatch.setattr(Context, "part", full)
            answer, _ = await ask(model, prompt, 16, NO_END)
        assert [read.refused for read in recorded.read][-1]
        assert not recorded.done
    monkeypatch.undo()
    async with loaded(model_path, kv_tokens=4096) as fresh:
        agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)


async def test_given_up_while_its_context_is_made(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for that, and the next one is read aside once it is made."""
    made, door = threading.Event(), threading.Event()

    class Slow(Context):
        def __init__(self, *args: Any) -> None:
            made.set()
            door.wait()
            super().__init__(*args)

    prompt = tokens(4, 450)
    async with slow(model_path) as (model, recorded):
        async with streaming(model, tokens(2, 40)) as pieces:
            monkeypatch.setattr(aside, "Context", Slow)
            try:
                async with model.submit("ben", tokens(1, 450), 16, NO_END, ()) as given_up:
                    await until(made.is_set)
                await until(lambda: given_up.ended is not None)
                asking = asyncio.ensure_future(ask(model, prompt, 16, NO_END))
                before = len(pieces)
                await until(lambda: len(pieces) > before + 3)
                assert all(read.making for read in recorded.read)
            finally:
                door.set()
            answer, _ = await asking
        assert any(part.tokens == prompt[: len(part.tokens)] for part in recorded.done)
    assert "shimmy-aside" not in {thread.name for thread in threading.enumerate()}
    async with loaded(model_path, kv_tokens=4096) as fresh:
        agree(model_path, prompt, (await ask(fresh, prompt, 16, NO_END))[0], answer)


async def test_what_nobody_foresaw_ends_the_engine(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    async with (
        asyncio.timeout(60),
        slow(model_path) as (model, _),
        model.submit("ann", tokens(2, 40), 1200, NO_END, ()) as stream,
    ):
        await anext(aiter(stream))
        monkeypatch.setattr(aside, "Context", fail)
        with pytest.raises(EngineCrashed):
            await ask(model, tokens(1, 450), 16, NO_END)


@pytest.mark.parametrize("most", [0, 300])
async def test_where_little_or_nothing_may_be_used(model_path: Path, most: int) -> None:
    async with loaded(model_path, kv_tokens=4096) as model:
        cell = model.facts.kv_bytes_per_token
    async with loaded(model_path, kv_tokens=4096, aside_bytes=most * cell) as model:
        assert model.facts.can_read_aside == bool(most)
        model.engine.scheduler._planner._aside._least = LEAST
        model.engine.scheduler._planner._pace._step_seconds = 1e-3
        recorded = Recorded(model.engine.backend)
        async with streaming(model, tokens(2, 40)):
            await ask(model, tokens(1, 450), 4, NO_END)
        assert [read.refused for read in recorded.read] == ([True] if most else [])


class TestTurnstile:
    @pytest.fixture
    def turning(self) -> Iterator[tuple[aside.Turnstile, list[int]]]:
        """A thread that counts as fast as it may."""
        turnstile, counts = aside.Turnstile(), [0]

        def count() -> None:
            while turnstile.enter():
                for _ in range(1000):
                    if turnstile._pass(None):
                        return
                    counts[0] += 1
                turnstile.leave()

        thread = threading.Thread(target=count)
        thread.start()
        yield turnstile, counts
        turnstile.end()
        thread.join(60)
        assert not thread.is_alive()

    def test_it_stands_until_it_may_go(self, turning: tuple[aside.Turnstile, list[int]]) -> None:
        turnstile, counts = turning
        assert turnstile.reached.wait(60)
        assert counts == [0]
        turnstile.let(1e-4)
        for _ in range(20):
            before = counts[0]
            assert counts[0] == before
            turnstile.let(1e-4)

    def test_it_is_not_waited_for_once_it_left(
        self, turning: tuple[aside.Turnstile, list[int]]
    ) -> None:
        turnstile, counts = turning
        assert turnstile.let(60) < 60
        assert counts[0] >= 1000

    def test_ended_while_it_stands(self) -> None:
        turnstile = aside.Turnstile()
        told: list[bool] = []
        thread = threading.Thread(target=lambda: told.append(turnstile.enter()))
        thread.start()
        assert turnstile.reached.wait(60)
        turnstile.end()
        thread.join(60)
        assert told == [False]
