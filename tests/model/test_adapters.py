"""LoRA adapters on the real engine, in both isolations.

Cases: an adapter changes the answer, none does not; several in flight at once answer as each alone;
their caches are kept apart, each reuses its own; a reproducible request too; a file that is none, or for
another model, is refused and disturbs nobody; the same adapter twice is loaded once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import random_gguf

from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import ModelLoadFailed

from .conftest import ask, loaded

pytestmark = pytest.mark.usefixtures("isolation")
PROMPT = tuple(i * 7 % 250 for i in range(100))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [str(random_gguf.write_adapter(folder / f"{n}.gguf", seed=n)) for n in (1, 2)]


@asynccontextmanager
async def with_adapters(path: Path, adapters: list[str]) -> AsyncIterator[LoadedModel]:
    async with loaded(path, kv_tokens=4096) as model:
        for adapter in adapters:
            await model.use_adapter(adapter)
        yield model


async def test_in_flight_at_once_as_each_alone(random_model: Path, adapters: list[str]) -> None:
    async with with_adapters(random_model, adapters) as model:
        alone = [(await ask(model, PROMPT, 24, adapter=one))[0] for one in ("", *adapters)]
        assert len(set(alone)) == 3
        again = await asyncio.gather(
            *(ask(model, PROMPT, 24, adapter=one) for one in ("", *adapters) for _ in range(3))
        )
        assert [text for text, _ in again] == [text for text in alone for _ in range(3)]
        assert max(model.engine.statistics.rows) <= 3


async def test_caches_are_kept_apart(random_model: Path, adapters: list[str]) -> None:
    async with with_adapters(random_model, adapters) as model:
        found = []
        for one in (adapters[0], adapters[1], "", adapters[0], adapters[1], ""):
            text, ended = await ask(model, PROMPT, 8, adapter=one)
            found.append((text, ended.usage.cached_tokens))
    assert [cached for _, cached in found] == [0, 0, 0, 99, 99, 99]
    assert [text for text, _ in found[:3]] == [text for text, _ in found[3:]]


async def test_reproducible(random_model: Path, adapters: list[str]) -> None:
    async with with_adapters(random_model, adapters) as model:
        shared = [(await ask(model, PROMPT, 24, adapter=one))[0] for one in ("", adapters[0])]
        exact = [
            (await ask(model, PROMPT, 24, adapter=one, reproducible=True))[0]
            for one in ("", adapters[0])
        ]
    assert exact[0] != exact[1]
    assert exact == shared


async def test_what_is_no_adapter_of_this_model(
    random_model: Path, adapters: list[str], tmp_path: Path
) -> None:
    other = random_gguf.write_adapter(tmp_path / "other.gguf", random_gguf.Shape(width=96))
    text = tmp_path / "text.gguf"
    text.write_bytes(b"no adapter" * 100)
    async with with_adapters(random_model, adapters) as model:
        running = asyncio.create_task(ask(model, PROMPT, 64))
        for path in (other, text, random_model, tmp_path / "missing.gguf"):
            with pytest.raises(ModelLoadFailed, match="refused the adapter") as refused:
                await model.use_adapter(str(path))
            assert str(tmp_path) not in refused.value.message
        assert (await running)[1].usage.completion_tokens == 64
        await model.use_adapter(adapters[0])
        assert (await ask(model, PROMPT, 4, adapter=adapters[0]))[1].usage.completion_tokens == 4
