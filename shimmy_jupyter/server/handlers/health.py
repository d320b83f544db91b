"""`GET shimmy/health`: can the main job be done, and if not, what to do about it."""

from __future__ import annotations

from jupyter_server.auth.decorator import authorized
from tornado import web

from ...health import health
from .base import ShimmyHandler


class HealthHandler(ShimmyHandler):
    _track_activity = False

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:metrics")
    async def get(self) -> None:
        service, around = self.service, self.settings.get("shimmy_surroundings")
        found = await health(service, around, service.may_use(self.principal))
        if not found.ok:
            self.set_status(503)
        await self.finish(found.to_json())
