"""Real models on the real engine: the bundled one, and random ones that the tests make."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import random_gguf

from shimmy_jupyter.compose import llama_backend
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.models.catalog import discover
from shimmy_jupyter.types import Ended, Message, Prompt, Sampling

GREEDY = Sampling(temperature=0)


def self_test_path() -> Path:
    (bundled,) = discover([])
    return bundled.path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gguf.write(tmp_path_factory.mktemp("models") / "random.gguf")


@asynccontextmanager
async def loaded(path: Path, **spec: Any) -> AsyncIterator[LoadedModel]:
    model = await LoadedModel.load(llama_backend, LoadSpec(path=str(path), **spec))
    try:
        yield model
        scheduler = model.engine.scheduler
        scheduler.check_invariants()
        assert not scheduler.sequences
    finally:
        await model.close()


async def ask(
    model: LoadedModel,
    prompt: Prompt,
    max_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (),
) -> tuple[str, Ended]:
    tokens = await model.encode((Message("user", prompt),) if isinstance(prompt, str) else prompt)
    async with model.submit("local", tokens, max_tokens, sampling, stop) as stream:
        text = "".join([piece async for piece in stream])
    assert stream.ended is not None
    return text, stream.ended


Ask = Callable[..., Awaitable[tuple[str, Ended]]]
