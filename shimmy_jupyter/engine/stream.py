"""A bounded stream of text from the engine's thread to one reader on an event loop.

The engine never blocks on a reader. Once `capacity` pieces are on their way or unread, the
sequence is paused, and goes on when they have been read; pieces are counted on the engine's side,
so a blocked event loop cannot let them pile up. The stream owns release: closing it, however
often, cancels the sequence unless it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from ..core.messages import Emit, Progress
from ..errors import from_failure
from ..types import Ended


class Upstream(Protocol):
    """The engine, as a stream sees it. May be called from any thread; queues and returns."""

    def cancel(self, id: int) -> None: ...

    def reader_full(self, id: int) -> None: ...

    def reader_ready(self, id: int) -> None: ...

    def ask_progress(self, id: int) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    unread: int
    capacity: int
    pauses: int
    ended: bool
    closed: bool


class TokenStream:
    """Read by one task: `async for text in stream`, then `ended` says how it ended."""

    def __init__(
        self, id: int, capacity: int, upstream: Upstream, principal: str = "local"
    ) -> None:
        self.id = id
        self.principal = principal
        self.capacity = capacity
        self.loop = asyncio.get_running_loop()
        self.ended: Ended | None = None
        self.progress: Progress | None = None
        """What it waited for when `ask` was last answered, until its first text."""
        self.bell = asyncio.Event()
        """Set when something has arrived. Streams that are read together may share one."""
        self.expires: asyncio.TimerHandle | None = None
        self._upstream = upstream
        self._unread: deque[Emit] = deque()
        self._closed = False
        self._lock = threading.Lock()
        self._outstanding = 0
        self._paused = False
        self._pauses = 0

    def count_sent(self) -> None:
        """Count a piece, on the engine's thread; pauses the sequence when that fills the stream.

        Full and ready are queued under the lock: in the other order the sequence would wait for
        a reader that has been and gone.
        """
        with self._lock:
            self._outstanding += 1
            if not self._paused and self._outstanding >= self.capacity:
                self._paused = True
                self._pauses += 1
                self._upstream.reader_full(self.id)

    def deliver(self, item: Emit | Progress | Ended) -> None:
        """Take what the engine sent, on the loop."""
        if isinstance(item, Progress):
            self.progress = item
            return
        if isinstance(item, Ended):
            self.ended = item
            if self.expires is not None:
                self.expires.cancel()
        elif not self._closed:
            self._unread.append(item)
        self.bell.set()

    async def read(self) -> list[Emit]:
        """All that has arrived, waiting for some; empty once the sequence has ended.

        Raises the `ShimmyError` that ended the sequence, after its text has been read.
        """
        await self._arrival()
        return self.take()

    def take(self) -> list[Emit]:
        """All that has arrived, without waiting. Raises as `read` does."""
        pieces = list(self._unread)
        self._unread.clear()
        if pieces:  # nothing read makes no room
            self._count_read(len(pieces))
        if not pieces and self.ended is not None and self.ended.failure is not None:
            raise from_failure(self.ended.failure)
        return pieces

    async def __aiter__(self) -> AsyncIterator[str]:
        while pieces := await self.read():
            for piece in pieces:
                yield piece.text

    async def wait(self, seconds: float) -> bool:
        """Whether there is something to read, the end too, within so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._arrival()
        return self.arrived

    def ask(self) -> None:
        """Have `progress` brought up to date, soon."""
        self._upstream.ask_progress(self.id)

    def close(self) -> None:
        """Stop wanting more. The engine's work for it ends within the step in progress."""
        if self._closed:
            return
        self._closed = True
        self._unread.clear()
        self.bell.set()
        if self.ended is None:
            self._upstream.cancel(self.id)

    def statistics(self) -> StreamStatistics:
        return StreamStatistics(
            len(self._unread), self.capacity, self._pauses, self.ended is not None, self._closed
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to come, or to read."""
        return not self._unread and (self.ended is not None or self._closed)

    @property
    def arrived(self) -> bool:
        """Whether there is something to read, the end too."""
        return bool(self._unread) or self.over

    async def _arrival(self) -> None:
        while not self.arrived:
            self.bell.clear()
            await self.bell.wait()

    def _count_read(self, pieces: int) -> None:
        with self._lock:
            self._outstanding -= pieces
            if self._paused:
                self._paused = False
                self._upstream.reader_ready(self.id)
