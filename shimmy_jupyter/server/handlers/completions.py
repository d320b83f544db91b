"""`POST shimmy/v1/chat/completions` and `POST shimmy/v1/completions`."""

from __future__ import annotations

import asyncio
import functools
import time
from asyncio import Future
from typing import TYPE_CHECKING, ClassVar

from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.iostream import StreamClosedError

from ...completion import Completion
from ...errors import Cancelled, RateLimitExceeded, ShimmyError
from ...guard.visit import Result, Visit, result_of
from ...models.jobs import Progress
from ...types import CompletionRequest
from .. import answers
from .body import BodyHandler

if TYPE_CHECKING:  # importing it would load pydantic at the server's start
    from ..requests import Parsed

_SMALL = 64 * 1024
_UNREAD_SECONDS = 60.0
"""For which a client may take in nothing of what it is sent; what it holds is others' too."""
_NAMED = 20
"""How many ignored fields the header names."""


class _Heard:
    """The last that was said of how far something is, on whichever thread."""

    progress = Progress("starting")

    def __call__(self, progress: Progress) -> None:
        self.progress = progress


class _GeneratingHandler(BodyHandler):
    """Streams or writes one completion."""

    _completion: Completion | None = None
    _starting: asyncio.Task[Completion] | None = None
    _gone = False

    def on_connection_close(self) -> None:
        # Tornado's own frees a handler whose client hung up amid the body.
        super().on_connection_close()
        self._gone = True
        if self._starting is not None:
            self._starting.cancel()
        if self._completion is not None:
            self._completion.close()

    async def _complete(self, api: _Api, route: str) -> None:
        visit = self.service.visit(self.asked(route))
        try:
            parsed = await self._parsed(api)
        except Exception as error:
            await visit.end(result_of(error))
            raise
        created = int(time.time())
        try:
            if parsed.stream:
                await self._stream(api.writer(parsed, created), parsed.request, visit)
                return
            async with await self._started(parsed.request, visit) as completion:
                self._completion = completion
                await self.tell_limits(visit)
                if not self._gone:
                    await self.finish(await api.body(parsed, completion, created))
        except RateLimitExceeded:
            await self.tell_limits(visit)
            raise
        except (StreamClosedError, Cancelled):
            # The client went away; leaving the block frees its sequence.
            self.log.debug("request %s: the client disconnected", self.request_id)
        finally:
            # A task has its error, whose traceback has this handler: each would keep the other.
            self._starting = self._completion = None

    async def _started(self, request: CompletionRequest, visit: Visit) -> Completion:
        """Who goes away meanwhile gives up its place. Raises `Cancelled`."""
        if self._gone:
            error = Cancelled("the client disconnected")
            await visit.end(result_of(error))
            raise error
        self._starting = asyncio.create_task(self.service.start(request, visit=visit))
        try:
            return await self._starting
        except asyncio.CancelledError as gone:
            visit.end_later(result_of(gone))  # also where it had not begun
            if self._gone:
                raise Cancelled("the client disconnected") from None
            self._starting.cancel()
            raise

    async def _parsed(self, api: _Api) -> Parsed:
        body = self.take_body()
        # Off the event loop, for the sake of others when it is large.
        parse = functools.partial(api.parse, body, self.request_id, self.principal)
        parsed: Parsed = parse() if len(body) < _SMALL else await asyncio.to_thread(parse)
        if parsed.ignored:
            self.set_header("x-shimmy-ignored", ignored_names(parsed.ignored))
        return parsed

    async def _stream(
        self, writer: answers.EventWriter, request: CompletionRequest, visit: Visit
    ) -> None:
        """Headers go with the first event, so a request that fails soon keeps its status."""
        heard = _Heard()
        starting = asyncio.create_task(self.service.start(request, heard, visit))
        starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async for comment in writer.loading(starting, lambda: heard.progress):
                await self.still_allowed("execute", "shimmy_jupyter:generate")
                await self._send(comment)
            completion = starting.result()
            await self.tell_limits(visit)
        except ShimmyError as error:
            visit.refused = result_of(error)
            if not self._headers_written:
                raise
            await self._send(writer.failed(error))
        else:
            async with completion:
                self._completion = completion
                if not self._gone:
                    await self._answer(writer, completion)
        finally:
            # Where the client went away before it began.
            starting.cancel()
            if not (starting.done() or visit.ended):
                visit.end_later(Result("cancelled", Cancelled.code))  # it may not have begun
            if starting.done() and not (starting.cancelled() or starting.exception()):
                await starting.result().finish(Cancelled("the client disconnected"))
            del starting  # as above
        if not self._gone:
            await self.finish(set_content_type="text/event-stream")

    async def _answer(self, writer: answers.EventWriter, completion: Completion) -> None:
        async for data in writer.events(completion, told=self._headers_written):
            try:
                await self.still_allowed("execute", "shimmy_jupyter:generate")
            except ShimmyError as error:
                if not self._headers_written:
                    raise
                await self._send(await writer.ended(completion, error))
                return
            await self._send(data)

    async def _send(self, data: bytes) -> None:
        connection = self.request.connection
        assert connection is not None
        try:
            if self._headers_written:
                # There is nothing left to transform: past the handler's own buffer.
                await self._read_by_client(connection.write(data))
                return
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("Cache-Control", "no-cache")
            self.set_header("X-Accel-Buffering", "no")
            self.write(data)
            await self._read_by_client(self.flush())
        except StreamClosedError:
            # On record as such, also where nobody has told us before.
            raise Cancelled("the client disconnected") from None

    async def _read_by_client(self, sending: Future[None]) -> None:
        try:
            if sending.done():
                return sending.result()  # most often: the system has taken all of it
            async with asyncio.timeout(_UNREAD_SECONDS):
                await sending
        except TimeoutError:
            self.request.connection.stream.close()  # type: ignore[union-attr]
            raise Cancelled("the client reads nothing") from None
        finally:
            del sending


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
        await self._complete(await _Api.load(chat=True), "chat")


@web.stream_request_body
class CompletionsHandler(_GeneratingHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        await self._complete(await _Api.load(chat=False), "completions")
