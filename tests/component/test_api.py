"""The Python API on a real Jupyter server: in a thread as a cell runs it, and awaited.

Cases: an answer and its figures; parameters honoured, falsy too, and refused by field; completions; a
stream, its result, left early, by its reader's end; awaited: an answer, a stream, cancelled, many at
once; an interrupt; vectors; values by a type, cut off, refused by a validator, by the engine; labels;
tokens; models; the model that is not named; OpenAI's client, over TCP and a unix socket, its token,
without the package, without a server; a denied model is refused with one code everywhere; without a
server; an unknown keyword.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pydantic
import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_unix_socket

from shimmy_jupyter import api
from shimmy_jupyter.core.policy import Policy, Rule
from shimmy_jupyter.engine.fake import FakeBackend, echo
from shimmy_jupyter.errors import (
    AccessDenied,
    AnswerCutOff,
    AnswerInvalid,
    InvalidValue,
    Misconfigured,
    ModelNotFound,
    RequestError,
    ServerUnreachable,
    ShimmyError,
)
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.notebook.asking import Asker
from shimmy_jupyter.notebook.client import Server
from shimmy_jupyter.notebook.remote import AsyncConnection
from shimmy_jupyter.types import EmbeddingFacts

from .conftest import MODEL, Fakes, new_guard, nobody_in, until

pytestmark = pytest.mark.parametrize("fakes", ["in process"], indirect=True)
SAYS: dict[str, Sequence[str]] = {}
"""What the model says to a prompt that ends so; else it says the prompt's last words again."""


def script(prompt: str) -> Sequence[str | bytes]:
    asked = prompt.removesuffix("\n<assistant>")
    return next((says for end, says in SAYS.items() if asked.endswith(end)), None) or echo(prompt)


@pytest.fixture(autouse=True)
def model(fakes: Fakes) -> Iterator[None]:
    shape = EmbeddingFacts("mean", 4, 64, 64, 4)
    fakes.make = lambda: FakeBackend(script, embedding=shape)
    yield
    SAYS.clear()


@pytest.fixture
def here(server: Any, http_server_client: Any, jp_http_port: int, jp_base_url: str) -> Server:
    url = f"http://127.0.0.1:{jp_http_port}{jp_base_url}"
    return Server(url, server.identity_provider.token)


def using(server: Server | None) -> None:
    """Ask this server from now on."""
    connection = AsyncConnection(lambda: server, pytest.fail)
    api.use(Asker(connection.transport), server=connection.server, last=connection.aclose)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    api.use(None)


@pytest.fixture
def notebook(here: Server) -> Server:
    using(here)
    return here


def cell(work: Callable[[], Any]) -> Any:
    """A function that waits, as a cell calls it; the server goes on meanwhile."""
    return asyncio.to_thread(work)


class TestAnswers:
    async def test_an_answer(self, notebook: Server) -> None:
        reply = await cell(lambda: api.chat("one two three"))
        assert reply.text == "one two three "
        assert (reply.model, reply.finish_reason) == (MODEL, "stop")
        assert reply.usage.completion_tokens == 4
        assert len(reply.request_id) == 32
        assert reply.timings.ttft_ms > 0
        assert reply.receipt is None  # nothing is recorded here
        assert str(reply) == reply.text

    async def test_parameters_are_honoured(self, notebook: Server) -> None:
        def work() -> None:
            assert api.chat("a b c", max_tokens=0).text == ""
            assert api.chat("a b c", max_tokens=2).finish_reason == "length"
            assert api.chat("a b c", stop=["b"], temperature=0, seed=0).text == "a "
            said = api.chat("a b", logprobs=True, top_logprobs=2).logprobs
            assert said is not None
            assert [len(one["top_logprobs"]) for one in said] == [2, 2]

        await cell(work)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("temperature", 3), ("top_logprobs", 2), ("stop", ""), ("logit_bias", {"x": 1}),
         ("max_tokens", -1), ("max_seconds", 0), ("grammar", {"type": "no"})],
    )  # fmt: skip
    async def test_or_refused_by_name(self, notebook: Server, field: str, value: Any) -> None:
        with pytest.raises(RequestError) as caught:
            await api.achat("q", **{field: value})  # type: ignore[misc]
        assert str(caught.value.param).startswith(field)
        assert caught.value.request_id

    async def test_an_unknown_keyword(self, notebook: Server, fakes: Fakes) -> None:
        for function in (api.chat, api.achat, api.complete, api.stream, api.astream, api.tokenize):
            with pytest.raises(TypeError, match="'temprature'"):
                function("q", temprature=1)  # type: ignore[call-arg,call-overload,operator]
        assert fakes.made == []

    async def test_completions(self, notebook: Server) -> None:
        def work() -> None:
            assert api.complete(">red green").text == "red green "
            assert api.complete(list(b">red")).text == "red "
            echoed = api.complete(">red", echo=True, logprobs=0, max_tokens=0)
            assert echoed.text == ">red"
            assert echoed.logprobs is not None
            assert len(echoed.logprobs) == 3  # the first has none

        await cell(work)
        assert (await api.acomplete(">red")).text == "red "

    async def test_a_model_that_is_not_there(self, notebook: Server) -> None:
        with pytest.raises(ModelNotFound) as caught:
            await cell(lambda: api.chat("q", model="ghost"))
        assert caught.value.param == "model"


class TestStreams:
    async def test_pieces_and_result(self, notebook: Server) -> None:
        def work() -> None:
            stream = api.stream("one two three", system="s")
            assert list(stream) == ["one ", "two ", "three "]
            assert stream.result.text == "one two three "
            assert stream.result.usage.completion_tokens == 4

        await cell(work)
        pieces = api.astream("four five")
        assert [piece async for piece in pieces] == ["four ", "five "]
        assert pieces.result.finish_reason == "stop"

    async def test_a_refusal_comes_with_the_first_piece(self, notebook: Server) -> None:
        stream = api.stream("q", model="ghost")
        with pytest.raises(ModelNotFound):
            await cell(lambda: next(stream))

    @pytest.mark.parametrize("way", ["close", "with", "let go"])
    async def test_left_early(self, notebook: Server, fakes: Fakes, way: str) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(script, gate=gate)
        gate.release(3)

        def work() -> None:
            stream = api.stream("a b c d e f", max_tokens=50)
            assert next(stream) == "a "
            if way == "close":
                stream.close()
            elif way == "with":
                with stream:
                    pass
            del stream
            gc.collect()

        await cell(work)
        await until(lambda: fakes.models[0].active == 0)
        gate.release(100)

    async def test_left_early_by_an_async_reader(self, notebook: Server, fakes: Fakes) -> None:
        gate = threading.Semaphore(3)
        fakes.make = lambda: FakeBackend(script, gate=gate)
        async with api.astream("a b c d e f", max_tokens=50) as stream:
            assert await anext(stream) == "a "
        await until(lambda: fakes.models[0].active == 0)
        gate.release(100)


class TestTwins:
    async def test_many_at_once(self, notebook: Server, fakes: Fakes) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(script, gate=gate)
        asking = [asyncio.create_task(api.achat(f"n {i}")) for i in range(80)]
        await until(lambda: fakes.models and fakes.models[0].active >= 32)
        gate.release(10_000)
        found = await asyncio.gather(*asking)
        assert [reply.text for reply in found] == [f"n {i} " for i in range(80)]
        assert max(fakes.made[0].batches) > 1

    async def test_cancelled(self, notebook: Server, fakes: Fakes) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(script, gate=gate)
        task = asyncio.create_task(api.achat("a b c", max_tokens=50))
        await until(lambda: fakes.models and fakes.models[0].active)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: fakes.models[0].active == 0)
        gate.release(100)

    async def test_they_are_all_there(self) -> None:
        waiting = {
            "chat",
            "complete",
            "stream",
            "embed",
            "extract",
            "classify",
            "tokenize",
            "models",
        }
        assert set(api.__all__) == waiting | {f"a{name}" for name in waiting} | {
            "openai_client",
            "panel",
        }
        for name in api.__all__:
            assert getattr(api, name).__doc__, name


def test_an_interrupt_ends_the_request(
    notebook: Server, fakes: Fakes, jp_asyncio_loop: asyncio.AbstractEventLoop
) -> None:
    """The cell runs in the main thread, as in a kernel; here the server has to have another."""
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(script, gate=gate)
    main = threading.main_thread().ident
    assert main is not None

    async def serve() -> None:
        await until(lambda: fakes.models and fakes.models[0].active)
        signal.pthread_kill(main, signal.SIGINT)
        await until(lambda: not fakes.models[0].active)

    server = threading.Thread(target=jp_asyncio_loop.run_until_complete, args=(serve(),))
    server.start()
    with pytest.raises(KeyboardInterrupt):
        api.chat("a b c", max_tokens=50)
    server.join(20)
    assert not server.is_alive()
    gate.release(100)


class TestVectors:
    async def test_an_array(self, notebook: Server) -> None:
        found = await cell(lambda: api.embed(["abc", "z"], model=MODEL))
        assert isinstance(found, np.ndarray)
        assert (found.shape, found.dtype) == ((2, 4), np.float32)
        assert found[:, :2].tolist() == [[3, 97], [1, 122]]
        assert (await api.aembed("abc", model=MODEL, dimensions=2)).shape == (1, 2)  # type: ignore[union-attr]

    async def test_more_than_a_request_takes(self, notebook: Server) -> None:
        texts = ["x" * (1 + i % 60) for i in range(2100)]
        found = await api.aembed(texts, model=MODEL)
        assert [row[0] for row in found] == [len(text) for text in texts]

    async def test_too_long_is_named(self, notebook: Server) -> None:
        with pytest.raises(ShimmyError) as caught:
            await api.aembed(["a", "x" * 500], model=MODEL)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "texts.1")

    async def test_no_model_is_made_for_it(self, notebook: Server) -> None:
        with pytest.raises(InvalidValue) as caught:
            await api.aembed(["a"])
        assert caught.value.param == "model"


class Fruit(pydantic.BaseModel):
    name: str
    count: int

    @pydantic.field_validator("count")
    @classmethod
    def some(cls, value: int) -> int:
        if not value:
            raise ValueError("there is no fruit")
        return value


class Colour(enum.Enum):
    RED = "red"


class TestValues:
    async def test_by_a_type(self, notebook: Server) -> None:
        SAYS["two apples"] = ('{"name":"apple"', ',"count":2}')
        SAYS["it is red"] = ('"red"',)

        def work() -> None:
            assert api.extract(Fruit, "two apples") == Fruit(name="apple", count=2)
            assert api.extract(Colour, "it is red") is Colour.RED

        await cell(work)
        assert await api.aextract(Fruit, "two apples", "What fruit?") == Fruit(
            name="apple", count=2
        )

    async def test_cut_off(self, notebook: Server) -> None:
        SAYS["two apples"] = ('{"name":"apple"', ',"count":2}')
        with pytest.raises(AnswerCutOff) as caught:
            await api.aextract(Fruit, "two apples", max_tokens=1)
        assert (caught.value.text, caught.value.param) == ('{"name":"apple"', "max_tokens")

    async def test_refused_by_a_validator(self, notebook: Server) -> None:
        SAYS["nothing"] = ('{"name":"apple","count":0}',)
        with pytest.raises(AnswerInvalid, match="there is no fruit") as caught:
            await cell(lambda: api.extract(Fruit, "nothing"))
        assert (caught.value.param, caught.value.text) == ("count", SAYS["nothing"][0])
        assert caught.value.request_id

    async def test_validators_run_where_the_caller_is(self, notebook: Server) -> None:
        SAYS["x"] = ('"red"',)
        seen = []

        class Seen(pydantic.RootModel[str]):
            def model_post_init(self, _: Any) -> None:
                seen.append(threading.current_thread())

        await api.aextract(Seen, "x")
        assert seen == [threading.current_thread()]

    async def test_refused_before_decoding(self, notebook: Server, fakes: Fakes) -> None:
        with pytest.raises(RequestError, match="the script says") as caught:
            await api.aextract({"enum": ["wrong"]}, "x")
        assert caught.value.param == "response_format"
        assert fakes.made[0].batches == []


async def test_labels(notebook: Server) -> None:
    found = await cell(lambda: api.classify("text", ["good", "bad"]))
    # The script finds a token as likely whatever came before it.
    assert found.scores == pytest.approx({"good": 0, "bad": 0})
    assert found.probabilities == pytest.approx({"good": 0.5, "bad": 0.5})
    assert (found.label, found.model) == ("good", MODEL)
    assert (await api.aclassify("text", ["bad", "good"], prompt="Which?")).label == "bad"
    with pytest.raises(InvalidValue):
        await api.aclassify("text", ["a", "a"])


async def test_tokens_and_models(notebook: Server) -> None:
    assert await cell(lambda: api.tokenize("é")) == list("é".encode())
    asked = [{"role": "user", "content": "q"}]
    assert await api.atokenize(asked) == list(b"<user>q\n<assistant>")
    (row,) = await cell(api.models)
    assert (row["id"], row["kind"]) == (MODEL, "model")
    assert await api.amodels() == await cell(api.models)


class TestOpenAI:
    async def test_it_is_for_this_server(self, notebook: Server) -> None:
        def work() -> None:
            with api.openai_client(max_retries=0) as client:
                asked: Any = [{"role": "user", "content": "one two"}]
                answer = client.chat.completions.create(model=MODEL, messages=asked)
                assert answer.choices[0].message.content == "one two "
                assert notebook.token
                assert notebook.token not in repr(client) + str(client)
                assert not client._client.trust_env

        await cell(work)

    async def test_options_are_its_own(self, notebook: Server) -> None:
        with api.openai_client(timeout=3.5) as client:
            assert client.timeout == 3.5
        with pytest.raises(TypeError):
            api.openai_client(base_url="http://elsewhere/")

    async def test_without_the_package(
        self, notebook: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(Misconfigured, match="openai"):
            api.openai_client()

    def test_where_the_model_is_inside_the_kernel(self) -> None:
        using(None)
        with pytest.raises(ServerUnreachable, match="inside this kernel"):
            api.openai_client()


class TestUnixSocket:
    @pytest.fixture
    def jp_base_url(self) -> str:
        return "/"

    async def test_all_the_same(self, here: Server, server: Any, tmp_path: Path) -> None:
        path = str(tmp_path / "s")
        listening = HTTPServer(server.web_app)
        listening.add_socket(bind_unix_socket(path))
        using(Server("http+unix://%2Fs/", here.token, path))

        def work() -> None:
            assert api.chat("one two").text == "one two "
            with api.openai_client(max_retries=0) as client:
                assert [model.id for model in client.models.list()] == [MODEL]
                assert here.token not in repr(client)

        await cell(work)
        await listening.close_all_connections()
        listening.stop()


class TestDenied:
    @pytest.fixture
    def guard(self, tmp_path: Path) -> Guard:
        return new_guard(tmp_path)

    CALLS: dict[str, Callable[[], Any]] = {
        "chat": lambda: api.chat("q", model=MODEL),
        "complete": lambda: api.complete("q", model=MODEL),
        "stream": lambda: list(api.stream("q", model=MODEL)),
        "embed": lambda: api.embed(["q"], model=MODEL),
        "extract": lambda: api.extract(int, "q", model=MODEL),
        "classify": lambda: api.classify("q", ["a", "b"], model=MODEL),
        "tokenize": lambda: api.tokenize("q", MODEL),
    }

    @pytest.mark.parametrize("name", CALLS)
    async def test_with_one_code_everywhere(
        self, notebook: Server, guard: Guard, fakes: Fakes, name: str
    ) -> None:
        guard.rules = Rules((Policy((Rule(False, ("use",), (MODEL,)),)),))
        with pytest.raises(AccessDenied) as caught:
            await cell(self.CALLS[name])
        assert (caught.value.code, caught.value.param) == ("policy_denied", "model")
        assert fakes.made == []
        await until(lambda: not guard.crowd._present)
        nobody_in(guard)

    async def test_by_openais_client(self, notebook: Server, guard: Guard) -> None:
        guard.rules = Rules((Policy((Rule(False, ("use",), (MODEL,)),)),))

        def work() -> None:
            with api.openai_client(max_retries=0) as client:
                client.completions.create(model=MODEL, prompt="q")

        with pytest.raises(openai.PermissionDeniedError) as caught:
            await cell(work)
        assert caught.value.code == "policy_denied"

    async def test_what_is_allowed_has_a_receipt(self, notebook: Server, guard: Guard) -> None:
        reply = await api.achat("q")
        assert reply.receipt is not None
        assert reply.receipt.request_id == reply.request_id


async def test_nobody_answers() -> None:
    using(Server("http://127.0.0.1:9/", "secret"))
    with pytest.raises(ServerUnreachable) as caught:
        await api.achat("q")
    assert "secret" not in str(caught.value)


async def test_a_kernel_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.delenv("SHIMMY_SERVER_URL", raising=False)
    monkeypatch.delenv("SHIMMY_KERNEL_TOKEN", raising=False)
    with pytest.raises(ServerUnreachable, match="inside this kernel"):
        api.openai_client()


async def test_another_takes_over(notebook: Server) -> None:
    await api.achat("q")
    before = api.session().portal
    using(notebook)
    assert api.session().portal is not before
    assert before._thread is None
    assert (await api.achat("q")).text == "q "
