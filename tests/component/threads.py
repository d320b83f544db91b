"""A child process that is a thread: the whole path over sockets, with a backend that a test holds."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable

from shimmy_jupyter.engine.backend import Backend
from shimmy_jupyter.engine.child import serve


class ThreadProcess:
    """As much of `subprocess.Popen` as a supervised child needs."""

    pid = 1

    def __init__(self, make: Callable[[], Backend], descriptors: list[int]) -> None:
        self._ends = [socket.socket(fileno=os.dup(fd)) for fd in descriptors]
        reading, self._writing = os.pipe()
        self.stderr = os.fdopen(reading, "rb")
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[], Backend]) -> None:
        try:
            serve(make, *self._ends)
        finally:
            for end in self._ends:
                end.close()
            os.close(self._writing)

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("a thread", timeout or 0)
        return 0

    def kill(self) -> None:
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                return
