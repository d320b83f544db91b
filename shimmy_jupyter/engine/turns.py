"""One at a time, and principals in turn: a lock that a hundred requests of one user do not clog."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from ..errors import QueueFull

T = TypeVar("T")

_SHARE = 3


class Turns:
    """At most `most` wait, and of one principal at most so many times what would be left free."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = False
        self._count = 0
        # In the order in which principals are next.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def turn(self, principal: str) -> AsyncIterator[None]:
        """Raises `QueueFull`. Whoever gives up waiting leaves no trace."""
        await self._take(principal)
        try:
            yield
        finally:
            self._give()

    async def keep(self, principal: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `work` gives, in a turn that lasts as long as that does, even where the caller gives up.
        For what cannot be stopped: another's turn must not begin beside it.
        """
        await self._take(principal)
        task = asyncio.ensure_future(work())
        task.add_done_callback(self._kept)
        try:
            return await asyncio.shield(task)
        finally:
            del task  # it has its error, whose traceback has this frame

    def _kept(self, task: asyncio.Future[Any]) -> None:
        if not task.cancelled():
            task.exception()  # whoever has given up does not look at it
        self._give()

    async def _take(self, principal: str) -> None:
        if not self._taken:
            self._taken = True
            return
        own = len(self._waiting.get(principal, ()))
        left = self._most - self._count
        if left <= 0 or own >= _SHARE * left:
            raise QueueFull(f"{self._count} prompts are waiting to be read; try again later")
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(principal, deque()).append(place)
        self._count += 1
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._give()  # it was this one's turn just now
            else:
                self._drop(principal, place)
            raise

    def _give(self) -> None:
        while self._waiting:
            principal = next(iter(self._waiting))
            queue = self._waiting.pop(principal)
            place = queue.popleft()
            self._count -= 1
            if queue:
                self._waiting[principal] = queue  # behind the others
            if not place.done():  # whoever gave up just now has not run yet
                place.set_result(None)
                return
        self._taken = False

    def _drop(self, principal: str, place: asyncio.Future[None]) -> None:
        queue = self._waiting.get(principal)
        if queue is None or place not in queue:
            return  # passed over already
        queue.remove(place)
        self._count -= 1
        if not queue:
            del self._waiting[principal]
