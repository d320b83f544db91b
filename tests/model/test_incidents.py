"""What went wrong elsewhere, tried on the real engine. `docs/security.md` says which incident it is.

Cases, the model in the server's process and in one of its own: while it is tried out, loaded, answers,
makes vectors and leaves, nobody listens but the server where it did before, on whatever kind of socket;
no cache that unpickles is made, and nothing is unpickled; the same where there is no server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import random_gguf
from kernel_session import RunningServer, running_server
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

# Loaded by every Python process of ours, before anything else; children inherit it.
GUARD = """
import functools, pickle, socket
import diskcache

LOG = {log!r}


def told(what, function):
    @functools.wraps(function)
    def telling(*given, **named):
        with open(LOG, "a") as log:
            print(what, file=log)
        return function(*given, **named)

    return telling


class Told(socket.socket):
    def listen(self, *rest):
        with open(LOG, "a") as log:
            print("listen", self.getsockname(), file=log)
        return super().listen(*rest)


class Unpickler(pickle.Unpickler):
    __init__ = told("unpickle", pickle.Unpickler.__init__)


socket.socket = Told
pickle.load, pickle.loads = told("unpickle", pickle.load), told("unpickle", pickle.loads)
pickle.Unpickler = Unpickler
diskcache.Cache.__init__ = told("diskcache", diskcache.Cache.__init__)
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: Any) -> Path:
    """What was done that is not done, a line each; who listens is among it."""
    log = tmp_path / "told"
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD.format(log=str(log)))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, [str(guard), before])))
    return log


@pytest.fixture
def models(tmp_path: Path, monkeypatch: Any) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    shape = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024)
    random_gguf.write(folder / "chat.gguf", shape, words=True)
    monkeypatch.setenv("SHIMMY_MODEL_PATHS", str(folder))
    return folder


Listener = tuple[Any, ...]
"""The type of a socket, and its address."""


def listeners(pid: int) -> set[Listener]:
    """Internet sockets of a process and its descendants that take connections or datagrams."""
    found: set[Listener] = set()
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        # A process in which a model is tried out ends while it is looked at.
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections("inet"):
                if one.laddr and one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    found.add((one.type, *one.laddr))
    return found


async def amid_an_answer(server: RunningServer) -> set[Listener]:
    """Who listens while the model is at it: before the look there was some of the answer, and after it
    the answer had not ended.
    """
    body = {
        "model": "chat", "max_tokens": 1900, "stream": True, "ignore_eos": True,
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    begun = asyncio.Event()
    request = HTTPRequest(
        server.url + "shimmy/v1/chat/completions",
        method="POST",
        headers={"Authorization": f"token {server.token}"},
        body=json.dumps(body),
        request_timeout=120,
        streaming_callback=lambda _: begun.set(),
    )
    answer = asyncio.ensure_future(AsyncHTTPClient().fetch(request))
    await begun.wait()
    seen = listeners(server.pid)
    assert (await server.request("GET", "shimmy/health"))["active"] == 1
    await answer
    return seen


async def watched(server: RunningServer, verb: str) -> list[set[Listener]]:
    """The same while a job is running."""
    seen = []
    id = (await server.request("POST", f"shimmy/api/models/chat/{verb}"))["job"]
    job = {"state": "running"}
    while job["state"] == "running":
        seen.append(listeners(server.pid))
        job = await server.request("GET", f"shimmy/api/jobs/{id}")
    assert job["state"] == "done", job
    return seen


@pytest.mark.parametrize("isolation", ["none", "process"])
async def test_nobody_listens_while_a_model_runs(told: Path, models: Path, isolation: str) -> None:
    """Ollama's exposed ports, CVE-2024-28224; and diskcache's pickles, CVE-2025-69872."""
    with running_server(f"--ShimmyEngine.isolation={isolation}") as server:
        before = listeners(server.pid)
        said = told.read_text()
        assert len(before) == 1
        assert said.startswith("listen")  # the guard does guard
        looks = [*await watched(server, "load"), *await watched(server, "probe")]
        looks.append(await amid_an_answer(server))
        vectors = {"model": "chat", "input": ["hello", "world"]}
        assert len((await server.request("POST", "shimmy/v1/embeddings", vectors))["data"]) == 2
        looks += [*await watched(server, "unload"), listeners(server.pid)]
        assert [look for look in looks if look != before] == []
        assert told.read_text() == said


def test_nobody_listens_where_there_is_no_server(told: Path, models: Path) -> None:
    command = [sys.executable, "-m", "shimmy_jupyter.cli"]
    for arguments in (
        ["generate", "--model", "chat", "--max-tokens", "2", "hi"],
        ["probe", "chat"],
    ):
        subprocess.run([*command, *arguments], check=True, capture_output=True)
    assert not told.exists(), told.read_text()
    make = (
        "import diskcache, pickle, sys; diskcache.Cache(sys.argv[1]).close(); pickle.loads(b'N.')"
    )
    subprocess.run([sys.executable, "-c", make, str(models.parent / "cache")], check=True)
    assert set(told.read_text().split()) >= {"diskcache", "unpickle"}  # the guard does guard
