"""docs/examples/nginx.conf in a real nginx, before a Jupyter server configured by the example beside it.

The files themselves, with this test's addresses, certificate and folders in place of theirs.

Cases: what is put in the example's place is there; an answer; a stream's first event before its last is
computed; nothing of a request in a temporary file; a kernel's WebSocket, by cookie, from its own page
and from another's; anonymous; wrong token; a body as large as allowed, larger, larger in chunks, a
notebook of that size elsewhere; the client's address and https, whatever the client says of them; what
would say who somebody is; the kernels' secret; another host name; plain HTTP; no token in the logs;
the container's check of its health.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect
from traitlets.config.loader import PyFileConfigLoader

from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.server.handlers.base import ShimmyHandler

from .conftest import Fakes, chat

EXAMPLES = Path(__file__).parent.parent.parent / "docs" / "examples"
HOST = "jupyter.example.org"
CHAT = "/shimmy/v1/chat/completions"
LIMIT = 8 << 20
TOKEN = "a-token-that-nobody-may-log"

NGINX = shutil.which("nginx", path=os.defpath + ":/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed on this machine")


UNTRIED = iter(random.SystemRandom().sample(range(20_000, 32_000), 1000))
"""Ports that systems give to no connection by themselves, so that one that is free stays so until nginx is there;
none is tried twice.
"""


def free_port() -> int:
    for port in UNTRIED:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a thousand ports are taken")


def rendered(example: str, here: dict[str, str]) -> str:
    """With each text replaced wherever it stands; it must stand there."""
    for theirs, ours in here.items():
        assert theirs in example, f"the example no longer has {theirs}"
        example = example.replace(theirs, ours)
    return example


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one, signed by itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    names = [x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "fullchain.pem").write_bytes(made.public_bytes(pem))
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "privkey.pem").write_bytes(private)
    return folder


@dataclass
class Front:
    """nginx, before the server."""

    server: Any
    folder: Path
    tls: ssl.SSLContext
    http: int
    https: int

    def client(self, source: str = "127.0.0.1", **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{self.https}",
            headers={"Host": self.host, **headers},
            transport=httpx.AsyncHTTPTransport(verify=self.tls, local_address=source),
            trust_env=False,
            timeout=30,
        )

    def signed_in(self, **options: Any) -> httpx.AsyncClient:
        return self.client(Authorization=f"token {TOKEN}", **options)

    @property
    def host(self) -> str:
        return f"{HOST}:{self.https}"

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    @property
    def temporary(self) -> Path:
        """Where nginx would have files for bodies."""
        return self.folder / "temporary"


@pytest.fixture
def fakes(monkeypatch: Any) -> Fakes:
    """A proxy makes no difference to where the engine is."""
    return Fakes()


@pytest.fixture
def jp_base_url() -> str:
    return "/"


@pytest.fixture
def jp_http_port() -> int:
    return free_port()


@pytest.fixture
def jp_server_config() -> Any:
    config = PyFileConfigLoader("jupyter_server_config.py", path=str(EXAMPLES)).load_config()
    assert config.ServerApp.ip == "127.0.0.1"
    assert config.ServerApp.trust_xheaders
    config.ServerApp.jpserver_extensions = {"shimmy_jupyter": True}
    config.IdentityProvider.token = TOKEN
    return config


@pytest.fixture
def front(
    server: Any, tmp_path: Path, certificate: Path, jp_asyncio_loop: asyncio.AbstractEventLoop
) -> Iterator[Front]:
    assert NGINX is not None
    folder = tmp_path / "nginx"
    (folder / "temporary").mkdir(parents=True)
    http, https = free_port(), free_port()
    example = rendered(
        (EXAMPLES / "nginx.conf").read_text(),
        {
            "listen 80;": f"listen 127.0.0.1:{http};",
            "listen 443 ssl;": f"listen 127.0.0.1:{https} ssl;",
            "server 127.0.0.1:8888;": f"server 127.0.0.1:{server.port};",
            "/etc/ssl/jupyter/": f"{certificate}/",
            "/var/log/nginx/": f"{folder}/",
        },
    )
    (folder / "example.conf").write_text(example)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"  {kind}_temp_path {folder}/temporary/{kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}daemon off;\npid {folder}/pid;\nworker_processes 1;\nerror_log {folder}/start.log;\n"
        f"events {{ worker_connections 64; }}\nhttp {{\n{places}  include {folder}/example.conf;\n}}\n"
    )
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    with (folder / "said").open("wb") as said:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:

        async def start() -> None:
            server.init_httpserver()
            for port in (server.port, http, https):
                await answering(port, running)

        jp_asyncio_loop.run_until_complete(start())
        tls = ssl.create_default_context(cafile=str(certificate / "fullchain.pem"))
        yield Front(server, folder, tls, http, https)
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        jp_asyncio_loop.run_until_complete(server.http_server.close_all_connections())


async def answering(port: int, running: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(20):
        while True:
            assert running.poll() is None, "nginx has ended: its log says why"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            await writer.wait_closed()
            return


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests as the server has them, its proxy's headers read."""
    found: list[Any] = []
    prepare = ShimmyHandler.prepare

    async def noting(self: ShimmyHandler) -> None:
        found.append((self.request.remote_ip, self.request.protocol, self.request.headers.copy()))
        await prepare(self)

    monkeypatch.setattr(ShimmyHandler, "prepare", noting)
    return found


async def test_an_answer(front: Front) -> None:
    async with front.signed_in() as client:
        answer = await client.post(CHAT, content=chat())
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "one two three "
    assert answer.headers["x-shimmy-request-id"]
    assert answer.headers["strict-transport-security"] == "max-age=31536000"


async def until(done: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.005)


async def events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def test_the_first_event_comes_before_the_last_is_computed(
    front: Front, fakes: Fakes
) -> None:
    gate = threading.Semaphore(2)  # the prompt, and a first word
    fakes.make = lambda: FakeBackend(lambda _: ["word "] * 40, gate=gate)
    async with (
        asyncio.timeout(30),
        front.signed_in() as client,
        client.stream("POST", CHAT, content=chat(stream=True)) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        came = events(answer)
        first = ""
        while "word" not in first:
            first = await anext(came)
        assert len(fakes.made[0].batches) <= 2
        gate.release(1000)
        rest = [event async for event in came]
    assert rest[-1] == "[DONE]"
    assert sum("word" in event for event in rest) >= 30


async def test_nothing_of_a_request_or_an_answer_goes_into_a_file(
    front: Front, fakes: Fakes
) -> None:
    for folder in front.temporary.iterdir():
        shutil.rmtree(folder)
        folder.touch()  # what would go into a file now fails
    fakes.make = lambda: FakeBackend(lambda _: ["x" * (1 << 18)] * 64)
    body = json.loads(chat(max_tokens=64))
    body["user"] = "x" * (1 << 20)  # far more than nginx keeps in memory on its own
    async with (
        front.signed_in() as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        assert answer.status_code == 200
        # So much that it cannot all be on its way to a client that has not read any of it.
        await until(lambda: fakes.models[0].active == 0)
        answered = json.loads(await answer.aread())
    assert len(answered["choices"][0]["message"]["content"]) == 64 << 18


async def test_anonymous_and_a_wrong_token(front: Front) -> None:
    async with front.client() as client:
        for headers in ({}, {"Authorization": "token wrong"}, {"Cookie": "_xsrf=1"}):
            for method, path in (
                ("POST", CHAT),
                ("GET", "/shimmy/v1/models"),
                ("GET", "/api/contents"),
            ):
                answer = await client.request(method, path, headers=headers)
                assert answer.status_code == 403, (path, headers)
        answer = await client.post(CHAT, content=chat())
        assert answer.json()["error"]["code"] == "policy_denied"


def padded(size: int) -> bytes:
    return chat().encode().ljust(size)


@pytest.mark.parametrize("chunked", [False, True])
async def test_how_large_a_body_may_be(front: Front, seen: list[Any], chunked: bool) -> None:
    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    async def send(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
        return await client.post(CHAT, content=pieces(body) if chunked else body)

    async with front.signed_in() as client:
        assert (await send(client, padded(LIMIT))).status_code == 200
        assert len(seen) == 1
        answer = await send(client, padded(LIMIT + 1))
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["code"] == "request_too_large"
    assert len(error["request_id"]) == 32
    if not chunked:
        assert len(seen) == 1  # it never came here


async def test_a_notebook_may_be_larger(front: Front) -> None:
    text = {"type": "file", "format": "text", "content": "x" * (LIMIT + 1)}
    async with front.signed_in() as client:
        answer = await client.put("/api/contents/large.txt", json=text)
    assert answer.status_code == 201


FORGED = {
    "X-Forwarded-For": "203.0.113.9, 198.51.100.7",
    "X-Real-IP": "203.0.113.9",
    "Forwarded": "for=203.0.113.9;proto=http",
    "X-Forwarded-Proto": "http",
    "X-Scheme": "http",
    "X-Forwarded-Host": "evil.example",
}
WHO = (
    "Remote-User", "X-Remote-User", "X-Forwarded-User", "X-Forwarded-Email", "X-Forwarded-Groups",
    "X-Forwarded-Preferred-Username", "X-Forwarded-Access-Token", "X-Auth-Request-User",
    "X-Auth-Request-Email", "X-Auth-Request-Groups", "X-Auth-Request-Access-Token", "Remote_User",
)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="has one loopback address, 127.0.0.1")
@pytest.mark.parametrize("forged", [{}, FORGED])
async def test_the_client_s_address_is_the_one_it_has(
    front: Front, seen: list[Any], forged: dict[str, str]
) -> None:
    async with front.signed_in(source="127.0.0.2") as client:
        assert (await client.get("/shimmy/v1/models", headers=forged)).status_code == 200
    ((ip, protocol, headers),) = seen
    assert (ip, protocol) == ("127.0.0.2", "https")
    assert headers.get_list("X-Forwarded-For") == ["127.0.0.2"]
    assert headers["Host"] == front.host
    assert not {"Forwarded", "X-Scheme", "X-Forwarded-Host"} & set(headers)


async def test_nobody_says_by_a_header_who_they_are(front: Front, seen: list[Any]) -> None:
    async with front.signed_in() as client:
        sent = dict.fromkeys(WHO, "admin")
        answer = await client.get("/shimmy/v1/models", headers={**sent, "X-Harmless": "1"})
        assert answer.status_code == 200
    ((_, _, headers),) = seen
    assert not set(WHO) & set(headers)
    assert "admin" not in headers.values()
    assert headers["X-Harmless"] == "1"


async def test_the_kernels_secret_is_not_good_from_outside(front: Front) -> None:
    front.server.web_app.settings["shimmy_kernel_secret"] = "open sesame"
    async with front.client(Authorization="token open sesame") as client:
        assert (await client.get("/shimmy/v1/models")).status_code == 403


async def test_another_host_name_is_refused(front: Front) -> None:
    async with front.signed_in() as client:
        for host in ("evil.example", f"{HOST}.evil.example", ""):
            answer = await client.get("/shimmy/v1/models", headers={"Host": host})
            assert answer.status_code in (400, 403), host


async def test_plain_http_is_sent_to_tls(front: Front) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        url = f"http://127.0.0.1:{front.http}/lab/tree/a?b=1"
        answer = await client.get(url, headers={"Host": "evil.example"})
    assert answer.status_code == 301
    assert answer.headers["location"] == f"https://{HOST}/lab/tree/a?b=1"


async def test_no_token_in_the_logs(front: Front) -> None:
    async with front.client() as client:
        query = f"?token={TOKEN}"
        assert (await client.get(f"/shimmy/v1/models{query}")).status_code == 200
        large = await client.post(CHAT + query, content=padded(LIMIT + 1))
        assert large.status_code == 413
        referrer = {"Referer": f"https://{HOST}/lab{query}"}
        assert (
            await client.get("/shimmy/v1/models", headers=referrer)
        ).status_code == 200  # a cookie
        front.server.http_server.stop()
        await front.server.http_server.close_all_connections()
        assert (await client.get(f"/api/status{query}")).status_code == 502
    await until(lambda: front.logs().count("\n") >= 4)
    assert '"GET /shimmy/v1/models" 200' in front.logs()
    assert TOKEN not in front.logs()
    assert "token=" not in front.logs()


async def channel(front: Front, kernel: str, **headers: str) -> WebSocketClientConnection:
    request = HTTPRequest(
        f"wss://127.0.0.1:{front.https}/api/kernels/{kernel}/channels",
        headers={"Host": front.host, **headers},
        ssl_options=front.tls,
    )
    return await websocket_connect(request)


async def test_a_kernel_s_websocket(front: Front) -> None:
    async with front.client() as client:
        landed = await client.get(f"/?token={TOKEN}")
        assert landed.status_code in (200, 302)
        set_cookies = landed.headers.get_list("set-cookie")
        assert any("username-" in one and "; Secure" in one for one in set_cookies)
        assert landed.headers.get("location", "/").startswith("/")
        cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    async with front.signed_in() as client:
        started = await client.post("/api/kernels", json={})
        assert started.status_code == 201
        kernel = started.json()["id"]
        mine = f"https://{front.host}"
        for headers in (
            {},
            {"Origin": mine},
            {"Cookie": cookies, "Origin": "https://evil.example"},
            {"Cookie": cookies, "Origin": f"https://evil.{front.host}"},
        ):
            with pytest.raises(HTTPClientError, match="403"):
                await channel(front, kernel, **headers)
        opened = await channel(front, kernel, Cookie=cookies, Origin=mine)
        assert opened.headers["Upgrade"] == "websocket"
        said = await asyncio.wait_for(opened.read_message(), 60)
        assert said
        opened.close()
        await until(lambda: opened.close_code is not None or opened.protocol is None)
        assert (await client.delete(f"/api/kernels/{kernel}")).status_code == 204


class TestHealthcheck:
    """The script that the container runs, without nginx."""

    @pytest.mark.parametrize(("token", "code"), [(TOKEN, 0), (f"{TOKEN}\n", 0), ("wrong", 1)])
    async def test_it(self, front: Front, tmp_path: Path, token: str, code: int) -> None:
        (tmp_path / "token").write_text(token)
        running = await asyncio.create_subprocess_exec(
            sys.executable,
            EXAMPLES / "healthcheck.py",
            env={
                "JUPYTER_TOKEN_FILE": str(tmp_path / "token"),
                "SHIMMY_HEALTH_URL": f"http://127.0.0.1:{front.server.port}/shimmy/health",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await running.communicate()
        assert running.returncode == code, said
        assert TOKEN.encode() not in said
        assert bool(said) == bool(code)
