"""The service in a kernel's own process answers as the routes do.

Cases: every route of the table, or a reason why not; a call of each, over HTTP and in the kernel, with the
same shape; what is wrong, with the same code and field; labels on record; streams for both kinds of
transport; leaving, interrupting and closing end the work; the same service for two event loops.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from jupyter_server.auth import IdentityProvider

from shimmy_jupyter import local
from shimmy_jupyter.config import Settings
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import Cancelled, InvalidValue, NotFound, ShimmyError
from shimmy_jupyter.inkernel import ROUTES
from shimmy_jupyter.local import LocalTransport
from shimmy_jupyter.models.sources import Found
from shimmy_jupyter.notebook.client import events, written
from shimmy_jupyter.server.openapi import OPERATIONS
from shimmy_jupyter.types import ModelFacts

from .conftest import MODEL, Ask, Fakes, People, chat, new_guard, new_service, records

pytestmark = pytest.mark.parametrize("fakes", ["in process"], indirect=True)

FILES = {("get", "shimmy/api/audit/export"), ("get", "shimmy/api/openapi.json")}
CHAT = "shimmy/v1/chat/completions"
ASKED: dict[str, Any] = json.loads(chat(temperature=0))
LABELS = {"x-shimmy-notebook": "a.ipynb", "x-shimmy-cell": "c1"}


@pytest.fixture
def transport(
    monkeypatch: Any, fakes: Fakes, tmp_path: Path, offered: list[Found]
) -> Iterator[LocalTransport]:
    monkeypatch.setattr(
        local, "build_service", lambda _: new_service(fakes, new_guard(tmp_path / "k"), offered)
    )
    transport = LocalTransport(Settings(), lambda: LABELS)
    yield transport
    transport.close()


def test_every_route_is_there(fakes: Fakes) -> None:
    for method, path in OPERATIONS:
        place = path.replace("{id}", "an-id")
        found = [p for m, p, _ in ROUTES if m == method.upper() and re.fullmatch(p, place)]
        assert bool(found) != ((method, path) in FILES), (method, path)


CALLS: tuple[tuple[str, str, Any], ...] = (
    ("POST", CHAT, ASKED),
    ("POST", "shimmy/v1/completions", {"model": MODEL, "prompt": ">hi"}),
    ("GET", "shimmy/v1/models", None),
    ("GET", f"shimmy/v1/models/{MODEL}", None),
    ("POST", "shimmy/api/tokenize", {"model": MODEL, "prompt": "abc"}),
    ("POST", "shimmy/api/detokenize", {"model": MODEL, "tokens": [97]}),
    ("POST", "shimmy/api/apply-template", {"model": MODEL, "messages": ASKED["messages"]}),
    ("GET", "shimmy/api/models", None),
    ("POST", "shimmy/api/models/discover", {}),
    ("GET", f"shimmy/api/models/{MODEL}", None),
    ("GET", "shimmy/api/suggestions?task=chat", None),
    ("GET", "shimmy/api/jobs", None),
    ("GET", "shimmy/api/limits", None),
    ("PUT", "shimmy/api/limits", {"max_queued": 3}),
    ("GET", "shimmy/api/audit?kind=end&limit=1&model=ghost", None),
    ("GET", "shimmy/api/audit/usage?by=model", None),
    ("POST", "shimmy/api/audit/verify", {}),
    ("POST", "shimmy/api/audit/anchor", {}),
    ("GET", "shimmy/health", None),
    ("POST", f"shimmy/api/models/{MODEL}/unload", {}),
)
WRONG: tuple[tuple[str, str, Any], ...] = (
    ("POST", CHAT, {**ASKED, "temperature": 9}),
    ("POST", CHAT, {**ASKED, "model": "ghost"}),
    ("POST", "shimmy/v1/embeddings", {"model": MODEL}),
    ("POST", "shimmy/v1/rerank", {"model": MODEL, "query": "x"}),
    ("POST", "shimmy/api/tokenize", {"model": MODEL}),
    ("POST", "shimmy/api/detokenize", {"model": MODEL, "tokens": "x"}),
    ("POST", "shimmy/api/apply-template", {"model": MODEL, "messages": []}),
    ("POST", "shimmy/api/models/pull", {"model": ""}),
    ("POST", "shimmy/api/models/ghost/load", {}),
    ("POST", f"shimmy/api/models/{MODEL}/load", {"x": 1}),
    ("GET", "shimmy/api/models/ghost", None),
    ("GET", "shimmy/api/jobs/ghost", None),
    ("DELETE", "shimmy/api/jobs/ghost", None),
    ("GET", "shimmy/api/suggestions?task=nothing", None),
    ("PUT", "shimmy/api/limits", {"max_everything": 1}),
    ("GET", "shimmy/api/audit?limit=0", None),
    ("GET", "shimmy/api/audit?user=bob", None),
    ("GET", "shimmy/api/audit/usage?by=cell", None),
    ("GET", "shimmy/api/audit/receipts/ghost", None),
    ("POST", "shimmy/api/audit/verify", {"against": {}}),
    ("GET", "shimmy/nothing", None),
)


def shape(value: Any) -> Any:
    """The names and kinds of what is there."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value[:1]]
    return type(value).__name__


@pytest.fixture
def identity_provider_class() -> type[IdentityProvider] | None:
    return People


@pytest.fixture
def guard(tmp_path: Path) -> Any:
    return new_guard(tmp_path / "s")


async def test_the_same_answers(
    transport: LocalTransport, ask: Ask, fakes: Fakes, guard: Any
) -> None:
    for method, path, body in CALLS:
        over_http = await ask(path.removeprefix("shimmy/"), body, method=method)
        assert over_http.status in (200, 202), (path, over_http.body)
        here = await transport.request(method, path, body)
        assert shape(here) == shape(over_http.json), path


async def test_the_same_refusals(transport: LocalTransport, ask: Ask, guard: Any) -> None:
    for method, path, body in WRONG:
        over_http = await ask(path.removeprefix("shimmy/"), body, method=method)
        with pytest.raises(ShimmyError) as caught:
            await transport.request(method, path, body)
        here = caught.value
        assert (here.status, here.code, here.param) == over_http.error, path


@pytest.mark.parametrize("odd", [{"x"}, float("nan"), object(), "\ud800"])
async def test_what_no_request_can_be_is_refused_as_by_http(
    transport: LocalTransport, odd: Any
) -> None:
    body = {**ASKED, "stop": odd}
    with pytest.raises(InvalidValue) as caught:
        written(body)
    refused = (caught.value.param, caught.value.message)
    assert refused[0] == "stop"
    with pytest.raises(InvalidValue) as caught:
        await transport.request("POST", CHAT, body)
    assert (caught.value.param, caught.value.message) == refused
    with pytest.raises(InvalidValue) as caught:
        async with transport.astream(CHAT, body) as pieces:
            [piece async for piece in pieces]
    assert (caught.value.param, caught.value.message) == refused


async def test_numpy_within_a_request(transport: LocalTransport) -> None:
    bias = {"97": np.float32(0)}
    answer = await transport.request("POST", CHAT, {**ASKED, "logit_bias": bias})
    assert answer["choices"]


def test_synchronously(transport: LocalTransport) -> None:
    assert transport.post("shimmy/api/tokenize", {"model": MODEL, "prompt": "abc"})["count"] == 3
    assert transport.put("shimmy/api/limits", {"max_queued": 3})["own"] == {"max_queued": 3}
    assert transport.get("shimmy/api/limits")["own"] == {"max_queued": 3}
    with pytest.raises(NotFound):
        transport.delete("shimmy/api/limits")


def test_labels_are_on_record(transport: LocalTransport) -> None:
    id = transport.post(CHAT, ASKED)["shimmy"]["request_id"]
    guard = transport._service.guard
    begin, _ = transport._start(records(guard, request_id=id)).result()
    assert (begin["notebook"], begin["cell"]) == ("a.ipynb", "c1")
    assert (begin["user"], begin["request_path"]) == ("local", CHAT)


async def test_streams(transport: LocalTransport) -> None:
    body = {**ASKED, "stream": True}

    def read() -> list[Any]:
        with transport.stream(CHAT, body) as chunks:
            return list(events(chunks))

    whole = await asyncio.to_thread(read)
    async with transport.astream(CHAT, body) as pieces:
        other = list(events([piece async for piece in pieces]))
    text = ["".join(c["choices"][0]["delta"].get("content", "") for c in s) for s in (whole, other)]
    assert text[0] == text[1] != ""
    with pytest.raises(NotFound):
        async with transport.astream("shimmy/v1/embeddings", body) as pieces:
            [piece async for piece in pieces]


class TestLeaving:
    """Of answers that have far more tokens than the model is let make."""

    LONG: ClassVar[dict[str, Any]] = {**ASKED, "max_tokens": 3000}

    @pytest.fixture
    def gate(self, fakes: Fakes) -> threading.Semaphore:
        gate = threading.Semaphore(5)
        fakes.make = lambda: FakeBackend(lambda _: ["x "] * 3000, gate=gate)
        return gate

    async def cancelled(self, transport: LocalTransport, gate: threading.Semaphore) -> None:
        gate.release(50)
        guard = transport._service.guard
        async with asyncio.timeout(20):
            while transport._service.active or guard._open:
                await asyncio.sleep(0)
        (end,) = await asyncio.wrap_future(transport._start(records(guard, kind="end")))
        assert end["outcome"] == "cancelled"

    async def test_a_stream(self, transport: LocalTransport, gate: Any) -> None:
        async with transport.astream(CHAT, {**self.LONG, "stream": True}) as pieces:
            async for _ in pieces:
                break
        await self.cancelled(transport, gate)

    async def test_a_whole_answer(self, transport: LocalTransport, gate: Any) -> None:
        asking = asyncio.create_task(transport.request("POST", CHAT, self.LONG))
        async with asyncio.timeout(20):
            while not transport._service.active:
                await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await self.cancelled(transport, gate)

    async def test_while_the_model_is_loaded(self, transport: LocalTransport, fakes: Fakes) -> None:
        begun, may_end = threading.Event(), threading.Event()

        class Slow(FakeBackend):
            def load(self, spec: LoadSpec) -> ModelFacts:
                begun.set()
                assert may_end.wait(20)
                return super().load(spec)

        fakes.make = Slow
        asking = asyncio.create_task(transport.request("POST", CHAT, ASKED))
        assert await asyncio.to_thread(begun.wait, 20)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await self.cancelled(transport, threading.Semaphore())
        may_end.set()

    async def test_an_interrupt(
        self, transport: LocalTransport, gate: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = transport._start

        class Interrupted:
            def __init__(self, future: Any) -> None:
                self.future = future

            def result(self) -> Any:
                while not transport._service.active:
                    pass
                raise KeyboardInterrupt

            def cancel(self) -> None:
                self.future.cancel()

        monkeypatch.setattr(transport, "_start", lambda work: Interrupted(start(work)))
        with pytest.raises(KeyboardInterrupt):
            transport.post(CHAT, self.LONG)
        monkeypatch.setattr(transport, "_start", start)
        await self.cancelled(transport, gate)

    def test_closing(self, transport: LocalTransport, gate: Any) -> None:
        with transport.stream(CHAT, {**self.LONG, "stream": True}) as chunks:
            found = iter(chunks)
            next(found)
            gate.release(50)
            transport.close()
            with pytest.raises((Cancelled, ShimmyError)):
                list(events(found))
        transport.close()
