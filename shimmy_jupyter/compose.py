"""Puts the house together from settings: for the server, for a kernel without one, for the
command line. The only place that names concrete parts of several rooms at once.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from anyio.from_thread import start_blocking_portal

from .config import Settings
from .engine.backend import Backend, LoadSpec
from .engine.model import LoadedModel
from .errors import NotFound, ShimmyError
from .models.catalog import ModelFile, discover
from .models.lifecycle import ModelPool
from .server import answers
from .service import CompletionService
from .types import Principal


def llama_backend() -> Backend:
    # Imported on first use: a server that nobody asks anything must not pay for it.
    from .engine.llama import LlamaBackend

    return LlamaBackend()


def build_service(settings: Settings) -> CompletionService:
    """The service on the real engine. Loads nothing until it is asked."""

    async def load(file: ModelFile) -> LoadedModel:
        spec = LoadSpec(
            path=str(file.path),
            context_size=settings.context_size,
            kv_tokens=settings.kv_tokens,
            slots=settings.max_sequences,
            threads=settings.threads,
            gpu_layers=settings.gpu_layers,
        )
        return await LoadedModel.load(llama_backend, spec, queue_size=settings.max_queue)

    pool = ModelPool(lambda: discover(settings.roots), load)
    return CompletionService(pool, default_max_tokens=settings.default_max_tokens)


class LocalTransport:
    """The service in this process, for a kernel without a server and for the command line.

    Speaks the HTTP API's bodies and events, so that whoever uses it need not know the difference.
    """

    def __init__(self, settings: Settings) -> None:
        self._service = build_service(settings)
        self._portal_manager = start_blocking_portal()
        self._portal = self._portal_manager.__enter__()
        atexit.register(self.close)

    def get(self, path: str) -> dict[str, Any]:
        if path != "shimmy/v1/models":
            raise NotFound(f"there is no {path}")
        return answers.models(self._portal.call(self._service.models))

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterable[bytes]]:
        """Events as they are made. Leaving the block cancels the request."""
        pieces: queue.SimpleQueue[bytes | ShimmyError | None] = queue.SimpleQueue()
        future = self._portal.start_task_soon(self._run, path, body, pieces)
        try:
            yield _until_none(pieces)
        finally:
            future.cancel()

    def close(self) -> None:
        """End what is running and free the models."""
        atexit.unregister(self.close)
        self._portal.call(self._service.close)
        self._portal_manager.__exit__(None, None, None)

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
        try:
            parsed = parse(body, uuid.uuid4().hex, Principal("local"))
            async with await self._service.start(parsed.request) as completion:
                writer = answers.EventWriter(shape, parsed, int(time.time()))
                async for piece in writer.events(completion):
                    pieces.put(piece)
        except ShimmyError as error:
            pieces.put(error)
        finally:
            pieces.put(None)


def _until_none(pieces: queue.SimpleQueue[bytes | ShimmyError | None]) -> Iterator[bytes]:
    while (piece := pieces.get()) is not None:
        if isinstance(piece, ShimmyError):
            raise piece
        yield piece
