"""Native code that recurses as deep as its text is long, in a thread whose stack allows for it.

llama.cpp splits text for most vocabularies with `std::regex`, whose recursion takes about 300 bytes
of stack for each character of a run such as "aaaa…": 30 kB of it overflow an ordinary thread's 8 MB
and kill the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from ..errors import ContextLengthExceeded, InvalidValue
from ..offloop import in_thread

T = TypeVar("T")

MAX_TEXT_BYTES = 1 << 20
"""The longest text that is tokenized: its stack takes half a gigabyte of addresses."""
_PER_BYTE = 512
_BASE = 16 << 20
_PAGES = 64 << 10
"""macOS wants whole pages, and no system's are larger."""

# The size of new threads' stacks is a setting of the whole process.
_creating = threading.Lock()


def bounded(text: bytes) -> bytes:
    """The same, unless it is too long to be sent on. Raises `InvalidValue`."""
    if len(text) > MAX_TEXT_BYTES:
        raise InvalidValue(f"they are a text of more than {MAX_TEXT_BYTES} bytes", param="tokens")
    return text


def longest(inputs: tuple[tuple[str, ...], ...]) -> int:
    """Bytes of the longest of these texts."""
    sizes = (len(text.encode("utf-8", "surrogatepass")) for one in inputs for text in one)
    return max(sizes, default=0)


async def in_deep_thread(work: Callable[[], T], text_bytes: int) -> T:
    """What `work` returns or raises, from a thread of its own with a stack for so long a text.

    The stack is only addresses until it is used, and goes with the thread.
    """
    size = (_BASE + _PER_BYTE * text_bytes) // _PAGES * _PAGES
    with _creating:
        before = threading.stack_size(size)
        try:
            done = in_thread(work, "shimmy-text")
        finally:
            threading.stack_size(before)
    try:
        return await asyncio.wrap_future(done)
    finally:
        del done  # it has the error, whose traceback has this frame: each would keep the other


def check_bytes(size: int, param: str) -> None:
    """Raises `ContextLengthExceeded` for a text that is too long to be tokenized."""
    if size > MAX_TEXT_BYTES:
        raise ContextLengthExceeded(
            f"a text of {size} bytes; at most {MAX_TEXT_BYTES} can be tokenized", param=param
        )
