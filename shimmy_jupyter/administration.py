"""Work on models, past the guard: whether somebody may, on record before it is begun."""

from __future__ import annotations

from functools import partial

from .errors import AccessDenied
from .guard.asked import Asked
from .guard.guard import Guard
from .models.jobs import Job
from .models.library import ModelLibrary


class Administration:
    """As `ModelLibrary`, for whom the policy allows it. Everything raises `AccessDenied`, too, and
    `AuditUnavailable` where acts have to be recorded and cannot.
    """

    def __init__(self, library: ModelLibrary, guard: Guard) -> None:
        self._library, self._guard = library, guard

    async def load(self, id: str, asked: Asked) -> Job:
        return await self._done("load", id, asked)

    async def unload(self, id: str, asked: Asked) -> Job:
        return await self._done("unload", id, asked)

    async def probe(self, id: str, asked: Asked) -> Job:
        return await self._done("probe", id, asked)

    async def verify(self, id: str, asked: Asked) -> Job:
        return await self._done("verify", id, asked)

    async def _done(self, action: str, id: str, asked: Asked) -> Job:
        # Who may not is told so, whether there is such a model or not.
        may = partial(self._guard.allows, asked.principal)
        if may(action, id):
            await self._library.pool.catalog.find(id, partial(may, "use"))
        await self._guard.act(asked, action, id)
        job: Job = await getattr(self._library, action)(id, asked.principal)
        return job

    async def pull(self, reference: str, asked: Asked, sha256: str | None = None) -> Job:
        meant = self._library.meant(reference)  # the address itself may have secrets in it
        detail = {"sha256": sha256} if sha256 is not None else None
        try:
            for name in meant.names:
                self._guard.check(asked.principal, "pull", name, meant.also)
            await self._library.check_pulling()
        except AccessDenied as error:
            await self._guard.record(asked, "pull", str(meant), detail, error)
            raise
        await self._guard.record(asked, "pull", str(meant), detail)
        return await self._library.pull(reference, asked.principal, sha256)
