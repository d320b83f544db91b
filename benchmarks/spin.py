"""A busy process: counts iterations, and on each line of input says how many there were and when."""

from __future__ import annotations

import json
import sys
import threading
import time

count = 0


def answer() -> None:
    for _ in sys.stdin:
        print(json.dumps({"iterations": count, "at": time.perf_counter()}), flush=True)
    over.set()


over = threading.Event()
threading.Thread(target=answer, daemon=True).start()
while not over.is_set():
    total = 0
    for i in range(10_000):
        total += i * i
    count += 1
