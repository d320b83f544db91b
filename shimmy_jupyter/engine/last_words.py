"""What a child process said before its end, and how it ended, in words."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from pathlib import Path
from typing import IO

from ..errors import without_folders

log = logging.getLogger("shimmy_jupyter.engine.child")

_LONGEST_LINE = 4096
_LEVELLED = re.compile(r"<(\d{1,2})>(.*)")


class LastWords:
    """Logs what the child says, and remembers what may have been its last words."""

    def __init__(self, stream: IO[bytes], models: Path) -> None:
        self._stream = stream
        self._models = str(models)
        self._said = ""
        self._thread = threading.Thread(target=self._read, name="shimmy-stderr", daemon=True)
        self._thread.start()
        self.join = self._thread.join

    @property
    def last(self) -> str:
        """The last complaint, without the folders of the server's file system."""
        return without_folders(self._said.replace(f"{self._models}{os.sep}", ""))[:300]

    def _read(self) -> None:
        with self._stream as stream:
            while line := stream.readline(_LONGEST_LINE):
                text = line.decode("utf-8", "replace").rstrip()
                self._heed("".join(c if c.isprintable() else " " for c in text))

    def _heed(self, line: str) -> None:
        known = _LEVELLED.fullmatch(line)
        # What no logger has written comes from a native library, often just before it aborts.
        level, text = (int(known[1]), known[2]) if known else (logging.WARNING, line)
        log.log(level, "%s", text)
        if text.strip() and (known is None or level >= logging.ERROR):
            self._said = text.strip()


_SIGNALS = {
    "SIGKILL": "was killed (SIGKILL), possibly because memory ran out",
    "SIGABRT": "gave up (SIGABRT)",
    "SIGILL": "used an instruction that this processor lacks (SIGILL); llama-cpp-python must be built "
    "for it",
    "SIGBUS": "could not read its memory (SIGBUS); was the model's file changed or cut short?",
    "SIGSEGV": "crashed (SIGSEGV)",
}


def ending(code: int, said: str) -> str:
    """How a process ended, in words, and what it `said` where the end was its own doing."""
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-code, f"signal {-code}")
    how = f"ended with exit code {code}" if code >= 0 else _SIGNALS.get(name, f"ended by {name}")
    return f"{how}: {said}" if said and (code >= 0 or name == "SIGABRT") else how
