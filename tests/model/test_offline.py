"""A working day without a network: load, chat, embed, look, try out, verify, unload, the panel's data, health,
the checklist, a notebook's kernel. No process of ours tries to reach anything but this machine.

Cases: the server and its kernel with `ShimmyApp.offline`; the same without, as nothing but a download
connects; a download is refused without trying, offline; a download that is allowed is the one that tries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import minilm_gguf
import pytest
import random_gguf
from kernel_session import RunningServer, kernel, running_server
from tornado.httpclient import HTTPClientError

from .test_embedding import tiny_bert

# Loaded by every Python process of ours, before anything else; children inherit it.
GUARD = """
import ipaddress, os, socket

LOG = {log!r}


def outward(address):
    if not isinstance(address, tuple):
        return False  # of this machine
    try:
        return not ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] not in ("localhost", "")


def told(what, address):
    with open(LOG, "a") as log:
        print(what, address, file=log)
    raise OSError("no network here")


class Guarded(socket.socket):
    def connect(self, address):
        return told("connect", address) if outward(address) else super().connect(address)

    def connect_ex(self, address):
        return told("connect", address) if outward(address) else super().connect_ex(address)

    def sendto(self, data, *rest):
        return told("sendto", rest[-1]) if outward(rest[-1]) else super().sendto(data, *rest)


def lookup(host, *rest, _usual=socket.getaddrinfo, **more):
    if host is not None and outward((host if isinstance(host, str) else host.decode(), 0)):
        told("look up", host)
    return _usual(host, *rest, **more)


socket.socket = Guarded
socket.getaddrinfo = lookup
"""


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: Any) -> Path:
    """What was tried, a line each."""
    log = tmp_path / "tried"
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD.format(log=str(log)))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, [str(guard), before])))
    return log


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    random_gguf.write(folder / "chat.gguf", words=True)
    minilm_gguf.convert(tiny_bert(tmp_path, head=False), folder / "bert.gguf")
    return folder


async def ended(server: RunningServer, method: str, path: str, body: Any = None) -> dict[str, Any]:
    id = (await server.request(method, path, body))["job"]
    while (job := await server.request("GET", f"shimmy/api/jobs/{id}"))["state"] == "running":
        pass
    found: dict[str, Any] = job
    return found


async def a_day(server: RunningServer) -> None:
    chat = {"model": "chat", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    assert (await ended(server, "POST", "shimmy/api/models/chat/load"))["state"] == "done"
    assert (await server.request("POST", "shimmy/v1/chat/completions", chat))["choices"]
    vectors = {"model": "bert", "input": ["hello", "world"]}
    assert len((await server.request("POST", "shimmy/v1/embeddings", vectors))["data"]) == 2
    assert (await server.request("POST", "shimmy/api/models/discover"))["default"] == "chat"
    for verb in ("probe", "verify", "unload"):
        assert (await ended(server, "POST", f"shimmy/api/models/chat/{verb}"))["state"] == "done"
    assert (await server.request("GET", "shimmy/api/models"))["models"]
    assert (await server.request("GET", "shimmy/v1/models"))["data"]
    assert (await server.request("GET", "shimmy/health"))["status"] == "ok"
    said: list[str] = []
    async with kernel(server) as running:
        for code in (
            "%load_ext shimmy_jupyter",
            "%shimmy models",
            "%shimmy --model chat --max-tokens 4 hi",
        ):
            await running.execute(code, lambda output: said.append(str(output)))
    assert "'type': 'error'" not in "".join(said), said


@pytest.mark.parametrize("offline", ["True", "False"])
async def test_nothing_is_tried(tried: Path, models: Path, offline: str) -> None:
    environment = {"SHIMMY_MODEL_PATHS": str(models)}
    options = [f"--ShimmyModels.search={place}" for place in ("huggingface", "home")]
    options.append(f"--ShimmyApp.offline={offline}")
    with running_server(*options, environment=environment) as server:
        await a_day(server)
        if offline == "True":
            with pytest.raises(HTTPClientError) as caught:
                await server.request("POST", "shimmy/api/models/pull", {"model": "org/name"})
            assert caught.value.code == 403
        assert not tried.exists(), tried.read_text()
        if offline == "False":
            # The guard does guard: what may connect is stopped by it.
            job = await ended(server, "POST", "shimmy/api/models/pull", {"model": "org/name"})
            assert job["state"] == "failed"
            assert "huggingface.co" in tried.read_text()


def test_commands_try_nothing(tried: Path, models: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SHIMMY_MODEL_PATHS", str(models))
    for command in (
        ["models", "--json"],
        ["models", "--suggest"],
        ["doctor", "--json"],
        ["probe", "chat"],
        ["verify", "chat"],
        ["generate", "--max-tokens", "2", "hi"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "shimmy_jupyter.cli", *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or command[0] == "doctor", done.stderr
        if "--json" in command:
            assert json.loads(done.stdout)
    assert not tried.exists(), tried.read_text()
    pull = [sys.executable, "-m", "shimmy_jupyter.cli", "pull", "org/name"]
    done = subprocess.run(pull, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "huggingface.co" in tried.read_text()
