"""Who gets in. Routes and methods are enumerated from the route table, so a new one is covered.

Cases: anonymous; wrong token; denied by the authorizer; what the authorizer was asked; cookie
without XSRF token, for every Sec-Fetch-Mode; foreign Origin; no warning names a route of ours;
unknown routes and methods; the kernels' secret, right, wrong, and from elsewhere; identity.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from typing import Any
from urllib.parse import urlencode

import pytest
from jupyter_server.auth import Authorizer, User
from tornado.httpclient import HTTPClientError

from shimmy_jupyter.server.handlers import ROUTES
from shimmy_jupyter.server.handlers.base import ShimmyHandler, is_local

from .conftest import MODEL, chat

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
PATHS = [
    re.sub(r"\(\?:/\.\*\)\?", "/nothing", pattern).replace("([^/]+)", MODEL)
    for pattern, _ in ROUTES
]
OURS = [
    (path, method)
    for (path, (_, handler)) in zip(PATHS, ROUTES, strict=True)
    for method in METHODS
    if getattr(handler, method.lower()) is not getattr(ShimmyHandler, method.lower())
]


async def fetch(client: Any, path: str, method: str, **options: Any) -> tuple[int, bytes]:
    body = chat() if method in ("POST", "PUT", "PATCH") else None
    try:
        response = await client.fetch(path, method=method, body=body, **options)
    except HTTPClientError as error:
        assert error.response is not None
        return error.response.code, error.response.body
    return response.code, response.body


def token_header(server: Any) -> dict[str, str]:
    return {"Authorization": f"token {server.identity_provider.token}"}


@pytest.fixture
def url(jp_base_url: str) -> Any:
    return lambda path: jp_base_url + path


def test_the_table_has_routes() -> None:
    assert len(OURS) >= 7
    assert ("shimmy/v1/chat/completions", "POST") in OURS
    assert all("(" not in path for path in PATHS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "token wrong"}, {"Cookie": "_xsrf=1"}])
async def test_anonymous_is_refused(
    server: Any, http_server_client: Any, url: Any, path: str, method: str, headers: dict[str, str]
) -> None:
    status, body = await fetch(http_server_client, url(path), method, headers=headers)
    assert status == 403
    if method != "HEAD":
        assert json.loads(body)["error"]["code"] == "policy_denied"


async def test_anonymous_is_refused_even_where_the_server_is_lax(
    server: Any, http_server_client: Any, url: Any
) -> None:
    server.web_app.settings["allow_unauthenticated_access"] = True
    for path, method in itertools.product(PATHS, METHODS):
        status, _ = await fetch(http_server_client, url(path), method)
        assert status == 403, (path, method)


@pytest.mark.parametrize(("path", "method"), OURS)
async def test_allowed_with_the_token(
    server: Any, http_server_client: Any, url: Any, path: str, method: str
) -> None:
    token = token_header(server)
    status, body = await fetch(http_server_client, url(path), method, headers=token)
    code = (json.loads(body).get("error") or {}).get("code")
    assert (status, code) in {
        (200, None),
        (404, "not_found"),
        (400, "invalid_value"),
        (400, "unknown_parameter"),
    }
    query = url(path) + "?" + urlencode({"token": server.identity_provider.token})
    assert (await fetch(http_server_client, query, method))[0] == status


class Deny(Authorizer):
    asked: list[tuple[str, str]] = []

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        self.asked.append((action, resource))
        return False


class TestDenied:
    @pytest.fixture
    def authorizer_class(self) -> type[Authorizer]:
        Deny.asked.clear()
        return Deny

    @pytest.mark.parametrize(("path", "method"), OURS)
    async def test_every_route_asks_the_authorizer(
        self, server: Any, http_server_client: Any, url: Any, path: str, method: str
    ) -> None:
        token = token_header(server)
        status, body = await fetch(http_server_client, url(path), method, headers=token)
        assert status == 403
        assert json.loads(body)["error"]["code"] == "policy_denied"
        (asked,) = Deny.asked
        assert asked in {
            ("execute", "shimmy_jupyter:generate"),
            ("read", "shimmy_jupyter:models"),
            ("write", "shimmy_jupyter:models"),
            ("read", "shimmy_jupyter:metrics"),
        }
        computes = (
            "completions",
            "embeddings",
            "rerank",
            "tokenize",
            "detokenize",
            "apply-template",
        )
        assert (asked[0] == "execute") == path.endswith(computes)
        changes = "shimmy/api/models/" in path or "shimmy/api/jobs/" in path
        assert (asked[0] == "write") == (changes and method != "GET")

    async def test_one_denial_does_not_decide_the_next_route(
        self, server: Any, http_server_client: Any, url: Any
    ) -> None:
        token = token_header(server)
        for path in ("shimmy/health", "shimmy/v1/models", "shimmy/health"):
            await fetch(http_server_client, url(path), "GET", headers=token)
        resources = [resource for _, resource in Deny.asked]
        assert resources == [f"shimmy_jupyter:{r}" for r in ("metrics", "models", "metrics")]


@pytest.fixture
def signed_in(server: Any, http_server_client: Any, jp_base_url: str) -> Any:
    """The cookies of a browser that has signed in, and its XSRF token."""

    async def sign_in() -> tuple[str, str]:
        token = server.identity_provider.token
        response = await http_server_client.fetch(jp_base_url + "api/me?token=" + token)
        cookies = [c.split(";")[0] for c in response.headers.get_list("Set-Cookie")]
        return "; ".join([*cookies, "_xsrf=made-by-hand"]), "made-by-hand"

    return sign_in


@pytest.mark.parametrize("mode", [None, "cors", "navigate", "no-cors", "same-origin", "websocket"])
async def test_cookie_post_needs_the_xsrf_token(
    server: Any, http_server_client: Any, url: Any, signed_in: Any, mode: str | None
) -> None:
    cookies, xsrf = await signed_in()
    fetch_mode = {"Sec-Fetch-Mode": mode} if mode else {}
    for path, method in OURS:
        if method != "POST":
            continue
        bare = await fetch(
            http_server_client, url(path), method, headers={"Cookie": cookies, **fetch_mode}
        )
        assert bare[0] == 403, path
        wrong = {"Cookie": cookies, "X-XSRFToken": xsrf + "!", **fetch_mode}
        assert (await fetch(http_server_client, url(path), method, headers=wrong))[0] == 403
        with_token = {"Cookie": cookies, "X-XSRFToken": xsrf, **fetch_mode}
        status, _ = await fetch(http_server_client, url(path), method, headers=with_token)
        assert status != 403, path


async def test_foreign_origin_is_refused(
    server: Any, http_server_client: Any, url: Any, signed_in: Any
) -> None:
    cookies, xsrf = await signed_in()
    headers = {"Cookie": cookies, "X-XSRFToken": xsrf, "Origin": "https://evil.example"}
    status, _ = await fetch(
        http_server_client, url("shimmy/v1/chat/completions"), "POST", headers=headers
    )
    assert status in (403, 404)


async def test_no_warning_names_our_routes(
    jp_configurable_serverapp: Any, jp_server_config: Any
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jp_configurable_serverapp(config=jp_server_config)
    assert not [w for w in caught if "shimmy" in str(w.message).lower()]


async def test_methods_that_no_handler_has(server: Any, http_server_client: Any, url: Any) -> None:
    token = token_header(server)
    status, body = await fetch(http_server_client, url("shimmy/v1/models"), "DELETE", headers=token)
    assert (status, json.loads(body)["error"]["code"]) == (405, "method_not_allowed")


async def test_gets_change_nothing(server: Any, jp_fetch: Any, fakes: Any) -> None:
    for path, method in OURS:
        if method == "GET" and "nothing" not in path and "jobs/" not in path:
            await jp_fetch(*path.split("/"))
    assert fakes.made == []


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


class TestPrincipal:
    def principal(self, user: Any) -> Any:
        handler = ShimmyHandler.__new__(ShimmyHandler)
        handler._current_user = user
        return handler.principal

    def test_random_token_user_is_local(self) -> None:
        assert self.principal(User(username="3f1c9d")).name == "local"

    def test_hub_user(self) -> None:
        user = User(username="ada")
        user.hub_user = {"name": "ada", "groups": ["staff"], "admin": True}  # type: ignore[attr-defined]
        principal = self.principal(user)
        assert (principal.name, principal.groups, principal.admin) == ("ada", ("staff",), True)
        assert principal.kind == "hub"
