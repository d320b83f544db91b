"""`GET shimmy/health`: can the main job be done, and if not, what to do about it."""

from __future__ import annotations

from jupyter_server.auth.decorator import authorized
from tornado import web

from .base import ShimmyHandler


class HealthHandler(ShimmyHandler):
    _track_activity = False

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:metrics")
    async def get(self) -> None:
        health = await self.service.health()
        if not health.ok:
            self.set_status(503)
        await self.finish(health.to_json())
