"""How fast this machine reads memory: `memchr` over zeros, a thread for each core."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from typing import Any

import numpy as np
import peers

BYTES = 512 << 20
"""Of each thread: far beyond any cache."""


def run(*, quick: bool) -> dict[str, Any]:
    found = {str(n): _read(n, 3 if quick else 15) for n in sorted({1, peers.cores()})}
    best = max(found.values())
    print(f"memory: {best:.1f} GB/s", flush=True)
    return {"gb_per_second": best, "by_threads": found}


def _read(threads: int, repeats: int) -> float:
    """GB a second in all: the median."""
    search = ctypes.CDLL(None).memchr
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), None
    # Written once, as untouched pages are all the same one.
    arrays = [np.full(BYTES // 8, 0, dtype=np.int64) for _ in range(threads)]
    for array in arrays:
        array[:] = 0

    def once() -> float:
        workers = [
            threading.Thread(target=search, args=(array.ctypes.data, 1, BYTES)) for array in arrays
        ]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return threads * BYTES / (time.perf_counter() - began) / 1e9

    return statistics.median(once() for _ in range(repeats))
