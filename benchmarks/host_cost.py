"""What a step costs besides the model: scheduler, engine thread, streams, SSE over HTTP.

The fake backend decodes in no time, so all of a step's time is ours. Events go as the handlers send
them, through tornado's HTTP server and a socket, to a process that reads and drops them.

lockstep    the next step waits until every event of this one is flushed: nothing overlaps and
            nothing is sent together, so this is the whole path's cost, one step at a time
no socket   the same up to the events' bytes, which nobody sends: what is not the system's
flat out    steps as fast as they come; a stream sends what has gathered in one write
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from shimmy_jupyter.completion import Completion
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.server import answers
from shimmy_jupyter.server.requests import parse_chat
from shimmy_jupyter.types import Principal, Sampling

STEPS = 500
REPEATS = 5
ROWS = (1, 16, 64)
DRAIN = """
import selectors, socket, sys
watch, left = selectors.DefaultSelector(), int(sys.argv[2])
for _ in range(left):
    s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    s.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    watch.register(s, selectors.EVENT_READ)
while left:
    for key, _ in watch.select():
        if not key.fileobj.recv(65536):
            watch.unregister(key.fileobj)
            left -= 1
"""


class Events(RequestHandler):
    """One stream. In lockstep the flush of a step's last event lets the next step go."""

    def initialize(self, bench: Bench) -> None:
        self.bench = bench

    async def get(self) -> None:
        await self.flush()
        async for data in self.bench.events():
            await self.request.connection.write(data)
            self.bench.flushed(data)


class Bench:
    def __init__(self, clients: int, *, lockstep: bool, sockets: bool = True) -> None:
        self.clients, self.lockstep, self.sockets = clients, lockstep, sockets
        self.gate = threading.Semaphore(0 if lockstep else 10**9)
        self.here, self.done = 0, 0
        self.asked, self.seen = 0, 0
        self.start, self.over = asyncio.Event(), asyncio.Event()
        self.parsed = parse_chat(
            {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True},
            "0" * 32,
            Principal("local"),
        )
        self.model: Any = None

    async def everybody_is_here(self) -> None:
        self.here += 1
        if self.here == self.clients:
            self.start.set()
        await self.start.wait()

    async def events(self) -> AsyncIterator[bytes]:
        await self.everybody_is_here()
        stream = self.model.submit("local", (62, 120), STEPS, Sampling(), ())
        writer = answers.EventWriter(answers.CHAT, self.parsed, 0)
        completion = Completion(self.parsed.request, 2, (stream,), stream.bell)
        async for data in writer.events(completion):
            yield data

    async def drop_them(self) -> None:
        async for data in self.events():
            self.flushed(data)

    def flushed(self, data: bytes) -> None:
        self.done += data.count(b'"content":"w')
        if self.done == STEPS * self.clients:
            self.over.set()
        batches = self.model.engine.backend.batches
        while self.seen < len(batches):
            self.asked += batches[self.seen]
            self.seen += 1
        if self.lockstep and self.done == self.asked:
            self.gate.release()

    async def run(self) -> float:
        """Microseconds a step, once all clients are connected."""
        # A row and a token each: nothing is guessed.
        spec = LoadSpec(path="", sequences=64, kv_tokens=2 * 64 * 4096, prompt_lookup=False)
        pieces = ["word "] * STEPS
        self.model = await LoadedModel.load(
            lambda: FakeBackend(lambda _: pieces, gate=self.gate), spec
        )
        if self.sockets:
            spent = await self._over_http()
        else:
            readers = [asyncio.create_task(self.drop_them()) for _ in range(self.clients)]
            spent = await self._timed()
            await asyncio.gather(*readers)
        steps = self.model.engine.statistics.steps
        await self.model.close()
        return spent / steps * 1e6

    async def _over_http(self) -> float:
        server = HTTPServer(Application([("/", Events, {"bench": self})]))
        sockets = bind_sockets(0, "127.0.0.1", socket.AF_INET)
        server.add_sockets(sockets)
        port = sockets[0].getsockname()[1]
        client = subprocess.Popen([sys.executable, "-c", DRAIN, str(port), str(self.clients)])
        spent = await self._timed()
        await asyncio.to_thread(client.wait)
        server.stop()
        await server.close_all_connections()
        return spent

    async def _timed(self) -> float:
        """Seconds from when all are here to the last event."""
        await self.start.wait()
        began, used = time.perf_counter(), time.process_time()
        self.gate.release()
        await self.over.wait()
        self.cpu = time.process_time() - used
        return time.perf_counter() - began


def host_cost() -> dict[str, dict[str, float]]:
    """Microseconds of a step, by mode and number of sequences in it."""
    modes = {
        "lockstep": {"lockstep": True},
        "no socket": {"lockstep": True, "sockets": False},
        "flat out": {"lockstep": False},
    }
    return {
        name: {
            str(n): statistics.median(asyncio.run(Bench(n, **mode).run()) for _ in range(REPEATS))
            for n in ROWS
        }
        for name, mode in modes.items()
    }


def costs(found: dict[str, dict[str, float]]) -> str:
    lines = ["host cost of a step with the fake backend, µs, by rows:"]
    for name, by_rows in found.items():
        lines.append(f"  {name:<9}" + "".join(f"{n:>5}: {us:<8.0f}" for n, us in by_rows.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    print(costs(host_cost()))
