"""What every handler shares: the error shape, the principal, the request id, the kernel's secret."""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import time
import uuid
import weakref
from typing import Any, ClassVar

from jupyter_server import CallContext
from jupyter_server.auth import User
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.extension.handler import ExtensionHandlerMixin
from jupyter_server.utils import ensure_async
from tornado import web

from ...errors import (
    AccessDenied,
    InternalError,
    InvalidValue,
    MethodNotAllowed,
    Misconfigured,
    NotFound,
    RateLimitExceeded,
    RequestTooLarge,
    ShimmyError,
)
from ...guard.asked import Asked
from ...guard.visit import Visit
from ...service import CompletionService
from ...types import Principal
from ..identity import LOCAL, principal_of

_BY_STATUS: dict[int, tuple[type[ShimmyError], str]] = {
    400: (InvalidValue, "the request could not be read"),
    401: (AccessDenied, "not allowed: sign in to this Jupyter server, or send its token"),
    403: (AccessDenied, "not allowed: sign in to this Jupyter server, or send its token"),
    404: (NotFound, "there is nothing here"),
    405: (MethodNotAllowed, "this route does not have that method"),
    413: (RequestTooLarge, "the body of the request is too large"),
}


LOOK_AGAIN_SECONDS = 5.0
"""How long a stream may go on after whoever asked for it has lost the right to."""
_SAID: dict[type[ShimmyError], str] = {
    InvalidValue: "the request could not be read",
    InternalError: "something went wrong; the server's log says what",
}
"""Of any other status, by whose fault it is."""
SMALL_BODY = 64 << 10
"""Bytes that a route takes which is not for texts."""
_WITH_BODY = ("POST", "PUT")
_OF_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")
"""What a page of another site can send without asking."""
_REMEMBERED = ("_jupyterhub_user", "_cached_hub_user")
"""Where JupyterHub's provider keeps on a handler what it has said."""
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-Ip")


@web.stream_request_body
class ShimmyHandler(ExtensionHandlerMixin, APIHandler):
    """Errors are raised as `ShimmyError` and written in the one JSON shape. No body is read before
    its sender is known, whatever the method, and none is kept here.
    """

    small_body: ClassVar[bool] = True
    _received = 0

    _is_kernel = False
    """Whether it came in by the secret that this server has given its kernels."""

    @property
    def service(self) -> CompletionService:
        service: CompletionService | Misconfigured = self.settings["shimmy_service"]
        if isinstance(service, Misconfigured):
            raise Misconfigured(service.message)
        return service

    @property
    def principal(self) -> Principal:
        """Who Jupyter says this is. Raises `AccessDenied` for nobody, and for unusable names."""
        if self._is_kernel:
            found = LOCAL
        else:
            found = principal_of(
                self.current_user,
                self.identity_provider,
                token_authenticated=getattr(self, "_token_authenticated", False),
            )
        return self.service.guard.rules.known(found)

    def asked(self, route: str) -> Asked:
        """Who asks, and from where. What the client says of itself is for the record only."""
        headers = self.request.headers
        return Asked(
            self.principal,
            self.request_id,
            route,
            client_ip=self.request.remote_ip,
            request_path=self.request.path,
            notebook=headers.get("x-shimmy-notebook"),
            cell=headers.get("x-shimmy-cell"),
        )

    async def tell_limits(self, visit: Visit) -> None:
        """In headers, where there are limits and headers have not gone out."""
        if not self._headers_written:
            self._told = await visit.headers()
            for name, value in self._told.items():
                self.set_header(name, value)

    def set_default_headers(self) -> None:
        # Called again when an error clears what was set: the id must outlive that.
        super().set_default_headers()
        self.request_id = getattr(self, "request_id", None) or uuid.uuid4().hex
        self.set_header("x-shimmy-request-id", self.request_id)
        for name, value in getattr(self, "_told", {}).items():
            self.set_header(name, value)

    async def prepare(self) -> None:  # type: ignore[override]
        self._look_again = time.monotonic() + LOOK_AGAIN_SECONDS
        self._accept_kernel_secret()
        await super().prepare()
        # Jupyter's context has the handler, with all that was sent, and every task and every timer that
        # is begun here copies that: the event loop keeps timers until their time, also when called off.
        CallContext.set(CallContext.JUPYTER_HANDLER, weakref.proxy(self))
        # The decorators say so too; this also covers methods that no handler has. What browsers ask
        # before they send credentials is an OPTIONS without a body.
        if not self.current_user and (self.request.method != "OPTIONS" or self._has_body()):
            raise web.HTTPError(403)
        self._check_type()
        length = self.request.headers.get("Content-Length", "0")
        # Of what is no number, or one beyond sense, Tornado says so.
        if length.isascii() and length.isdigit() and len(length) < 20:
            self.check_size(int(length))

    def _check_type(self) -> None:
        """A form that another site sends with this one's cookies lacks `_xsrf`, and is no JSON."""
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in _OF_FORMS and not self.token_authenticated:
            raise InvalidValue(
                f"a body of type {kind} is taken with a token only; application/json is wanted",
                param="Content-Type",
            )

    def _has_body(self) -> bool:
        headers = self.request.headers
        return "Transfer-Encoding" in headers or bool(headers.get("Content-Length", "").strip("0"))

    @property
    def wants_body(self) -> bool:
        """Whether anything can be made of one, by its method."""
        return self.request.method in _WITH_BODY

    @property
    def most_bytes(self) -> int:
        """The longest body that this route takes."""
        most: int = self.settings["shimmy_max_request_bytes"]
        return most if self._is_for_texts() else min(most, SMALL_BODY)

    def _is_for_texts(self) -> bool:
        return self.wants_body and not self.small_body

    def data_received(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received > self.most_bytes and not self._finished:
            # Nobody awaits this: what is raised here would be no answer.
            error = self._too_large(f"{self._received} bytes and more")
            self.send_error(error.status, exc_info=(type(error), error, None))

    def check_size(self, size: int) -> None:
        """Raises `RequestTooLarge`."""
        if size > self.most_bytes:
            raise self._too_large(f"{size} bytes")

    def _too_large(self, size: str) -> RequestTooLarge:
        most = self.most_bytes
        whose = "ShimmyLimits.max_request_size" if self._is_for_texts() else "this route"
        return RequestTooLarge(f"the body has {size}; {whose} allows {most}")

    def query(self, name: str) -> str | None:
        """The value of a query's parameter. Raises `InvalidValue` where there are several."""
        values = self.get_query_arguments(name, strip=False)
        if len(values) > 1:
            raise InvalidValue("this parameter is there more than once", param=name)
        return values[0] if values else None

    def _accept_kernel_secret(self) -> None:
        """A server with only a password has no token that its kernels could know; it has given
        them a secret of its own. Good from this machine only, and not through a proxy.
        """
        secret = self.settings.get("shimmy_kernel_secret")
        if not secret or not self._from_this_machine():
            return
        given = self.identity_provider.get_token(self) or ""
        if hmac.compare_digest(given.encode(), secret.encode()):
            self.current_user = self._jupyter_current_user = User(username="kernel")
            self._token_authenticated = True
            self._is_kernel = True

    async def still_allowed(self, action: str, resource: str) -> None:
        """For what is sent piece by piece: who asked may have signed out, been removed or been denied
        since. Looks every `LOOK_AGAIN_SECONDS`. Raises `AccessDenied`.
        """
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + LOOK_AGAIN_SECONDS
        before = self.principal
        self._jupyter_current_user = None  # else the provider says what it said before
        for name in _REMEMBERED:
            self.__dict__.pop(name, None)
        self._accept_kernel_secret()
        user = await ensure_async(self.identity_provider.get_user(self))
        if user is not None:
            self.current_user = self._jupyter_current_user = user
            allowed = await ensure_async(
                self.authorizer.is_authorized(self, user, action, resource)
            )
            found = self.principal
            same = found.name == before.name and set(found.groups) == set(before.groups)
            if allowed and same and found.admin >= before.admin:
                return
        raise AccessDenied("not allowed any more: the answer ends here")

    def _from_this_machine(self) -> bool:
        if any(name in self.request.headers for name in _FORWARDED):
            return False
        connection: Any = self.request.connection
        # A socket that is gone has no name, and nobody to answer.
        try:
            here, there = (
                connection.stream.socket.getsockname(),
                connection.stream.socket.getpeername(),
            )
        except (AttributeError, OSError):
            return False
        return is_local(here, there)

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        if self._headers_written and not self._finished:
            # Ended in good order, an answer that was cut off would look whole.
            connection: Any = self.request.connection
            connection.stream.close()
        super().send_error(status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        if not isinstance(error, ShimmyError):
            other = InvalidValue if 400 <= status_code < 500 else InternalError
            kind, message = _BY_STATUS.get(status_code, (other, _SAID[other]))
            error = kind(message)
        if isinstance(error, RequestTooLarge):
            # The rest of the body is not read.
            self.set_header("Connection", "close")
        self.set_status(error.status)
        if isinstance(error, RateLimitExceeded) and error.retry_after is not None:
            self.set_header("Retry-After", str(math.ceil(error.retry_after)))
        self.finish(json.dumps(error.to_json(self.request_id)))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        # What a client did wrong is answered, not logged with a traceback. Tornado would write the
        # whole address, in which there may be a token.
        if isinstance(value, ShimmyError):
            return
        where = f"request {self.request_id}, {self.request.method} {self.request.path[:200]}"
        if isinstance(value, web.HTTPError) and value.status_code < 500:
            self.log.warning("%s: %s", where, value)
        else:
            self.log.error("%s failed", where, exc_info=(typ, value, tb))


def is_local(here: Any, there: Any) -> bool:
    """Whether a connection between two socket names stays on this machine. A Unix socket's name is
    a text; an IP socket's begins with the address.
    """
    if isinstance(here, str | bytes):
        return True
    return bool(here[0] == there[0] or ipaddress.ip_address(there[0]).is_loopback)


class UnknownRouteHandler(ShimmyHandler):
    """Whatever else is below `shimmy/`: a 404 in our own shape, for those who may know."""

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def get(self) -> None:
        raise NotFound("there is no such route")

    @web.authenticated
    @authorized(action="read", resource="shimmy_jupyter:models")
    async def post(self) -> None:
        raise NotFound("there is no such route")
