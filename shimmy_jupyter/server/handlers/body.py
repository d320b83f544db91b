"""A body that is collected up to the route's own limit."""

from __future__ import annotations

from ...errors import RequestTooLarge
from .base import ShimmyHandler


class BodyHandler(ShimmyHandler):
    """For handlers with `tornado.web.stream_request_body`: what is too large is not kept."""

    async def prepare(self) -> None:  # type: ignore[override]
        self._limit: int = self.settings["shimmy_max_request_bytes"]
        self._body = bytearray()
        self._received = 0
        await super().prepare()
        length = self.request.headers.get("Content-Length", "0")
        if length.isdigit():
            self._check_size(int(length))

    def data_received(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received <= self._limit:
            self._body += chunk

    def take_body(self) -> bytes:
        """Once. Raises `RequestTooLarge`."""
        self._check_size(self._received)
        body, self._body = bytes(self._body), bytearray()
        return body

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise RequestTooLarge(
                f"the body has {size} bytes; ShimmyLimits.max_request_size allows {self._limit}"
            )
