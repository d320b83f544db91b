"""`POST shimmy/api/tokenize`, `/detokenize` and `/apply-template`: exact counts before sending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jupyter_server.auth.decorator import authorized
from tornado import web

from .body import BodyHandler

if TYPE_CHECKING:  # importing it would load pydantic at the server's start
    from .. import token_requests


async def _requests() -> Any:
    """Off the event loop at its first use: it imports pydantic."""

    def load() -> Any:
        from .. import token_requests

        return token_requests

    return await asyncio.to_thread(load)


class _TokensHandler(BodyHandler):
    async def parsed(self, name: str) -> Any:
        parse: Callable[[bytes], Any] = getattr(await _requests(), name)
        return await asyncio.to_thread(parse, self.take_body())


class TokenizeHandler(_TokensHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        asked: token_requests.Tokenize = await self.parsed("parse_tokenize")
        tokens = await self.service.tokenize(
            asked.model, asked.prompt, self.principal, asked.options
        )
        await self.finish({"tokens": tokens, "count": len(tokens)})


class DetokenizeHandler(_TokensHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        asked: token_requests.Detokenize = await self.parsed("parse_detokenize")
        text = await self.service.detokenize(asked.model, asked.tokens, self.principal)
        await self.finish({"text": text})


class ApplyTemplateHandler(_TokensHandler):
    @web.authenticated
    @authorized(action="execute", resource="shimmy_jupyter:generate")
    async def post(self) -> None:
        asked: token_requests.Tokenize = await self.parsed("parse_template")
        found = await self.service.rendered(
            asked.model, asked.prompt, self.principal, asked.options
        )
        await self.finish(
            {"prompt": found.text, "count": found.count, "cached_tokens": found.cached}
        )
