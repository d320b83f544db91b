"""The Python API on a real server, in a process of its own, with the real engine.

Cases: 200 generated schemas on the bundled model, some of them impossible: a valid value, cut off, or
refused with the reason before anything is decoded; types as people write them; a label's score is
what the model's own answer had; a text makes its label likelier; vectors; the same seed again; in a
kernel: an answer, OpenAI's client, and an interrupt of each kind of call, which stops the engine.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal

import jsonschema
import numpy as np
import pydantic
import pytest
import random_gguf
from kernel_session import Kernel, RunningServer, kernel, running_server, text_of

from shimmy_jupyter.errors import AnswerCutOff, RequestError
from shimmy_jupyter.notebook.asking import Asker
from shimmy_jupyter.notebook.classifying import Classifier
from shimmy_jupyter.notebook.client import Server
from shimmy_jupyter.notebook.remote import AsyncHttpTransport
from shimmy_jupyter.notebook.schemas import extract

from .test_constraints import with_definitions

LEN = "Return the number of items in a container."
TEXT = "len(obj) returns the number of items in a container; its name is len, and it is a builtin."
IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "not": {"not": {"type": "null"}},
    "if": {"if": {"required": ["it"]}},
    "uniqueItems": {"uniqueItems": True},
    "contains": {"contains": {"type": "string"}},
    "ref": {"properties": {"it": {"$ref": "https://example.org/schema"}}},
    "pattern": {"properties": {"it": {"type": "string", "pattern": "^(?=a)"}}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    models = tmp_path_factory.mktemp("models")
    shape = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
    random_gguf.write(models / "slow.gguf", shape, words=True, seed=3)
    with running_server(environment={"SHIMMY_MODEL_PATHS": str(models)}) as running:
        yield running


@pytest.fixture
def transport(server: RunningServer, jp_asyncio_loop: Any) -> Iterator[AsyncHttpTransport]:
    made = AsyncHttpTransport(Server(server.url, server.token))
    yield made
    jp_asyncio_loop.run_until_complete(made.aclose())


@pytest.fixture
def asker(transport: AsyncHttpTransport) -> Asker:
    async def bundled() -> str:
        return "self-test"

    return Asker(lambda: transport, default_model=bundled)


async def tokens_decoded(server: RunningServer) -> int:
    """Of requests that have ended, by the ledger."""
    usage = (await server.request("GET", "shimmy/api/audit/usage"))["usage"]
    return sum(row["tokens_generated"] for row in usage)


async def test_generated_schemas(asker: Asker, server: RunningServer) -> None:
    random = Random("extract")
    schemas: list[tuple[str, dict[str, Any]]] = []
    for i in range(200):
        odd = random.choice(list(IMPOSSIBLE)) if i % 8 == 0 else ""
        one = with_definitions(random)
        schemas.append((odd, {**one, **IMPOSSIBLE.get(odd, {})}))
    turn = asyncio.Semaphore(16)

    async def outcome(i: int, odd: str, one: dict[str, Any]) -> str:
        async with turn:
            try:
                reply = await extract(
                    asker, one, TEXT, temperature=1, seed=i, reproducible=False, max_tokens=100
                )
            except AnswerCutOff as cut:
                assert cut.text
                return "length"
            except RequestError as refused:
                assert odd, refused
                assert refused.code in ("invalid_value", "unsupported_parameter")
                assert odd in refused.message or "look" in refused.message, refused
                return "refused"
        jsonschema.validate(reply.parsed, one)
        assert json.loads(reply.text) == reply.parsed
        return "valid"

    before = await tokens_decoded(server)
    impossible = [outcome(i, odd, one) for i, (odd, one) in enumerate(schemas) if odd]
    assert set(await asyncio.gather(*impossible)) == {"refused"}
    assert await tokens_decoded(server) == before
    found = await asyncio.gather(
        *(outcome(i, odd, one) for i, (odd, one) in enumerate(schemas) if not odd)
    )
    assert len(impossible) + len(found) == 200
    assert set(found) <= {"valid", "length"}
    assert found.count("valid") > len(found) // 2


class Function(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    builtin: bool
    returns: Literal["int", "str", "list"]
    arguments: list[Literal["obj", "n"]] = pydantic.Field(max_length=2)
    nested: Function | None = None


@pytest.mark.parametrize(
    "kind", [Function, list[Function], tuple[bool, int], dict[str, bool], Literal["yes", "no"], set[bool]]
)  # fmt: skip
async def test_types(asker: Asker, kind: Any) -> None:
    for seed in range(3):
        try:
            reply = await extract(asker, kind, TEXT, temperature=1, seed=seed, max_tokens=150)
        except AnswerCutOff:
            continue
        assert pydantic.TypeAdapter(kind).validate_python(reply.parsed) == reply.parsed


async def test_the_same_seed_again(asker: Asker) -> None:
    one, two = [await asker.chat("What is a list?", seed=0, max_tokens=20) for _ in range(2)]
    assert one.text == two.text
    assert one.receipt is not None


class TestLabels:
    async def test_a_score_is_what_the_answer_had(self, asker: Asker) -> None:
        """The model's greedy answer, as a label, has the log-probability that it had as an answer."""
        question = "What does len do?"
        answer = await asker.chat(question, temperature=0, logprobs=True, thinking=False)
        assert answer.text == LEN
        assert answer.logprobs is not None
        scored = answer.logprobs
        whole = b"".join(bytes(one["bytes"]) for one in scored)
        assert whole.decode() == LEN
        expected = math.fsum(one["logprob"] for one in scored)

        one = Classifier(asker, [LEN, "Return a list."])

        async def rendered(_: str) -> str:
            body = {"model": "self-test", "messages": [{"role": "user", "content": question}]}
            return str((await asker.post("shimmy/api/apply-template", body))["prompt"])

        one._base = {"model": "self-test"}
        one._rendered = rendered  # type: ignore[method-assign]
        found = await one._likelihoods("")
        assert found[LEN] == pytest.approx(expected, abs=0.05)
        assert found[LEN] > found["Return a list."]

    async def test_a_text_makes_its_label_likelier(self, asker: Asker) -> None:
        one = Classifier(asker, [LEN, "Return a list.", "Sort it."], prompt="What does this do?")
        found = await one.classify("What does len do?")
        assert found.label == LEN
        assert math.fsum(found.probabilities.values()) == pytest.approx(1)
        empty = await one.classify("")
        assert empty.scores == pytest.approx(dict.fromkeys(found.scores, 0), abs=0.05)


async def test_vectors(asker: Asker) -> None:
    found = await asker.embed(["one text", "another", "one text"], model="slow")
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == ((3, 256), np.float32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-3)
    assert found[0] @ found[2] > 0.99


async def done(session: Kernel, code: str) -> str:
    outputs = await session.execute(code)
    assert [one["type"] for one in outputs] == ["stream"], outputs
    return text_of(outputs[0]).strip()


async def test_in_a_kernel(server: RunningServer) -> None:
    async with kernel(server) as session:
        first = "from shimmy_jupyter import api; import sys; "
        heavy = "print([m for m in ('httpx', 'numpy', 'pydantic', 'openai') if m in sys.modules])"
        assert await done(session, first + heavy) == "[]"
        ask = "print({}api.{}chat('What does len do?', model='self-test', temperature=0))"
        assert await done(session, ask.format("", "")) == LEN
        assert await done(session, ask.format("await ", "a")) == LEN
        openai = "c = api.openai_client(); print(c.models.retrieve('self-test').owned_by, c)"
        said = await done(session, openai)
        assert said.startswith("shimmy <openai.OpenAI")
        assert server.token not in said


CALLS = {
    "waiting": "api.chat('Go on', {})",
    "reading": "list(api.stream('Go on', {}))",
    "awaiting": "await api.achat('Go on', {})",
    "awaiting pieces": "async for _ in api.astream('Go on', {}): pass",
    "for a value": "api.extract(str, 'Go on', {})",
}


@pytest.mark.parametrize("call", CALLS)
async def test_an_interrupt_stops_the_engine(server: RunningServer, call: str) -> None:
    endless = CALLS[call].format("model='slow', max_tokens=1900, ignore_eos=True")
    async with kernel(server) as session:
        await done(session, "from shimmy_jupyter import api; print(len(api.models()))")
        running = asyncio.create_task(session.execute(endless))
        async with asyncio.timeout(60):
            while not (await server.request("GET", "shimmy/health"))["active"]:
                assert not running.done(), running.result()
        await session.interrupt()
        async with asyncio.timeout(5):  # the answer would take longer
            outputs = await running
        assert outputs[-1]["content"]["ename"] in ("KeyboardInterrupt", "CancelledError")
        async with asyncio.timeout(20):
            while (await server.request("GET", "shimmy/health"))["active"]:
                pass
        ask = "print(api.chat('What does len do?', model='self-test', temperature=0))"
        assert await done(session, ask) == LEN


async def test_a_script_that_asked_ends_at_once(server: RunningServer, tmp_path: Path) -> None:
    """With a stream half read, and without a word; the engine stops, too."""
    script = (
        "from shimmy_jupyter import api\n"
        "stream = api.stream('Go on', model='slow', max_tokens=1900, ignore_eos=True)\n"
        "print(bool(next(stream)))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script,
        env={**os.environ, "SHIMMY_SERVER_URL": server.url, "SHIMMY_KERNEL_TOKEN": server.token},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, said) == (0, b"True\n")
    async with asyncio.timeout(20):
        while (await server.request("GET", "shimmy/health"))["active"]:
            pass
