"""A bare socket client in a process of its own: many streams, one selector, no HTTP library.

Reads `{"clients", "body"}` a line on standard input; posts the body on that many connections at
once and answers with what it saw of the streams: the decode rate while all of them were running,
and each one's milliseconds until its first token.
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    connection: socket.socket
    tail: bytes = b""
    tokens: list[float] = field(default_factory=list)
    status: bytes = b""
    done: bool = False


EVENT = b'"text":"'


def measure(host: str, port: int, path: str, token: str, wanted: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps(wanted["body"]).encode()
    request = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: token {token}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
    selector = selectors.DefaultSelector()
    streams = [Stream(socket.create_connection((host, port))) for _ in range(wanted["clients"])]
    for stream in streams:
        selector.register(stream.connection, selectors.EVENT_READ, stream)
    began = time.perf_counter()
    for stream in streams:
        stream.connection.sendall(request)
    open_streams = len(streams)
    while open_streams:
        for key, _ in selector.select():
            stream = key.data
            data = stream.connection.recv(65536)
            now = time.perf_counter()
            if not data:
                selector.unregister(stream.connection)
                stream.connection.close()
                open_streams -= 1
                continue
            stream.status = stream.status or data.split(b"\r\n", 1)[0]
            text = stream.tail + data
            stream.done = stream.done or b"[DONE]" in text
            count = text.count(EVENT)
            stream.tail = text[text.rfind(EVENT) + len(EVENT) :] if count else text
            stream.tail = stream.tail[-len(EVENT) :]
            stream.tokens += [now] * count
    for stream in streams:
        # Bytes that are no character yet wait for the rest, so a token may come without an event.
        whole = len(stream.tokens) - 1 >= 0.95 * wanted["body"]["max_tokens"]
        if b" 200 " not in stream.status or not stream.done or not whole:
            raise RuntimeError(f"a stream failed: {stream.status!r}, {len(stream.tokens)} events")
    # The last event of a stream carries the finish reason and no token.
    times = [s.tokens[:-1] for s in streams]
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    within = sum(start < moment <= end for t in times for moment in t)
    return {
        "tokens_per_second": within / (end - start),
        "first_token_ms": statistics.median((t[0] - began) * 1e3 for t in times),
        "tokens": [len(t) for t in times],
    }


def main() -> None:
    host, port, path, token = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.stdin.readline()
    for line in sys.stdin:
        print(json.dumps(measure(host, port, path, token.strip(), json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
