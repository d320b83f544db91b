"""Vectors and scores as a loaded model makes them, in both isolations.

Cases: all-MiniLM-L6-v2 against its reference, by text; the right passage for a query; a model that
generates, beside streams, whose answers stay as they are; long inputs in slices; too long; tokens that are
taken as they are; a reranker; a model that cannot generate; a caller who gives up; Hangul.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minilm_gguf
import numpy as np
import pytest
import random_gguf

from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import ContextLengthExceeded, InvalidValue, UnsupportedParameter
from shimmy_jupyter.types import Constraint, EmbeddingInput

from .bert_reference import Array, Bert
from .conftest import ask, loaded, self_test_path
from .test_embedding import FOLDER, TEXTS, needs_minilm, tiny_bert

pytestmark = pytest.mark.usefixtures("isolation")


async def vectors(model: LoadedModel, inputs: Sequence[EmbeddingInput], who: str = "p") -> Array:
    names = tuple(f"input.{i}" for i in range(len(inputs)))
    tokens = await model.encode_inputs(tuple(inputs), names, who)
    assert model.embedder is not None
    found = await model.embedder.vectors(tokens, who)
    return np.stack([np.frombuffer(row, dtype="<f4") for row in found])


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert FOLDER is not None
    path = tmp_path_factory.mktemp("minilm") / "minilm.gguf"
    minilm_gguf.convert(FOLDER, path)
    return path


@needs_minilm
class TestMiniLM:
    async def test_a_hundred_sentences(self, minilm: Path) -> None:
        assert FOLDER is not None
        reference = Bert(FOLDER)
        async with loaded(minilm) as model:
            assert not model.facts.can_generate
            found = await vectors(model, [(text,) for text in TEXTS])
            # All at once, from several users.
            halves = await asyncio.gather(
                vectors(model, [(text,) for text in TEXTS[:50]], "a"),
                vectors(model, [(text,) for text in TEXTS[50:]], "b"),
            )
            assert model.active == 0
        expected = np.stack([reference.embed(reference.tokenize(text)) for text in TEXTS])
        cosines = (found * expected).sum(axis=1)
        print(f"smallest cosine {cosines.min():.7f}")
        assert cosines.min() >= 0.999
        assert (np.concatenate(halves) * expected).sum(axis=1).min() >= 0.999

    async def test_the_right_passage(self, minilm: Path) -> None:
        async with loaded(minilm) as model:
            queries = await vectors(model, [(text,) for text in TEXTS[:10]])
            passages = await vectors(model, [(text,) for text in TEXTS[10:20]])
        assert (queries @ passages.T).argmax(axis=1).tolist() == list(range(10))

    async def test_long_texts_of_few_tokens_are_counted(self, minilm: Path) -> None:
        async with loaded(minilm) as model:
            assert len(await model.encode("photosynthesis " * 92)) < 300
            with pytest.raises(ContextLengthExceeded, match="embeds at most 512"):
                await vectors(model, [("!!! " * 200_000,)] * 4)
            assert (await vectors(model, [("still there",)])).shape == (1, 384)

    async def test_hangul_is_taken_apart_as_it_was_in_training(self, minilm: Path) -> None:
        assert FOLDER is not None
        reference = Bert(FOLDER)
        async with loaded(minilm) as model:
            (tokens,) = await model.encode_inputs((("안녕하세요",),), ("input",), "p")
        assert tokens == reference.tokenize("안녕하세요")


async def test_beside_streams() -> None:
    inputs: list[EmbeddingInput] = [(f"text number {i}",) for i in range(40)]
    async with loaded(self_test_path()) as model:
        alone, _ = await ask(model, "What does len do?")
        expected = await vectors(model, inputs)
        answers, found = await asyncio.gather(
            asyncio.gather(*(ask(model, "What does len do?", who=str(i)) for i in range(4))),
            vectors(model, inputs),
        )
    assert [text for text, _ in answers] == [alone] * 4
    assert (found * expected).sum(axis=1).min() > 1 - 1e-4
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)


async def test_long_inputs_and_too_long_ones(random_model: Path) -> None:
    async with loaded(random_model) as model:
        shape = model.facts.embedding
        assert shape is not None
        assert (shape.pooling, shape.divisible, shape.tokens) == ("last", True, 2048)
        longest = tuple(i % 250 for i in range(2048))
        one = await vectors(model, [longest])
        mixed = await vectors(model, [(1, 2), longest, (3,), longest])
        assert (mixed[[1, 3]] @ one[0]).min() > 1 - 1e-3
        with pytest.raises(ContextLengthExceeded, match="2049 tokens") as refused:
            await vectors(model, [(1,), (*longest, 5)])
        assert refused.value.param == "input.1"
        with pytest.raises(InvalidValue) as wrong:
            await vectors(model, [(1, model.facts.vocabulary)])
        assert wrong.value.param == "input.0"
        with pytest.raises(ContextLengthExceeded):
            await vectors(model, [("x" * 2_000_000,)])


async def test_a_caller_who_gives_up(random_model: Path) -> None:
    inputs: list[EmbeddingInput] = [tuple(i % 250 for i in range(2000))] * 20
    async with loaded(random_model) as model:
        expected = await vectors(model, [(1, 2, 3)])
        task = asyncio.create_task(vectors(model, inputs))
        while model.active == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert model.active == 0
        again = await vectors(model, [(1, 2, 3)])
    assert (again[0] @ expected[0]) > 1 - 1e-4


async def test_a_reranker(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path, head=True)
    minilm_gguf.convert(folder, tmp_path / "rank.gguf")
    reference = Bert(folder)
    query, documents = "a b c", ["d", "e f g", "a b c", "x y z " * 5]
    pairs: list[Any] = [
        (*reference.tokenize(query), *reference.tokenize(document)[1:]) for document in documents
    ]
    expected = [reference.score(pair) for pair in pairs]
    async with loaded(tmp_path / "rank.gguf") as model:
        assert not model.facts.can_generate
        found = await vectors(model, [(query, document) for document in documents])
    assert found[:, 0] == pytest.approx(expected, abs=5e-3)


async def test_a_model_that_only_embeds(tmp_path: Path) -> None:
    path = random_gguf.write(tmp_path / "mean.gguf", causal=False)
    async with loaded(path) as model:
        with pytest.raises(UnsupportedParameter):
            await model.compile(Constraint("json_object"))
        assert not model.facts.can_generate
        assert model.facts.embedding is not None
        assert model.facts.embedding.pooling == "mean"
        found = await vectors(model, [(1, 2, 3), (4, 5)])
    assert found.shape == (2, 64)
