"""A thousand clients that go away: no sequence, thread or descriptor is left, and no memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psutil
import random_gguf
from kernel_session import RunningServer, running_server

CANCELS = 1000
WARM = 50


async def start_and_leave(server: RunningServer, how: int) -> None:
    """Post a long request and hang up: at once, after the headers, or amid the text."""
    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    body = json.dumps(
        {
            "model": "slow",
            "messages": [{"role": "user", "content": f"Say something long, number {how}."}],
            "max_tokens": 1500,
            "stream": how % 4 != 0,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /shimmy/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: token {server.token}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    if how % 4 == 2:
        await reader.readuntil(b"\r\n\r\n")
    elif how % 4 == 3:
        await reader.readuntil(b'"content":"')
        await reader.readuntil(b"data: ")
    writer.close()
    await writer.wait_closed()


async def idle(server: RunningServer) -> None:
    async with asyncio.timeout(30):
        while (await server.request("GET", "shimmy/health"))["active"]:
            pass


async def test_a_thousand_cancels_leave_nothing(tmp_path: Path) -> None:
    shape = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
    random_gguf.write(tmp_path / "slow.gguf", shape, seed=3)
    with running_server(environment={"SHIMMY_MODEL_PATHS": str(tmp_path)}) as server:
        process = psutil.Process(server.pid)
        for i in range(WARM):
            await start_and_leave(server, i)
        await idle(server)
        memory = process.memory_info().rss
        threads, descriptors = process.num_threads(), process.num_fds()
        for i in range(WARM, CANCELS):
            await start_and_leave(server, i)
        await idle(server)
        growth = process.memory_info().rss / memory - 1
        print(
            f"\nmemory {memory >> 20} MiB, growth {growth:+.2%}, {threads} threads, {descriptors} fds"
        )
        assert growth < 0.05
        # The pool of helper threads may fill up to its size; nothing grows with the requests.
        assert process.num_threads() <= threads + 8
        assert process.num_fds() <= descriptors + 2
