"""The whole path as a person has it: a Jupyter server in a process of its own, a kernel that it
started, a real model, and clients that were not written for us.

Cases: a cell's answer, streamed as updates; the kernel finds its own server and not another; the
interrupt button stops the engine; a mistake fails the cell; the openai client, unmodified; in the
kernel when there is no server; start-up imports; a password-only server's kernels.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import nbclient
import nbformat
import openai
import pytest
import random_gguf
from jupyter_server.auth import passwd
from kernel_session import Kernel, RunningServer, kernel, running_server, text_of
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from shimmy_jupyter.models.sources import BUNDLED

THINKS = random_gguf.CHATML + "{% if enable_thinking == false %}<think></think>{% endif %}"
LEN = "Return the number of items in a container."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    models = tmp_path_factory.mktemp("models")
    shape = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
    random_gguf.write(models / "slow.gguf", shape, words=True, seed=3)
    script = ("<think>", "why ", "not", "</think>", "<tool_call>", '{"f": 1}', "</tool_call>")
    random_gguf.write_chain(models / "thinks.gguf", script, template=THINKS)
    with running_server(environment={"SHIMMY_MODEL_PATHS": str(models)}) as running:
        yield running


def answers(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [o for o in outputs if "display_data" in o["type"]]


async def test_a_cell_is_answered(server: RunningServer) -> None:
    async with kernel(server) as session:
        loading = await session.execute("%load_ext shimmy")
        assert loading == []
        outputs = await session.execute(
            "%shimmy --model self-test --temperature 0 What does len do?"
        )
        shown = answers(outputs)
        assert outputs == shown, outputs  # in particular, no line about running in the kernel
        assert shown[0]["type"] == "display_data"
        assert {o["type"] for o in shown[1:]} <= {"update_display_data"}
        last = shown[-1]["content"]["data"]
        assert last["text/plain"].startswith(LEN)
        assert LEN in last["text/html"]
        models = await server.request("GET", "shimmy/v1/models/self-test")
        assert models["shimmy"]["state"] == "loaded"
        loaded = await session.execute("import sys; print('llama_cpp' in sys.modules)")
        assert text_of(loaded[0]).strip() == "False"


async def test_a_mistake_fails_the_cell(server: RunningServer) -> None:
    async with kernel(server) as session:
        await session.execute("%load_ext shimmy_jupyter")
        (error,) = await session.execute("%%shimmy ghost\nhello")
        assert error["type"] == "error"
        assert error["content"]["ename"] == "ModelNotFound"
        assert "ghost" in text_of(error)


async def test_interrupting_the_cell_stops_the_engine(server: RunningServer) -> None:
    forever = "%%shimmy slow --max-tokens 1900\nGo on"
    async with kernel(server) as session:
        await session.execute("%load_ext shimmy")
        started = asyncio.Event()
        running = asyncio.create_task(session.execute(forever, lambda _: started.set()))
        await started.wait()
        await session.interrupt()
        outputs = await running
        assert outputs[-1]["content"]["ename"] == "KeyboardInterrupt"
        assert text_of(answers(outputs)[-1]).endswith("[stopped]")
        async with asyncio.timeout(20):
            while (await server.request("GET", "shimmy/health"))["active"]:
                pass
        after = await session.execute("%shimmy --model self-test --temperature 0 What does len do?")
        assert text_of(answers(after)[-1]).startswith(LEN)


async def test_the_kernel_asks_its_own_server(server: RunningServer) -> None:
    with running_server() as other:
        async with kernel(other) as session:
            await session.execute("%load_ext shimmy")
            (error,) = await session.execute("%%shimmy slow\nhello")
            assert "there are: self-test" in text_of(error)
        # Named explicitly, the other one it is.
        async with kernel(other) as session:
            await session.execute(
                f"import os; os.environ['SHIMMY_SERVER_URL'] = {server.url!r};"
                f"os.environ['SHIMMY_KERNEL_TOKEN'] = {server.token!r}"
            )
            await session.execute("%load_ext shimmy")
            outputs = await session.execute("%%shimmy slow --max-tokens 3\nhello")
            assert "slow · 3 tokens" in text_of(answers(outputs)[-1])


class TestOpenAI:
    @pytest.fixture
    def client(self, server: RunningServer) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(
            base_url=server.url + "shimmy/v1", api_key=server.token, max_retries=0
        ) as client:
            yield client

    ASK: Any = {
        "model": "self-test",
        "messages": [{"role": "user", "content": "What does len do?"}],
        "temperature": 0,
    }

    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [
            "slow",
            "thinks",
            "self-test",
        ]
        assert client.models.retrieve("self-test").owned_by == "shimmy"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("ghost")
        assert caught.value.code == "model_not_found"

    def test_chat(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(**self.ASK)
        assert answer.choices[0].message.content == LEN
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 11
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0

    def test_streams(self, client: openai.OpenAI) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(**self.ASK, **options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == LEN
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 11

    def test_completions(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="slow", prompt="once", max_tokens=5)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 5
        assert answer.choices[0].finish_reason in ("stop", "length")

    def test_choices_log_probabilities_and_a_schema_in_a_stream(
        self, client: openai.OpenAI
    ) -> None:
        properties = {"name": {"enum": ["len", "max"]}, "returns": {"enum": [0, 1]}}
        schema = {
            "type": "object", "properties": properties, "required": ["name", "returns"],
            "additionalProperties": False,
        }  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
        chunks = client.chat.completions.create(
            **{**self.ASK, "temperature": 1}, n=2, seed=3, stream=True, response_format=form,
            logprobs=True, top_logprobs=2, max_tokens=80,
        )  # fmt: skip
        texts, scored, reasons = ["", ""], [b"", b""], [None, None]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = reasons[choice.index] or choice.finish_reason
                for one in choice.logprobs.content or [] if choice.logprobs else []:
                    assert len(one.top_logprobs) == 2
                    scored[choice.index] += bytes(one.bytes or [])
        for text, tokens, reason in zip(texts, scored, reasons, strict=True):
            assert tokens.decode() == text
            if reason == "stop":
                answer = json.loads(text)
                assert answer["name"] in ("len", "max")
                assert answer["returns"] in (0, 1)
        assert "stop" in reasons

    def test_reasoning_and_a_tool_call_that_nobody_parses(self, client: openai.OpenAI) -> None:
        ask = {**self.ASK, "model": "thinks"}
        message = client.chat.completions.create(**ask).choices[0].message
        assert message.content == '<tool_call>{"f": 1}</tool_call>'
        assert message.model_extra == {"reasoning_content": "why not"}
        assert message.tool_calls is None
        texts, thought = "", ""
        scored = {"content": b"", "reasoning_content": b""}
        for chunk in client.chat.completions.create(**ask, stream=True, logprobs=True):
            (choice,) = chunk.choices
            texts += choice.delta.content or ""
            thought += (choice.delta.model_extra or {}).get("reasoning_content", "")
            if choice.logprobs is not None:
                scores = choice.logprobs.model_dump()
                for kind in scored:
                    for one in scores.get(kind) or []:
                        scored[kind] += bytes(one["bytes"])
        assert (texts, thought) == ('<tool_call>{"f": 1}</tool_call>', "why not")
        assert scored["content"].decode() == texts
        assert scored["reasoning_content"] == b"<think>why not</think>"

        form = {"type": "json_schema", "json_schema": {"name": "f", "schema": {"enum": [1, 2]}}}
        answer = client.chat.completions.create(**ask, response_format=form)
        assert answer.choices[0].message.content in ("1", "2")
        assert answer.choices[0].message.model_extra == {"reasoning_content": "why not"}
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == 4
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ask, reasoning_effort="low")
        assert caught.value.param == "reasoning_effort"

    def test_embeddings(self, client: openai.OpenAI) -> None:
        texts = ["one text", "another", "one text"]
        found = client.embeddings.create(model="slow", input=texts)
        first, second, third = (one.embedding for one in found.data)
        assert len(first) == 256
        assert sum(a * b for a, b in zip(first, third, strict=True)) == pytest.approx(1, abs=1e-3)
        assert sum(a * b for a, b in zip(first, second, strict=True)) < 0.99
        floats = client.embeddings.create(model="slow", input="one text", encoding_format="float")
        assert floats.data[0].embedding == pytest.approx(first, abs=1e-2)
        short = client.embeddings.create(model="slow", input="one text", dimensions=8)
        assert sum(x * x for x in short.data[0].embedding) == pytest.approx(1, abs=1e-5)
        assert found.usage.total_tokens == sum(map(len, texts))
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="slow", input=["a", ""])
        assert caught.value.param == "input.1"

    def test_typed_errors(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**self.ASK, "temperature": 3})
        assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")
        with pytest.raises(openai.BadRequestError, match="too many for this model") as caught:
            client.completions.create(model="self-test", prompt="x y " * 2000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**self.ASK, store=True)
        assert caught.value.code == "unsupported_parameter"

    def test_a_wrong_key(self, server: RunningServer) -> None:
        with (
            openai.OpenAI(base_url=server.url + "shimmy/v1", api_key="wrong") as stranger,
            pytest.raises(openai.PermissionDeniedError) as caught,
        ):
            stranger.models.list()
        assert caught.value.code == "policy_denied"

    def test_a_stream_that_is_left(self, client: openai.OpenAI) -> None:
        stream = client.chat.completions.create(
            model="slow", messages=self.ASK["messages"], max_tokens=1900, stream=True
        )
        next(iter(stream))
        stream.close()
        assert client.chat.completions.create(**self.ASK).choices[0].message.content == LEN


def notebook(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


def test_without_a_server_the_kernel_answers_itself_and_says_so(server: RunningServer) -> None:
    """As under papermill: a notebook client starts the kernel, while an unrelated server runs."""
    book = notebook(
        "%load_ext shimmy", "%shimmy --temperature 0 What does len do?", "%shimmy --bad x"
    )
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no such option"):
        nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    said, *shown = book.cells[1].outputs
    assert said.text == "shimmy: no Jupyter server started this kernel; the model runs inside it.\n"
    assert shown[-1].data["text/plain"].startswith(LEN)


@pytest.mark.parametrize("leave", ["", "import os; os.kill(os.getpid(), 2)"])
def test_a_process_that_used_the_model_ends(leave: str) -> None:
    """With an answer still being made: a script's end must not wait for it, nor print a word."""
    code = f"""
from shimmy_jupyter.local import LocalTransport
from shimmy_jupyter.config import Settings
local = LocalTransport(Settings())
body = {{"model": "self-test", "messages": [{{"role": "user", "content": "len"}}], "stream": True}}
stream = local.stream("shimmy/v1/chat/completions", body)
print(bool(next(iter(stream.__enter__()))))
{leave}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "True\n"
    assert done.stderr == "" or "KeyboardInterrupt" in done.stderr.splitlines()[-1]


async def test_a_server_with_only_a_password_lets_its_kernels_in() -> None:
    hashed = passwd("open sesame")
    options = (
        "--IdentityProvider.token=",
        f"--PasswordIdentityProvider.hashed_password={hashed}",
    )
    with running_server(*options) as server:
        assert server.token == ""
        cookies, xsrf = await sign_in(server, "open sesame")
        request = HTTPRequest(
            server.url + "api/kernels",
            method="POST",
            body="{}",
            headers={"Cookie": cookies, "X-XSRFToken": xsrf},
        )
        started = json.loads((await AsyncHTTPClient().fetch(request)).body)
        address = server.url.replace("http", "ws", 1) + f"api/kernels/{started['id']}/channels"
        socket = await websocket_connect(HTTPRequest(address, headers={"Cookie": cookies}))
        session = Kernel(server, started["id"], socket)
        await session.execute("%load_ext shimmy")
        outputs = await session.execute("%shimmy --temperature 0 What does len do?")
        assert text_of(answers(outputs)[-1]).startswith(LEN), outputs
        with pytest.raises(HTTPClientError, match="403"):
            await server.request("GET", "shimmy/v1/models")
        socket.close()


async def sign_in(server: RunningServer, password: str) -> tuple[str, str]:
    """The cookies of a browser that has given the password, and its XSRF token."""
    client = AsyncHTTPClient()
    page = await client.fetch(server.url + "login")
    cookies = [c.split(";")[0] for c in page.headers.get_list("Set-Cookie")]
    xsrf = next(c.partition("=")[2] for c in cookies if c.startswith("_xsrf="))
    done = await client.fetch(
        server.url + "login",
        method="POST",
        body=urlencode({"password": password, "_xsrf": xsrf}),
        headers={"Cookie": "; ".join(cookies)},
        follow_redirects=False,
        raise_error=False,
    )
    cookies += [c.split(";")[0] for c in done.headers.get_list("Set-Cookie")]
    return "; ".join(cookies), xsrf


HEAVY = ("llama_cpp", "numpy", "ipywidgets", "pandas", "torch")


def test_a_server_that_nobody_asks_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
from jupyter_server.serverapp import ServerApp
app = ServerApp()
app.initialize(["--no-browser", "--allow-root", "--ServerApp.port=0"], find_extensions=True)
assert "shimmy_jupyter" in app.extension_manager.extensions
assert app.extension_manager.extension_apps["shimmy_jupyter"]
print([m for m in {HEAVY} if m in sys.modules])
"""
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.splitlines()[-1] == "[]"


async def test_health(server: RunningServer) -> None:
    health = await server.request("GET", "shimmy/health")
    assert health["status"] == "ok"
    for dependency in health["dependencies"]:
        assert set(dependency) == {"name", "status", "detail", "action"}
    assert str(Path(server.log).parent) not in json.dumps(health)


def test_command_line(tmp_path: Path) -> None:
    def shimmy(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shimmy_jupyter.cli", *args],
            capture_output=True, text=True, check=False, input=stdin,
            env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path)},
        )  # fmt: skip

    assert shimmy("generate", "--temperature", "0", "What does len do?").stdout == LEN + "\n"
    assert (
        shimmy("generate", "--temperature", "0", "-", stdin="What does len do?").stdout
        == LEN + "\n"
    )
    assert shimmy("generate", "--model", "self-test", "--max-tokens", "0", "hi").stdout == "\n"
    row = shimmy("models").stdout.splitlines()[1].split()
    assert row == [
        "*",
        "self-test",
        "3.3",
        "MB",
        "Q8_0",
        "3,049,920",
        "1,024",
        "bundled",
        "available",
    ]
    listed = json.loads(shimmy("models", "--json").stdout)
    assert [model["id"] for model in listed["models"]] == [listed["default"]] == ["self-test"]
    digest = hashlib.sha256(BUNDLED.read_bytes()).hexdigest()
    assert digest in shimmy("verify", "self-test").stdout
    assert shimmy("verify", "self-test", "--sha256", "0" * 64).returncode == 1
    assert json.loads(shimmy("probe", "--json", "self-test").stdout)["outcome"] == "ok"
    failed = shimmy("generate", "--model", "ghost", "hi")
    assert failed.returncode == 1
    assert "model_not_found" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert shimmy("--help").returncode == 0
