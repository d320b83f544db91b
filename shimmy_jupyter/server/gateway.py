"""For a Jupyter server behind a gateway that authenticates people and sends a signed JWT for them.

    c.ServerApp.identity_provider_class = "shimmy_jupyter.server.gateway.JWTIdentityProvider"
    c.JWTIdentityProvider.issuer = "https://login.example.org/realms/lab"
    c.JWTIdentityProvider.audience = "jupyter"
    c.JWTIdentityProvider.jwks_url = "https://login.example.org/realms/lab/certs"
    c.JWTIdentityProvider.header = "X-Forwarded-Access-Token"
    c.JWTIdentityProvider.admin_groups = ["lab-admins"]

Each request is authenticated by its own token, so nothing outlives its expiry: there is no login
form and no cookie says who anybody is. The server's own token still lets programs of this machine
in, such as its kernels, as `local`. See docs/gateway.md. Needs `pip install shimmy-jupyter[gateway]`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from jupyter_server.auth import IdentityProvider, User
from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.auth.login import LoginFormHandler
from tornado import web
from traitlets import Bool, Int, List, TraitError, Unicode, default, validate

from ..errors import AccessDenied, FetchRefused, Misconfigured
from .identity import GatewayUser, checked_name, groups_of
from .jwks import ALGORITHMS, MAX_JWKS_BYTES, FileKeys, KeySource, UrlKeys, parse_jwks

MAX_TOKEN_BYTES = 16 << 10

_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
_TYPES = ("JWT", "AT+JWT", "APPLICATION/JWT", "APPLICATION/AT+JWT")
_TIMES = ("exp", "nbf", "iat")


class TokenRefused(Exception):
    """Why a token is not accepted, without any of what is in it."""


class SignInElsewhere(LoginFormHandler):
    """In place of the login form, whereto Jupyter sends the browser of somebody unknown."""

    @allow_unauthenticated
    def get(self) -> None:
        if not self.current_user:
            raise web.HTTPError(403, "this server is signed in to at its gateway")
        form: Any = super()
        form.get()

    @allow_unauthenticated
    def post(self) -> None:
        raise web.HTTPError(405)


class JWTIdentityProvider(IdentityProvider):
    """Identifies people by the JWTs of a gateway. Wrong settings end the server's start."""

    issuer = Unicode(help="The iss claim that every token must have. Required.").tag(config=True)
    audience = Unicode(
        help="What every token's aud claim must be, or have among others: this server, as the "
        "gateway calls it. Required."
    ).tag(config=True)
    jwks_file = Unicode(
        help="A file with the public keys that tokens are signed with, as a JWK Set. It is read "
        "again when it changes. Either this or jwks_url is required."
    ).tag(config=True)
    jwks_url = Unicode(
        help="The https URL of that JWK Set. It is fetched when needed and every five minutes, "
        "directly and not through a proxy; its host may have a private address."
    ).tag(config=True)
    algorithms = List(
        Unicode(),
        ["RS256", "ES256", "EdDSA"],
        help="Signature algorithms that are accepted, of " + ", ".join(ALGORITHMS) + ".",
    ).tag(config=True)
    leeway = Int(
        30,
        min=0,
        max=300,
        help="Seconds by which the gateway's clock and this machine's may differ.",
    ).tag(config=True)
    header = Unicode(
        "Authorization",
        help='The header with the token. In "Authorization" it follows the word Bearer; in any '
        "other it may stand alone.",
    ).tag(config=True)
    injected = Bool(
        None,
        allow_none=True,
        help="Whether the gateway adds the header to requests that the browser authenticates by "
        "other means, such as a cookie of the gateway's. Requests that change something then need "
        "Jupyter's XSRF token, as any page could cause them. None: not for Authorization, which "
        "then only the client itself may send; always for any other header.",
    ).tag(config=True)
    username_claim = Unicode("sub", help="The claim with the user's name.").tag(config=True)
    groups_claim = Unicode(
        "groups", help="The claim with the names of the user's groups, if there is one."
    ).tag(config=True)
    admin_groups = List(Unicode(), help="Groups whose members are administrators.").tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keys = self._checked()

    @default("updatable_fields")
    def _nothing_to_edit(self) -> list[str]:
        return []

    @validate("algorithms")
    def _asymmetric(self, proposal: Any) -> list[str]:
        names: list[str] = proposal["value"]
        for name in names:
            if name not in ALGORITHMS:
                secret = name.upper().startswith("HS") or name.lower() == "none"
                reason = " (whoever can check such a token can make one)" if secret else ""
                raise TraitError(f"JWTIdentityProvider.algorithms cannot have {name!r}{reason}")
        if not names:
            raise TraitError("JWTIdentityProvider.algorithms must name an algorithm")
        return names

    @validate("header")
    def _a_header(self, proposal: Any) -> str:
        name: str = proposal["value"]
        if not _HEADER.fullmatch(name) or name.lower() in ("cookie", "host"):
            raise TraitError(f"JWTIdentityProvider.header cannot be {name!r}")
        return name

    def _checked(self) -> KeySource:
        """Where the keys come from. Raises `TraitError` for settings that cannot work together."""
        try:
            import cryptography  # noqa: F401
            from jwt import PyJWK  # noqa: F401
        except ImportError:
            raise TraitError(
                "JWTIdentityProvider needs PyJWT and cryptography: "
                "pip install shimmy-jupyter[gateway]"
            ) from None
        for name in ("issuer", "audience", "username_claim"):
            if not getattr(self, name):
                raise TraitError(f"JWTIdentityProvider.{name} must be set")
        if bool(self.jwks_file) == bool(self.jwks_url):
            raise TraitError(
                "of JWTIdentityProvider.jwks_file and JWTIdentityProvider.jwks_url exactly one must "
                "be set"
            )
        if self.injected is False and not self._bearer:
            raise TraitError(
                "JWTIdentityProvider.injected can be False only where the header is Authorization"
            )
        return self._from_file() if self.jwks_file else self._from_url()

    def _from_file(self) -> KeySource:
        source = FileKeys(Path(self.jwks_file), self._parse, self.log)
        try:
            usable = source.read()
        except Misconfigured as error:
            raise TraitError(f"JWTIdentityProvider.jwks_file: {error}") from None
        if not usable:
            raise TraitError(
                "JWTIdentityProvider.jwks_file: no key in it can be used with any of "
                + ", ".join(self.algorithms)
            )
        return source

    def _from_url(self) -> KeySource:
        from ..models.fetch_http import named_target

        try:
            named_target(self.jwks_url)
        except FetchRefused as error:
            raise TraitError(f"JWTIdentityProvider.jwks_url: {error}") from None
        return UrlKeys(self.fetch_keys, self._parse, self.log)

    def fetch_keys(self) -> bytes:
        """The JWKS that `jwks_url` has now. Blocks; raises `ShimmyError`."""
        from ..models.fetch_http import fetch_document

        return fetch_document(self.jwks_url, MAX_JWKS_BYTES)

    def validate_security(self, app: Any, ssl_options: dict[str, Any] | None = None) -> None:
        super().validate_security(app, ssl_options)
        if self._bearer and self.injected is None:
            self.log.warning(
                "JWTs in the Authorization header are taken for sent by clients themselves, without "
                "XSRF tokens. If the gateway adds them, set JWTIdentityProvider.injected = True; if "
                "not, set it to False and this line goes away."
            )

    @property
    def _parse(self) -> Any:
        return functools.partial(parse_jwks, algorithms=frozenset(self.algorithms), log=self.log)

    @property
    def _bearer(self) -> bool:
        return self.header.lower() == "authorization"

    @property
    def auth_enabled(self) -> bool:
        return True

    @property
    def login_available(self) -> bool:
        return False

    @property
    def logout_available(self) -> bool:
        return False

    def get_handlers(self) -> list[tuple[str, object]]:
        return [(r"/login", SignInElsewhere)]

    def get_user(self, handler: web.RequestHandler) -> Awaitable[User | None]:
        return self._identified(handler)

    def get_user_cookie(self, handler: web.RequestHandler) -> None:
        """No cookie says who anybody is."""

    async def _identified(self, handler: web.RequestHandler) -> User | None:
        """A JWT decides alone, whatever else was sent; without one, the server's own token does."""
        known: User | None = getattr(handler, "_jupyter_current_user", None)
        if known is not None:
            return known
        token = self.token_of(handler.request.headers.get_list(self.header))
        if token is not None:
            user: User | None = await self.authenticate(token)
            by_token = self._bearer and not self.injected
        else:
            user = await self.get_user_token(handler)
            by_token = True
        if user is not None:
            # What Jupyter goes by when it decides about XSRF tokens and foreign origins.
            handler._token_authenticated = by_token  # type: ignore[attr-defined]  # noqa: SLF001
        return user

    def token_of(self, values: list[str]) -> str | None:
        """The token in the header's values; None where they have none. More than one value is a
        token that nobody can verify, as a gateway sends one.
        """
        if not values:
            return None
        found = [re.fullmatch(r"(?i:bearer)(?:\s+(.*))?", value) for value in values]
        if self._bearer and not any(found):
            return None  # "token …" is Jupyter's own, and what a proxy asks for is the proxy's
        if len(values) > 1:
            return ""
        return values[0] if found[0] is None else found[0][1] or ""

    async def authenticate(self, token: str) -> GatewayUser | None:
        """Whom a JWT names, if it is good at this moment. Otherwise the log says why not."""
        try:
            return self._user(await self._claims(token))
        except TokenRefused as refused:
            self.log.info("a token from the gateway was refused: %s", refused)
        except AccessDenied as denied:
            self.log.info("a token from the gateway was refused: %s", denied)
        return None

    async def _claims(self, token: str) -> dict[str, Any]:
        """What a token says, once it is verified. Raises `TokenRefused`."""
        import jwt

        if len(token) > MAX_TOKEN_BYTES or not token.isascii() or token.count(".") != 2:
            raise TokenRefused("it is no JWT of a usable size")
        try:
            algorithm, id = self._named_key(jwt.get_unverified_header(token))
            key = await self._keys.find(algorithm, id)
            if key is None:
                raise TokenRefused("it was not signed with a key that is known")
            claims: dict[str, Any] = jwt.decode(
                token,
                key.public,
                algorithms=[algorithm],
                issuer=self.issuer,
                audience=self.audience,
                leeway=self.leeway,
                options={"require": ["exp", "iss", "aud", self.username_claim]},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            # Its own words may quote the token.
            raise TokenRefused(type(error).__name__) from None
        for name in _TIMES:
            if name in claims and type(claims[name]) not in (int, float):
                raise TokenRefused(f"its {name} is no number")
        return claims

    def _named_key(self, header: dict[str, Any]) -> tuple[str, str | None]:
        """The algorithm and the key's id, from a header that nobody has verified yet."""
        algorithm, kind = header.get("alg"), header.get("typ", "JWT")
        if not isinstance(algorithm, str) or algorithm not in self.algorithms:
            raise TokenRefused("its algorithm is not among the accepted ones")
        if not isinstance(kind, str) or kind.upper() not in _TYPES:
            raise TokenRefused("its type says that it is for something else")
        if "crit" in header or "b64" in header:
            raise TokenRefused("it asks for an extension")
        return algorithm, header.get("kid")

    def _user(self, claims: dict[str, Any]) -> GatewayUser:
        """Raises `AccessDenied` for a name or groups that cannot be used."""
        name = checked_name(claims[self.username_claim])
        given = claims.get(self.groups_claim)
        groups = groups_of([given] if isinstance(given, str) else given)
        admin = any(group in self.admin_groups for group in groups)
        return GatewayUser(name, groups=groups, admin=admin)
