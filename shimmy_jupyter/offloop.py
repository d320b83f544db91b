"""Work that waits for the disk, in a thread of its own: while a process ends asyncio's have gone already.
And work on the event loop that takes turns with others, or goes on without whoever began it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")

_TURN = 500
"""Some microseconds' work each."""


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """What `work` will return or raise. It cannot be called off; who waits may go."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


async def off_loop(work: Callable[[], T]) -> T:
    """What `work` returns or raises."""
    return await asyncio.wrap_future(in_thread(work, "shimmy-guard"))


def apart(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that keeps nothing of the request that began it. Any other would for as long as somebody
    has the task, in its context: Jupyter puts the handler there, with all that was sent.
    """
    return asyncio.create_task(work, context=Context())


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The items of a collection that may have thousands; others have a turn after every 500."""
    for number, item in enumerate(items, 1):
        yield item
        if number % _TURN == 0:
            await asyncio.sleep(0)
