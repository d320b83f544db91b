"""`GET shimmy/v1/models` and `GET shimmy/v1/models/{id}`."""

from __future__ import annotations

import asyncio
import re

from jupyter_server.auth.decorator import authorized
from tornado import web

from ...errors import ModelNotFound
from .. import answers
from .base import ShimmyHandler

_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


def model_id(id: str) -> str:
    """The part of an address that names a model. Raises `ModelNotFound` for what can be none's."""
    if not _ID.fullmatch(id):
        raise ModelNotFound(
            "a model's id has up to 128 of the characters A-Z a-z 0-9 . _ : @ -", param="model"
        )
    return id


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
        found = await self.service.model(model_id(id), self.principal)
        await self.finish(answers.model(found))
