"""A real Jupyter server with the extension enabled, its engine played by the scripted backend: in
the server, and behind sockets as with `isolation = "process"`.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import Authorizer, IdentityProvider, User
from tornado.iostream import IOStream
from tornado.tcpclient import TCPClient

from shimmy_jupyter.audit.ledger import Ledger, Query
from shimmy_jupyter.audit.verify import verify
from shimmy_jupyter.engine import isolated
from shimmy_jupyter.engine.backend import Backend, LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.engine.isolated import IsolatedBackend
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import AccessDenied
from shimmy_jupyter.guard.guard import Guard
from shimmy_jupyter.guard.spending import Spending
from shimmy_jupyter.models.library import ModelLibrary
from shimmy_jupyter.models.lifecycle import ModelPool
from shimmy_jupyter.models.sources import Found
from shimmy_jupyter.server.identity import GatewayUser
from shimmy_jupyter.service import CompletionService

from ..offered import catalog, found
from .threads import ThreadProcess

MODEL = "fake"


@dataclass
class Fakes:
    """What the next model that is loaded will be, and those that were."""

    make: Callable[[], FakeBackend] = FakeBackend
    spec: LoadSpec = field(default_factory=lambda: LoadSpec(path="", sequences=16))
    queue_size: int = 64
    stream_capacity: int = 256
    isolated: bool = False
    made: list[FakeBackend] = field(default_factory=list)
    models: list[LoadedModel] = field(default_factory=list)

    async def load(self, _file: Found) -> LoadedModel:
        def backend() -> Backend:
            return IsolatedBackend() if self.isolated else self._made()

        model = await LoadedModel.load(
            backend, self.spec, queue_size=self.queue_size, stream_capacity=self.stream_capacity
        )
        self.models.append(model)
        return model

    def start(self, _factory: str, descriptors: list[int]) -> ThreadProcess:
        return ThreadProcess(self._made, descriptors)

    def _made(self) -> FakeBackend:
        self.made.append(self.make())
        return self.made[-1]

    def check(self) -> None:
        """Nothing is left of any request, and the scheduler agrees with itself."""
        for model in self.models:
            scheduler = model.engine.scheduler
            scheduler.check_invariants()
            assert not scheduler.sequences, scheduler
            assert model.active == 0


@pytest.fixture(params=["in process", "behind sockets"])
def fakes(request: Any, monkeypatch: Any) -> Fakes:
    fakes = Fakes(isolated=request.param == "behind sockets")
    monkeypatch.setattr(isolated, "_start", fakes.start)
    return fakes


@pytest.fixture
def authorizer_class() -> type[Authorizer] | None:
    return None


@pytest.fixture
def identity_provider_class() -> type[IdentityProvider] | None:
    return None


@pytest.fixture
def guard() -> Guard | None:
    """What a module's tests give the service instead of no guard: `new_guard` makes one."""
    return None


@pytest.fixture
def jp_server_config(
    authorizer_class: type[Authorizer] | None,
    identity_provider_class: type[IdentityProvider] | None,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "ServerApp": {
            "jpserver_extensions": {"shimmy_jupyter": True},
            "allow_unauthenticated_access": False,
        }
    }
    if authorizer_class is not None:
        config["ServerApp"]["authorizer_class"] = authorizer_class
    if identity_provider_class is not None:
        config["ServerApp"]["identity_provider_class"] = identity_provider_class
    return config


def no_puller() -> Any:
    raise AccessDenied("nothing is downloaded here")


@pytest.fixture
def offered() -> list[Found]:
    """The models that there are."""
    return [found(MODEL, Path("fake.gguf"))]


def new_service(
    fakes: Fakes, guard: Guard | None = None, offered: list[Found] | None = None
) -> CompletionService:
    models = [found(MODEL, Path("fake.gguf"))] if offered is None else offered
    pool = ModelPool(catalog(*models), fakes.load)
    library = ModelLibrary(pool, None, no_puller)
    return CompletionService(pool, library, guard=guard, default_max_tokens=64)


@pytest.fixture
def server(
    jp_serverapp: Any, fakes: Fakes, guard: Guard | None, offered: list[Found], jp_asyncio_loop: Any
) -> Any:
    """The running server, its service now on the fake backend. Ends with nothing left over."""
    service = new_service(fakes, guard, offered)
    extension = jp_serverapp.extension_manager.extension_apps["shimmy_jupyter"].pop()
    jp_serverapp.extension_manager.extension_apps["shimmy_jupyter"].add(extension)
    extension.service = service
    jp_serverapp.web_app.settings["shimmy_service"] = service
    yield jp_serverapp
    if guard is not None:
        jp_asyncio_loop.run_until_complete(service.close())
        check_guard(guard)
    fakes.check()


class Clock:
    """A time of day that tests set."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def new_guard(folder: Path, *, clock: Clock | None = None, audit: bool = True) -> Guard:
    """Everything allowed and recorded, until a test sets its `rules`."""
    ledger = Ledger(folder / "audit" / "ledger.sqlite") if audit else None
    clocked = {} if clock is None else {"clock": clock}
    return Guard(spending=Spending(folder / "limits.sqlite"), ledger=ledger, **clocked)  # type: ignore[arg-type]


def check_guard(guard: Guard) -> None:
    """After its end: nobody is in, nothing is reserved, and what has begun has ended on record."""
    nobody_in(guard)
    path = guard.spending._writer.path if guard.spending._writer is not None else None
    if path is not None and path.exists():
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT * FROM reservations").fetchall() == []
    if guard.ledger is not None and guard.ledger.path.exists() and guard.ledger.failure is None:
        verdict = verify(guard.ledger.path)
        assert (verdict.ok, verdict.open_requests) == (True, 0), verdict


def nobody_in(guard: Guard) -> None:
    guard.crowd.check_invariants()
    assert not guard.crowd._present
    assert not guard.waiting
    assert not guard.turns


class People(IdentityProvider):  # type: ignore[misc]
    """Whoever the request says it is, as "NAME" or "NAME:GROUP,GROUP" with a "!" for an administrator."""

    async def get_user(self, handler: Any) -> User | None:  # type: ignore[override]
        given = handler.request.headers.get("X-Test-User")
        if given is None:
            return None
        handler._token_authenticated = True
        name, _, groups = given.removesuffix("!").partition(":")
        chosen = tuple(groups.split(",")) if groups else ()
        return GatewayUser(username=name, groups=chosen, admin=given.endswith("!"))


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str, str | None]:
        """Status, code and field of a refusal in the one shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "code", "param", "request_id"}
        assert error["request_id"] == self.id
        return self.status, error["code"], error["param"]

    @property
    def id(self) -> str:
        return self.headers["x-shimmy-request-id"]


Ask = Callable[..., Awaitable[Answer]]


@pytest.fixture
def ask(server: Any, http_server_client: Any, jp_base_url: str) -> Ask:
    """Ask a route as somebody; with a body it is a POST."""

    async def ask(
        path: str, body: Any = None, who: str = "ann", method: str | None = None, **headers: str
    ) -> Answer:
        text = body if isinstance(body, str | bytes | None) else json.dumps(body)
        response = await http_server_client.fetch(
            f"{jp_base_url}shimmy/{path}",
            method=method or ("GET" if body is None else "POST"),
            body=text,
            headers={
                "X-Test-User": who,
                "Content-Type": "application/json",
                **{name.replace("_", "-"): value for name, value in headers.items()},
            },
            raise_error=False,
            allow_nonstandard_methods=True,
        )
        return Answer(response.code, response.headers, response.body)

    return ask


@pytest.fixture
def dial(
    server: Any, http_server_client: Any, jp_http_port: int, jp_base_url: str
) -> Callable[..., Awaitable[IOStream]]:
    """Send a POST and leave reading the answer, or hanging up, to the test."""

    async def dial(path: str, body: str, who: str = "ann") -> IOStream:
        stream = await TCPClient().connect("127.0.0.1", jp_http_port)
        data = body.encode()
        head = (
            f"POST {jp_base_url}shimmy/{path} HTTP/1.1\r\nHost: 127.0.0.1:{jp_http_port}\r\n"
            f"X-Test-User: {who}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        await stream.write(head.encode() + data)
        # A test whose answer does not come fails, and does not hang.
        asyncio.get_running_loop().call_later(10, stream.close)
        return stream

    return dial


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def records(guard: Guard, **query: Any) -> list[dict[str, Any]]:
    """Of requests and acts, the oldest first; what the server notes of its own rules is left out."""
    assert guard.ledger is not None
    ledger = guard.ledger
    page = await asyncio.to_thread(lambda: ledger.query(Query(**query), None, 1000))
    return [one for one in page.records[::-1] if one.get("action") != "policy"]


def chat(prompt: str = "one two three", **fields: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **fields}
    return json.dumps(body)
