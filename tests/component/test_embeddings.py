"""Embeddings and reranking over HTTP, with a scripted backend.

Cases: a text, tokens, lists of either; base64; fewer dimensions; many, in several calls; each bad field
named; too long, by how many; too much in all; a model that makes none, one that ranks, one that cannot
generate; ranks, the best first; beside a stream; users take turns; an engine that ended, before and amid it;
a vector that is none.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
from typing import Any

import pytest

from shimmy_jupyter.engine.backend import Embedded
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import EngineLost
from shimmy_jupyter.types import EmbeddingFacts

from .conftest import MODEL, Fakes, chat
from .test_choices import post
from .test_completions import CHAT, refused, until

EMBEDDINGS = ("shimmy", "v1", "embeddings")
RERANK = ("shimmy", "v1", "rerank")
SHAPE = EmbeddingFacts("mean", 4, 64, 64, 4)
RANKS = EmbeddingFacts("rank", 1, 64, 64, 4)


@pytest.fixture(autouse=True)
def embedding(fakes: Fakes) -> None:
    fakes.make = lambda: FakeBackend(embedding=SHAPE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("abc", [[3, 97]]),
        (["abc", "z"], [[3, 97], [1, 122]]),
        ([5, 6, 7], [[3, 5]]),
        ([[5, 6], [7]], [[2, 5], [1, 7]]),
        (["abc", [7]], [[3, 97], [1, 7]]),
    ],
)
async def test_what_may_be_embedded(
    server: Any, jp_fetch: Any, given: Any, expected: list[list[int]]
) -> None:
    answer = await post(jp_fetch, *EMBEDDINGS, input=given)
    assert answer["object"] == "list"
    assert answer["model"] == MODEL
    assert [one["index"] for one in answer["data"]] == list(range(len(expected)))
    assert [one["embedding"] for one in answer["data"]] == [[*e, 0, 0] for e in expected]
    tokens = sum(length for length, _ in expected)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


async def test_base64(server: Any, jp_fetch: Any) -> None:
    answer = await post(jp_fetch, *EMBEDDINGS, input="abc", encoding_format="base64")
    data = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack("<4f", data) == (3, 97, 0, 0)


async def test_fewer_dimensions(server: Any, jp_fetch: Any) -> None:
    answer = await post(jp_fetch, *EMBEDDINGS, input=[[3, 4, 4, 4]], dimensions=2)
    assert answer["data"][0]["embedding"] == pytest.approx([4 / 5, 3 / 5])
    assert (await post(jp_fetch, *EMBEDDINGS, input="a", dimensions=4))["data"]


async def test_many_in_several_calls(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    texts = ["x" * (1 + i % 60) for i in range(300)]
    answer = await post(jp_fetch, *EMBEDDINGS, input=texts)
    assert [one["embedding"][0] for one in answer["data"]] == [len(text) for text in texts]
    assert max(fakes.made[0].embedded) <= SHAPE.sequences
    assert len(fakes.made[0].embedded) > 300 / SHAPE.sequences


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": {}}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": ["a", []]}, "input.1"),
        ({"input": ["a", [["b"]]]}, "input.1"),
        ({"input": [[1, "b"]]}, "input.0"),
        ({"input": [[1, -1]]}, "input.0"),
        ({"input": [[1, 99999]]}, "input.0"),
        ({"input": [True]}, "input.0"),
        ({"input": ["\ud800"]}, "input.0"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_bad_field_is_named(
    server: Any, jp_fetch: Any, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"model": MODEL, **fields})
    status, error = await refused(jp_fetch, *EMBEDDINGS, body=body)
    assert (status, error["code"], error["param"]) == (400, "invalid_value", param)


async def test_too_long(server: Any, jp_fetch: Any) -> None:
    body = json.dumps({"model": MODEL, "input": ["a", "x" * 65]})
    status, error = await refused(jp_fetch, *EMBEDDINGS, body=body)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "input.1"
    assert "65 tokens" in error["message"]
    assert (await post(jp_fetch, *EMBEDDINGS, input="x" * 64))["usage"]["total_tokens"] == 64


async def test_a_model_that_makes_none(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    fakes.make = FakeBackend
    for path, fields in (
        (EMBEDDINGS, {"input": "a"}),
        (RERANK, {"query": "a", "documents": ["b"]}),
    ):
        body = json.dumps({"model": MODEL, **fields})
        status, error = await refused(jp_fetch, *path, body=body)
        assert (status, error["code"]) == (400, "unsupported_parameter")
        assert error["param"] == "model"


async def test_ranks(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    fakes.make = lambda: FakeBackend(embedding=RANKS)
    documents = ["bb", {"text": "dddd"}, "a", "cc"]
    fields = {"query": "q", "documents": documents}
    answer = await post(jp_fetch, *RERANK, **fields)
    assert [one["index"] for one in answer["results"]] == [1, 0, 3, 2]
    assert [one["relevance_score"] for one in answer["results"]] == [6, 4, 4, 3]
    assert answer["usage"]["total_tokens"] == 17
    answer = await post(jp_fetch, *RERANK, **fields, top_n=2, return_documents=True)
    assert answer["results"] == [
        {"index": 1, "relevance_score": 6, "document": {"text": "dddd"}},
        {"index": 0, "relevance_score": 4, "document": {"text": "bb"}},
    ]
    body = json.dumps({"model": MODEL, "input": "a"})
    status, error = await refused(jp_fetch, *EMBEDDINGS, body=body)
    assert (status, error["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": ["a", 5]}, "documents.1"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "q", "documents": ["a", "x" * 64]}, "documents.1"),
    ],
)
async def test_what_cannot_be_ranked(
    server: Any, jp_fetch: Any, fakes: Fakes, fields: dict[str, Any], param: str
) -> None:
    fakes.make = lambda: FakeBackend(embedding=RANKS)
    body = json.dumps({"model": MODEL, **fields})
    status, error = await refused(jp_fetch, *RERANK, body=body)
    assert (status, error["param"]) == (400, param)


async def test_beside_a_stream(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(lambda _: ["a"] * 20, gate=gate, embedding=SHAPE)
    answer = asyncio.ensure_future(jp_fetch(*CHAT, method="POST", body=chat()))
    vectors = asyncio.ensure_future(post(jp_fetch, *EMBEDDINGS, input=["x"] * 12))
    for _ in range(60):
        gate.release()
        await asyncio.sleep(0)
    assert len((await vectors)["data"]) == 12
    text = json.loads((await answer).body)["choices"][0]["message"]["content"]
    assert text == "a" * 20


async def test_an_engine_that_ended_unnoticed_is_loaded_again(
    server: Any, jp_fetch: Any, fakes: Fakes, monkeypatch: Any
) -> None:
    assert (await post(jp_fetch, *EMBEDDINGS, input="x"))["data"]
    tokenize, calls = FakeBackend.tokenize_inputs, [0]

    def fails_once(self: FakeBackend, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise EngineLost("gone")
        return tokenize(self, *args)

    monkeypatch.setattr(FakeBackend, "tokenize_inputs", fails_once)
    answer = await post(jp_fetch, *EMBEDDINGS, input=["x"] * 12)
    assert len(answer["data"]) == 12
    assert len(fakes.models) == 2


async def test_also_where_nothing_has_to_be_tokenized(
    server: Any, jp_fetch: Any, fakes: Fakes
) -> None:
    assert (await post(jp_fetch, *EMBEDDINGS, input=[5]))["data"]

    def gone() -> None:
        raise EngineLost("gone")

    fakes.models[0].engine.backend.check = gone  # type: ignore[method-assign]
    assert len((await post(jp_fetch, *EMBEDDINGS, input=[[5], [6, 7]]))["data"]) == 2
    assert len(fakes.models) == 2


async def test_an_engine_that_ends_amid_it(server: Any, jp_fetch: Any, monkeypatch: Any) -> None:
    embed, calls = FakeBackend.embed, [0]

    def fails_once(self: FakeBackend, *args: Any) -> Embedded:
        calls[0] += 1
        if calls[0] == 2:
            raise EngineLost("gone")
        return embed(self, *args)

    monkeypatch.setattr(FakeBackend, "embed", fails_once)
    body = json.dumps({"model": MODEL, "input": ["x"] * 12})
    status, error = await refused(jp_fetch, *EMBEDDINGS, body=body)
    assert (status, error["code"]) == (503, "engine_crashed")
    assert len((await post(jp_fetch, *EMBEDDINGS, input=["x"] * 12))["data"]) == 12


async def test_one_user_s_many_inputs_do_not_keep_another_waiting(
    server: Any, jp_fetch: Any, fakes: Fakes
) -> None:
    divisible = EmbeddingFacts("last", 4, 64, 8, 4, divisible=True)
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(embedding=divisible, gate=gate)
    many = asyncio.ensure_future(post(jp_fetch, *EMBEDDINGS, input=["x" * 63, "y" * 9] * 8))
    await until(lambda: bool(fakes.models) and fakes.models[0].active == 1)
    one = asyncio.ensure_future(fakes.models[0].embedder.vectors(((7,),), "other"))  # type: ignore[union-attr]
    # The first one's long input, and then the other's turn.
    for _ in range(12):
        gate.release()
    assert (await one)[0].startswith(struct.pack("<2f", 1, 7))
    assert not many.done()
    for _ in range(200):
        gate.release()
    assert len((await many)["data"]) == 16


@pytest.mark.parametrize(
    "given", [[[5] * 4096] * 65, [5] * 262_145], ids=["many lists", "one long list"]
)
async def test_more_tokens_than_one_request_may_have(
    server: Any, jp_fetch: Any, given: Any
) -> None:
    body = json.dumps({"model": MODEL, "input": given})
    status, error = await refused(jp_fetch, *EMBEDDINGS, body=body)
    assert (status, error["param"]) == (400, "input")


async def test_a_query_is_not_multiplied_without_bound(
    server: Any, jp_fetch: Any, fakes: Fakes
) -> None:
    fakes.make = lambda: FakeBackend(embedding=RANKS)
    body = json.dumps({"model": MODEL, "query": "!" * 1_000_000, "documents": ["d"] * 2048})
    status, error = await refused(jp_fetch, *RERANK, body=body)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "documents.0"


@pytest.mark.parametrize("vector", [b"\x00" * 12, struct.pack("<4f", 1, 2, 3, float("nan"))])
async def test_a_vector_that_is_none(
    server: Any, jp_fetch: Any, monkeypatch: Any, vector: bytes
) -> None:
    monkeypatch.setattr(FakeBackend, "embed", lambda *_: Embedded((vector,), 0.1))
    body = json.dumps({"model": MODEL, "input": "a"})
    status, error = await refused(jp_fetch, *EMBEDDINGS, body=body)
    assert (status, error["code"]) == (500, "generation_failed")


async def test_a_model_that_cannot_generate(
    server: Any, jp_fetch: Any, fakes: Fakes, monkeypatch: Any
) -> None:
    from dataclasses import replace

    load = FakeBackend.load

    def embeds_only(self: FakeBackend, spec: Any) -> Any:
        return replace(load(self, spec), can_generate=False)

    monkeypatch.setattr(FakeBackend, "load", embeds_only)
    for fields in ({}, {"response_format": {"type": "json_object"}}):
        status, error = await refused(jp_fetch, *CHAT, body=chat(**fields))
        assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", "model")
    assert (await post(jp_fetch, *EMBEDDINGS, input="a"))["data"]
    await until(lambda: fakes.models[0].active == 0)


async def test_fields_without_effect_are_named(server: Any, jp_fetch: Any) -> None:
    body = json.dumps({"model": MODEL, "input": "a", "user": "me", "truncate": "END"})
    response = await jp_fetch(*EMBEDDINGS, method="POST", body=body)
    assert response.headers["x-shimmy-ignored"] == "user, truncate"
