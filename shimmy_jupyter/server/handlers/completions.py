"""`POST shimmy/v1/chat/completions` and `POST shimmy/v1/completions`."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import ClassVar

from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.iostream import StreamClosedError

from ...completion import Completion
from ...errors import Cancelled
from .. import answers
from .body import BodyHandler

_SMALL = 64 * 1024
_NAMED = 20
"""How many ignored fields the header names."""


class _GeneratingHandler(BodyHandler):
    """Streams or writes one completion."""

    _completion: Completion | None = None
    _gone = False

    def on_connection_close(self) -> None:
        # Tornado's own frees a handler whose client hung up amid the body.
        super().on_connection_close()
        self._gone = True
        if self._completion is not None:
            self._completion.close()

    async def _complete(self, api: _Api) -> None:
        body = self.take_body()
        # Off the event loop, for the sake of others when it is large.
        parse = functools.partial(api.parse, body, self.request_id, self.principal)
        parsed = parse() if len(body) < _SMALL else await asyncio.to_thread(parse)
        if parsed.ignored:
            self.set_header("x-shimmy-ignored", ignored_names(parsed.ignored))
        created = int(time.time())
        async with await self.service.start(parsed.request) as completion:
            self._completion = completion
            if self._gone:
                return
            try:
                if parsed.stream:
                    await self._stream(api.writer(parsed, created), completion)
                else:
                    await self.finish(await api.body(parsed, completion, created))
            except (StreamClosedError, Cancelled):
                # The client went away; leaving the block frees its sequence.
                self.log.debug("request %s: the client disconnected", self.request_id)

    async def _stream(self, writer: answers.EventWriter, completion: Completion) -> None:
        connection = self.request.connection
        assert connection is not None
        # Headers go with the first event, so a request that fails soon keeps its status.
        async for data in writer.events(completion):
            if self._headers_written:
                # There is nothing left to transform: past the handler's own buffer.
                await connection.write(data)
                continue
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("Cache-Control", "no-cache")
            self.set_header("X-Accel-Buffering", "no")
            self.write(data)
            await self.flush()
        await self.finish(set_content_type="text/event-stream")


class _Api:
    """The parsing and answering of one endpoint."""

    def __init__(self, *, chat: bool) -> None:
        from .. import requests

        shape = answers.CHAT if chat else answers.COMPLETION
        self.parse = requests.parse_chat if chat else requests.parse_completion
        self.writer = functools.partial(answers.EventWriter, shape)
        self.body = functools.partial(answers.body, shape)

    _loaded: ClassVar[dict[bool, _Api]] = {}

    @classmethod
    async def load(cls, *, chat: bool) -> _Api:
        """Pydantic takes a fifth of a second to import: on first use, and not on the event loop."""
        if chat not in cls._loaded:
            cls._loaded[chat] = await asyncio.to_thread(cls, chat=chat)
        return cls._loaded[chat]


def ignored_names(names: tuple[str, ...]) -> str:
    """As the header `x-shimmy-ignored` gives them."""
    return ", ".join(_header_safe(name) for name in names[:_NAMED])


def _header_safe(name: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() and c != "," else "?" for c in name)[:64]


@web.stream_request_body
class ChatCompletionsHandler(_GeneratingHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        await self._complete(await _Api.load(chat=True))


@web.stream_request_body
class CompletionsHandler(_GeneratingHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        await self._complete(await _Api.load(chat=False))
