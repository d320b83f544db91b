"""A body that is collected up to the route's own limit."""

from __future__ import annotations

from .base import ShimmyHandler


class BodyHandler(ShimmyHandler):
    """What is too large is refused as soon as that is known, and not kept; nor is what comes with a method
    that has no use for it.
    """

    small_body = False

    async def prepare(self) -> None:  # type: ignore[override]
        self._body = bytearray()
        await super().prepare()

    def data_received(self, chunk: bytes) -> None:
        super().data_received(chunk)
        if self._finished:
            self._body.clear()
        elif self.wants_body:
            self._body += chunk

    def take_body(self) -> bytes:
        """Once."""
        body, self._body = bytes(self._body), bytearray()
        return body
