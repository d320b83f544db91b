"""The service in this process, for a kernel without a server and for the command line."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

from .administration import Administration
from .compose import build_service
from .config import Settings
from .errors import AccessDenied, InternalError, NotFound, ShimmyError
from .guard.asked import Asked
from .guard.visit import result_of
from .server import answers
from .types import Principal

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter")


class LocalTransport:
    """Speaks the HTTP API's bodies and events, so that whoever uses it need not know the difference.
    Its event loop has a thread of its own: the kernel's is busy running the cell.
    """

    def __init__(self, settings: Settings) -> None:
        self._service = build_service(settings)
        self._may_compute = settings.guard.allow_in_kernel
        self._administration = Administration(self._service.library, self._service.guard)
        self._loop = asyncio.new_event_loop()
        # A daemon, and no executor is needed to close: neither may keep the process from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name="shimmy", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def get(self, path: str) -> dict[str, Any]:
        return self._start(self._answer("GET", path, {})).result()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._start(self._answer("POST", path, body)).result()

    def delete(self, path: str) -> dict[str, Any]:
        return self._start(self._answer("DELETE", path, {})).result()

    async def _answer(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the route would; but who waits here waits for everything."""
        parts = [unquote(part) for part in path.removeprefix("shimmy/").split("/")]
        if method == "GET":
            return await self._look(path)
        library, me = self._service.library, Principal("local")
        allows = self._service.may_use(me)
        asked, work = _asked(path), self._administration
        match (method, *parts):
            case ("DELETE", "api", "jobs", id):
                return library.jobs.cancel(id, me).to_json()
            case ("POST", "api", "models", "discover"):
                return _read(await answers.library(library, await library.discover(), allows))
            case ("POST", "api", "models", "pull"):
                return {"job": (await work.pull(body["model"], asked, body.get("sha256"))).id}
            case ("POST", "api", "models", id, "load" | "unload" | "probe" | "verify" as verb):
                if verb == "load":
                    self._check_place()
                return {"job": (await getattr(work, verb)(id, asked)).id}
        raise NotFound(f"there is no {path}")

    async def _look(self, path: str) -> dict[str, Any]:
        library, me = self._service.library, Principal("local")
        allows = self._service.may_use(me)
        place, _, query = path.removeprefix("shimmy/").partition("?")
        match [unquote(part) for part in place.split("/")]:
            case ["api", "suggestions"]:
                return await library.suggestions(dict(parse_qsl(query)).get("task"))
            case ["v1", "models"]:
                return _read(answers.models(await self._service.models(me)))
            case ["api", "models"]:
                found = await library.describe(wait=True)
                return _read(await answers.library(library, found, allows))
            case ["api", "models", id]:
                self._service.check_seen(id, me)
                return (await library.describe_one(id)).to_json()
            case ["api", "jobs", id]:
                return library.jobs.get(id, me).to_json()
        raise NotFound(f"there is no {path}")

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterable[bytes]]:
        """Events as they are made. Leaving the block cancels the request."""
        pieces: queue.SimpleQueue[bytes | ShimmyError | None] = queue.SimpleQueue()
        future = self._start(self._run(path, body, pieces))
        try:
            yield _until_none(pieces)
        finally:
            future.cancel()

    def close(self) -> None:
        """End what is running and free the models. Closing twice is fine."""
        atexit.unregister(self.close)
        if not self._loop.is_running():
            return
        self._start(self._service.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _check_place(self) -> None:
        """Raises `AccessDenied` where models answer in a server only."""
        if not self._may_compute:
            raise AccessDenied(
                "ShimmyPolicy.allow_in_kernel is off: a model answers in a Jupyter server only"
            )

    async def _run(
        self,
        path: str,
        body: dict[str, Any],
        pieces: queue.SimpleQueue[bytes | ShimmyError | None],
    ) -> None:
        from .server import requests

        chat = path == "shimmy/v1/chat/completions"
        parse = requests.parse_chat if chat else requests.parse_completion
        shape = answers.CHAT if chat else answers.COMPLETION
        asked = _asked(path, "chat" if chat else "completions")
        try:
            visit = self._service.visit(asked)
            try:
                self._check_place()
                parsed = parse(body, asked.request_id, asked.principal)
            except Exception as error:
                await visit.end(result_of(error))
                raise
            async with await self._service.start(parsed.request, visit=visit) as completion:
                writer = answers.EventWriter(shape, parsed, int(time.time()))
                async for piece in writer.events(completion):
                    pieces.put(piece)
        except ShimmyError as error:
            pieces.put(error)
        except Exception as defect:
            log.exception("a request failed in a way that nobody foresaw")
            pieces.put(InternalError(f"{type(defect).__name__}: the log says more"))
        finally:
            pieces.put(None)


def _asked(path: str, route: str = "act") -> Asked:
    return Asked(Principal("local"), uuid.uuid4().hex, route, request_path=path)


def _until_none(pieces: queue.SimpleQueue[bytes | ShimmyError | None]) -> Iterator[bytes]:
    while (piece := pieces.get()) is not None:
        if isinstance(piece, ShimmyError):
            raise piece
        yield piece


def _read(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(body)
    return found
