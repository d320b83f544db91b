"""A real Jupyter server in a process of its own, and a kernel that it starts: as a person has them.

Used by the demo and by the tests of the whole path.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

READY_SECONDS = 60


@dataclass(frozen=True)
class RunningServer:
    """`url` ends in "/"; `pid` is the server's own."""

    url: str
    token: str
    pid: int
    log: Path

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        """JSON from the server's REST API; raises tornado's HTTPClientError."""
        request = HTTPRequest(
            self.url + path,
            method=method,
            headers={"Authorization": f"token {self.token}"},
            body=json.dumps(body or {}) if method == "POST" else None,
            request_timeout=600,
        )
        response = await AsyncHTTPClient().fetch(request)
        return json.loads(response.body) if response.body else None


@contextlib.contextmanager
def running_server(
    *options: str, environment: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """Start a server on a free port of this machine, with folders of its own; stop it afterwards.

    `options` are added to its command line. Raises RuntimeError, with its log, if it does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        runtime, log = Path(folder, "runtime"), Path(folder, "log")
        config = Path(folder, "config")
        config.mkdir()
        # Everywhere the same models, whatever this machine has downloaded.
        found = json.dumps({"ShimmyModels": {"search": []}})
        (config / "jupyter_server_config.json").write_text(found)
        env = {
            **os.environ,
            "JUPYTER_RUNTIME_DIR": str(runtime),
            "JUPYTER_CONFIG_DIR": str(config),
            "JUPYTER_DATA_DIR": str(Path(folder, "data")),
            **(environment or {}),
        }
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root"]
        command += ["--ServerApp.port=0", f"--ServerApp.root_dir={folder}", *options]
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        try:
            info = _wait_for_record(process, runtime / f"jpserver-{process.pid}.json", log)
            yield RunningServer(info["url"], info["token"], process.pid, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_record(process: subprocess.Popen[bytes], record: Path, log: Path) -> dict[str, Any]:
    for _ in range(READY_SECONDS * 200):
        # The record is there a moment before the server listens.
        with contextlib.suppress(OSError, ValueError):
            info = dict(json.loads(record.read_text()))
            socket.create_connection(("127.0.0.1", info["port"])).close()
            return info
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.005)
            break
    raise RuntimeError(f"the Jupyter server did not start:\n{log.read_text()}")


class Kernel:
    """A kernel that the server started, spoken to over its WebSocket as a notebook does."""

    def __init__(self, server: RunningServer, id: str, channels: WebSocketClientConnection) -> None:
        self.server, self.id, self._socket = server, id, channels

    async def execute(
        self, code: str, on_output: Callable[[dict[str, Any]], None] | None = None
    ) -> list[dict[str, Any]]:
        """Run a cell. Returns the messages it published, in order, as `{"type", "content"}`."""
        parent = uuid.uuid4().hex
        await self._send("execute_request", parent, {"code": code, "silent": False})
        outputs: list[dict[str, Any]] = []
        while True:
            raw = await self._socket.read_message()
            if raw is None:
                raise RuntimeError("the kernel's connection was closed")
            message = json.loads(raw)
            if message["parent_header"].get("msg_id") != parent or message["channel"] != "iopub":
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return outputs
            if kind in ("stream", "display_data", "update_display_data", "execute_result", "error"):
                outputs.append({"type": kind, "content": content})
                if on_output is not None:
                    on_output(outputs[-1])

    async def interrupt(self) -> None:
        await self.server.request("POST", f"api/kernels/{self.id}/interrupt")

    async def _send(self, kind: str, id: str, content: dict[str, Any]) -> None:
        message = {
            "channel": "shell",
            "header": {
                "msg_id": id,
                "msg_type": kind,
                "session": "s",
                "username": "",
                "version": "5.3",
            },
            "parent_header": {},
            "metadata": {},
            "content": {
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                **content,
            },
        }
        await self._socket.write_message(json.dumps(message))


@contextlib.asynccontextmanager
async def kernel(server: RunningServer) -> AsyncIterator[Kernel]:
    """A new Python kernel, shut down afterwards."""
    started = await server.request("POST", "api/kernels", {"name": "python3"})
    address = server.url.replace("http", "ws", 1) + f"api/kernels/{started['id']}/channels"
    request = HTTPRequest(address, headers={"Authorization": f"token {server.token}"})
    channels = await websocket_connect(request)
    try:
        yield Kernel(server, started["id"], channels)
    finally:
        channels.close()
        await server.request("DELETE", f"api/kernels/{started['id']}")


def text_of(output: dict[str, Any]) -> str:
    """What a terminal can show of one output."""
    content = output["content"]
    if output["type"] == "stream":
        return str(content["text"])
    if output["type"] == "error":
        return "\n".join(content["traceback"])
    return str(content["data"].get("text/plain", ""))
