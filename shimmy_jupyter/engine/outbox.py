"""What a step produced, on its way to the event loops that wait for it."""

from __future__ import annotations

import asyncio

from ..core.messages import Emit, Progress
from ..types import Ended
from .stream import TokenStream

_Delivery = tuple[TokenStream, Emit | Progress | Ended]


class Outbox:
    def __init__(self) -> None:
        self._deliveries: list[_Delivery] = []

    def add(self, stream: TokenStream, item: Emit | Progress | Ended) -> None:
        self._deliveries.append((stream, item))

    def flush(self) -> list[int]:
        """All that there is, in one call for each loop. Returns streams whose loop is closed: nobody is left
        to read them.
        """
        deliveries, self._deliveries = self._deliveries, []
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}
        for stream, item in deliveries:
            by_loop.setdefault(stream.loop, []).append((stream, item))
        unread: list[int] = []
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                unread += [stream.id for stream, item in items if not isinstance(item, Ended)]
        return unread


def _deliver(items: list[_Delivery]) -> None:
    for stream, item in items:
        stream.deliver(item)
