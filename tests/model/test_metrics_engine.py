"""Metrics of the real engine: an answer's own figures, in this process and behind sockets.

Cases: tokens and times of a chat; steps as the engine counted them; the KV cache while it runs, and
after; health says that it is well, and of a child that was killed that it is not.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shimmy_jupyter.audit.ledger import Ledger
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import AccessDenied
from shimmy_jupyter.guard.guard import Guard
from shimmy_jupyter.health import Surroundings, health
from shimmy_jupyter.models.library import ModelLibrary
from shimmy_jupyter.models.lifecycle import ModelPool
from shimmy_jupyter.models.sources import BUNDLED, Found
from shimmy_jupyter.server.metrics import Metrics
from shimmy_jupyter.service import CompletionService
from shimmy_jupyter.types import CompletionRequest, Message, Principal

from ..offered import catalog, found
from . import conftest

MODEL = "self-test"
AROUND = Surroundings(None, 0, disk=lambda _: 1 << 40, memory=lambda: 1 << 40, gpu=lambda: None)


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[CompletionService]:
    async def load(_file: Found) -> LoadedModel:
        spec = LoadSpec(path=str(BUNDLED), gpu_layers=0)
        return await LoadedModel.load(conftest.making, spec)

    def no_puller() -> Any:
        raise AccessDenied("nothing is downloaded here")

    pool = ModelPool(catalog(found(MODEL, BUNDLED)), load)
    guard = Guard(ledger=Ledger(folder / "ledger.sqlite"))
    service = CompletionService(pool, ModelLibrary(pool, None, no_puller), guard=guard)
    try:
        yield service
    finally:
        await service.close()


def request(**fields: Any) -> CompletionRequest:
    messages = (Message("user", "What does len do?"),)
    return CompletionRequest("id", Principal("me"), MODEL, messages, **fields)


async def status_of(service: CompletionService, name: str) -> str:
    found = await health(service, AROUND)
    return next(one.status for one in found.dependencies if one.name == name)


async def test_an_answer(tmp_path: Path, isolation: str) -> None:
    async with served(tmp_path) as service:
        await check_an_answer(service)


async def check_an_answer(service: CompletionService) -> None:
    registry = CollectorRegistry(auto_describe=True)
    detach = Metrics(registry).attach(service)

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"shimmy_{name}", labels) or 0.0

    async with await service.start(request(max_tokens=24)) as completion:
        assert await completion.read()
        running, used = value("models_resident"), value("kv_tokens_used")
        while await completion.read():
            pass
        await completion.finish()
    usage, timings = completion.usage, completion.ended.timings
    assert running == 1
    assert used in (0, usage.prompt_tokens + 24)  # it may have ended before it was looked at
    assert value("tokens_total", kind="prompt") == usage.prompt_tokens > 5
    assert value("tokens_total", kind="completion") == usage.completion_tokens > 1
    assert value("requests_total", route="completions", code="ok") == 1
    assert timings.ttft_ms is not None
    assert timings.tokens_per_second is not None
    first = value("time_to_first_token_seconds_sum")
    assert first >= timings.ttft_ms / 1000  # from its arrival, not from the engine's
    between = value("inter_token_seconds_sum")
    assert between == pytest.approx(1 / timings.tokens_per_second)
    whole = value("request_seconds_sum", route="completions")
    # The first token is heard of when the event loop comes to it: later ones may be there by then.
    assert whole >= max(first, between * (usage.completion_tokens - 1))
    (model,) = service.pool.loaded()
    statistics = model.engine.statistics
    assert value("batch_size_count") == statistics.steps > 0
    assert value("batch_size_sum") == sum(n * steps for n, steps in statistics.rows.items())
    assert value("kv_tokens_used") == value("queue_depth") == 0
    assert value("kv_tokens_capacity") == model.facts.kv_tokens
    assert value("models_resident_bytes") == model.memory_bytes > BUNDLED.stat().st_size
    assert await status_of(service, "engine") == "ok"
    detach()


@pytest.mark.parametrize("isolation", ["process"], indirect=True)
async def test_a_child_that_was_killed(tmp_path: Path, isolation: str) -> None:
    async with served(tmp_path) as service:
        await check_a_child_that_was_killed(service)


async def check_a_child_that_was_killed(service: CompletionService) -> None:
    async with await service.start(request(max_tokens=2)) as completion:
        await completion.text()
    (model,) = service.pool.loaded()
    backend: Any = model.engine.backend
    for _ in range(2):  # by the second the engine's thread has nothing left to tell the child
        await model.engine.errand(lambda: None)
    os.kill(backend.pid, signal.SIGKILL)
    while backend.pid is not None:
        await asyncio.sleep(0.005)
    assert model.failure is None
    assert await status_of(service, "engine") == "degraded"
    async with await service.start(request(max_tokens=2)) as completion:
        await completion.text()
    assert await status_of(service, "engine") == "ok"
