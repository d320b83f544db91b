"""`GET shimmy/api/openapi.json`: these routes, for programs."""

from __future__ import annotations

import asyncio

from jupyter_server.auth.decorator import authorized
from tornado import web

from .base import ShimmyHandler


def _document() -> bytes:
    # Imports pydantic, and this package.
    from .. import openapi

    return openapi.served()


class OpenApiHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self) -> None:
        # Where a setting is wrong this says so, as every other route does.
        _ = self.service
        self.set_header("Content-Type", "application/json")
        await self.finish(await asyncio.to_thread(_document))
