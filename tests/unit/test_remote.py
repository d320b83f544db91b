"""Many requests at once to a server, which a few lines here play.

Cases: a body and its answer, by each method; the token, labels, no proxy; typed errors, when to try
again, an answer that is none of ours, nobody there; what is no JSON is named, and not sent; a stream,
whole, left early, refused; a request that is cancelled hangs up; 64 at once, the next one waits; a
unix socket; events cut anywhere; one transport in each loop; the synchronous client's `put`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import (
    InternalError,
    InvalidValue,
    ModelNotFound,
    QueueFull,
    RateLimitExceeded,
    ServerUnreachable,
)
from shimmy_jupyter.notebook import client, remote
from shimmy_jupyter.notebook.client import HttpTransport, Server
from shimmy_jupyter.notebook.remote import AsyncConnection, AsyncHttpTransport


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Played:
    """A server: what it was asked, and what it answers. `left` is set when a client hangs up."""

    answer: Callable[[Request, asyncio.StreamWriter], Awaitable[None]]
    asked: list[Request] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    server: Server = field(default_factory=lambda: Server("", ""))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split()
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                self.asked.append(Request(method, path, headers, json.loads(raw or b"null")))
                answering = asyncio.ensure_future(self.answer(self.asked[-1], writer))
                gone = asyncio.ensure_future(reader.read(1)) if path.endswith("/slow") else None
                if gone is not None:
                    await gone
                    answering.cancel()
                    break
                await answering
        self.left.set()
        writer.close()


def said(
    status: int = 200, body: Any = None, *headers: str
) -> Callable[[Request, asyncio.StreamWriter], Awaitable[None]]:
    data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()

    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(data)}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode() + data)
        await writer.drain()

    return answer


def error(code: str, status: int, *headers: str, param: str | None = None) -> Any:
    shape = {"message": "why", "code": code, "param": param, "request_id": "r1"}
    return said(status, {"error": shape}, *headers)


@contextlib.asynccontextmanager
async def playing(
    answer: Callable[[Request, asyncio.StreamWriter], Awaitable[None]], socket: str | None = None
) -> AsyncIterator[tuple[Played, AsyncHttpTransport]]:
    played = Played(answer)
    if socket:
        running = await asyncio.start_unix_server(played.serve, socket)
        played.server = Server("http+unix://x/", "secret", socket)
    else:
        running = await asyncio.start_server(played.serve, "127.0.0.1", 0)
        port = running.sockets[0].getsockname()[1]
        played.server = Server(f"http://127.0.0.1:{port}/base/", "secret")
    transport = AsyncHttpTransport(played.server, lambda: {"x-shimmy-cell": "c7"})
    try:
        yield played, transport
    finally:
        await transport.aclose()
        await transport.aclose()
        running.close()
        await running.wait_closed()


async def test_a_body_and_its_answer() -> None:
    async with playing(said(200, {"ok": [1]})) as (played, transport):
        assert await transport.request("POST", "shimmy/api/x", {"a": "é", "zero": 0}) == {"ok": [1]}
        assert await transport.request("GET", "shimmy/api/y?z=1") == {"ok": [1]}
        await transport.request("PUT", "shimmy/api/limits", {})
        await transport.request("DELETE", "shimmy/api/jobs/1")
    first, second, third, fourth = played.asked
    assert (first.method, first.path) == ("POST", "/base/shimmy/api/x")
    assert first.body == {"a": "é", "zero": 0}
    assert first.headers["content-type"] == "application/json"
    assert (second.method, second.path, second.body) == ("GET", "/base/shimmy/api/y?z=1", None)
    assert (third.method, third.body, fourth.method) == ("PUT", {}, "DELETE")
    for one in played.asked:
        assert one.headers["authorization"] == "token secret"
        assert one.headers["x-shimmy-cell"] == "c7"


async def test_proxies_do_not_get_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with playing(said(200, {"ok": 1})) as (_, transport):
        assert await transport.request("GET", "x") == {"ok": 1}


async def test_no_token_no_header() -> None:
    async with playing(said()) as (played, _):
        bare = AsyncHttpTransport(Server(played.server.url, ""))
        await bare.request("GET", "x")
        await bare.aclose()
    assert "authorization" not in played.asked[0].headers


async def test_typed_errors() -> None:
    async with playing(error("model_not_found", 404, param="model")) as (_, transport):
        with pytest.raises(ModelNotFound, match="why") as caught:
            await transport.request("GET", "x")
    assert (caught.value.param, caught.value.request_id) == ("model", "r1")


@pytest.mark.parametrize(("header", "seconds"), [("17", 17.0), ("soon", None)])
async def test_when_to_try_again(header: str, seconds: float | None) -> None:
    refusal = error("rate_limit_exceeded", 429, f"Retry-After: {header}")
    async with playing(refusal) as (_, transport):
        with pytest.raises(RateLimitExceeded) as caught:
            await transport.request("POST", "x", {})
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize(
    "answer", [said(404, b"<h1>no</h1>"), said(200, b"<h1>sign in</h1>"), said(200, b"[1]")]
)
async def test_an_answer_that_is_none_of_ours(answer: Any) -> None:
    async with playing(answer) as (_, transport):
        with pytest.raises(ServerUnreachable, match="answer"):
            await transport.request("GET", "x")


async def test_nobody_there() -> None:
    async with playing(said()) as (played, _):
        url = played.server.url
    transport = AsyncHttpTransport(Server(url, "secret"))
    with pytest.raises(ServerUnreachable, match="ConnectError") as caught:
        await transport.request("GET", "x")
    assert "secret" not in str(caught.value)
    with pytest.raises(ServerUnreachable):
        async with transport.stream("x", {}):
            pass
    await transport.aclose()


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, "\ud800", {1, 2}, object(), [math.nan], b"bytes"]
)
async def test_what_is_no_json_is_named_and_not_sent(value: Any) -> None:
    async with playing(said()) as (played, transport):
        with pytest.raises(InvalidValue) as caught:
            await transport.request("POST", "x", {"fine": 0, "odd": value})
        assert caught.value.param == "odd"
        with pytest.raises(InvalidValue):
            async with transport.stream("x", {"odd": value}):
                pass
    assert played.asked == []


async def test_a_stream() -> None:
    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b"data: {}\n\n", b"data: [DONE]\n\n"):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")

    async with (
        playing(answer) as (played, transport),
        transport.stream("shimmy/x", {"stream": True}) as chunks,
    ):
        got = b"".join([chunk async for chunk in chunks])
    assert got == b"data: {}\n\ndata: [DONE]\n\n"
    assert played.asked[0].body == {"stream": True}
    assert played.asked[0].headers["x-shimmy-cell"] == "c7"


async def test_a_refused_stream() -> None:
    async with playing(error("queue_full", 503)) as (_, transport):
        with pytest.raises(QueueFull):
            async with transport.stream("x", {}):
                pytest.fail("there is no answer")


async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"5\r\n: hi\n\r\n")
    await asyncio.Event().wait()


async def test_a_stream_that_is_left_hangs_up() -> None:
    async with playing(endless) as (played, transport):
        async with transport.stream("slow", {}) as chunks:
            assert await anext(aiter(chunks)) == b": hi\n"
            assert not played.left.is_set()
        await asyncio.wait_for(played.left.wait(), 5)


async def test_a_cancelled_request_hangs_up() -> None:
    async with playing(endless) as (played, transport):
        asking = asyncio.create_task(transport.request("POST", "slow", {}))
        while not played.asked:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(played.left.wait(), 5)


async def test_as_many_at_once_as_there_are_connections() -> None:
    gate = asyncio.Event()

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await said(200, {"n": request.body["n"]})(request, writer)

    async with playing(answer) as (played, transport):
        numbers = range(remote.CONNECTIONS + 9)
        asking = [asyncio.create_task(transport.request("POST", "x", {"n": i})) for i in numbers]
        while len(played.asked) < remote.CONNECTIONS:
            await asyncio.sleep(0)
        for _ in range(1000):  # the others would have come by now
            await asyncio.sleep(0)
        assert len(played.asked) == remote.CONNECTIONS
        gate.set()
        found = await asyncio.wait_for(asyncio.gather(*asking), 30)
    assert [one["n"] for one in found] == list(numbers)


async def test_a_unix_socket(tmp_path: Path) -> None:
    async with playing(said(200, {"ok": 1}), str(tmp_path / "s")) as (played, transport):
        assert await transport.request("POST", "shimmy/x", {}) == {"ok": 1}
    assert played.asked[0].path == "/shimmy/x"
    assert played.asked[0].headers["host"] == "localhost"


STREAM = (
    b': {"state": "queued"}\n\n: waiting\n\n'
    b'data: {"choices": [{"delta": {"content": "\xc3\xa9"}}]}\n\n'
    b'data: {"choices": []}\n\ndata: [DONE]\n\n'
)


async def _chunks(data: bytes, cuts: list[int]) -> AsyncIterator[bytes]:
    at = 0
    for cut in [*sorted(cuts), len(data)]:
        yield data[at:cut]
        at = cut


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_cut_anywhere(cuts: list[int]) -> None:
    async def read() -> list[dict[str, Any]]:
        return [item async for item in remote.events(_chunks(STREAM, cuts))]

    assert asyncio.run(read()) == list(client.events([STREAM]))
    assert len(list(client.events([STREAM]))) == 3


async def test_a_stream_that_just_ends_was_cut_off() -> None:
    with pytest.raises(InternalError, match="cut off"):
        _ = [item async for item in remote.events(_chunks(STREAM[:-4], []))]


async def test_an_error_in_a_stream_is_raised() -> None:
    shape = {"message": "m", "code": "queue_full", "param": None, "request_id": "r"}
    data = f"data: {json.dumps({'error': shape})}\n\n".encode()
    with pytest.raises(QueueFull):
        _ = [item async for item in remote.events(_chunks(data, []))]


class TestConnection:
    async def test_one_transport_in_each_loop(self) -> None:
        found: list[int] = []

        def find() -> Server:
            found.append(1)
            return Server("http://127.0.0.1:9/", "t")

        connection = AsyncConnection(find, pytest.fail)
        here = connection.transport()
        assert connection.transport() is here
        assert isinstance(here, AsyncHttpTransport)

        async def elsewhere() -> Any:
            there = connection.transport()
            await connection.aclose()
            return there

        assert await asyncio.to_thread(asyncio.run, elsewhere()) is not here
        assert connection.transport() is here
        assert len(found) == 2
        await connection.aclose()
        await connection.aclose()
        assert connection.transport() is not here
        await connection.aclose()

    async def test_where_there_is_no_server(self) -> None:
        local: Any = object()
        connection = AsyncConnection(lambda: None, lambda: local)
        assert connection.transport() is local
        await connection.aclose()


async def test_the_synchronous_client_raises_the_same_errors() -> None:
    page = b"<html>\n\n<p>Sign in</p>\n\n</html>"
    async with playing(said(200, page)) as (played, _):

        def ask() -> list[str]:
            transport = HttpTransport(played.server)
            try:
                with pytest.raises(ServerUnreachable, match="is not JSON"):
                    transport.get("shimmy/api/models")
                assert len(played.asked) == 1
                for value in (float("nan"), "\udc80", object()):
                    with pytest.raises(InvalidValue) as caught:
                        transport.post("x", {"fine": 0, "odd": value})
                    assert caught.value.param == "odd"
                    with pytest.raises(InvalidValue), transport.stream("x", {"odd": value}):
                        pytest.fail("it is not sent")
                with (
                    transport.stream("x", {}) as chunks,
                    pytest.raises(ServerUnreachable) as caught,
                ):
                    list(client.events(chunks))
                return [caught.value.message, transport._client.headers["content-type"]]
            finally:
                transport._client.close()

        assert await asyncio.to_thread(ask) == [
            "the Jupyter server's answer is not JSON", "application/json",
        ]  # fmt: skip
    assert len(played.asked) == 2


async def test_the_synchronous_client_puts() -> None:
    async with playing(said(200, {"ok": 1})) as (played, _):

        def put() -> dict[str, Any]:
            transport = HttpTransport(played.server)
            try:
                return transport.put("shimmy/api/limits", {"max_seconds": None})
            finally:
                transport._client.close()

        assert await asyncio.to_thread(put) == {"ok": 1}
    assert (played.asked[0].method, played.asked[0].body) == ("PUT", {"max_seconds": None})
