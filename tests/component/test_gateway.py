"""A real Jupyter server behind a gateway that is played by keys made here. Cases:

accepted: each algorithm; several audiences; types of token; times within the leeway; a key that is not
 named where there is one; groups as a list, as a text, none; administrators; two users
refused: another issuer, audience; expired, not yet valid, issued in the future, also without leeway;
 claims missing or of wrong types; unsigned; signed with the public key as a secret; by a stranger, who
 brings a key along; unknown, unnamed and mistaken keys; tampered; extensions; tokens for other uses;
 oversized; garbage; two at once; and each of them also beside a right token of Jupyter's, and a cookie
where: the header alone, not the query; other headers; nothing else that a client may send
Jupyter's token: in query and header, as `local`; switched off; cookies identify nobody
XSRF and origins: a client's own token, an injected one, a header of another name; sockets too
pages: nothing loops, nobody gets a login form
keys: rotated, removed, spoilt and back in the file; those that cannot be used; by URL, over HTTPS, once,
 at most once a minute, taken away, while the URL fails or hangs
settings: each that is wrong ends the start by its name; the package missing; described in the docs
never: the token in the log
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import hmac
import json
import logging
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jupyter_server.auth import User
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect
from traitlets import TraitError
from traitlets.config import Config

from shimmy_jupyter.errors import FetchFailed, FetchRefused, Misconfigured
from shimmy_jupyter.models import fetch_http
from shimmy_jupyter.models.fetch_http import fetch_document, named_target
from shimmy_jupyter.server.gateway import JWTIdentityProvider, TokenRefused
from shimmy_jupyter.server.handlers import base
from shimmy_jupyter.server.jwks import ALGORITHMS, FileKeys, Key, UrlKeys, parse_jwks, pick
from shimmy_jupyter.types import Principal

from . import test_fetch
from .conftest import Fakes, chat

ISSUER, AUDIENCE = "https://login.test/realms/lab", "jupyter"
ALL = frozenset(ALGORITHMS)
LOG = logging.getLogger("tests.gateway")
LOCAL = Principal("local")
ADA = Principal("ada", kind="gateway")
DOCS = (Path(__file__).parent.parent.parent / "docs" / "gateway.md").read_text()

certificates, hub = test_fetch.certificates, test_fetch.hub


def encoded(part: bytes | dict[str, Any]) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(public: Any, **members: Any) -> dict[str, Any]:
    kind = {
        rsa.RSAPublicKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePublicKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PublicKey: jwt.algorithms.OKPAlgorithm,
    }
    algorithm = next(a for cls, a in kind.items() if isinstance(public, cls))
    return {**algorithm.to_jwk(public, as_dict=True), **members}  # type: ignore[attr-defined]


class Gateway:
    """The other side: its keys, of which `published` are in the file, and its tokens."""

    def __init__(self) -> None:
        self.secret: dict[str, Any] = {
            "r1": rsa.generate_private_key(65537, 2048),
            "r2": rsa.generate_private_key(65537, 2048),
            "e1": ec.generate_private_key(ec.SECP256R1()),
            "e2": ec.generate_private_key(ec.SECP384R1()),
            "d1": ed25519.Ed25519PrivateKey.generate(),
            "stranger": rsa.generate_private_key(65537, 2048),
        }
        self.file = Path()

    def jwks(self, *published: str) -> bytes:
        keys = [jwk(self.secret[name].public_key(), kid=name, use="sig") for name in published]
        return json.dumps({"keys": keys}).encode()

    def publish(self, *published: str) -> None:
        self.write(self.jwks(*published))

    def write(self, data: bytes) -> None:
        beside = self.file.with_suffix(".new")
        beside.write_bytes(data)
        beside.replace(self.file)

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Those of a right token; None leaves one out, and times are counted from now."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": 300, "iat": 0, **changed}
        for name in ("exp", "nbf", "iat"):
            if type(claims.get(name)) in (int, float):
                claims[name] += now
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self,
        *,
        by: str = "r1",
        algorithm: str = "RS256",
        header: dict[str, Any] | None = None,
        **changed: Any,
    ) -> str:
        claims = self.claims(**changed)
        return self.sign({"kid": by, **(header or {})}, claims, by, algorithm)

    def sign(self, header: dict[str, Any], claims: Any, by: str, algorithm: str) -> str:
        """By hand, as PyJWT would not make most of what is tried here."""
        signing = jwt.algorithms.get_default_algorithms()[algorithm]
        given = {"typ": "JWT", "alg": algorithm, **header}
        names = {name: value for name, value in given.items() if value is not None}
        text = f"{encoded(names)}.{encoded(claims)}"
        return f"{text}.{encoded(signing.sign(text.encode(), self.secret[by]))}"

    def unsigned(self, signature: bytes = b"", **header: Any) -> str:
        return f"{encoded({'kid': 'r1', **header})}.{encoded(self.claims())}.{encoded(signature)}"

    def with_a_public_secret(self, secret: bytes) -> str:
        head, body, _ = self.unsigned(alg="HS256", typ="JWT").split(".")
        mac = hmac.new(secret, f"{head}.{body}".encode(), hashlib.sha256).digest()
        return f"{head}.{body}.{encoded(mac)}"

    @property
    def pem(self) -> bytes:
        public = self.secret["r1"].public_key()
        return bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@pytest.fixture(scope="module")
def keys() -> Gateway:
    return Gateway()


@pytest.fixture
def gateway(keys: Gateway, tmp_path: Path) -> Gateway:
    keys.file = tmp_path / "keys.json"
    keys.publish("r1", "r2", "e1", "d1")
    return keys


@pytest.fixture
def fakes(monkeypatch: Any) -> Fakes:
    """In process only: who asks is decided before any engine."""
    return Fakes()


@pytest.fixture
def changed() -> dict[str, Any]:
    """Settings that a class of tests has beside the required ones."""
    return {}


@pytest.fixture
def jp_server_config(
    jp_server_config: dict[str, Any], gateway: Gateway, changed: dict[str, Any]
) -> dict[str, Any]:
    server = jp_server_config["ServerApp"] | {"identity_provider_class": JWTIdentityProvider}
    return {"ServerApp": server, "JWTIdentityProvider": required(gateway) | changed}


def required(gateway: Gateway) -> dict[str, Any]:
    return {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "jwks_file": str(gateway.file),
        "admin_groups": ["admins"],
    }


@pytest.fixture
def ask(server: Any, http_server_client: Any, jp_base_url: str, monkeypatch: Any) -> Any:
    """The principal that the handler gave its request to, or the status of a refusal."""
    found: list[Principal] = []

    def recording(*args: Any, **options: Any) -> Principal:
        found.append(real(*args, **options))
        return found[-1]

    real = base.principal_of
    monkeypatch.setattr(base, "principal_of", recording)

    async def ask(
        token: str | None = None, *, query: str = "", post: bool = False, **headers: str
    ) -> Principal | int:
        found.clear()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        path = "shimmy/v1/chat/completions" if post else "shimmy/api/jobs"
        options = {"method": "POST", "body": chat()} if post else {}
        sent["Content-Type"] = "application/json"
        try:
            await http_server_client.fetch(f"{jp_base_url}{path}{query}", headers=sent, **options)
        except HTTPClientError as error:
            assert error.response is not None
            code = json.loads(error.response.body)["error"]["code"]
            assert code == {403: "policy_denied", 404: "not_found"}[error.code]
            assert not found
            return error.code
        (principal,) = {*found}  # it may ask more than once, and is told the same
        return principal

    return ask


@pytest.fixture(autouse=True)
def log(caplog: Any) -> Iterator[Any]:
    """What is signed never stands in the log, whatever became of it."""
    caplog.set_level(logging.DEBUG)
    yield caplog
    told = "\n".join(record.getMessage() for record in caplog.get_records("call"))
    assert not re.search(r"eyJ[\w-]{6,}", told), told


Make = Callable[[Gateway], str]


def tampered(gateway: Gateway) -> str:
    head, _, signature = gateway.token().split(".")
    return f"{head}.{encoded(gateway.claims(sub='root'))}.{signature}"


ACCEPTED: dict[str, tuple[Make, Principal]] = {
    "as it should be": (lambda g: g.token(), ADA),
    "elliptic": (lambda g: g.token(by="e1", algorithm="ES256"), ADA),
    "edwards": (lambda g: g.token(by="d1", algorithm="EdDSA"), ADA),
    "another key": (lambda g: g.token(by="r2"), ADA),
    "one key of its type, unnamed": (
        lambda g: g.token(by="e1", algorithm="ES256", header={"kid": None}),
        ADA,
    ),
    "several audiences": (lambda g: g.token(aud=["other", AUDIENCE]), ADA),
    "no type": (lambda g: g.token(header={"typ": None}), ADA),
    "another type": (lambda g: g.token(header={"typ": "application/jwt"}), ADA),
    "an access token": (lambda g: g.token(header={"typ": "at+jwt"}), ADA),
    "expired within the leeway": (lambda g: g.token(exp=-15), ADA),
    "valid soon": (lambda g: g.token(nbf=15), ADA),
    "issued soon": (lambda g: g.token(iat=15), ADA),
    "without the time of issue": (lambda g: g.token(iat=None), ADA),
    "a fraction of a second": (lambda g: g.token(exp=300.5), ADA),
    "another user": (lambda g: g.token(sub="bob"), Principal("bob", kind="gateway")),
    "groups": (
        lambda g: g.token(groups=["staff", "ml", "staff"]),
        Principal("ada", ("staff", "ml"), kind="gateway"),
    ),
    "one group as text": (
        lambda g: g.token(groups="staff ml"),
        Principal("ada", ("staff ml",), kind="gateway"),
    ),
    "no groups": (lambda g: g.token(groups=[]), ADA),
    "an administrator": (
        lambda g: g.token(groups=["staff", "admins"]),
        Principal("ada", ("staff", "admins"), admin=True, kind="gateway"),
    ),
    "a name that is a random id": (
        lambda g: g.token(sub="0123456789ab4def8123456789abcdef"),
        Principal("0123456789ab4def8123456789abcdef", kind="gateway"),
    ),
    "groups do not make one by likeness": (
        lambda g: g.token(groups=["Admins", "admin"], admin=True),
        Principal("ada", ("Admins", "admin"), kind="gateway"),
    ),
}  # fmt: skip

REFUSED: dict[str, Make] = {
    "another issuer": lambda g: g.token(iss=ISSUER + "/"),
    "an issuer among several": lambda g: g.token(iss=[ISSUER]),
    "another audience": lambda g: g.token(aud="jupyterhub"),
    "audiences without us": lambda g: g.token(aud=["a", "b"]),
    "an audience that holds ours": lambda g: g.token(aud={AUDIENCE: 1}),
    "expired": lambda g: g.token(exp=-45),
    "not yet valid": lambda g: g.token(nbf=45),
    "issued in the future": lambda g: g.token(iat=45),
    **{
        f"no {claim}": (lambda g, claim=claim: g.token(**{claim: None}))
        for claim in ("exp", "iss", "aud", "sub")
    },
    "a time as text": lambda g: g.token(exp="9999999999"),
    "a time that is true": lambda g: g.token(nbf=True),
    "no number": lambda g: g.token(exp=float("nan")),
    "eternity": lambda g: g.token(exp=float("inf")),
    "a name that is a number": lambda g: g.token(sub=7),
    "an empty name": lambda g: g.token(sub=""),
    "a name of two lines": lambda g: g.token(sub="ada\nroot"),
    "a name that is too long": lambda g: g.token(sub="a" * 257),
    "groups that are none": lambda g: g.token(groups={"admins": True}),
    "a group that is none": lambda g: g.token(groups=["staff", 7]),
    "unsigned": lambda g: g.unsigned(alg="none", typ="JWT"),
    "unsigned, in capitals": lambda g: g.unsigned(alg="NONE", typ="JWT"),
    "unsigned, called signed": lambda g: g.unsigned(alg="RS256", typ="JWT"),
    "no algorithm": lambda g: g.unsigned(b"x", typ="JWT"),
    "a list of algorithms": lambda g: g.unsigned(b"x", alg=["RS256"], typ="JWT"),
    "the public key as secret": lambda g: g.with_a_public_secret(g.pem),
    "the public key as secret, unpadded": lambda g: g.with_a_public_secret(g.pem.strip()),
    "the public JWK as secret": lambda g: g.with_a_public_secret(g.jwks("r1")),
    "an algorithm that is not accepted": lambda g: g.token(algorithm="RS384"),
    "signed by a stranger": lambda g: g.token(by="stranger", header={"kid": "r1"}),
    "a stranger's key": lambda g: g.token(by="stranger"),
    "a stranger who brings the key": lambda g: g.token(
        by="stranger",
        header={
            "kid": "r1",
            "jwk": jwk(g.secret["stranger"].public_key()),
            "jku": "https://stranger.test/keys",
            "x5u": "https://stranger.test/chain",
        },
    ),
    "a key of another type": lambda g: g.token(header={"kid": "e1"}),
    "a curve of another algorithm": lambda g: g.token(by="e2", algorithm="ES256"),
    "one of two keys, unnamed": lambda g: g.token(header={"kid": None}),
    "a key's name that is a number": lambda g: g.token(header={"kid": 1}),
    "a tampered name": tampered,
    "a tampered signature": lambda g: g.token()[:-8] + "AAAAAAAA",
    "no signature": lambda g: g.token().rpartition(".")[0] + ".",
    "an extension": lambda g: g.token(header={"crit": ["exp"], "exp": 1}),
    "an empty extension": lambda g: g.token(header={"crit": []}),
    "an unencoded body": lambda g: g.token(header={"b64": False, "crit": ["b64"]}),
    "for another use": lambda g: g.token(header={"typ": "logout+jwt"}),
    "of a type that is a number": lambda g: g.token(header={"typ": 7}),
    "oversized": lambda g: g.token(note="x" * 13_000),
    "no object": lambda g: g.sign({"kid": "r1"}, b"[1]", "r1", "RS256"),
    "no JSON": lambda g: g.sign({"kid": "r1"}, b"ada", "r1", "RS256"),
    "a header that is no object": lambda g: encoded(b"[]") + ".e30.eA",
    "a header of many levels": lambda g: encoded(b"[" * 9000) + ".e30.eA",
    "two parts": lambda g: g.token().rpartition(".")[0],
    "five parts": lambda g: g.token() + ".eA.eA",
    "garbage": lambda g: "garbage",
    "garbage in parts": lambda g: "a.b.c",
    "nothing": lambda g: "",
    "Jupyter's own token": lambda g: "JUPYTER",
    "two tokens": lambda g: f"{g.token()},Bearer {g.token()}",
    "a right one and a space": lambda g: g.token() + " x",
}


@pytest.mark.parametrize("case", ACCEPTED)
async def test_accepted(ask: Any, gateway: Gateway, case: str) -> None:
    make, principal = ACCEPTED[case]
    assert await ask(make(gateway)) == principal
    assert await ask(make(gateway), post=True) == principal


@pytest.mark.parametrize("case", REFUSED)
async def test_refused(ask: Any, gateway: Gateway, server: Any, case: str, log: Any) -> None:
    own = server.identity_provider.token
    token = REFUSED[case](gateway).replace("JUPYTER", own)
    log.clear()
    assert await ask(token) == 403
    assert "was refused" in log.text
    # Nothing that was sent with it stands in for it.
    cookie = await signed_in(ask, server)
    assert await ask(token, query=f"?token={own}", Cookie=cookie) == 403
    assert await ask(token, query=f"?token={own}", post=True) == 403


async def signed_in(ask: Any, server: Any) -> str:
    """A login cookie as Jupyter's own providers would sign it."""
    from tornado.web import create_signed_value

    provider = server.identity_provider
    secret = server.web_app.settings["cookie_secret"]
    name = f"username-127-0-0-1-{server.port}"
    provider.cookie_name = name
    user = provider.user_to_cookie(User("ada"))
    return f"{name}={create_signed_value(secret, name, user).decode()}"


class TestBeforeAnyKey:
    """What is refused without asking PyJWT, whose versions differ, or for a key, which may be far."""

    @pytest.mark.parametrize(
        "header",
        [
            {"alg": "RS256", "crit": ["exp"]},
            {"alg": "RS256", "crit": []},
            {"alg": "RS256", "b64": True},
            {"alg": "HS256"},
            {"alg": "none"},
            {"alg": "RS384"},
            {"alg": "rs256"},
            {"alg": None},
            {},
            {"alg": "RS256", "typ": "dpop+jwt"},
            {"alg": "RS256", "typ": None},
        ],
    )
    def test_headers(self, gateway: Gateway, header: dict[str, Any]) -> None:
        with pytest.raises(TokenRefused):
            provider(gateway)._named_key(header)

    def test_a_usable_one(self, gateway: Gateway) -> None:
        header = {"alg": "RS256", "kid": "r1", "jku": "https://stranger.test"}
        assert provider(gateway)._named_key(header) == ("RS256", "r1")


class TestWithoutLeeway:
    @pytest.fixture
    def changed(self) -> dict[str, Any]:
        return {"leeway": 0}

    async def test_times_are_exact(self, ask: Any, gateway: Gateway) -> None:
        assert await ask(gateway.token()) == ADA
        for late in ({"exp": -5}, {"nbf": 15}, {"iat": 15}):
            assert await ask(gateway.token(**late)) == 403

    async def test_a_token_stops_when_it_expires(
        self, ask: Any, gateway: Gateway, monkeypatch: Any
    ) -> None:
        token = gateway.token(exp=300)
        assert await ask(token) == ADA

        class Later(jwt.api_jwt.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return super().now(tz) + jwt.api_jwt.timedelta(seconds=301)

        monkeypatch.setattr(jwt.api_jwt, "datetime", Later)
        assert await ask(token) == 403


class TestWhere:
    async def test_not_in_the_query(self, ask: Any, gateway: Gateway) -> None:
        for name in ("token", "access_token"):
            assert await ask(query=f"?{name}={gateway.token()}") == 403

    async def test_not_in_other_headers(self, ask: Any, gateway: Gateway) -> None:
        token = gateway.token()
        for name in ("X_Forwarded_Access_Token", "Cookie", "Proxy_Authorization", "X_Token"):
            assert await ask(**{name: f"Bearer {token}"}) == 403
        for scheme in ("token", "Basic", "JWT", "BearerX"):
            assert await ask(Authorization=f"{scheme} {token}") == 403
        for scheme in ("bearer", "BEARER", "Bearer "):
            assert await ask(Authorization=f"{scheme} {token}") == ADA

    async def test_nothing_else_names_anybody(self, ask: Any, gateway: Gateway) -> None:
        says = {
            "X_Forwarded_User": "root", "X_Remote_User": "root", "Remote_User": "root",
            "X_Shimmy_User": "root", "X_Forwarded_Groups": "admins", "Forwarded": "for=root",
        }  # fmt: skip
        assert await ask(**says) == 403
        assert await ask(gateway.token(), **says) == ADA

    async def test_the_gateways_user_is_jupyters_too(
        self, server: Any, gateway: Gateway, http_server_client: Any, jp_base_url: str
    ) -> None:
        headers = {"Authorization": f"Bearer {gateway.token(groups=['staff'])}"}
        me = await http_server_client.fetch(jp_base_url + "api/me", headers=headers)
        said = json.loads(me.body)
        assert (said["identity"]["username"], said["identity"]["groups"]) == ("ada", ["staff"])
        assert said["permissions"]["updatable_fields"] == []
        assert "Set-Cookie" not in me.headers

    async def test_whoever_is_called_local_is_refused_here(
        self, ask: Any, gateway: Gateway
    ) -> None:
        assert await ask(gateway.token(sub="local")) == 403


class TestJupytersToken:
    async def test_it_is_local(self, ask: Any, server: Any) -> None:
        own = server.identity_provider.token
        for post in (False, True):
            assert await ask(query=f"?token={own}", post=post) == LOCAL
            assert await ask(Authorization=f"token {own}", post=post) == LOCAL
            assert await ask(Authorization="token wrong", post=post) == 403
        basic = await ask(Authorization="Basic eDp5", query=f"?token={own}")
        assert basic == LOCAL

    async def test_it_leaves_no_cookie_and_cookies_name_nobody(
        self, ask: Any, server: Any, http_server_client: Any, jp_base_url: str
    ) -> None:
        own = server.identity_provider.token
        answer = await http_server_client.fetch(f"{jp_base_url}api/me?token={own}")
        assert "Set-Cookie" not in answer.headers
        cookie = await signed_in(ask, server)
        assert await ask(Cookie=cookie) == 403
        # With the token, it still does not say who it is.
        me = await http_server_client.fetch(
            f"{jp_base_url}api/me?token={own}", headers={"Cookie": cookie}
        )
        assert json.loads(me.body)["identity"]["username"] != "ada"
        assert await ask(query=f"?token={own}", Cookie=cookie) == LOCAL

    async def test_switched_off(self, ask: Any, server: Any, gateway: Gateway) -> None:
        own, server.identity_provider.token = server.identity_provider.token, ""
        for query in (f"?token={own}", "?token=", ""):
            assert await ask(query=query) == 403
        assert await ask(Authorization="token ") == 403
        assert await ask(gateway.token()) == ADA


async def posts(ask: Any, **headers: str) -> list[Principal | int]:
    """Without an XSRF token, with one, and with one for a foreign page."""
    xsrf = {"Cookie": "_xsrf=made-by-hand", "X_XSRFToken": "made-by-hand"}
    foreign = {"Origin": "https://evil.test"}
    return [
        await ask(post=True, **headers),
        await ask(post=True, **headers, **xsrf),
        await ask(post=True, **headers, **foreign),
    ]


async def socket(server: Any, base_url: str, port: int, **headers: str) -> bool:
    """Whether a socket opens."""
    url = f"ws://127.0.0.1:{port}{base_url}api/events/subscribe"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        opened = await websocket_connect(HTTPRequest(url, headers=sent, follow_redirects=False))
    except HTTPClientError as error:
        assert error.code in (302, 403)
        return False
    opened.close()
    return True


class TestByTheClientItself:
    async def test_needs_no_xsrf_token(self, ask: Any, gateway: Gateway) -> None:
        assert await posts(ask, Authorization=f"Bearer {gateway.token()}") == [ADA, ADA, ADA]

    async def test_sockets(
        self, server: Any, http_server: Any, jp_base_url: str, jp_http_port: int, gateway: Gateway
    ) -> None:
        opens = functools.partial(socket, server, jp_base_url, jp_http_port)
        evil = "https://evil.test"
        assert await opens(Authorization=f"Bearer {gateway.token()}")
        assert await opens(Authorization=f"Bearer {gateway.token()}", Origin=evil)
        assert not await opens(Authorization=f"Bearer {gateway.token(exp=-45)}")
        assert not await opens()
        assert not await opens(Cookie=f"token={gateway.token()}")


@pytest.mark.parametrize("header", ["Authorization", "X-Forwarded-Access-Token"])
class TestInjected:
    @pytest.fixture
    def changed(self, header: str) -> dict[str, Any]:
        told = {"injected": True} if header == "Authorization" else {}
        return {"header": header, **told}

    def bearing(self, header: str, token: str) -> dict[str, str]:
        return {header.replace("-", "_"): f"Bearer {token}"}

    async def test_needs_an_xsrf_token(self, ask: Any, gateway: Gateway, header: str) -> None:
        bearing = self.bearing(header, gateway.token())
        assert await ask(**bearing) == ADA
        assert await posts(ask, **bearing) == [403, ADA, 404]

    async def test_jupyters_token_beside_it_makes_no_difference(
        self, ask: Any, server: Any, gateway: Gateway, header: str
    ) -> None:
        bearing, own = self.bearing(header, gateway.token()), server.identity_provider.token
        assert await ask(post=True, query=f"?token={own}", **bearing) == 403
        assert await ask(post=True, query=f"?token={own}") == LOCAL

    async def test_sockets(
        self,
        server: Any,
        http_server: Any,
        jp_base_url: str,
        jp_http_port: int,
        gateway: Gateway,
        header: str,
    ) -> None:
        opens = functools.partial(socket, server, jp_base_url, jp_http_port)
        bearing = self.bearing(header, gateway.token())
        assert await opens(**bearing)
        assert not await opens(**bearing, Origin="https://evil.test")

    async def test_the_token_may_stand_alone(
        self, ask: Any, server: Any, gateway: Gateway, header: str
    ) -> None:
        name = header.replace("-", "_")
        alone = await ask(**{name: gateway.token()})
        assert alone == (403 if header == "Authorization" else ADA)
        if header != "Authorization":
            own = server.identity_provider.token
            assert await ask(Authorization=f"Bearer {gateway.token()}") == 403
            assert await ask(Authorization=f"Bearer {own}") == LOCAL
            assert await ask(Authorization=f"Bearer {own}", **{name: "garbage"}) == 403


class TestTokenOf:
    """Which of a header's values is the token; None is left to Jupyter's own."""

    @pytest.mark.parametrize(
        ("values", "token"),
        [
            ([], None), (["token x"], None), (["Basic x"], None), ([""], None),
            (["Bearer a.b.c"], "a.b.c"), (["bearer  a.b.c"], "a.b.c"), (["Bearer"], ""),
            (["Bearer a", "Bearer b"], ""), (["token x", "Bearer b"], ""),
            (["token x", "token y"], None), (["Bearer a b"], "a b"),
        ],
    )  # fmt: skip
    def test_in_authorization(self, gateway: Gateway, values: list[str], token: str | None) -> None:
        assert provider(gateway).token_of(values) == token

    @pytest.mark.parametrize(
        ("values", "token"),
        [
            ([], None), (["a.b.c"], "a.b.c"), (["Bearer a.b.c"], "a.b.c"), ([""], ""),
            (["a.b.c", "a.b.c"], ""), (["token x"], "token x"), (["Bearer"], ""),
        ],
    )  # fmt: skip
    def test_in_another(self, gateway: Gateway, values: list[str], token: str | None) -> None:
        assert provider(gateway, header="X-Jwt").token_of(values) == token


class TestPages:
    async def test_nothing_loops_and_nobody_gets_a_form(
        self, server: Any, http_server_client: Any, jp_base_url: str, gateway: Gateway
    ) -> None:
        async def get(path: str, **options: Any) -> Any:
            return await http_server_client.fetch(
                jp_base_url + path, raise_error=False, follow_redirects=False, **options
            )

        for path in ("login", "login?next=%2Fa%2540b%2Ffiles%2Fx", "files/x", "nothing", "logout"):
            answer = await get(path)
            if answer.code == 302:
                assert answer.headers["Location"].startswith(jp_base_url + "login?next=")
                answer = await get(answer.headers["Location"].removeprefix(jp_base_url))
            assert answer.code == 403, path
            assert b"<form" not in answer.body
            assert b"password" not in answer.body
        for body in ("password=x", f"password={server.identity_provider.token}"):
            answer = await get("login", method="POST", body=body)
            assert answer.code in (403, 405)
            assert "username" not in str(answer.headers.get_list("Set-Cookie"))
        bearing = {"Authorization": f"Bearer {gateway.token()}"}
        there = await get("login?next=%2Fa%2540b%2Fapi%2Fme", headers=bearing)
        assert there.headers["Location"] == jp_base_url + "api/me"
        away = await get("login?next=https://evil.test", headers=bearing)
        assert away.headers["Location"] == jp_base_url


class TestKeyFile:
    async def test_rotated_and_removed(self, ask: Any, gateway: Gateway, log: Any) -> None:
        old, new = gateway.token(by="r1"), gateway.token(by="r2")
        gateway.publish("r1")
        assert (await ask(old), await ask(new)) == (ADA, 403)
        gateway.publish("r1", "r2")
        assert (await ask(old), await ask(new)) == (ADA, ADA)
        gateway.publish("r2")
        assert (await ask(old), await ask(new)) == (403, ADA)
        gateway.write(b'{"keys": []}')
        assert (await ask(old), await ask(new)) == (403, 403)

    async def test_spoilt_and_back(self, ask: Any, gateway: Gateway, log: Any) -> None:
        token = gateway.token()
        for spoilt in (b"", b"{", b"[]", b'{"keys": {}}', b"x" * 300_000):
            gateway.write(spoilt)
            log.clear()
            assert (await ask(token), await ask(token)) == (403, 403)
            assert log.text.count("nobody can sign in") == 1
            assert str(gateway.file) not in log.text
        gateway.publish("r1")
        assert await ask(token) == ADA
        gateway.file.unlink()
        assert await ask(token) == 403
        gateway.publish("r1")
        assert await ask(token) == ADA

    async def test_it_is_read_once_while_it_stays(self, gateway: Gateway) -> None:
        reads: list[bytes] = []

        def parse(data: bytes) -> Any:
            reads.append(data)
            return parse_jwks(data, ALL, LOG)

        source = FileKeys(gateway.file, parse, LOG)
        for _ in range(5):
            assert await source.find("RS256", "r1")
        assert len(reads) == 1
        gateway.publish("r1")
        assert await source.find("RS256", "r1")
        assert len(reads) == 2

    async def test_its_size(self, gateway: Gateway) -> None:
        source = provider(gateway)._keys
        data = gateway.jwks("r1")
        gateway.write(data.ljust(256 << 10))
        assert await source.find("RS256", "r1")
        gateway.write(data.ljust((256 << 10) + 1))
        assert await source.find("RS256", "r1") is None

    async def test_no_regular_file(self, tmp_path: Path) -> None:
        import os

        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        for path in (pipe, tmp_path):
            with pytest.raises(Misconfigured, match="no regular file"):
                FileKeys(path, lambda _: (), LOG).read()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
MEMBERS = ("kty", "crv", "n", "e", "x", "y", "alg", "use", "kid", "key_ops", "d")
LIKELY = st.sampled_from(["RSA", "EC", "OKP", "P-256", "Ed25519", "AQAB", "sig", "RS256", ""])
HEADERS = st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "exp", "iss", "aud", "sub"])


@pytest.fixture(scope="module")
def anyones(keys: Gateway, tmp_path_factory: Any) -> JWTIdentityProvider:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_bytes(keys.jwks("r1", "e1"))
    return provider(keys, jwks_file=str(file))


class TestAnything:
    @given(
        st.text() | st.lists(JSON | st.dictionaries(HEADERS, LIKELY | JSON), min_size=3, max_size=3)
    )
    def test_whatever_is_sent(self, anyones: JWTIdentityProvider, parts: Any) -> None:
        text = (
            parts
            if isinstance(parts, str)
            else ".".join(encoded(json.dumps(p).encode()) for p in parts)
        )
        assert asyncio.run(anyones.authenticate(text)) is None

    @given(st.lists(st.dictionaries(st.sampled_from(MEMBERS), LIKELY | JSON) | JSON, max_size=3))
    def test_whatever_is_in_it(self, entries: list[Any]) -> None:
        for key in parse_jwks(json.dumps({"keys": entries}).encode(), ALL, LOG):
            assert key.algorithms <= ALL


class TestKeySets:
    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"use": "enc"}, "not for verifying"),
            ({"key_ops": ["sign"]}, "not for verifying"),
            ({"key_ops": "verify"}, "not for verifying"),
            ({"d": "AQAB"}, "secret"),
            ({"k": "c2VjcmV0", "kty": "oct"}, "secret"),
            ({"kty": "oct"}, "none of the configured"),
            ({"kty": "EC"}, "none of the configured"),
            ({"alg": "RS999"}, "none of the configured"),
            ({"alg": "HS256"}, "none of the configured"),
            ({"kid": 7}, "kid"),
            ({"n": "AQAB"}, "damaged or too short"),
            ({"n": 7}, "damaged or too short"),
            ({"n": None}, "damaged or too short"),
        ],
    )
    def test_what_cannot_be_used(
        self, gateway: Gateway, log: Any, changed: dict[str, Any], why: str
    ) -> None:
        public = gateway.secret["r1"].public_key()
        entry = jwk(public, kid="r1") | changed
        assert parse_jwks(json.dumps({"keys": [entry]}).encode(), ALL, LOG) == ()
        assert re.search(f"key 0 .*{why}", log.text)

    def test_short_keys(self) -> None:
        short = jwk(rsa.generate_private_key(65537, 1024).public_key())
        assert parse_jwks(json.dumps({"keys": [short]}).encode(), ALL, LOG) == ()

    def test_what_a_key_is_for(self, gateway: Gateway) -> None:
        found = parse_jwks(gateway.jwks("r1", "e1", "e2", "d1"), ALL, LOG)
        assert {key.id: key.algorithms for key in found} == {
            "r1": {name for name in ALL if name[:2] in ("RS", "PS")},
            "e1": {"ES256"},
            "e2": {"ES384"},
            "d1": {"EdDSA"},
        }
        only = jwk(gateway.secret["r1"].public_key(), alg="PS256", key_ops=["verify"])
        (key,) = parse_jwks(json.dumps({"keys": [only]}).encode(), ALL, LOG)
        assert key.algorithms == {"PS256"}
        assert parse_jwks(json.dumps({"keys": [only]}).encode(), frozenset({"RS256"}), LOG) == ()

    def test_which_is_picked(self) -> None:
        a, b = (Key(name, frozenset({"RS256"}), name) for name in "ab")
        other = Key("a", frozenset({"ES256"}), "other")
        nameless = Key(None, frozenset({"EdDSA"}), "nameless")
        keys = (a, b, other, nameless)
        assert pick(keys, "RS256", "a") is a
        assert pick(keys, "ES256", "a") is other
        assert pick(keys, "ES256", None) is other
        assert pick(keys, "EdDSA", None) is nameless
        assert pick(keys, "EdDSA", "c") is None
        assert pick(keys, "RS256", None) is None
        assert pick((a, a), "RS256", "a") is None
        assert pick((), "RS256", None) is None


class Far:
    """A URL's keys, a clock, and a count of what was fetched."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.now, self.fetched = gateway, 1000.0, 0
        self.published: tuple[str, ...] = ("r1",)
        self.fails = False
        self.open = threading.Event()
        self.open.set()
        self.source = UrlKeys(self.fetch, self.parse, LOG, lambda: self.now)

    def parse(self, data: bytes) -> Any:
        return parse_jwks(data, ALL, LOG)

    def fetch(self) -> bytes:
        self.fetched += 1
        assert self.open.wait(20)
        if self.fails:
            raise FetchFailed("login.test cannot be connected to")
        return self.gateway.jwks(*self.published)

    async def knows(self, *names: str) -> list[bool]:
        return [await self.source.find("RS256", name) is not None for name in names]


@pytest.fixture
def far(gateway: Gateway) -> Iterator[Far]:
    far = Far(gateway)
    yield far
    far.open.set()
    running = far.source._running
    if running is not None:
        running.result(20)


class TestKeysByUrl:
    async def test_once_when_needed(self, far: Far) -> None:
        assert far.fetched == 0
        assert await asyncio.gather(*(far.knows("r1") for _ in range(20))) == [[True]] * 20
        assert far.fetched == 1

    async def test_unknown_keys_at_most_once_a_minute(self, far: Far) -> None:
        assert await far.knows("r1", "r2") == [True, False]
        assert far.fetched == 1
        far.published = ("r1", "r2")
        far.now += 59
        assert await far.knows("r2", "x", "y") == [False] * 3
        far.now += 1
        assert await far.knows("r2", "x", "y", "r1") == [True, False, False, True]
        assert far.fetched == 2

    async def test_taken_away(self, far: Far) -> None:
        assert await far.knows("r1") == [True]
        far.published = ("r2",)
        far.now += 300
        assert await far.knows("r1") == [True]
        far.now += 1
        assert await far.knows("r1", "r2") == [False, True]

    async def test_while_it_fails(self, far: Far, log: Any) -> None:
        assert await far.knows("r1") == [True]
        far.fails = True
        for _ in range(6):
            far.now += 600
            assert await far.knows("r1") == [True]
        assert far.fetched == 7
        assert "login.test cannot be connected to" in log.text
        far.now += 1
        assert await far.knows("r1") == [False]
        far.fails = False
        assert await far.knows("r1") == [False]  # the minute is not over
        far.now += 60
        assert await far.knows("r1") == [True]

    async def test_from_the_start(self, far: Far) -> None:
        far.fails = True
        assert await far.knows("r1", "r1") == [False, False]
        assert far.fetched == 1

    async def test_what_is_no_jwks_changes_nothing(self, far: Far, monkeypatch: Any) -> None:
        assert await far.knows("r1") == [True]
        monkeypatch.setattr(far.gateway, "jwks", lambda *_: b"<html>")
        far.now += 301
        assert await far.knows("r1") == [True]
        assert far.fetched == 2

    async def test_while_it_hangs(self, far: Far, monkeypatch: Any) -> None:
        monkeypatch.setattr(UrlKeys, "PATIENCE", 0)
        assert await far.knows("r1") == [True]
        far.now += 301
        far.published = ("r2",)
        far.open.clear()
        assert await far.knows("r1") == [True]
        waiting = asyncio.create_task(far.knows("r2"))
        gone = asyncio.create_task(far.knows("r2"))
        for _ in range(50):  # as far as they come while it hangs
            await asyncio.sleep(0)
        assert not waiting.done()
        gone.cancel()
        far.open.set()
        assert await waiting == [True]
        assert await far.knows("r1") == [False]
        assert far.fetched == 2


def near(monkeypatch: Any, certificates: Path, address: str = "127.0.0.1") -> Any:
    """`fetch_document`, for which every name is the server of these tests."""
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    return functools.partial(
        fetch_document, resolver=lambda *_: [address], verify=context, seconds=20
    )


class TestOverHttps:
    @pytest.fixture
    def fetch(self, monkeypatch: Any, certificates: Path) -> Any:
        return near(monkeypatch, certificates)

    def test_a_document(self, hub: Any, fetch: Any) -> None:
        hub.serve(test_fetch.whole(b"keys"))
        assert fetch(hub.url(query="?v=1"), 4) == b"keys"
        (seen,) = hub.seen
        assert (seen.method, seen.sni, "authorization" in seen.headers) == (
            "GET",
            "hub.test",
            False,
        )

    def test_bounds(self, hub: Any, fetch: Any, monkeypatch: Any) -> None:
        hub.serve(test_fetch.whole(b"12345"))
        with pytest.raises(FetchRefused, match="more than 4 bytes"):
            fetch(hub.url(), 4)
        ticks = iter([0.0, 21.0])
        monkeypatch.setattr(fetch_http, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
        with pytest.raises(FetchFailed, match="too slowly"):
            fetch(hub.url(), 5)

    def test_redirects_stay_at_home(self, hub: Any, fetch: Any) -> None:
        hub.serve(test_fetch.redirect("/b"))
        hub.serve(test_fetch.whole(b"keys"), "/b")
        assert fetch(hub.url(), 4) == b"keys"
        hub.serve(test_fetch.redirect(hub.url("/b", "cdn.test")))
        with pytest.raises(FetchRefused, match="redirects to where nothing is fetched from"):
            fetch(hub.url(), 4)
        assert {seen.host for seen in hub.seen} == {"hub.test"}

    @pytest.mark.parametrize("status", [204, 401, 404, 500])
    def test_other_answers(self, hub: Any, fetch: Any, status: int) -> None:
        hub.serve(lambda handler: handler.answer(status, b""))
        with pytest.raises(FetchFailed, match=f"hub.test answered {status}"):
            fetch(hub.url(), 100)

    def test_the_certificate_must_be_the_names(self, hub: Any, fetch: Any) -> None:
        hub.serve(test_fetch.whole(b"keys"), host="wrong.test")
        with pytest.raises(FetchFailed, match="certificate"):
            fetch(hub.url(host="wrong.test"), 100)
        assert hub.seen == []

    @pytest.mark.parametrize(
        ("address", "allowed"),
        [
            ("10.0.0.5", True), ("192.168.1.1", True), ("127.0.0.1", True), ("::1", True),
            ("100.64.0.1", True), ("fd00::1", True), ("93.184.215.14", True),
            ("169.254.169.254", False), ("fe80::1", False), ("0.0.0.0", False),
            ("168.63.129.16", False), ("224.0.0.1", False), ("::ffff:10.0.0.5", False),
        ],
    )  # fmt: skip
    def test_private_addresses_but_no_metadata(self, address: str, allowed: bool) -> None:
        assert (fetch_http._within(address) is None) == allowed

    def test_metadata_is_not_connected_to(self, monkeypatch: Any, certificates: Path) -> None:
        fetch = near(monkeypatch, certificates, "169.254.169.254")
        with pytest.raises(FetchRefused, match="link-local"):
            fetch("https://login.test/keys", 100)

    @pytest.mark.parametrize(
        "url",
        [
            "", "login.test", "http://login.test/", "https://10.0.0.1/", "https://[::1]/",
            "https://u:p@login.test/", "https://login.test/#x", "file:///etc/passwd",
            "https://*.test/", "https://login.test/a b", "https:///keys", "https://keys/",
        ],
    )  # fmt: skip
    def test_what_is_no_address(self, url: str) -> None:
        with pytest.raises(FetchRefused):
            named_target(url)

    @pytest.mark.parametrize("url", ["https://LOGIN.test:8443/k?a", "https://login.test?a"])
    def test_what_is_one(self, url: str) -> None:
        assert named_target(url).host == "login.test"


class TestServerWithUrl:
    @pytest.fixture
    def changed(self, hub: Any) -> dict[str, Any]:
        return {"jwks_url": hub.url("/certs"), "jwks_file": ""}

    async def test_all_of_it(
        self, ask: Any, gateway: Gateway, hub: Any, certificates: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(fetch_http, "fetch_document", near(monkeypatch, certificates))
        hub.serve(test_fetch.whole(gateway.jwks("r1")), "/certs")
        assert await ask(gateway.token()) == ADA
        assert await ask(gateway.token(by="r2")) == 403
        assert len(hub.seen) == 1


def provider(gateway: Gateway, **changed: Any) -> JWTIdentityProvider:
    settings = {k: v for k, v in {**required(gateway), **changed}.items() if v is not None}
    return JWTIdentityProvider(config=Config(JWTIdentityProvider=settings))


class TestSettings:
    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"issuer": None}, r"\.issuer must be set"),
            ({"issuer": ""}, r"\.issuer must be set"),
            ({"audience": None}, r"\.audience must be set"),
            ({"jwks_file": None}, "jwks_file and .*jwks_url"),
            ({"jwks_url": "https://login.test/keys"}, "jwks_file and .*jwks_url"),
            ({"username_claim": ""}, "username_claim must be set"),
            ({"jwks_file": "/nowhere/keys.json"}, r"\.jwks_file: keys.json cannot be read"),
            ({"jwks_file": None, "jwks_url": "http://login.test/"}, r"\.jwks_url: only https"),
            ({"algorithms": ["none"]}, r"\.algorithms cannot have 'none' \(whoever"),
            ({"algorithms": ["RS256", "HS256"]}, r"\.algorithms cannot have 'HS256' \(whoever"),
            ({"algorithms": ["hs512"]}, r"\.algorithms cannot have 'hs512' \(whoever"),
            ({"algorithms": ["RS1"]}, r"\.algorithms cannot have 'RS1'$"),
            ({"algorithms": []}, r"\.algorithms must name"),
            ({"algorithms": ["ES512"]}, "no key in it can be used with any of ES512"),
            ({"algorithms": 7}, "algorithms"),
            ({"leeway": -1}, "leeway"),
            ({"leeway": 301}, "leeway"),
            ({"leeway": "soon"}, "leeway"),
            ({"header": ""}, r"\.header cannot be"),
            ({"header": "Cookie"}, r"\.header cannot be"),
            ({"header": "X Jwt"}, r"\.header cannot be"),
            ({"header": "X-Jwt", "injected": False}, r"\.injected can be False only"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, gateway: Gateway, changed: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(TraitError, match=why) as caught:
            provider(gateway, **changed)
        assert "/nowhere" not in str(caught.value)

    def test_an_empty_key_set(self, gateway: Gateway) -> None:
        gateway.write(b'{"keys": []}')
        with pytest.raises(TraitError, match=r"\.jwks_file: no key in it"):
            provider(gateway)
        gateway.write(b"keys")
        with pytest.raises(TraitError, match=r"\.jwks_file: the JWKS is not JSON"):
            provider(gateway)

    @pytest.mark.parametrize("module", ["jwt", "cryptography"])
    def test_without_the_package(self, gateway: Gateway, monkeypatch: Any, module: str) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(TraitError, match=r"pip install shimmy-jupyter\[gateway\]"):
            provider(gateway)

    def test_they_end_the_servers_start(self, gateway: Gateway) -> None:
        options = {"issuer": ISSUER, "jwks_file": gateway.file}
        arguments = [
            "--ServerApp.identity_provider_class=shimmy_jupyter.server.gateway.JWTIdentityProvider",
            *(f"--JWTIdentityProvider.{name}={value}" for name, value in options.items()),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", *arguments],
            check=False, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.rstrip().endswith("JWTIdentityProvider.audience must be set")
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("changed", "warned"),
        [
            ({}, True),
            ({"injected": True}, False),
            ({"injected": False}, False),
            ({"header": "X-Jwt"}, False),
        ],
    )
    def test_how_it_is_sent_should_be_said(
        self, gateway: Gateway, log: Any, changed: dict[str, Any], warned: bool
    ) -> None:
        provider(gateway, **changed).validate_security(SimpleNamespace(ip="127.0.0.1"))
        assert ("JWTIdentityProvider.injected" in log.text) == warned

    @pytest.mark.parametrize("token", ["", "x"])
    def test_authentication_is_never_off(self, gateway: Gateway, token: str) -> None:
        it = provider(gateway, token=token)
        assert (it.auth_enabled, it.login_available, it.logout_available) == (True, False, False)

    def test_other_claims(self, gateway: Gateway) -> None:
        it = provider(gateway, username_claim="email", groups_claim="roles", admin_groups=["r"])
        token = gateway.token(sub=None, email="ada@lab.test", roles=["r"], groups=["no"])
        user = asyncio.run(it.authenticate(token))
        assert user is not None
        assert (user.username, user.groups, user.admin) == ("ada@lab.test", ("r",), True)
        assert asyncio.run(it.authenticate(gateway.token())) is None

    def test_the_server_does_not_need_the_package(self) -> None:
        code = (
            "import sys; sys.modules['jwt'] = sys.modules['cryptography'] = None\n"
            "import shimmy_jupyter.server.app, shimmy_jupyter.server.gateway"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize("trait", sorted(JWTIdentityProvider.class_own_traits(config=True)))
    def test_each_is_described(self, trait: str) -> None:
        own = JWTIdentityProvider.class_own_traits(config=True)[trait]
        assert own.help
        row = re.search(rf"\| `{trait}` \| (.+?) \|", DOCS)
        assert row, "not in the table of docs/gateway.md"
        value = JWTIdentityProvider.class_traits()[trait].default()
        assert row[1].strip("`") == ("None" if value is None else json.dumps(value))
