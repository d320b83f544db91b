"""No file that the validator accepts ends the engine's process: llama.cpp refuses it, or it answers.

Cases: valid files of several architectures and vocabularies; mutants of each; adapters and
their mutants; some that are refused, to see that they would have ended it.

5,000 of them: `make mutants`; others: GGUF_SEED=5.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import minilm_gguf
import mutated_gguf
import pytest
import random_gguf

from shimmy_jupyter.compose import isolated_backend
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import EngineLost, ShimmyError
from shimmy_jupyter.models.gguf import GgufError, validate
from shimmy_jupyter.types import Sampling

from .test_embedding import tiny_bert

SEED = int(os.environ.get("GGUF_SEED", "0"))
MUTANTS = int(os.environ.get("GGUF_MUTANTS", "500"))
"""Of all bases and of an adapter together."""
TEXT = 'Zoë said:\t"1 + 1 = 2"\n\n日本語 🙂 \0 <|im_end|> </s>' + chr(0x10FFFF)
BASES = ("llama", "quantized", "encoder", "bert", *mutated_gguf.RELATIVES)
ENDING = ("block_count 0", "epsilon nan", "no tokenizer", "bytes missing", "norm in F16")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("bases")
    path = folder / "a.gguf"
    found = {
        "llama": random_gguf.write(path).read_bytes(),
        "quantized": random_gguf.write(path, quantized=True, infill=True).read_bytes(),
        "encoder": random_gguf.write(path, causal=False).read_bytes(),
        "adapter": random_gguf.write_adapter(path).read_bytes(),
    }
    minilm_gguf.convert(tiny_bert(folder, head=False), path)
    found["bert"] = path.read_bytes()
    for name in mutated_gguf.RELATIVES:
        found[name] = mutated_gguf.relative(found["llama"], name)
    return found


async def use(model: LoadedModel, adapter: Path | None) -> None:
    """Everything that a file's contents decide on."""
    options: dict[str, Any] = {}
    if adapter is not None:
        await model.use_adapter(str(adapter))
        options["adapter"] = str(adapter)
    if model.facts.can_generate:
        tokens = await model.encode(TEXT)
        sampling = Sampling(temperature=1.0, seed=1)
        async with model.submit("me", tokens, 3, sampling, (), **options) as stream:
            async for _ in stream:
                pass
        await model.decode(tokens[:5])
    if model.embedder is not None:
        inputs = await model.encode_inputs(((TEXT,), ("a",)), ("input.0", "input.1"), "me")
        await model.embedder.vectors(inputs, "me")


async def fate(path: Path, adapter: Path | None = None) -> str:
    """What became of the engine's process: "answered", "refused", or how it ended."""
    try:
        model = await LoadedModel.load(isolated_backend, LoadSpec(path=str(path), threads=1))
    except EngineLost as error:
        return error.message
    except ShimmyError:
        return "refused"
    backend: Any = model.engine.backend
    try:
        await use(model, adapter)
        said = "answered"
    except ShimmyError as error:
        said = error.message if isinstance(error, EngineLost) else "refused"
    lives = backend.pid is not None
    failure = model.failure
    await model.close()
    return said if lives else (failure.message if failure is not None else said)


def accepted(base: bytes, folder: Path, fates: Counter[str]) -> Iterator[tuple[str, Path]]:
    """Each mutant that the validator accepts: its name and a file. Counts the others, each of which is
    refused with a reason.
    """
    mutants = mutated_gguf.mutations(base, SEED, -(-MUTANTS // (len(BASES) + 1)))
    for number, (name, data) in enumerate(mutants):
        path = folder / f"{number}.gguf"
        path.write_bytes(data)
        try:
            validate(path)
        except GgufError as error:
            assert 10 < len(error.message) < 400, error.message
            assert str(path.parent) not in error.message
            fates["by the validator"] += 1
            path.unlink()
            continue
        yield name, path


async def judge(
    name: str, base: bytes, folder: Path, one: Callable[[Path], Awaitable[str]]
) -> None:
    """All that become of its mutants, as many at once as there are processors."""
    fates: Counter[str] = Counter()
    mutants = accepted(base, folder, fates)

    async def some() -> None:
        for mutation, path in mutants:
            found = await one(path)
            path.unlink()
            fates[found] += 1
            if found not in {"answered", "refused"}:
                print(f"{name}, {mutation}: {found}")

    async with asyncio.TaskGroup() as group:
        for _ in range(os.cpu_count() or 1):
            group.create_task(some())
    print(f"\n{name}: {dict(fates)}")
    assert set(fates) <= {"answered", "refused", "by the validator"}
    assert fates["answered"]
    assert fates["by the validator"]


@pytest.mark.parametrize("name", BASES)
async def test_what_is_accepted(name: str, bases: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(bases[name])
    validate(path)
    assert await fate(path) == "answered"
    await judge(name, bases[name], tmp_path, fate)


async def test_adapters(bases: dict[str, bytes], tmp_path: Path) -> None:
    model, path = tmp_path / "model.gguf", tmp_path / "a.gguf"
    model.write_bytes(bases["llama"])
    path.write_bytes(bases["adapter"])
    validate(path)
    assert await fate(model, path) == "answered"
    await judge("adapter", bases["adapter"], tmp_path, lambda mutant: fate(model, mutant))


@pytest.mark.parametrize("name", ENDING)
async def test_what_is_refused_would_end_it(
    name: str, bases: dict[str, bytes], tmp_path: Path
) -> None:
    """Else the check has outlived its reason."""
    path = tmp_path / "a.gguf"
    file, _ = mutated_gguf.parsed(bases["llama"])
    mutated_gguf.NAMED[name][1](file)
    path.write_bytes(file.pack())
    with pytest.raises(GgufError):
        validate(path)
    assert "SIG" in await fate(path)
