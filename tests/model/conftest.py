"""Real models on the real engine: the bundled one, and random ones that the tests make."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import random_gguf

from shimmy_jupyter.compose import isolated_backend, llama_backend
from shimmy_jupyter.engine.backend import LoadSpec, Sharing
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.models.sources import BUNDLED
from shimmy_jupyter.types import Ended, Message, Prompt, Sampling

GREEDY = Sampling(temperature=0)


def self_test_path() -> Path:
    return BUNDLED


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gguf.write(tmp_path_factory.mktemp("models") / "random.gguf")


making = llama_backend


@pytest.fixture(params=["none", "process"])
def isolation(request: Any, monkeypatch: Any) -> str:
    """Models that are loaded in this test are, in turn, in this process and in one of their own."""
    makers = {"none": llama_backend, "process": isolated_backend}
    monkeypatch.setattr(f"{__name__}.making", makers[request.param])
    return str(request.param)


@asynccontextmanager
async def loaded(
    path: Path, sharing: Sharing | None = None, **spec: Any
) -> AsyncIterator[LoadedModel]:
    model = await LoadedModel.load(making, LoadSpec(path=str(path), **spec), sharing=sharing)
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
    who: str = "local",
    **options: Any,
) -> tuple[str, Ended]:
    tokens = await model.encode((Message("user", prompt),) if isinstance(prompt, str) else prompt)
    async with model.submit(who, tokens, max_tokens, sampling, stop, **options) as stream:
        text = "".join([piece async for piece in stream])
    assert stream.ended is not None
    return text, stream.ended


Ask = Callable[..., Awaitable[tuple[str, Ended]]]
