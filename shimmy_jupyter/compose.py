"""Puts the house together from settings: for the server, for a kernel without one, for the
command line. The only place that names concrete parts of several rooms at once.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from .config import Settings
from .engine.backend import Backend, LoadSpec, Sharing
from .engine.model import LoadedModel
from .errors import InternalError, NotFound, ShimmyError
from .models.catalog import ModelFile, discover
from .models.lifecycle import ModelPool
from .server import answers
from .service import CompletionService
from .types import Principal

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter")


def llama_backend() -> Backend:
    # Imported on first use: a server that nobody asks anything must not pay for it.
    from .engine.llama import LlamaBackend

    return LlamaBackend()


def isolated_backend() -> Backend:
    from .engine.isolated import IsolatedBackend

    return IsolatedBackend()


def build_service(settings: Settings) -> CompletionService:
    """The service on the real engine. Loads nothing until it is asked."""

    async def load(file: ModelFile) -> LoadedModel:
        spec = LoadSpec(
            path=str(file.path),
            context_size=settings.context_size,
            kv_tokens=settings.kv_tokens,
            kv_type=settings.kv_type,
            prompt_lookup=settings.prompt_lookup,
            sequences=settings.max_sequences,
            threads=settings.threads,
            gpu_layers=settings.gpu_layers,
            nice=settings.nice,
        )
        return await LoadedModel.load(backend, spec, queue_size=settings.max_queue, sharing=sharing)

    backend = isolated_backend if settings.isolation == "process" else llama_backend
    sharing = Sharing(settings.weights, settings.saved_kv_bytes, settings.public_prefixes)
    pool = ModelPool(lambda: discover(settings.roots), load)
    return CompletionService(
        pool,
        default_max_tokens=settings.default_max_tokens,
        max_seconds=settings.max_seconds,
    )


class LocalTransport:
    """The service in this process, for a kernel without a server and for the command line.

    Speaks the HTTP API's bodies and events, so that whoever uses it need not know the difference.
    Its event loop has a thread of its own: the kernel's is busy running the cell.
    """

    def __init__(self, settings: Settings) -> None:
        self._service = build_service(settings)
        self._loop = asyncio.new_event_loop()
        # A daemon, and no executor is needed to close: neither may keep the process from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name="shimmy", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def get(self, path: str) -> dict[str, Any]:
        if path != "shimmy/v1/models":
            raise NotFound(f"there is no {path}")
        return answers.models(self._start(self._service.models()).result())

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
        except Exception as defect:
            log.exception("a request failed in a way that nobody foresaw")
            pieces.put(InternalError(f"{type(defect).__name__}: {defect}"))
        finally:
            pieces.put(None)


def _until_none(pieces: queue.SimpleQueue[bytes | ShimmyError | None]) -> Iterator[bytes]:
    while (piece := pieces.get()) is not None:
        if isinstance(piece, ShimmyError):
            raise piece
        yield piece
