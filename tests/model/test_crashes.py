"""Engine processes that die: whose requests end, how that is said, and what answers next.

Cases: four signals amid a batch; a child killed while idle, noticed or not, before a prompt of text
and one of tokens; three crashes; other models meanwhile; a file that is touched; what the server has
of the one that ended.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import random_gguf

from shimmy_jupyter.compose import build_service
from shimmy_jupyter.config import Settings
from shimmy_jupyter.errors import EngineCrashed, ModelLoadFailed
from shimmy_jupyter.health import health
from shimmy_jupyter.models.sources import Places
from shimmy_jupyter.service import Completion, CompletionService
from shimmy_jupyter.types import CompletionRequest, FinishReason, Message, Principal, Sampling

ME = Principal("local")

SHAPE = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024, vocabulary=2048)
GREEDY = Sampling(temperature=0)
LEN = "Return the number of items in a container."


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return random_gguf.write(tmp_path / "words.gguf", SHAPE, words=True)


@pytest.fixture
def service(model_path: Path, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    made = build_service(Settings(isolation="process", places=Places(roots=(model_path.parent,))))
    yield made
    jp_asyncio_loop.run_until_complete(made.close())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def begin(
    service: CompletionService,
    prompt: Any = "tell me",
    max_tokens: int = 1500,
    *,
    model: str = "words",
    who: str = "ann",
) -> Completion:
    return await service.start(
        CompletionRequest("id", Principal(who), model, prompt, max_tokens, GREEDY)
    )


async def answer(service: CompletionService, *args: Any, **options: Any) -> str:
    async with await begin(service, *args, **options) as completion:
        return await completion.text()


def tokens(text: str) -> int:
    """A token of this model is a letter and a number."""
    return sum(map(str.isalpha, text))


def child(service: CompletionService) -> int:
    (model,) = service.pool.loaded()
    pid = model.engine.backend.pid
    assert isinstance(pid, int)
    return pid


async def kill(service: CompletionService, number: int = signal.SIGKILL) -> None:
    """Send it, and wait until it is gone."""
    (model,) = service.pool.loaded()
    os.kill(child(service), number)
    await until(lambda: model.engine.backend.pid is None)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Nothing looks for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
async def test_what_the_server_has_of_it_goes_at_once(service: CompletionService) -> None:
    """The tokens of all that it kept would stay, crash by crash, until Python looks for cycles."""
    completion = await begin(service)
    assert await completion.read()
    (model,) = service.pool.loaded()
    scheduler = weakref.ref(model.engine.scheduler)
    del model
    await kill(service)
    with pytest.raises(EngineCrashed):
        await completion.text()
    completion.close()
    del completion
    await answer(service, max_tokens=4)  # by a new one
    assert scheduler() is None


class TestAmidABatch:
    @pytest.mark.parametrize("name", ["SIGKILL", "SIGABRT", "SIGILL", "SIGSEGV"])
    async def test_every_open_request_ends_and_the_next_is_answered(
        self, name: str, service: CompletionService
    ) -> None:
        open_ones = [await begin(service, f"tell me {i}", who=f"u{i % 3}") for i in range(8)]
        for completion in open_ones:
            assert await completion.read()
        first = child(service)
        await kill(service, signal.Signals[name])
        for completion in open_ones:
            with pytest.raises(EngineCrashed, match=name) as caught:
                await completion.text()
            assert "the engine's process" in caught.value.message
            assert "/" not in caught.value.message
            assert completion.ended.reason is FinishReason.ERROR
            completion.close()
        (status,) = [s for s in await service.models(ME) if s.file.id == "words"]
        assert status.state == "failed"
        assert name in str(status.error)
        assert not service.active
        assert tokens(await answer(service, max_tokens=4)) == 4
        assert child(service) != first
        assert (await health(service)).to_json()["status"] == "ok"

    async def test_requests_that_wait_end_too(self, service: CompletionService) -> None:
        """Some in the queue, and some whose readers have not come yet."""
        open_ones = [await begin(service, f"{i}") for i in range(40)]
        (model,) = service.pool.loaded()
        await until(
            lambda: len(model.engine.scheduler.line) > 0 and model.engine.statistics.steps > 3
        )
        await kill(service)
        for completion in open_ones:
            with pytest.raises(EngineCrashed, match="SIGKILL"):
                await completion.text()
        assert not model.engine.scheduler.sequences


class TestWhileIdle:
    async def test_the_next_request_is_answered(self, service: CompletionService) -> None:
        before = await answer(service, max_tokens=8)
        first = child(service)
        await kill(service)
        assert await answer(service, max_tokens=8) == before
        assert child(service) != first

    async def test_so_is_one_that_comes_at_the_same_moment(
        self, service: CompletionService
    ) -> None:
        before = await answer(service, max_tokens=8)
        os.kill(child(service), signal.SIGKILL)
        assert await answer(service, max_tokens=8) == before

    async def test_so_are_several_at_once(self, service: CompletionService) -> None:
        before = await answer(service, max_tokens=8)
        await kill(service)
        assert (
            await asyncio.gather(*(answer(service, max_tokens=8) for _ in range(6))) == [before] * 6
        )
        assert len(service.pool.loaded()) == 1

    async def test_so_is_one_of_tokens(self, service: CompletionService) -> None:
        """Nothing of its prompt goes through the engine's process before it is queued."""
        before = await answer(service, (65, 66, 67), 8)
        await kill(service)
        assert await answer(service, (65, 66, 67), 8) == before


class TestQuarantine:
    async def crash(self, service: CompletionService, times: int = 3) -> None:
        for _ in range(times):
            async with await begin(service) as completion:
                assert await completion.read()
                await kill(service, signal.SIGSEGV)
                with pytest.raises(EngineCrashed, match="SIGSEGV"):
                    await completion.text()

    async def test_three_crashes_lock_it_up_but_no_other(self, service: CompletionService) -> None:
        await self.crash(service)
        for _ in range(2):
            with pytest.raises(
                ModelLoadFailed, match=r"words is quarantined: .* 3 times .*SIGSEGV"
            ):
                await begin(service)
        states = {s.file.id: s for s in await service.models(ME)}
        assert states["words"].state == "quarantined"
        assert "SIGSEGV" in str(states["words"].error)
        assert (await service.model("words", ME)).state == "quarantined"
        found = await health(service)
        (models,) = [d for d in found.dependencies if d.name == "models"]
        assert (models.status, found.ok) == ("degraded", True)
        assert "words: it crashed 3 times" in models.detail
        question = (Message("user", "What does len do?"),)
        assert await answer(service, question, 64, model="self-test") == LEN
        assert states["self-test"].state == "available"

    async def test_touching_the_file_frees_it(
        self, service: CompletionService, model_path: Path
    ) -> None:
        await self.crash(service)
        with pytest.raises(ModelLoadFailed, match="quarantined"):
            await begin(service)
        facts = model_path.stat()
        os.utime(model_path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
        assert (await service.model("words", ME)).state == "available"
        assert tokens(await answer(service, max_tokens=4)) == 4
        assert (await health(service)).to_json()["status"] == "ok"

    async def test_two_crashes_do_not(self, service: CompletionService) -> None:
        await self.crash(service, 2)
        assert tokens(await answer(service, max_tokens=4)) == 4
