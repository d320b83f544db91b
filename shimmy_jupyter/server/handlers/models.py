"""`GET shimmy/v1/models` and `GET shimmy/v1/models/{id}`."""

from __future__ import annotations

import asyncio

from jupyter_server.auth.decorator import authorized
from tornado import web

from .. import answers
from .base import ShimmyHandler


class ModelsHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self) -> None:
        found = await self.service.models(self.principal)
        # There can be thousands.
        await self.finish(await asyncio.to_thread(answers.models, found))


class ModelHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self, id: str) -> None:
        await self.finish(answers.model(await self.service.model(id, self.principal)))
