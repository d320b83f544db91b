"""Work that waits for the disk, in a thread of its own: while a process ends asyncio's have gone already.
And work on the event loop that takes turns with others, or that several wait for.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from .errors import ShimmyError

T = TypeVar("T")

_TURN = 500
"""Some microseconds' work each."""


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """What `work` will return or raise. It cannot be called off; who waits may go."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    threading.Thread(target=_settle, args=(done, work), name=name, daemon=True).start()
    return done


def _settle(done: Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # noqa: BLE001  raised where it is waited for
        done.set_exception(error)
    finally:
        del done  # it has the error, whose traceback has this frame


async def off_loop(work: Callable[[], T]) -> T:
    """What `work` returns or raises."""
    return await asyncio.wrap_future(in_thread(work, "shimmy-guard"))


async def shared(task: asyncio.Future[T]) -> T:
    """What a task comes to that others wait for, too, or that is kept. An error is one's own copy: the task
    would keep what is in the traceback, and others' tracebacks would be in it.
    """
    try:
        return await asyncio.shield(task)
    except ShimmyError as error:
        raise copy.copy(error) from None


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The items of a collection that may have thousands; others have a turn after every 500."""
    for number, item in enumerate(items, 1):
        yield item
        if number % _TURN == 0:
            await asyncio.sleep(0)
