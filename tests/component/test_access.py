"""Who gets in. Routes and methods are enumerated from the route table, so a new one is covered.

The sweep: every route of the table × every method that Tornado passes on ×
  nobody, a wrong token (header, bearer, query), a forged cookie: 403, on a lax server too
  a cookie without `_xsrf`, with it but not sent, with another: 403, for every Sec-Fetch-Mode
  a cookie and a foreign Origin: refused; a token and a foreign Origin: answered to that Origin alone
  a foreign Host (DNS rebinding), with a token and with a cookie: 403
  an upgrade to a WebSocket: nobody, a foreign Origin, and with the token: none is opened
  an authorizer that denies everything: 403, and it was asked once, for what the route is about
That the sweep is whole: the table is what the server serves, each path of the sweep leads to its own
handler, each method has both decorators and each of them refuses by itself; and that it fails for a
handler that lacks one.
Beside it: no warning names a route of ours; unknown routes and methods; the kernels' secret, right,
wrong, and from elsewhere; a server with a wrong setting; identity.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import pytest
from jupyter_server.auth import Authorizer
from jupyter_server.auth.decorator import allow_unauthenticated, authorized
from tornado import web
from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketHandler

from shimmy_jupyter.server.handlers import ROUTES
from shimmy_jupyter.server.handlers.audit import AuditAnchorHandler, AuditVerifyHandler
from shimmy_jupyter.server.handlers.base import ShimmyHandler, UnknownRouteHandler, is_local
from shimmy_jupyter.server.handlers.models import ModelsHandler

from .conftest import MODEL, chat

METHODS = web.RequestHandler.SUPPORTED_METHODS
WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")
MODES = (None, "cors", "navigate", "no-cors", "same-origin", "websocket")
RESOURCES = {
    ("execute", "shimmy_jupyter:generate"),
    ("read", "shimmy_jupyter:models"),
    ("write", "shimmy_jupyter:models"),
    ("read", "shimmy_jupyter:metrics"),
    ("read", "shimmy_jupyter:limits"),
    ("write", "shimmy_jupyter:limits"),
    ("read", "shimmy_jupyter:audit"),
    ("write", "shimmy_jupyter:audit"),
}
"""What an administrator's authorizer is asked, as the design names it."""
COMPUTES = ("completions", "embeddings", "rerank", "tokenize", "detokenize", "apply-template")
_PLACEHOLDERS = {"([^/]+)": MODEL, "(?:/.*)?": "/nothing"}

Route = tuple[str, str]
"""A path below the base URL, and a method."""
Routes = Iterable[tuple[str, type[Any]]]

# In none of these does a request reach an engine, wherever that is.
no_engine = pytest.mark.parametrize("fakes", ["in process"], indirect=True)


def path_of(pattern: str) -> str:
    """A path that the pattern matches."""
    path = pattern
    for placeholder, text in _PLACEHOLDERS.items():
        path = path.replace(placeholder, text)
    assert re.fullmatch(r"[\w./-]+", path), f"the sweep has no text for a part of {pattern}"
    return path


PATHS = [path_of(pattern) for pattern, _ in ROUTES]
EVERY: list[Route] = [(path, method) for path in PATHS for method in METHODS]


def own_methods(handler: type[Any]) -> list[str]:
    """Those that are not Tornado's refusal, or Jupyter's answer to OPTIONS."""
    return [
        method
        for method in METHODS
        if getattr(handler, method.lower()) is not getattr(ShimmyHandler, method.lower())
    ]


OURS: list[Route] = [
    (path, method)
    for path, (_, handler) in zip(PATHS, ROUTES, strict=True)
    for method in own_methods(handler)
]


@dataclass(frozen=True, slots=True)
class Got:
    """An answer. `code` is that of an error in our shape."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        if not self.headers.get("Content-Type", "").startswith("application/json"):
            return None
        code = (json.loads(self.body or b"{}").get("error") or {}).get("code")
        return None if code is None else str(code)


class Sweep:
    """Asks every route, or some."""

    def __init__(self, client: Any, base_url: str) -> None:
        self._client, self._base_url = client, base_url

    async def ask(
        self, route: Route, headers: Mapping[str, str] | None = None, query: str = ""
    ) -> Got:
        path, method = route
        # Else the client says that it is a form, which is another reason to refuse it.
        kind = {"Content-Type": "application/json"} if method in WITH_BODY else {}
        response = await self._client.fetch(
            self._base_url + path + query,
            method=method,
            headers={**kind, **(headers or {})},
            body=chat() if method in WITH_BODY else None,
            allow_nonstandard_methods=True,
            follow_redirects=False,
            raise_error=False,
        )
        return Got(response.code, response.headers, response.body or b"")

    async def all(
        self,
        headers: Mapping[str, str] | None = None,
        query: str = "",
        routes: Iterable[Route] = EVERY,
    ) -> dict[Route, Got]:
        return {route: await self.ask(route, headers, query) for route in routes}

    async def not_refused(
        self, headers: Mapping[str, str] | None = None, query: str = ""
    ) -> dict[Route, int]:
        """Routes and their status, of those that did not say 403 in our shape. An OPTIONS without
        credentials is what browsers ask first, and Jupyter answers it: with nothing but headers.
        """
        through = {}
        for route, got in (await self.all(headers, query)).items():
            if route[1] == "OPTIONS":
                refused = not got.body and "Access-Control-Allow-Origin" not in got.headers
            else:
                shaped = route[1] == "HEAD" or got.code == "policy_denied"
                refused = got.status == 403 and shaped
            if not refused:
                through[route] = got.status
        return through


@pytest.fixture
def sweep(server: Any, http_server_client: Any, jp_base_url: str) -> Sweep:
    return Sweep(http_server_client, jp_base_url)


def token_header(server: Any) -> dict[str, str]:
    return {"Authorization": f"token {server.identity_provider.token}"}


SignIn = Callable[[], Awaitable[tuple[str, str]]]


@pytest.fixture
def signed_in(server: Any, http_server_client: Any, jp_base_url: str) -> SignIn:
    """The cookie of a browser that has signed in, and an XSRF token that suits what it would add."""

    async def sign_in() -> tuple[str, str]:
        token = server.identity_provider.token
        response = await http_server_client.fetch(jp_base_url + "api/me?token=" + token)
        cookies = [c.split(";")[0] for c in response.headers.get_list("Set-Cookie")]
        login = "; ".join(cookie for cookie in cookies if not cookie.startswith("_xsrf="))
        assert login.startswith("username-")
        return login, "made-by-hand"

    return sign_in


# That the sweep is whole.


def test_the_table_has_routes() -> None:
    assert len(OURS) >= 20
    assert ("shimmy/v1/chat/completions", "POST") in OURS
    assert ("shimmy/api/jobs/fake", "DELETE") in OURS


def test_each_path_leads_to_its_own_handler() -> None:
    for (pattern, _), path in zip(ROUTES, PATHS, strict=True):
        first = next(known for known, _ in ROUTES if re.fullmatch(known, path))
        assert first == pattern, f"{path} never reaches {pattern}"


@no_engine
def test_the_table_is_what_the_server_serves(server: Any, jp_base_url: str) -> None:
    def rules(router: Any) -> Iterator[tuple[str, Any]]:
        for rule in router.rules:
            if hasattr(rule.target, "rules"):
                yield from rules(rule.target)
            elif hasattr(rule.matcher, "regex"):
                yield rule.matcher.regex.pattern, rule.target

    served = [
        (pattern, target)
        for pattern, target in rules(server.web_app.default_router)
        if "shimmy" in pattern or "shimmy" in str(getattr(target, "__module__", ""))
    ]
    assert served == [(f"{jp_base_url}{pattern}$", handler) for pattern, handler in ROUTES]


def _plain(self: Any) -> None:
    """Something to be decorated."""


_AUTHENTICATED = web.authenticated(_plain).__code__  # type: ignore[attr-defined]
_AUTHORIZED = authorized(action="read", resource="x")(_plain).__code__


READS_BY_POST = {UnknownRouteHandler, AuditVerifyHandler, AuditAnchorHandler}
"""Their POST changes nothing, but that an anchor is on record."""


def unguarded(routes: Routes) -> list[str]:
    """What is wrong with the guards of these handlers' methods, a line each."""
    found = []
    for pattern, handler in routes:
        if issubclass(handler, WebSocketHandler):
            found.append(f"{pattern}: the sweep knows nothing of WebSockets")
            continue
        if not issubclass(handler, ShimmyHandler):
            found.append(f"{pattern}: {handler.__name__} is none of ours")
            continue
        for method in own_methods(handler):
            why = _why_unguarded(getattr(handler, method.lower()))
            changes = method not in ("GET", "HEAD") and handler not in READS_BY_POST
            if why is None and changes == _reads(getattr(handler, method.lower())):
                why = "what it asks for is not what it does"
            if why:
                found.append(f"{pattern} {method}: {why}")
    return found


def _reads(outer: Any) -> bool:
    return bool(inspect.getclosurevars(outer.__wrapped__).nonlocals["action"] == "read")


def _why_unguarded(outer: Any) -> str | None:
    if getattr(outer, "__allow_unauthenticated", False):
        return "is open to everybody"
    if getattr(outer, "__code__", None) is not _AUTHENTICATED:
        return "@web.authenticated is not its first decorator"
    inner = outer.__wrapped__
    if getattr(inner, "__code__", None) is not _AUTHORIZED:
        return "@authorized is not its second decorator"
    names = inspect.getclosurevars(inner).nonlocals
    if (asked := (names["action"], names["resource"])) not in RESOURCES:
        return f"asks for {asked}"
    return None


def test_every_method_has_both_decorators() -> None:
    assert unguarded(ROUTES) == []


class _Nobody:
    """As much of a handler as decorators look at."""

    current_user = None
    request = type("Request", (), {"method": "POST"})

    @property
    def authorizer(self) -> Authorizer:
        raise AssertionError("the authorizer is asked about nobody")


@pytest.mark.parametrize(
    ("handler", "method"),
    [(h, m) for _, h in ROUTES for m in own_methods(h)],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_each_decorator_refuses_nobody_by_itself(handler: type[Any], method: str) -> None:
    outer = getattr(handler, method.lower())
    with pytest.raises(web.HTTPError) as caught:
        await outer(_Nobody())
    assert (caught.value.status_code, caught.value.log_message) == (403, None)
    with pytest.raises(web.HTTPError) as caught:
        await outer.__wrapped__(_Nobody())
    assert caught.value.status_code == 403
    assert str(caught.value.log_message).startswith("User is not authorized to ")


class TestTheSweepSees:
    """A handler that somebody forgot to guard."""

    class Open(ShimmyHandler):
        async def get(self) -> None:
            await self.finish({})

    class NotAuthorized(ShimmyHandler):
        @web.authenticated
        async def get(self) -> None:
            await self.finish({})

    class NotAuthenticated(ShimmyHandler):
        @authorized(action="read", resource="shimmy_jupyter:models")
        async def get(self) -> None:
            await self.finish({})

    class TheOtherWayRound(ShimmyHandler):
        @authorized(action="read", resource="shimmy_jupyter:models")
        @web.authenticated
        async def get(self) -> None:
            await self.finish({})

    class ForEverybody(ShimmyHandler):
        @allow_unauthenticated
        async def get(self) -> None:
            await self.finish({})

    class OfSomethingElse(ShimmyHandler):
        @web.authenticated
        @authorized(action="read", resource="contents")
        async def get(self) -> None:
            await self.finish({})

    class ReadsByWriting(ShimmyHandler):
        @web.authenticated
        @authorized(action="write", resource="shimmy_jupyter:models")
        async def get(self) -> None:
            await self.finish({})

    class WritesByReading(ShimmyHandler):
        @web.authenticated
        @authorized(action="read", resource="shimmy_jupyter:models")
        async def put(self) -> None:
            await self.finish({})

    class Foreign(web.RequestHandler):
        @web.authenticated
        @authorized(action="read", resource="shimmy_jupyter:models")
        async def get(self) -> None:
            await self.finish({})

    class Socket(ShimmyHandler, WebSocketHandler):
        pass

    class OwnOptions(ShimmyHandler):
        def options(self, *args: Any, **kwargs: Any) -> None:
            self.finish({})

    @pytest.mark.parametrize(
        "handler",
        [Open, NotAuthorized, NotAuthenticated, TheOtherWayRound, ForEverybody, OfSomethingElse,
         ReadsByWriting, WritesByReading, Foreign, Socket, OwnOptions],
    )  # fmt: skip
    def test_missing_decorators(self, handler: type[Any]) -> None:
        assert len(unguarded([(r"shimmy/bad", handler)])) == 1

    def test_a_placeholder_it_does_not_know(self) -> None:
        with pytest.raises(AssertionError, match="no text for a part"):
            path_of(r"shimmy/api/things/(\d+)")

    @no_engine
    async def test_a_body_that_runs_without_asking(
        self, sweep: Sweep, server: Any, monkeypatch: Any
    ) -> None:
        server.web_app.settings["authorizer"] = Deny(parent=server)
        token = token_header(server)
        assert {got.status for got in (await sweep.all(token, routes=OURS)).values()} == {403}
        monkeypatch.setattr(ModelsHandler, "get", self.NotAuthorized.get)
        through = await sweep.all(token, routes=OURS)
        assert [route for route, got in through.items() if got.status != 403] == [
            ("shimmy/v1/models", "GET")
        ]

    @no_engine
    async def test_a_handler_that_lets_everybody_in(
        self, sweep: Sweep, server: Any, monkeypatch: Any
    ) -> None:
        async def prepare(handler: ShimmyHandler) -> None:
            handler.current_user = None

        monkeypatch.setattr(ShimmyHandler, "prepare", prepare)
        monkeypatch.setattr(ModelsHandler, "get", self.Open.get)
        assert ("shimmy/v1/models", "GET") in await sweep.not_refused()


# The sweep.

NOBODY: dict[str, dict[str, str]] = {
    "nothing": {},
    "a wrong token": {"Authorization": "token wrong"},
    "a wrong bearer": {"Authorization": "Bearer wrong"},
    "an empty token": {"Authorization": "token "},
    "an XSRF cookie": {"Cookie": "_xsrf=1", "X-XSRFToken": "1"},
    "a forged cookie": {"Cookie": "username-127-0-0-1-{port}=2|1:0|10:1|4:user|8:bG9jYWw=|00"},
}


@no_engine
@pytest.mark.parametrize("who", NOBODY)
async def test_anonymous_is_refused(sweep: Sweep, jp_http_port: int, who: str) -> None:
    headers = {name: text.format(port=jp_http_port) for name, text in NOBODY[who].items()}
    assert await sweep.not_refused(headers) == {}


@no_engine
async def test_a_wrong_token_in_the_query_is_refused(sweep: Sweep) -> None:
    assert await sweep.not_refused(query="?token=wrong") == {}


@no_engine
async def test_anonymous_is_refused_even_where_the_server_is_lax(sweep: Sweep, server: Any) -> None:
    server.web_app.settings["allow_unauthenticated_access"] = True
    assert await sweep.not_refused() == {}


@pytest.mark.parametrize("way", ["header", "query", "cookie"])
async def test_allowed_with_the_token(
    sweep: Sweep, server: Any, signed_in: SignIn, way: str
) -> None:
    headers, query = token_header(server), ""
    if way == "query":
        headers, query = {}, "?" + urlencode({"token": server.identity_provider.token})
    if way == "cookie":
        login, xsrf = await signed_in()
        headers = {"Cookie": f"{login}; _xsrf={xsrf}", "X-XSRFToken": xsrf}
    for route, got in (await sweep.all(headers, query, routes=OURS)).items():
        assert got.status < 300 or (got.status, got.code) in {
            (404, "not_found"),
            (400, "invalid_value"),
            (400, "unknown_parameter"),
        }, route


@no_engine
async def test_methods_that_no_handler_has(sweep: Sweep, server: Any) -> None:
    got = await sweep.all(token_header(server))
    for route in set(EVERY) - set(OURS):
        if route[1] != "OPTIONS":
            assert got[route].status == 405, route
            assert route[1] == "HEAD" or got[route].code == "method_not_allowed", route
    for method in ("TRACE", "CONNECT", "PROPFIND"):
        answer = await sweep.ask(("shimmy/v1/models", method), token_header(server))
        assert (answer.status, answer.code) == (405, "method_not_allowed")


class Deny(Authorizer):
    asked: list[tuple[str, str]] = []

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        self.asked.append((action, resource))
        return False


@no_engine
class TestDenied:
    @pytest.fixture
    def authorizer_class(self) -> type[Authorizer]:
        Deny.asked.clear()
        return Deny

    @pytest.mark.parametrize("way", ["token", "cookie"])
    async def test_every_route_asks_the_authorizer(
        self, sweep: Sweep, server: Any, signed_in: SignIn, way: str
    ) -> None:
        headers = token_header(server)
        if way == "cookie":
            login, xsrf = await signed_in()
            headers = {"Cookie": f"{login}; _xsrf={xsrf}", "X-XSRFToken": xsrf}
        for route in EVERY:
            path, method = route
            Deny.asked.clear()
            got = await sweep.ask(route, headers)
            if route not in OURS:
                assert (Deny.asked, got.status) in [([], 405), ([], 204), ([], 200)], route
                continue
            assert (got.status, got.code) == (403, "policy_denied"), route
            (asked,) = Deny.asked
            assert asked in RESOURCES, route
            assert (asked[0] == "execute") == path.endswith(COMPUTES), route
            if asked[0] != "execute" and "nothing" not in path:
                reads = method == "GET" or path.endswith(("audit/verify", "audit/anchor"))
                assert (asked[0] == "read") == reads, route

    async def test_one_denial_does_not_decide_the_next_route(
        self, sweep: Sweep, server: Any
    ) -> None:
        for path in ("shimmy/health", "shimmy/v1/models", "shimmy/health"):
            await sweep.ask((path, "GET"), token_header(server))
        resources = [resource for _, resource in Deny.asked]
        assert resources == [f"shimmy_jupyter:{r}" for r in ("metrics", "models", "metrics")]


@no_engine
@pytest.mark.parametrize("mode", MODES)
async def test_a_cookie_needs_the_xsrf_token(
    sweep: Sweep, signed_in: SignIn, fakes: Any, mode: str | None
) -> None:
    login, xsrf = await signed_in()
    fetch_mode = {"Sec-Fetch-Mode": mode} if mode else {}
    changing = [route for route in EVERY if route[1] in WITH_BODY]
    for headers in (
        {"Cookie": login},
        {"Cookie": login, "X-XSRFToken": xsrf},
        {"Cookie": f"{login}; _xsrf={xsrf}"},
        {"Cookie": f"{login}; _xsrf={xsrf}", "X-XSRFToken": xsrf + "!"},
        {"Cookie": f"{login}; _xsrf={xsrf}", "X-XSRFToken": ""},
    ):
        got = await sweep.all({**headers, **fetch_mode}, routes=changing)
        through = {
            r: g.status for r, g in got.items() if (g.status, g.code) != (403, "policy_denied")
        }
        assert through == {}, headers
    assert fakes.made == []
    sent = {"Cookie": f"{login}; _xsrf={xsrf}", "X-XSRFToken": xsrf, **fetch_mode}
    got = await sweep.all(sent, routes=[route for route in OURS if route in changing])
    assert {r: g.status for r, g in got.items() if g.status == 403} == {}


FOREIGN = (
    "https://evil.example",
    "null",
    "http://127.0.0.1:{port}.evil.example",
    "http://127.0.0.1:1",
)


@no_engine
@pytest.mark.parametrize("origin", FOREIGN)
async def test_a_foreign_origin_with_a_cookie(
    sweep: Sweep, signed_in: SignIn, jp_http_port: int, fakes: Any, origin: str
) -> None:
    login, xsrf = await signed_in()
    cookie = {"Cookie": f"{login}; _xsrf={xsrf}", "X-XSRFToken": xsrf}
    headers = {**cookie, "Origin": origin.format(port=jp_http_port)}
    for route, got in (await sweep.all(headers)).items():
        assert "Access-Control-Allow-Origin" not in got.headers, route
        if route[1] == "OPTIONS":
            assert not got.body, route
            continue
        assert got.status in (403, 404), route
        assert route[1] == "HEAD" or got.code in ("policy_denied", "not_found"), route
    assert fakes.made == []
    own = {**cookie, "Origin": f"http://127.0.0.1:{jp_http_port}"}
    for route, got in (await sweep.all(own, routes=OURS)).items():
        assert got.status != 403, route
        assert "Access-Control-Allow-Origin" not in got.headers


@no_engine
async def test_a_foreign_origin_with_a_token(sweep: Sweep, server: Any) -> None:
    """A page cannot have a token that it was not given; nothing is opened to any other page by it."""
    token = token_header(server)
    origin = {"Origin": "https://page.example"}
    own = await sweep.all(token)
    for route, got in (await sweep.all({**token, **origin})).items():
        assert (got.status, got.code) == (own[route].status, own[route].code), route
        allowed = got.headers.get("Access-Control-Allow-Origin")
        assert allowed in ("https://page.example", None), route
        assert "Access-Control-Allow-Credentials" not in got.headers, route
    for route, got in (await sweep.all({"Authorization": "token wrong", **origin})).items():
        assert route[1] == "OPTIONS" or got.status in (403, 404), route
        assert "Access-Control-Allow-Origin" not in got.headers, route


@no_engine
@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", "metadata.google.internal", "[fd00::1]"]
)  # fmt: skip
async def test_a_foreign_host(
    sweep: Sweep, server: Any, signed_in: SignIn, jp_http_port: int, fakes: Any, host: str
) -> None:
    """A name that an attacker rebinds to this machine."""
    login, xsrf = await signed_in()
    cookie = {"Cookie": f"{login}; _xsrf={xsrf}", "X-XSRFToken": xsrf}
    for credentials in (token_header(server), cookie):
        same_site = {"Host": f"{host}:{jp_http_port}", "Origin": f"http://{host}:{jp_http_port}"}
        for route, got in (await sweep.all({**credentials, **same_site})).items():
            assert got.status == 403, route
    assert fakes.made == []


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@no_engine
async def test_no_socket_is_opened(
    sweep: Sweep, server: Any, signed_in: SignIn, jp_http_port: int
) -> None:
    gets = [route for route in EVERY if route[1] == "GET"]
    for route, got in (await sweep.all(UPGRADE, routes=gets)).items():
        assert (got.status, got.code) == (403, "policy_denied"), route
    login, _ = await signed_in()
    foreign = {"Cookie": login, "Origin": "https://evil.example", **UPGRADE}
    for route, got in (await sweep.all(foreign, routes=gets)).items():
        assert got.status in (403, 404), route
    for route, got in (await sweep.all({**token_header(server), **UPGRADE}, routes=gets)).items():
        assert got.status != 101, route


# Beside it.


async def fetch(client: Any, path: str, method: str, **options: Any) -> tuple[int, bytes]:
    body = chat() if method in ("POST", "PUT", "PATCH") else None
    try:
        response = await client.fetch(path, method=method, body=body, **options)
    except HTTPClientError as error:
        assert error.response is not None
        return error.response.code, error.response.body
    return response.code, response.body


@pytest.fixture
def url(jp_base_url: str) -> Any:
    return lambda path: jp_base_url + path


async def test_no_warning_names_our_routes(
    jp_configurable_serverapp: Any, jp_server_config: Any
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jp_configurable_serverapp(config=jp_server_config)
    assert not [w for w in caught if "shimmy" in str(w.message).lower()]


class TestKernelSecret:
    async def test_only_its_bearer_from_this_machine(
        self, server: Any, http_server_client: Any, url: Any
    ) -> None:
        settings = server.web_app.settings
        settings["shimmy_kernel_secret"] = "open sesame"
        post = url("shimmy/v1/chat/completions")
        good = {"Authorization": "token open sesame"}
        assert (await fetch(http_server_client, post, "POST", headers=good))[0] == 200
        for wrong in ("open", "open sesame!", "", "öpen"):
            headers = {"Authorization": f"token {wrong}"}
            assert (await fetch(http_server_client, post, "POST", headers=headers))[0] == 403

    async def test_it_opens_nothing_else(
        self, server: Any, http_server_client: Any, url: Any
    ) -> None:
        server.web_app.settings["shimmy_kernel_secret"] = "open sesame"
        good = {"Authorization": "token open sesame"}
        assert (await fetch(http_server_client, url("api/contents"), "GET", headers=good))[0] == 403

    async def test_not_through_a_proxy(
        self, server: Any, http_server_client: Any, url: Any
    ) -> None:
        server.web_app.settings["shimmy_kernel_secret"] = "open sesame"
        for name in ("X-Forwarded-For", "X-Real-Ip", "Forwarded"):
            headers = {"Authorization": "token open sesame", name: "127.0.0.1"}
            path = url("shimmy/v1/models")
            assert (await fetch(http_server_client, path, "GET", headers=headers))[0] == 403

    def test_this_machine(self) -> None:
        assert is_local(("127.0.0.1", 1), ("127.0.0.1", 2))
        assert is_local(("::1", 1, 0, 0), ("::1", 2, 0, 0))
        assert is_local(("10.0.0.5", 1), ("10.0.0.5", 2))
        assert is_local("/run/jupyter.sock", "")
        assert not is_local(("10.0.0.5", 1), ("10.0.0.6", 2))
        assert not is_local(("127.0.0.1", 1), ("8.8.8.8", 2))

    async def test_there_is_none_where_a_token_does(self, server: Any) -> None:
        assert "shimmy_kernel_secret" not in server.web_app.settings


class TestMisconfigured:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        return {**jp_server_config, "ShimmyEngine": {"kv_tokens": -1}}

    async def test_routes_say_so_and_the_server_stops(
        self, jp_serverapp: Any, http_server_client: Any, url: Any
    ) -> None:
        token = token_header(jp_serverapp)
        for path, method in OURS:
            status, body = await fetch(http_server_client, url(path), method, headers=token)
            if "nothing" not in path and method == "GET":
                error = json.loads(body)["error"]
                assert (status, error["code"]) == (503, "misconfigured")
                assert "kv_tokens" in error["message"]
        (app,) = jp_serverapp.extension_manager.extension_apps["shimmy_jupyter"]
        assert app.current_activity() == 0
        await app.stop_extension()


class TestLocalhostOnly:
    """`ShimmyApp.bind_localhost_only`."""

    @pytest.fixture(params=["127.0.0.1", "127.8.8.8", "::1", "localhost", "0.0.0.0", "", "*", "::",
                            "10.0.0.5", "lab.example.org", "localhost.example.org"])  # fmt: skip
    def ip(self, request: Any) -> str:
        return str(request.param)

    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any], ip: str) -> dict[str, Any]:
        jp_server_config["ServerApp"] |= {"ip": ip, "allow_remote_access": True}
        return {**jp_server_config, "ShimmyApp": {"bind_localhost_only": True}}

    async def test_refuses_where_the_server_listens_elsewhere(
        self, jp_serverapp: Any, http_server_client: Any, jp_base_url: str, ip: str
    ) -> None:
        sweep = Sweep(http_server_client, jp_base_url)
        got = await sweep.ask(("shimmy/v1/models", "GET"), token_header(jp_serverapp))
        if ip in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
            assert got.status == 200
            return
        assert (got.status, got.code) == (503, "misconfigured")
        assert b"bind_localhost_only" in got.body
        assert (ip.strip("*").encode() or b"all addresses") in got.body
