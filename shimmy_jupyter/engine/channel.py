"""Frames over a stream socket: a length in four bytes, then so many bytes."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

_CHUNK = 1 << 16
_LONGEST_WAIT = 3600.0  # poll counts milliseconds in 32 bits


class WireError(ValueError):
    """What came is no message. The text names no content."""


class Frames:
    """Takes bytes as they come and gives whole payloads."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self, limit: int) -> bytes | None:
        """The next payload once it is here. One that says to be larger is not waited for."""
        buffer = self._buffer
        if len(buffer) < 4:
            return None
        end = int.from_bytes(buffer[:4]) + 4
        if end - 4 > limit:
            raise WireError(f"a frame of {end - 4} bytes, where {limit} are the most")
        if len(buffer) < end:
            return None
        payload = bytes(buffer[4:end])
        del buffer[:end]
        return payload


class Channel:
    """Frames over a stream socket, for one thread that receives and any number that send.

    A deadline is a moment of the monotonic clock, None for never. Raises `TimeoutError`, `EOFError`,
    `OSError` or `WireError`.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._frames = Frames()
        self._sending = threading.Lock()
        self._urgent = b""

    def send(self, frame: bytes, deadline: float | None = None) -> None:
        with self._sending:
            rest = memoryview(frame)
            while rest:
                try:
                    rest = rest[self._socket.send(rest) :]
                except BlockingIOError:
                    self._wait(select.POLLOUT, deadline)
        self._send_urgent()

    def send_now(self, frame: bytes) -> None:
        """Never waits: while another thread sends, that one sends this frame too when it is done.

        The frame must be small, so that the kernel takes it in one piece. It is dropped where the
        other end has not read for long.
        """
        self._urgent = frame
        self._send_urgent()

    def _send_urgent(self) -> None:
        while self._urgent and self._sending.acquire(blocking=False):
            try:
                frame, self._urgent = self._urgent, b""
                with contextlib.suppress(OSError):
                    self._socket.send(frame)
            finally:
                self._sending.release()

    def receive(self, limit: int, deadline: float | None = None) -> bytes:
        while (payload := self._frames.next(limit)) is None:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            if not data:
                raise EOFError
            self._frames.feed(data)
            # Also while bytes keep dripping in.
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
        return payload

    def _wait(self, event: int, deadline: float | None) -> None:
        """Until it may be worth trying again."""
        left = _LONGEST_WAIT if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        poll = select.poll()
        poll.register(self._socket, event)
        poll.poll(1000 * min(left, _LONGEST_WAIT))

    def shut(self) -> None:
        """Both ends read an end of file. Whoever waits here wakes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._sending:
            self._socket.close()
