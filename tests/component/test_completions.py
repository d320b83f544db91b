"""The OpenAI endpoints on a real Jupyter server: shapes, figures, refusals, disconnects.

Cases: one body; a stream, with and without usage; greedy text complete; max_tokens 0, exact,
and cut; stop strings; content parts; every bad field named; unknown model; too long; ignored and
unsupported fields; a failing step; NaN logits; a full queue; a client that goes away; a body over
the limit.
"""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import psutil
import pytest
from tornado.httpclient import HTTPClientError
from tornado.iostream import IOStream
from tornado.tcpclient import TCPClient

from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.core.messages import OpenSlot
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import EngineLost
from shimmy_jupyter.guard.guard import Rules
from shimmy_jupyter.notebook import client

from .conftest import MODEL, Fakes, chat

CHAT = ("shimmy", "v1", "chat", "completions")
COMPLETIONS = ("shimmy", "v1", "completions")


async def refused(fetch: Any, *path: str, body: str | bytes) -> tuple[int, dict[str, Any]]:
    with pytest.raises(HTTPClientError) as caught:
        await fetch(*path, method="POST", body=body)
    response = caught.value.response
    error = json.loads(response.body)["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["message"]
    assert error["request_id"] == response.headers["x-shimmy-request-id"]
    return response.code, error


def events(body: bytes) -> list[dict[str, Any]]:
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_one_body(server: Any, jp_fetch: Any) -> None:
    response = await jp_fetch(*CHAT, method="POST", body=chat())
    answer = json.loads(response.body)
    assert answer["object"] == "chat.completion"
    assert answer["id"] == "chatcmpl-" + response.headers["x-shimmy-request-id"]
    assert answer["model"] == MODEL
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "one two three ",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"
    prompt = len("<user>one two three\n<assistant>")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 4,  # three words and the end token
        "total_tokens": prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert answer["shimmy"]["request_id"] == response.headers["x-shimmy-request-id"]
    assert answer["shimmy"]["queue_ms"] >= 0
    assert answer["shimmy"]["ttft_ms"] > 0


async def test_stream_with_usage(server: Any, jp_fetch: Any) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    response = await jp_fetch(*CHAT, method="POST", body=body)
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    chunks = events(response.body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
    assert "".join(texts) == "one two three "
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert chunks[-1]["shimmy"]["ttft_ms"] > 0


async def test_stream_without_usage_carries_the_figures_last(server: Any, jp_fetch: Any) -> None:
    response = await jp_fetch(*CHAT, method="POST", body=chat(stream=True))
    chunks = events(response.body)
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "shimmy" in chunks[-1]
    assert all("shimmy" not in chunk for chunk in chunks[:-1])


async def test_plain_completion(server: Any, jp_fetch: Any) -> None:
    body = json.dumps({"model": MODEL, "prompt": ">red green"})
    response = await jp_fetch(*COMPLETIONS, method="POST", body=body)
    answer = json.loads(response.body)
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == "red green "
    stream = json.dumps({"model": MODEL, "prompt": ">red green", "stream": True})
    response = await jp_fetch(*COMPLETIONS, method="POST", body=stream)
    assert "".join(c["choices"][0]["text"] for c in events(response.body)) == "red green "


async def test_token_prompt(server: Any, jp_fetch: Any) -> None:
    body = json.dumps({"model": MODEL, "prompt": list(b">red")})
    response = await jp_fetch(*COMPLETIONS, method="POST", body=body)
    assert json.loads(response.body)["choices"][0]["text"] == "red "
    body = json.dumps({"model": MODEL, "prompt": [62, 100_000]})
    assert (await refused(jp_fetch, *COMPLETIONS, body=body))[1]["param"] == "prompt"


@pytest.mark.parametrize(
    ("wanted", "text", "reason", "generated"),
    [
        (0, "", "length", 0),
        (1, "one ", "length", 1),
        (3, "one two three ", "length", 3),
        (4, "one two three ", "stop", 4),
    ],
)
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens(
    server: Any, jp_fetch: Any, field: str, wanted: int, text: str, reason: str, generated: int
) -> None:
    response = await jp_fetch(*CHAT, method="POST", body=chat(**{field: wanted}))
    answer = json.loads(response.body)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["choices"][0]["finish_reason"] == reason
    assert answer["usage"]["completion_tokens"] == generated
    assert answer["usage"]["prompt_tokens"] > 0


async def test_stop_string_across_tokens_is_not_shown(server: Any, jp_fetch: Any) -> None:
    response = await jp_fetch(*CHAT, method="POST", body=chat("a b c d", stop=["b c", "zz"]))
    choice = json.loads(response.body)["choices"][0]
    assert choice["message"]["content"] == "a "
    assert choice["finish_reason"] == "stop"


async def test_content_parts(server: Any, jp_fetch: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": parts}]})
    response = await jp_fetch(*CHAT, method="POST", body=body)
    assert json.loads(response.body)["choices"][0]["message"]["content"] == "one two "
    parts = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": parts}]})
    status, error = await refused(jp_fetch, *CHAT, body=body)
    assert (status, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == "messages.0.content.0.type"


BAD_FIELDS = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"repeat_penalty": 0}, "repeat_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({f"f{i}": i for i in range(1000)}, None),
    ({"stream": "yes"}, "stream"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"logprobs": 0}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"grammar": {"type": "bnf", "value": "x"}}, "grammar.type"),
    ({"grammar": {"type": "gbnf", "value": ""}}, "grammar.value"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_object"}, "grammar": {"type": "regex", "value": "x"}},
        "grammar",
    ),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=[str(f)[:50] for f, _ in BAD_FIELDS])
async def test_a_bad_field_is_named(
    server: Any, jp_fetch: Any, fields: dict[str, Any], param: str | None
) -> None:
    status, error = await refused(jp_fetch, *CHAT, body=chat(**fields))
    assert (status, error["code"], error["param"]) == (400, "invalid_value", param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"temperature": NaN}', b"\xff", b"[" * 100_000]
)
async def test_what_is_not_json(server: Any, jp_fetch: Any, body: bytes) -> None:
    status, error = await refused(jp_fetch, *CHAT, body=body)
    assert (status, error["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("echo", 0),
        ("store", True),
    ],
)
async def test_without_effect_means_refused(
    server: Any, jp_fetch: Any, field: str, value: Any
) -> None:
    status, error = await refused(jp_fetch, *CHAT, body=chat(**{field: value}))
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", field)


async def test_neutral_values_pass_and_unknown_fields_are_named(server: Any, jp_fetch: Any) -> None:
    body = chat(
        n=1, tools=[], logprobs=False, response_format={"type": "text"}, store=False, logit_bias={},
        user="me", magic=3, grammar=None,
    )  # fmt: skip
    response = await jp_fetch(*CHAT, method="POST", body=body)
    assert response.headers["x-shimmy-ignored"] == "user, magic"
    body = chat(messages=[{"role": "user", "content": "x", "colour": 1}], stream=True,
                stream_options={"include_obfuscation": False})  # fmt: skip
    response = await jp_fetch(*CHAT, method="POST", body=body)
    ignored = response.headers["x-shimmy-ignored"]
    assert ignored == "stream_options.include_obfuscation, messages.0.colour"
    response = await jp_fetch(*CHAT, method="POST", body=chat(**{f"f{i}": 1 for i in range(150)}))
    assert len(response.headers["x-shimmy-ignored"]) < 2000
    response = await jp_fetch(*CHAT, method="POST", body=chat(**{"a\r\nset-cookie": 1}))
    assert response.headers["x-shimmy-ignored"] == "a??set-cookie"


async def test_falsy_parameters_are_honoured(
    server: Any, jp_fetch: Any, fakes: Fakes, monkeypatch: Any
) -> None:
    seen = []
    apply = FakeBackend.apply

    def record(self: FakeBackend, change: Any) -> None:
        if isinstance(change, OpenSlot):
            seen.append(change.sampling)
        apply(self, change)

    monkeypatch.setattr(FakeBackend, "apply", record)
    await jp_fetch(
        *CHAT, method="POST", body=chat(temperature=0, seed=0, top_k=0, top_p=0, min_p=0)
    )
    (sampling,) = seen
    assert (sampling.temperature, sampling.seed, sampling.top_k) == (0, 0, 0)
    assert (sampling.top_p, sampling.min_p) == (0, 0)


async def test_unknown_model(server: Any, jp_fetch: Any) -> None:
    status, error = await refused(jp_fetch, *CHAT, body=chat(model="ghost"))
    assert (status, error["code"]) == (404, "model_not_found")
    assert "'ghost'" in error["message"]


async def test_too_long_says_by_how_many(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    fakes.spec = LoadSpec(path="", context_size=100, sequences=2)
    overhead = len("<user>\n<assistant>")
    fits = await jp_fetch(*CHAT, method="POST", body=chat("x" * (99 - overhead)))
    assert json.loads(fits.body)["usage"]["prompt_tokens"] == 99
    status, error = await refused(jp_fetch, *CHAT, body=chat("x" * (107 - overhead)))
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "107 tokens: 8 too many" in error["message"]
    assert error["param"] == "messages"
    body = chat("x" * (90 - overhead), max_tokens=11)
    status, error = await refused(jp_fetch, *CHAT, body=body)
    assert (status, error["param"]) == (400, "max_tokens")
    assert "1 tokens more" in error["message"]
    body = chat("x" * (101 - overhead), max_tokens=0)
    assert "1 too many" in (await refused(jp_fetch, *CHAT, body=body))[1]["message"]


async def test_failing_step_is_an_error_not_an_answer(
    server: Any, jp_fetch: Any, fakes: Fakes
) -> None:
    fakes.make = lambda: FakeBackend(fail_at=3)
    status, error = await refused(jp_fetch, *CHAT, body=chat())
    assert (status, error["code"]) == (503, "engine_crashed")
    response = await jp_fetch(*CHAT, method="POST", body=chat())
    assert json.loads(response.body)["choices"][0]["finish_reason"] == "stop"


async def test_error_before_the_first_event_has_its_status(
    server: Any, jp_fetch: Any, fakes: Fakes
) -> None:
    fakes.make = lambda: FakeBackend(fail_at=1)
    status, error = await refused(jp_fetch, *CHAT, body=chat(stream=True))
    assert (status, error["code"]) == (503, "engine_crashed")


async def test_error_later_in_a_stream_is_its_last_event(
    server: Any, jp_fetch: Any, fakes: Fakes, jp_http_port: int, jp_base_url: str
) -> None:
    gate = threading.Semaphore(1)
    fakes.make = lambda: FakeBackend(gate=gate, fail_at=2)
    stream = await _post(server, jp_http_port, jp_base_url, chat(stream=True).encode())
    await stream.read_until(b"one")
    gate.release()
    rest = await stream.read_until(b"0\r\n\r\n")
    assert b'"code":"engine_crashed"' in rest
    assert b"[DONE]" not in rest
    stream.close()


async def test_an_engine_that_ended_is_loaded_again(
    server: Any, jp_fetch: Any, fakes: Fakes
) -> None:
    class Broken(FakeBackend):
        def apply(self, change: Any) -> None:
            raise EngineLost("out of memory")

    fakes.make = Broken
    status, error = await refused(jp_fetch, *CHAT, body=chat())
    assert (status, error["code"]) == (503, "engine_crashed")
    model = json.loads((await jp_fetch("shimmy", "v1", "models", MODEL)).body)
    assert model["shimmy"]["state"] == "failed"
    assert model["shimmy"]["error"]
    health = json.loads((await jp_fetch("shimmy", "health")).body)
    assert health["status"] == "degraded"
    fakes.make = FakeBackend
    response = await jp_fetch(*CHAT, method="POST", body=chat())
    assert json.loads(response.body)["choices"][0]["finish_reason"] == "stop"
    assert json.loads((await jp_fetch("shimmy", "health")).body)["status"] == "ok"


async def test_a_model_that_does_not_load(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    def missing() -> FakeBackend:
        raise ImportError("libllama.so: cannot open shared object file")

    fakes.make = missing
    status, error = await refused(jp_fetch, *CHAT, body=chat())
    assert (status, error["code"]) == (503, "model_load_failed")
    assert "libllama.so" in error["message"]
    assert json.loads((await jp_fetch("shimmy", "health")).body)["status"] == "degraded"


async def test_numbers_that_are_not_finite_end_that_sequence_alone(
    server: Any, jp_fetch: Any, fakes: Fakes
) -> None:
    fakes.make = lambda: FakeBackend(
        lambda prompt: ["ok ", b"\0nan"] if "bad" in prompt else ["fine ", "indeed"]
    )
    bad, good = await asyncio.gather(
        refused(jp_fetch, *CHAT, body=chat("bad")), jp_fetch(*CHAT, method="POST", body=chat("x"))
    )
    assert bad[1]["code"] == "generation_failed"
    assert json.loads(good.body)["choices"][0]["message"]["content"] == "fine indeed"


async def test_characters_are_never_split(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    text = "naïve 漢字 🎉!"
    fakes.make = lambda: FakeBackend(lambda _: [bytes([b]) for b in text.encode()])
    response = await jp_fetch(*CHAT, method="POST", body=chat(stream=True))
    pieces = [c["choices"][0]["delta"].get("content", "") for c in events(response.body)]
    assert "".join(pieces) == text
    assert "🎉" in pieces
    assert len(response.body.decode().split("data: ")) == len(events(response.body)) + 2


async def test_full_queue(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(gate=gate)
    fakes.spec, fakes.queue_size = LoadSpec(path="", sequences=1), 1
    waiting = [asyncio.ensure_future(jp_fetch(*CHAT, method="POST", body=chat())) for _ in range(4)]
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        response = task.exception().response  # type: ignore[union-attr]
        assert response.code == 503
        assert json.loads(response.body)["error"]["code"] == "queue_full"
    for _ in range(100):
        gate.release()
    finished = await asyncio.gather(*pending, return_exceptions=True)
    assert sum(not isinstance(t, Exception) for t in finished) >= 1


async def test_a_client_that_goes_away_frees_its_sequence_within_a_step(
    server: Any, jp_fetch: Any, fakes: Fakes, jp_http_port: int, jp_base_url: str
) -> None:
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(lambda _: ["word "] * 1000, gate=gate)
    body = chat(stream=True, max_tokens=1000).encode()
    gate.release(3)
    stream = await _post(server, jp_http_port, jp_base_url, body)
    await stream.read_until(b"word")
    stream.close()
    (model,), (backend,) = fakes.models, fakes.made
    await until(lambda: not model.engine._inbox.empty() or model.active == 0)
    before = len(backend.batches)
    gate.release(1000)
    await until(lambda: model.active == 0)
    assert len(backend.batches) <= before + 1
    # Behind sockets, changes wait for the next step.
    assert fakes.isolated or not backend.open_slots


async def test_body_over_the_limit(
    server: Any, jp_fetch: Any, jp_http_port: int, jp_base_url: str
) -> None:
    server.web_app.settings["shimmy_max_request_bytes"] = 1000
    status, error = await refused(jp_fetch, *CHAT, body=chat("x" * 2000))
    assert (status, error["code"]) == (413, "request_too_large")
    assert "max_request_size" in error["message"]
    # Without a length in front it is only known at the end.
    stream = await TCPClient().connect("127.0.0.1", jp_http_port)
    body = chat("x" * 2000).encode()
    head = _head(server, jp_http_port, jp_base_url, "Transfer-Encoding: chunked")
    await stream.write(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert b" 413 " in await stream.read_until(b"\r\n")
    stream.close()


async def test_a_client_that_hangs_up_amid_its_body(
    server: Any, jp_fetch: Any, fakes: Fakes, jp_http_port: int, jp_base_url: str
) -> None:
    before = len(asyncio.all_tasks())
    for _ in range(20):
        stream = await TCPClient().connect("127.0.0.1", jp_http_port)
        await stream.write(_head(server, jp_http_port, jp_base_url, "Content-Length: 5000") + b"{")
        stream.close()
    await jp_fetch(*CHAT, method="POST", body=chat())
    await until(lambda: len(asyncio.all_tasks()) <= before)
    assert fakes.models[0].active == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": [1] * 500_000 + ["x"]}),
        (COMPLETIONS, {"prompt": ["x"] * 500_000}),
        (COMPLETIONS, {"prompt": [[1], [2]] * 100_000}),
        (CHAT, {"messages": [1] * 500_000}),
        (CHAT, {"messages": [{}] * 200_000}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 100_000}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * 500_000}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "stop": [1] * 500_000}),
    ],
    ids=["ids", "texts", "lists", "messages", "objects", "chats", "parts", "stops"],
)
async def test_long_wrong_lists_cost_little(
    server: Any, jp_fetch: Any, path: tuple[str, ...], body: dict[str, Any]
) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    status, error = await refused(jp_fetch, *path, body=json.dumps({"model": MODEL, **body}))
    assert status == 400
    assert error["param"].split(".")[0] in ("prompt", "messages", "stop")
    assert process.memory_info().rss - before < 200 << 20


async def test_clients_share_batches(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(gate=gate)
    texts = [f"client {i} says " + "word " * 10 for i in range(8)]
    waiting = asyncio.gather(
        *(jp_fetch(*CHAT, method="POST", body=chat(text, stream=i % 2 == 0)) for i, text in
          enumerate(texts))
    )  # fmt: skip
    await until(lambda: fakes.models and fakes.models[0].active == 8)
    gate.release(1000)
    for text, response in zip(texts, await waiting, strict=True):
        assert all(word in response.body.decode() for word in text.split())
    assert max(fakes.made[0].batches) == 8


async def test_bodies_name_no_path(server: Any, jp_fetch: Any, tmp_path: Any) -> None:
    _, error = await refused(jp_fetch, *CHAT, body=chat(model="../../etc/passwd"))
    assert error["code"] == "model_not_found"
    assert str(tmp_path) not in json.dumps(error)


def _head(server: Any, port: int, base_url: str, length: str) -> bytes:
    return (
        f"POST {base_url}shimmy/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Authorization: token {server.identity_provider.token}\r\n{length}\r\n\r\n"
    ).encode()


async def _post(server: Any, port: int, base_url: str, body: bytes) -> IOStream:
    stream = await TCPClient().connect("127.0.0.1", port)
    await stream.write(_head(server, port, base_url, f"Content-Length: {len(body)}") + body)
    return stream


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


class TestWaiting:
    """What a stream says while there is no text."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("shimmy_jupyter.server.answers.PATIENCE", 0.01)

    async def _comments(self, stream: IOStream, state: bytes) -> dict[str, Any]:
        """The first comment that says so."""
        await stream.read_until(b': {"state":"' + state)
        rest = await stream.read_until(b"\n\n")
        return dict(json.loads(b'{"state":"' + state + rest))

    async def test_position_and_reason(
        self, server: Any, jp_fetch: Any, fakes: Fakes, jp_http_port: int, jp_base_url: str
    ) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(lambda _: ["word "] * 50, gate=gate)
        fakes.spec = LoadSpec(path="", sequences=1)
        body = chat(stream=True).encode()
        streams = []
        for count in (1, 2, 3):
            streams.append(await _post(server, jp_http_port, jp_base_url, body))
            await until(lambda: bool(fakes.models) and fakes.models[0].active == count)  # noqa: B023
        await streams[-1].read_until(b": waiting")
        # What was asked is answered between two steps.
        gate.release(10)
        seen = await self._comments(streams[-1], b"queued")
        assert seen["position"] == 1
        assert "as many as one may have" in seen["reason"]
        assert seen["prompt_tokens"] == len("<user>one two three\n<assistant>")
        gate.release(1000)
        for stream in streams:
            assert b"word " in await stream.read_until(b"[DONE]")
            stream.close()

    async def test_an_error_after_that_is_in_the_stream(
        self, server: Any, jp_fetch: Any, fakes: Fakes, jp_http_port: int, jp_base_url: str
    ) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate, fail_at=1)
        body = chat(stream=True).encode()
        stream = await _post(server, jp_http_port, jp_base_url, body)
        head = await stream.read_until(b": waiting")
        assert b" 200 " in head.split(b"\r\n")[0]
        gate.release(10)
        await stream.read_until(b'"error":')
        assert b'"engine_crashed"' in await stream.read_until(b"\n\n")
        stream.close()

    async def test_a_client_that_knows_no_comments(
        self, server: Any, jp_fetch: Any, fakes: Fakes
    ) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        asked = asyncio.ensure_future(jp_fetch(*CHAT, method="POST", body=chat(stream=True)))
        await until(lambda: bool(fakes.models) and fakes.models[0].active == 1)
        gate.release(100)
        response = await asked
        found = [item for item in client.events([response.body]) if "waiting" not in item]
        assert "".join(i["choices"][0]["delta"].get("content", "") for i in found) == (
            "one two three "
        )


async def test_max_seconds_ends_a_request(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(gate=gate)
    status, error = await refused(jp_fetch, *CHAT, body=chat(max_seconds=0.01))
    assert (status, error["code"]) == (408, "deadline_exceeded")
    assert "max_seconds" in error["message"]


async def test_the_administrator_s_limit_binds(server: Any, jp_fetch: Any, fakes: Fakes) -> None:
    fakes.make = lambda: FakeBackend(gate=threading.Semaphore(0))
    server.web_app.settings["shimmy_service"].guard.rules = Rules(
        limits=[LimitTable(Limits(seconds=0.01))]
    )
    status, error = await refused(jp_fetch, *CHAT, body=chat(max_seconds=1000))
    assert (status, error["code"]) == (408, "deadline_exceeded")


@pytest.mark.parametrize(
    ("field", "value"), [("max_seconds", 0), ("max_seconds", -1), ("max_seconds", "1"), ("reproducible", 1)]
)  # fmt: skip
async def test_own_fields_are_checked(
    server: Any, jp_fetch: Any, field: str, value: object
) -> None:
    status, error = await refused(jp_fetch, *CHAT, body=chat(**{field: value}))
    assert (status, error["code"], error["param"]) == (400, "invalid_value", field)


async def test_reproducible_has_a_context_of_its_own(
    server: Any, jp_fetch: Any, fakes: Fakes, monkeypatch: Any
) -> None:
    seen = []
    apply = FakeBackend.apply

    def record(self: FakeBackend, change: Any) -> None:
        if isinstance(change, OpenSlot):
            seen.append(change)
        apply(self, change)

    monkeypatch.setattr(FakeBackend, "apply", record)
    body = chat(reproducible=True, max_tokens=9)
    response = await jp_fetch(*CHAT, method="POST", body=body)
    assert json.loads(response.body)["choices"][0]["message"]["content"] == "one two three "
    (opened,) = seen
    assert opened.private_tokens == len("<user>one two three\n<assistant>") + 9
    assert opened.sampling.seed == 0
