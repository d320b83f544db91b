"""The service in this process, for a kernel without a server and for the command line."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import threading
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future
from typing import Any, TypeVar

from .compose import build_service
from .config import Settings
from .errors import ShimmyError
from .health import Surroundings
from .inkernel import InKernel

T = TypeVar("T")
_Piece = bytes | ShimmyError | None


class LocalTransport:
    """Speaks the HTTP API's bodies and events, so that whoever uses it need not know the difference, and
    both kinds of transport. Its event loop has a thread of its own: the kernel's is busy running the
    cell.
    """

    def __init__(self, settings: Settings, labels: Callable[[], Mapping[str, str]] = dict) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon, and no executor is needed to close: neither may keep the process from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name="shimmy", daemon=True)
        self._service = build_service(settings)
        self._routes = InKernel(
            self._service,
            Surroundings(settings.state_folder, settings.memory_reserve),
            may_compute=settings.guard.allow_in_kernel,
            labels=labels,
        )
        self._thread.start()
        atexit.register(self.close)

    def get(self, path: str) -> dict[str, Any]:
        return self._waited("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._waited("POST", path, body)

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._waited("PUT", path, body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._waited("DELETE", path)

    def fetch(self, path: str) -> Iterator[bytes]:
        """The pieces of a file."""
        pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        future = self._start(self._put(self._routes.file(path, pieces.put), pieces.put))
        try:
            yield from _until_none(pieces)
        finally:
            future.cancel()

    def _waited(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        future = self._start(self._routes.answer(method, path, body))
        try:
            return future.result()
        finally:
            future.cancel()  # an interrupt ends the work, too

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return await asyncio.wrap_future(self._start(self._routes.answer(method, path, body)))

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterable[bytes]]:
        """Events as they are made. Leaving the block cancels the request."""
        pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        future = self._start(self._run(path, body, pieces.put))
        try:
            yield _until_none(pieces)
        finally:
            future.cancel()

    @property
    def asynchronous(self) -> Asynchronous:
        return Asynchronous(self)

    @property
    def closed(self) -> bool:
        return not self._thread.is_alive()

    @contextlib.asynccontextmanager
    async def astream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterable[bytes]]:
        """The same, for another event loop."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[_Piece] = asyncio.Queue()

        def put(piece: _Piece) -> None:
            with contextlib.suppress(RuntimeError):  # that loop has been closed meanwhile
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        future = self._start(self._run(path, body, put))
        try:
            yield _async_until_none(pieces)
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

    def _run(
        self, path: str, body: dict[str, Any], put: Callable[[_Piece], None]
    ) -> Coroutine[Any, Any, None]:
        return self._put(self._routes.stream(path, body, put), put)

    @staticmethod
    async def _put(work: Coroutine[Any, Any, None], put: Callable[[_Piece], None]) -> None:
        try:
            await work
        except ShimmyError as error:
            put(error)
        finally:
            put(None)


class Asynchronous:
    """The same for whoever awaits it, in any event loop."""

    def __init__(self, local: LocalTransport) -> None:
        self.request, self.stream = local.request, local.astream


def _until_none(pieces: queue.SimpleQueue[_Piece]) -> Iterator[bytes]:
    while (piece := pieces.get()) is not None:
        if isinstance(piece, ShimmyError):
            raise piece
        yield piece


async def _async_until_none(pieces: asyncio.Queue[_Piece]) -> AsyncIterator[bytes]:
    while (piece := await pieces.get()) is not None:
        if isinstance(piece, ShimmyError):
            raise piece
        yield piece
