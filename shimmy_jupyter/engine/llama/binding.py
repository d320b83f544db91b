"""The only importer of `llama_cpp`: its functions, its log, and which calls keep the GIL.

Short native calls keep the GIL (`ctypes.PyDLL`): giving it up for 150 ns would hand it to whatever
else is running Python in the server for up to 5 ms. Only what takes longer releases it: decoding,
loading, freeing, tokenizing, and moving KV about.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

# A failing native assertion would otherwise attach a debugger to the server. Must precede loading.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import llama_cpp.llama_cpp as native

__all__ = ["available_memory", "give_back_memory", "initialise", "listen", "native", "quick", "why"]

log = logging.getLogger("shimmy_jupyter.llama")


class _Native:
    """The same functions as `native`, bound to a handle that keeps the GIL during the call."""

    def __init__(self) -> None:
        self.library = ctypes.PyDLL(native._lib._name)  # noqa: SLF001  the handle has no other name

    def __getattr__(self, name: str) -> Any:
        typed = getattr(native, name)
        quick = getattr(self.library, name)
        quick.argtypes, quick.restype = typed.argtypes, typed.restype
        setattr(self, name, quick)
        return quick


quick = _Native()

# One step quieter than llama.cpp: what stops us is raised, and says more than its log line.
_LEVELS = {2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
_ERROR = 4
_ABORTED = ("graph_compute: ", "process_ubatch: ", "llama_decode: failed to decode, ret = 2")
"""What llama.cpp says at level error when a step is aborted, which is no error here."""
_said = threading.local()


@native.llama_log_callback
def _log(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if line.startswith(_ABORTED):
        log.debug("%s", line)
    elif level in _LEVELS and line:
        log.log(_LEVELS[level], "%s", line)
        if level == _ERROR:
            _said.first_error = getattr(_said, "first_error", None) or line


def listen() -> None:
    """Forget what llama.cpp complained of in this thread, to hear what it says next."""
    _said.first_error = None


def why(path: str) -> str:
    """What llama.cpp first complained of since `listen`, without its prefixes and our paths."""
    line = getattr(_said, "first_error", None) or "it gave no reason"
    reason = line.rpartition("error loading model: ")[2].replace(path, Path(path).name)
    # Also of other files, such as a model's further parts.
    return re.sub(r"(?:[A-Za-z]:)?[/\\][^'\"]*[/\\]", "", reason)


def available_memory() -> int:
    """Bytes that could be used without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def give_back_memory() -> None:
    """What was freed goes back to the system, where the C library would keep it for each thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@functools.cache
def initialise() -> None:
    native.llama_log_set(_log, None)
    native.llama_backend_init()
