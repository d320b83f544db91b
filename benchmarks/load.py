"""A load generator in a process of its own: bare sockets, one selector, no HTTP library.

The first line on standard input says how to reach the server; each further line is a job, answered
with what became of every request: when it was sent and when each of its tokens came, in seconds
since the job began.

burst    `clients` requests at once; until all are answered
closed   `clients` of them, each asking again when it is answered; for `seconds`
open     Poisson arrivals at `rate` a second for `seconds`, and `drain` seconds for the rest
beside   `clients` long streams, and once they run, a long prompt; until it is answered
warm     a prompt, and when it is answered, another with the same beginning

While a job runs it only notes what came when: a client that parsed every token would take the
processor from the engine that it measures. What the bytes say is worked out when all is over.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import prompts

TICK = 0.05
RUNNING = 8
"""A stream that came in so many pieces is past its beginning."""
DONE = b"[DONE]"


class Events:
    """A response's bytes → the data of its server-sent events."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self._raw, self._chunked = b"", False

    def feed(self, data: bytes) -> list[bytes]:
        self._raw += data
        if not self.status:
            head, blank, rest = self._raw.partition(b"\r\n\r\n")
            if not blank:
                return []
            self.status = int(head.split(b" ", 2)[1])
            self._chunked = b"transfer-encoding: chunked" in head.lower()
            self._raw = rest
        if self._chunked:
            self._dechunk()
        else:
            self.body, self._raw = self.body + self._raw, b""
        if self.status != 200:
            return []
        *lines, self.body = self.body.split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def _dechunk(self) -> None:
        while True:
            size, newline, rest = self._raw.partition(b"\r\n")
            if not newline:
                return
            length = int(size.split(b";")[0], 16)
            if len(rest) < length + 2:
                return
            self.body += rest[:length]
            self._raw = rest[length + 2 :]


@dataclass
class Request:
    kind: str
    sent: float
    connection: socket.socket
    ended: float | None = None
    received: list[tuple[float, bytes]] = field(default_factory=list)
    _tail: bytes = b""

    def take(self, data: bytes, now: float) -> bool:
        """Whether the answer is over."""
        self.received.append((now, data))
        recent = self._tail + data
        self._tail = recent[-len(DONE) :]
        return not data or DONE in recent

    def facts(self) -> dict[str, Any]:
        answer = Answer()
        for now, data in self.received:
            answer.take(data, now)
        return {
            "kind": self.kind,
            "sent": round(self.sent, 5),
            "ended": self.ended and round(self.ended, 5),
            "times": [round(moment, 5) for moment in answer.times],
            "error": answer.error,
            **answer.counts,
        }


class Answer:
    """What a response's bytes say."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: str | None = None
        self.counts: dict[str, Any] = {}
        self._events = Events()

    def take(self, data: bytes, now: float) -> None:
        for event in self._events.feed(data):
            if event == DONE:
                continue
            content = json.loads(event)
            if "error" in content:
                self.error = str(content["error"])[:300]
            for choice in content.get("choices", ()):
                # Every token is one letter and a number, however the server groups them.
                self.times += [now] * sum(map(str.isalpha, choice["text"]))
            self.counts |= _counts(content)
        if not data and (self._events.status != 200 or not self.times):
            self.error = f"{self._events.status}: {self._events.body[:300]!r}"


def _counts(content: dict[str, Any]) -> dict[str, Any]:
    """What servers say about the prompt, each in its own place."""
    usage = content.get("usage") or {}
    found = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "cached": (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    }
    if "shimmy" in content:
        found["cached"] = content["shimmy"].get("cached_tokens")
    return {name: value for name, value in found.items() if value is not None}


class Load:
    """The requests of one job. Policies are generators that post, and yield how long to wait."""

    def __init__(self, server: dict[str, Any], job: dict[str, Any]) -> None:
        self.server, self.job = server, job
        self.requests: list[Request] = []
        self.running: list[Request] = []
        self._selector = selectors.DefaultSelector()
        self._began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._began

    def post(self, prompt: str, max_tokens: int, kind: str = "") -> Request:
        body = {
            **self.server["fields"],
            **prompts.SAMPLING,
            **self.job.get("fields", {}),
            "prompt": prompt if self.server["text"] else prompts.ids(prompt),
            "max_tokens": max_tokens,
            "seed": 1 + len(self.requests),
            "stream": True,
        }
        address = self.server["host"], self.server["port"]
        connection = socket.create_connection(address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = Request(kind, self.now(), connection)
        self._selector.register(connection, selectors.EVENT_READ, request)
        self.requests.append(request)
        self.running.append(request)
        data = json.dumps(body).encode()
        head = (
            f"POST {self.server['path']} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
            f"Authorization: {self.server['authorization']}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        return request

    def ask(self, kind: str = "") -> Request:
        """Post the job's next ordinary request."""
        seed = f"{self.job['seed']}/{len(self.requests)}"
        return self.post(
            prompts.text(self.job["prompt_tokens"], seed), self.job["max_tokens"], kind
        )

    def run(self) -> dict[str, Any]:
        for wait in POLICIES[self.job["mode"]](self):
            for key, _ in self._selector.select(timeout=max(0.0, wait)):
                self._read(key.data)
        seconds = self.now()
        for request in list(self.running):
            self._close(request)
        self._selector.close()
        return {"seconds": seconds, "requests": [request.facts() for request in self.requests]}

    def _read(self, request: Request) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):
            data = request.connection.recv(1 << 16)
        if request.take(data, self.now()):
            request.ended = self.now()
            self._close(request)

    def _close(self, request: Request) -> None:
        self._selector.unregister(request.connection)
        request.connection.close()
        self.running.remove(request)


def burst(load: Load) -> Iterator[float]:
    for _ in range(load.job["clients"]):
        load.ask()
    while load.running:
        yield TICK


def closed(load: Load) -> Iterator[float]:
    while load.now() < load.job["seconds"]:
        while len(load.running) < load.job["clients"]:
            load.ask()
        yield min(TICK, load.job["seconds"] - load.now())


def open_(load: Load) -> Iterator[float]:
    random, at = Random(str(load.job["seed"])), 0.0
    while (at := at + random.expovariate(load.job["rate"])) < load.job["seconds"]:
        while load.now() < at:
            yield min(TICK, at - load.now())
        load.ask()
    end = load.job["seconds"]
    while load.now() < end or (load.running and load.now() < end + load.job["drain"]):
        yield TICK


def beside(load: Load) -> Iterator[float]:
    job = load.job
    streams = [load.ask("stream") for _ in range(job["clients"])]
    while any(len(s.received) < RUNNING and s.ended is None for s in streams):
        yield TICK
    quiet_until = load.now() + job["quiet"]
    while load.now() < quiet_until:
        yield TICK
    long = load.post(prompts.text(job["long_tokens"], f"{job['seed']}/long"), 1, "long")
    while long.ended is None:
        yield TICK


def warm(load: Load) -> Iterator[float]:
    job = load.job
    prefix = prompts.text(job["prefix_tokens"], f"{job['seed']}/prefix")
    for kind in ("cold", "warm"):
        rest = prompts.text(job["new_tokens"], f"{job['seed']}/{kind}")
        request = load.post(prefix + rest, job["max_tokens"], kind)
        while request.ended is None:
            yield TICK


POLICIES = {"burst": burst, "closed": closed, "open": open_, "beside": beside, "warm": warm}


def main() -> None:
    server = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        print(json.dumps(Load(server, json.loads(line)).run()), flush=True)


if __name__ == "__main__":
    main()
