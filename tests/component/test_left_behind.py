"""When a request is over, what has its prompt goes at once, and does not wait until Python looks for cycles.

That is the handler, which has the request's body and answer, its visit and its completion. Jupyter's context
has the handler, and every task that a handler starts keeps that context; and an error has, by its traceback,
the frames that it came through, and what they have.

Cases: an answer in one body, as a stream, of several choices; a bad field; an unknown model; too long;
an error of a thread for texts, and of the engine's thread; a deadline; a step that fails, before a stream and
within it; a model that cannot be loaded, which others wait for, too; a full queue; a client that goes away
amid its answer and while it waits; embeddings, one, many, with a bad field, too long, failed; with limits and
records; other routes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import IdentityProvider

from shimmy_jupyter.completion import Completion
from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import GenerationFailed
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.guard.visit import Visit
from shimmy_jupyter.server.handlers.base import ShimmyHandler
from shimmy_jupyter.types import EmbeddingFacts

from .conftest import MODEL, Ask, Fakes, People, chat, new_guard, until

CHAT = "v1/chat/completions"
WRONG = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "wrong"}}}


@pytest.fixture
def identity_provider_class() -> type[IdentityProvider] | None:
    return People


@pytest.fixture
def alive(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[weakref.WeakSet[Any]]:
    """The handlers, visits and completions that are there, where nothing looks for cycles."""
    there: weakref.WeakSet[Any] = weakref.WeakSet()
    seen: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        made = getattr(owner, name)

        def watched(one: Any, *args: Any, **options: Any) -> None:
            there.add(one)
            seen[owner.__name__] += 1
            made(one, *args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(ShimmyHandler, "initialize")
    watch(Visit, "__init__")
    watch(Completion, "__init__")
    gc.collect()
    gc.disable()
    yield there
    gc.enable()
    assert seen["ShimmyHandler"]


@pytest.mark.parametrize(
    ("status", "path", "body"),
    [
        (200, CHAT, chat()),
        (200, CHAT, chat(stream=True)),
        (200, CHAT, chat(n=3)),
        (200, "v1/completions", json.dumps({"model": MODEL, "prompt": "x"})),
        (400, CHAT, chat(max_tokens="x")),
        (400, CHAT, chat("x" * 100_000, stream=True)),
        (400, CHAT, chat(response_format=WRONG)),
        (400, CHAT, chat(response_format=WRONG, stream=True)),
        (404, CHAT, chat(model="nobody")),
        (404, CHAT, chat(model="nobody", stream=True)),
        (408, CHAT, chat(max_seconds=1e-6)),
        (408, CHAT, chat(max_seconds=1e-6, stream=True)),
        (200, "v1/models", None),
        (404, "v1/models/nobody", None),
        (200, "health", None),
    ],
)
async def test_whatever_it_was_answered(
    alive: weakref.WeakSet[Any], ask: Ask, status: int, path: str, body: str | None
) -> None:
    for _ in range(2):
        assert (await ask(path, body)).status == status
    await until(lambda: not alive)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_at", [1, 2])
async def test_a_failing_step(
    alive: weakref.WeakSet[Any], ask: Ask, fakes: Fakes, stream: bool, fail_at: int
) -> None:
    fakes.make = lambda: FakeBackend(fail_at=fail_at)
    answer = await ask(CHAT, chat(stream=stream))
    assert b"engine_crashed" in answer.body
    await until(lambda: not alive)


async def test_a_model_that_cannot_be_loaded(
    alive: weakref.WeakSet[Any], ask: Ask, fakes: Fakes
) -> None:
    def missing() -> FakeBackend:
        raise ImportError("libllama.so: cannot open shared object file")

    fakes.make = missing
    asked = [ask(CHAT, chat(stream=stream)) for stream in (False, True, False)]
    answers = await asyncio.gather(*asked)
    assert {json.loads(one.body)["error"]["code"] for one in answers} == {"model_load_failed"}
    await until(lambda: not alive)


async def test_a_full_queue(alive: weakref.WeakSet[Any], ask: Ask, fakes: Fakes) -> None:
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(gate=gate)
    fakes.spec, fakes.queue_size = LoadSpec(path="", sequences=1), 1
    asked = [asyncio.ensure_future(ask(CHAT, chat(stream=i % 2 == 1))) for i in range(8)]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    gate.release(1000)
    statuses = {one.status for one in await asyncio.gather(*asked)}
    assert 503 in statuses
    del asked
    await until(lambda: not alive)


def goes_on(gate: threading.Semaphore) -> None:
    """One step: no more are let go than are taken."""
    gate.acquire(blocking=False)
    gate.release()


class TestGoneAway:
    @pytest.mark.parametrize("steps", [0, 3])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_amid_its_answer(
        self, alive: weakref.WeakSet[Any], dial: Any, fakes: Fakes, stream: bool, steps: int
    ) -> None:
        gate = threading.Semaphore(steps)
        fakes.make = lambda: FakeBackend(lambda _: ["word "] * 1000, gate=gate)
        connection = await dial(CHAT, chat(stream=stream, max_tokens=1000))
        if stream and steps:
            await connection.read_until(b"word")
        else:
            await until(lambda: fakes.models and fakes.models[0].active)
        connection.close()
        gate.release(1000)
        await until(lambda: fakes.models[0].active == 0)
        await until(lambda: not alive)

    async def test_having_read_slowly(
        self, alive: weakref.WeakSet[Any], dial: Any, fakes: Fakes
    ) -> None:
        """The loop keeps until their time what was to be done if the client read nothing for a minute."""
        gate = threading.Semaphore(3)
        fakes.make = lambda: FakeBackend(lambda _: ["word " * 100] * 1000, gate=gate)
        connection = await dial(CHAT, chat(stream=True, max_tokens=1000))
        await connection.read_until(b"word")
        sending = [one.request.connection.stream for one in alive if isinstance(one, ShimmyHandler)]
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sending[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        gate.release(1000)
        await until(sending[0].writing)
        connection.close()
        await until(lambda: not alive)

    async def test_while_it_waits(
        self, alive: weakref.WeakSet[Any], ask: Ask, dial: Any, fakes: Fakes
    ) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(lambda _: ["word "] * 3000, gate=gate)
        fakes.spec = LoadSpec(path="", sequences=1)
        first = asyncio.ensure_future(ask(CHAT, chat(max_tokens=3000)))
        await until(lambda: fakes.models and fakes.models[0].active)
        for stream in (False, True):
            connection = await dial(CHAT, chat(stream=stream))
            await until(lambda: fakes.models[0].active == 2)
            connection.close()
            # It is heard of between two steps.
            await until(lambda: goes_on(gate) or fakes.models[0].active < 2)
        gate.release(3000)
        assert (await first).status == 200
        await until(lambda: not alive)


class TestEmbeddings:
    @pytest.mark.parametrize(
        ("status", "given"), [(200, "abc"), (400, {}), (400, "x" * 1000), (200, ["a"] * 100)]
    )
    async def test_answered(
        self, alive: weakref.WeakSet[Any], ask: Ask, fakes: Fakes, status: int, given: Any
    ) -> None:
        fakes.make = lambda: FakeBackend(embedding=EmbeddingFacts("mean", 4, 64, 64, 4))
        answer = await ask("v1/embeddings", {"model": MODEL, "input": given})
        assert answer.status == status
        await until(lambda: not alive)

    async def test_failed(self, alive: weakref.WeakSet[Any], ask: Ask, fakes: Fakes) -> None:
        class Failing(FakeBackend):
            def embed(self, *_: Any, **__: Any) -> Any:
                raise GenerationFailed("no vector")

        fakes.make = lambda: Failing(embedding=EmbeddingFacts("mean", 4, 64, 64, 4))
        answer = await ask("v1/embeddings", {"model": MODEL, "input": "abc"})
        assert b"no vector" in answer.body
        await until(lambda: not alive)


class TestGuarded:
    """With limits, and with records of what was asked."""

    @pytest.fixture
    def guard(self, tmp_path: Path) -> Guard:
        guard = new_guard(tmp_path)
        guard.rules = Rules(limits=[LimitTable(Limits(tokens_per_day=400))])
        return guard

    @pytest.mark.parametrize("stream", [False, True])
    async def test_until_the_limit_is_reached(
        self, alive: weakref.WeakSet[Any], ask: Ask, stream: bool
    ) -> None:
        seen = set()
        for _ in range(12):
            seen.add((await ask(CHAT, chat(stream=stream))).status)
        assert seen == {200, 429}
        await until(lambda: not alive)
