"""`shimmy/api/limits`: what a user has left, and how users tighten their own."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_server.auth.decorator import authorized
from tornado import web

from .body import BodyHandler


def _wanted(body: bytes) -> dict[str, Any]:
    # It imports pydantic.
    from ..limit_requests import parse_limits

    return parse_limits(body)


class LimitsHandler(BodyHandler):
    small_body = True

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:limits")
    async def get(self) -> None:
        await self._show()

    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:limits")
    async def put(self) -> None:
        wanted = await asyncio.to_thread(_wanted, self.take_body())
        await self.service.guard.tighten(self.asked("act"), wanted)
        await self._show()

    async def _show(self) -> None:
        guard, principal = self.service.guard, self.principal
        found = await guard.limits(principal)
        await self.finish(found | {"queue_position": guard.queue_position(principal)})
