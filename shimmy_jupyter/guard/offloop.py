"""Work that waits for the disk, in a thread of its own: while a process ends asyncio's have gone already."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def off_loop(work: Callable[[], T]) -> T:
    """What `work` returns or raises."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # whoever waits may go; the work goes on

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name="shimmy-guard", daemon=True).start()
    return await asyncio.wrap_future(done)
