"""`POST shimmy/v1/embeddings` and `POST shimmy/v1/rerank`."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_server.auth.decorator import authorized
from tornado import web

from ...errors import Cancelled, RateLimitExceeded
from ...guard.visit import Result, Visit, result_of
from .body import BodyHandler
from .completions import ignored_names


async def _api() -> Any:
    """Off the event loop at its first use: it imports pydantic."""

    def load() -> Any:
        from .. import embeddings

        return embeddings

    return await asyncio.to_thread(load)


class _VectorsHandler(BodyHandler):
    """A client that goes away ends the work for it after the call in progress."""

    _task: asyncio.Task[bytes] | None = None
    _gone = False

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self._gone = True
        if self._task is not None:
            self._task.cancel()

    async def _answer(self, parser: str, route: str) -> None:
        api = await _api()
        visit = self.service.visit(self.asked(route))
        body = self.take_body()
        try:
            parsed = await asyncio.to_thread(
                getattr(api, parser), body, self.request_id, self.principal
            )
        except Exception as error:
            await visit.end(result_of(error))
            raise
        if parsed.ignored:
            self.set_header("x-shimmy-ignored", ignored_names(parsed.ignored))
        if self._gone:
            visit.end_later(Result("cancelled", Cancelled.code))
            return
        self._task = asyncio.create_task(self._computed(parsed, visit))
        try:
            answer = await self._task
        except asyncio.CancelledError:
            visit.end_later(Result("cancelled", Cancelled.code))  # where it had not begun
            if self._gone:
                return
            raise Cancelled("the request was cancelled") from None
        except RateLimitExceeded:
            await self.tell_limits(visit)
            raise
        finally:
            self._task = None  # it has its error, whose traceback has this handler
        await self.tell_limits(visit)
        self.set_header("Content-Type", "application/json")
        await self.finish(answer)

    async def _computed(self, parsed: Any, visit: Visit) -> bytes:
        found = await self.service.embed(parsed.request, visit)
        # Thousands of numbers take a while to write down.
        answer: bytes = await asyncio.to_thread(parsed.answer, found)
        return answer


@web.stream_request_body
class EmbeddingsHandler(_VectorsHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        await self._answer("parse_embeddings", "embeddings")


@web.stream_request_body
class RerankHandler(_VectorsHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        await self._answer("parse_rerank", "rerank")
