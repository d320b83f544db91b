"""Many requests at once to the kernel's own server, from one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import httpx

from .client import Blocks, Server, check, headers, reached, read, unreachable, written

CONNECTIONS = 64
"""Requests under way at once; further ones wait here."""
_WORK = httpx.Timeout(10.0, read=None, pool=None)
_LOOK = httpx.Timeout(30.0, pool=None)


class AsyncTransport(Protocol):
    """Where requests go. Bodies and answers are the HTTP API's, whoever carries them."""

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer's JSON. Cancelling it cancels the request."""
        ...

    def stream(
        self, path: str, body: dict[str, Any]
    ) -> AbstractAsyncContextManager[AsyncIterable[bytes]]:
        """The answer's server-sent events as they arrive. Leaving the block cancels the request."""
        ...


class AsyncHttpTransport:
    """Talks to one server, from the event loop in which it is first used. Ignores proxy settings: the
    token is for that server only. A POST may take as long as its answer does.
    """

    def __init__(self, server: Server, labels: Callable[[], Mapping[str, str]] = dict) -> None:
        self.server = server
        self._labels = labels
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        uds: Any = {}
        if server.socket:
            uds = {"transport": httpx.AsyncHTTPTransport(uds=server.socket, limits=limits)}
        self._client = httpx.AsyncClient(
            headers=headers(server), limits=limits, **{**reached(server), "timeout": _WORK}, **uds
        )

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        content = None if body is None else written(body)
        with unreachable():
            response = await self._client.request(
                method,
                path,
                content=content,
                headers=dict(self._labels()),
                timeout=_WORK if method == "POST" else _LOOK,
            )
            return read(response)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterable[bytes]]:
        sent = self._client.stream(
            "POST", path, content=written(body), headers=dict(self._labels())
        )
        with unreachable():
            async with sent as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                check(response)
                yield response.aiter_bytes()

    async def aclose(self) -> None:
        """Closing twice is fine."""
        await self._client.aclose()


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """As `client.events`, of chunks that are awaited."""
    blocks = Blocks()
    async for chunk in chunks:
        for item in blocks.feed(chunk):
            yield item
        if blocks.done:
            return
    blocks.close()


class AsyncConnection:
    """Finds the server when it is first needed, and has one transport in each event loop. Where there is
    no server, `local` makes what answers in its place.
    """

    def __init__(
        self,
        find: Callable[[], Server | None],
        local: Callable[[], AsyncTransport],
        labels: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._find, self._local, self._labels = find, local, labels
        self._made: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncTransport]
        self._made = WeakKeyDictionary()

    def transport(self) -> AsyncTransport:
        """That of the running event loop. Raises `ServerUnreachable`."""
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            server = self.server()
            self._made[loop] = (
                self._local() if server is None else AsyncHttpTransport(server, self._labels)
            )
        return self._made[loop]

    def server(self) -> Server | None:
        """None where the model runs inside the kernel. Raises `ServerUnreachable`."""
        return self._find()

    async def aclose(self) -> None:
        """Close that of the running event loop."""
        made = self._made.pop(asyncio.get_running_loop(), None)
        if isinstance(made, AsyncHttpTransport):
            await made.aclose()
