"""`shimmy/api/models` and `shimmy/api/jobs`: what there is, and work on it that takes a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.iostream import StreamClosedError

from ...administration import Administration
from ...errors import AccessDenied
from ...models.jobs import Job
from ...models.library import ModelLibrary
from .. import answers
from .base import ShimmyHandler
from .body import BodyHandler
from .models import model_id

if TYPE_CHECKING:  # importing it would load pydantic at the server's start
    from .. import model_requests


class _LibraryHandler(BodyHandler):
    small_body = True

    @property
    def library(self) -> ModelLibrary:
        return self.service.library

    @property
    def administration(self) -> Administration:
        return Administration(self.library, self.service.guard)

    async def parsed(self, name: str) -> Any:
        """Off the event loop: the first time it imports pydantic."""
        body = self.take_body()

        def parse() -> Any:
            from .. import model_requests

            parse: Callable[[bytes], Any] = getattr(model_requests, name)
            return parse(body)

        return await asyncio.to_thread(parse)

    async def accepted(self, job: Job) -> None:
        self.set_status(202)
        await self.finish({"job": job.id})


class LibraryHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self) -> None:
        library, allows = self.service.library, self.service.may_use(self.principal)
        await self.finish(await answers.library(library, await library.describe(), allows))


class LibraryModelHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self, id: str) -> None:
        await self.service.model(model_id(id), self.principal)
        await self.finish((await self.service.library.describe_one(model_id(id))).to_json())


class SuggestionsHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self) -> None:
        task = self.query("task")
        await self.finish(await self.service.library.suggestions(task))


class DiscoverHandler(_LibraryHandler):
    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:models")
    async def post(self) -> None:
        await self.parsed("parse_empty")
        allows = self.service.may_use(self.principal)
        await self.finish(
            await answers.library(self.library, await self.library.discover(), allows)
        )


class PullHandler(_LibraryHandler):
    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:models")
    async def post(self) -> None:
        asked: model_requests.Pull = await self.parsed("parse_pull")
        await self.accepted(
            await self.administration.pull(asked.model, self.asked("act"), asked.sha256)
        )


class LoadHandler(_LibraryHandler):
    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:models")
    async def post(self, id: str) -> None:
        await self.parsed("parse_empty")
        await self.accepted(await self.administration.load(model_id(id), self.asked("act")))


class UnloadHandler(_LibraryHandler):
    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:models")
    async def post(self, id: str) -> None:
        await self.parsed("parse_empty")
        await self.accepted(await self.administration.unload(model_id(id), self.asked("act")))


class ProbeHandler(_LibraryHandler):
    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:models")
    async def post(self, id: str) -> None:
        await self.parsed("parse_empty")
        await self.accepted(await self.administration.probe(model_id(id), self.asked("act")))


class VerifyHandler(_LibraryHandler):
    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:models")
    async def post(self, id: str) -> None:
        await self.parsed("parse_empty")
        await self.accepted(await self.administration.verify(model_id(id), self.asked("act")))


class JobsHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self) -> None:
        jobs = self.service.library.jobs.of(self.principal)
        await self.finish({"jobs": [job.to_json() for job in jobs]})


class JobHandler(ShimmyHandler):
    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self, id: str) -> None:
        job = self.service.library.jobs.get(id, self.principal)
        if "text/event-stream" not in self.request.headers.get("Accept", ""):
            await self.finish(job.to_json())
            return
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Accel-Buffering", "no")
        try:
            async for look in job.looks():
                await self.still_allowed("read", "shimmy_jupyter:models")
                self.write(answers.event(look))
                await self.flush()
        except StreamClosedError:
            return
        except AccessDenied as error:
            self.write(answers.event(error.to_json(self.request_id)))
        await self.finish(set_content_type="text/event-stream")

    @web.authenticated
    @authorized(action="write", resource="shimmy_jupyter:models")
    async def delete(self, id: str) -> None:
        job = self.service.library.jobs.cancel(id, self.principal)
        await self.finish(job.to_json())
