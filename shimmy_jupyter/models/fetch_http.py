"""HTTPS requests that stay where policy lets them: each name is resolved once, every address it has
is checked, and the connection goes to a checked address while TLS checks the name.

httpx carries the requests, by its transport alone: its client would follow the environment's
proxies, keep cookies and log whole URLs, whose queries are often credentials.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import httpx

from ..errors import Misconfigured
from .addresses import Target, check_hosts, check_url, refusal
from .fetch_errors import FetchFailed, FetchRefused, in_words

log = logging.getLogger("shimmy_jupyter.models")

Resolver = Callable[[str, int], Sequence[str]]
"""Addresses of a name, for a port. Raises `OSError` (as `socket.getaddrinfo` does)."""

_MOST_REDIRECTS = 5
_MOST_ADDRESSES = 4
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DOCUMENT_SECONDS = 20.0
_WITHIN = frozenset({"private", "loopback", "a carrier's private network"})
_TOKEN = re.compile(r"[!-~]{1,4096}")
_LENGTH = re.compile(r"[0-9]{1,18}")
_SECONDS = re.compile(r"[0-9]{1,6}")
_CODE = re.compile(r"[A-Za-z]{1,40}")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds until a connection stands, and until the next bytes come or go. A slow transfer may
    take as long as it likes; one that stands still may not.
    """

    connect: float = 10.0
    read: float = 30.0
    write: float = 30.0


def system_resolver(host: str, port: int) -> list[str]:
    """By the operating system, whose own time limits hold."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def default_context() -> ssl.SSLContext:
    """Checks certificates by certifi's authorities and by this machine's own."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


_asking: ContextVar[bool] = ContextVar("shimmy_jupyter_asking", default=False)


def _not_ours(_record: logging.LogRecord) -> bool:
    return not _asking.get()


# At DEBUG httpcore logs answers' headers: locations with signatures, cookies. Other users of
# httpcore in this process keep their log.
for _name in ("httpcore.connection", "httpcore.http11"):
    logging.getLogger(_name).addFilter(_not_ours)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    before = _asking.set(True)
    try:
        yield
    finally:
        _asking.reset(before)


class Answer:
    """An answer whose body has not been read. Closing it twice is fine."""

    def __init__(
        self, target: Target, response: httpx.Response, transport: httpx.HTTPTransport
    ) -> None:
        self.target = target
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._transport = transport

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with _unlogged(), contextlib.suppress(httpx.HTTPError, OSError):
            self._response.close()
            self._transport.close()

    @property
    def length(self) -> int | None:
        """Bytes of the body as announced; None where the server does not say."""
        if "transfer-encoding" in self.headers:  # then a length beside it means nothing
            return None
        text = self.headers.get("content-length")
        if text is None:
            return None
        if not _LENGTH.fullmatch(text):
            raise FetchFailed(f"{self.target.host} announced a length that is no number")
        return int(text)

    def refuse_encoding(self) -> None:
        """Raises `FetchFailed` for a body that is not the file's own bytes."""
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            raise FetchFailed(
                f"{self.target.host} sent the file compressed, though it was asked not to"
            )

    def chunks(self) -> Iterator[bytes]:
        """The body's bytes as they come. Raises `FetchFailed` if they stop before its end."""
        body = self._response.iter_raw()
        while True:
            try:
                with _unlogged():
                    chunk = next(body, None)
            except httpx.HTTPError as error:
                raise _explained(self.target, error) from None
            if chunk is None:
                return
            yield chunk

    def read(self, limit: int, until: float = math.inf) -> bytes:
        """The whole body. Raises `FetchRefused` once it is longer than `limit` bytes, `FetchFailed`
        if it is not there by `until`, of the monotonic clock.
        """
        body = bytearray()
        for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise FetchRefused(f"{self.target.host} answered more than {in_words(limit)}")
            if time.monotonic() > until:
                raise FetchFailed(f"{self.target.host} sends too slowly")
        return bytes(body)


class Web:
    """Requests to allowed hosts. Without state between requests: no cookies, no kept connections."""

    def __init__(
        self,
        allowed_hosts: Iterable[str],
        *,
        resolver: Resolver = system_resolver,
        timeouts: Timeouts | None = None,
        token_for: Callable[[str], str | None] = lambda _host: None,
        verify: ssl.SSLContext | None = None,
        refused: Callable[[str], str | None] = refusal,
    ) -> None:
        self.allowed_hosts = check_hosts(allowed_hosts)
        self._resolver = resolver
        self._token_for = token_for
        self._refused = refused
        self._verify = verify or default_context()
        if self._verify.verify_mode != ssl.CERT_REQUIRED or not self._verify.check_hostname:
            raise Misconfigured("certificates must be checked, and against the host's name")
        times = timeouts or Timeouts()
        self._timeout = {
            "connect": times.connect,
            "read": times.read,
            "write": times.write,
            "pool": times.connect,
        }

    def check(self, url: str) -> Target:
        """Raises `FetchRefused`. Touches nothing."""
        return check_url(url, self.allowed_hosts)

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        leave_origin: bool = True,
    ) -> Answer:
        """The answer after at most five redirects, each checked like the URL itself.

        Without `leave_origin`, a redirect to another origin is not followed but is the answer. A
        token goes to the first origin only, and to none once that has been left. Raises
        `FetchRefused` where policy ends, `FetchFailed` where the network does.
        """
        target = self.check(url)
        first = target.origin
        token = self._token(target.host)
        for _ in range(_MOST_REDIRECTS + 1):
            answer = self._send(method, target, dict(headers or {}), token)
            if answer.status not in _REDIRECTS:
                return answer
            with contextlib.ExitStack() as stack:
                stack.enter_context(answer)
                following = self._location(answer)
                if following.origin != first:
                    if not leave_origin:
                        stack.pop_all()
                        return answer
                    token = None
            log.debug("%s redirects to %s", target.host, following.host)
            target = following
        raise FetchFailed(f"{target.host} redirects more than {_MOST_REDIRECTS} times")

    def _token(self, host: str) -> str | None:
        token = self._token_for(host)
        if token is not None and not _TOKEN.fullmatch(token):
            raise Misconfigured(f"the token for {host} is empty or has unusual characters")
        return token

    def _location(self, answer: Answer) -> Target:
        location = answer.headers.get("location", "")
        if not location:
            raise FetchFailed(f"{answer.target.host} redirects without saying where to")
        host = answer.target.host
        # urljoin drops control characters, which must be refused, so they are looked for before.
        if any(ord(character) < 0x21 for character in location):
            raise FetchRefused(f"{host} redirects to what is no URL")
        try:
            return self.check(urljoin(answer.target.url, location))
        except ValueError:  # urljoin's, for brackets that match nothing
            raise FetchRefused(f"{host} redirects to what is no URL") from None
        except FetchRefused as error:
            raise FetchRefused(
                f"{host} redirects to where nothing is fetched from: {error.message}"
            ) from None

    def _send(
        self, method: str, target: Target, headers: dict[str, str], token: str | None
    ) -> Answer:
        headers |= {
            "Host": target.authority,
            "User-Agent": "shimmy-jupyter",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        failure: httpx.HTTPError | None = None
        for address in self._addresses(target):
            transport = httpx.HTTPTransport(
                verify=self._verify,
                trust_env=False,
                limits=httpx.Limits(max_connections=1, max_keepalive_connections=0),
            )
            request = httpx.Request(
                method,
                httpx.URL(scheme="https", host=address, port=target.port, path="/"),
                headers=headers,
                extensions={
                    "timeout": self._timeout,
                    # The connection goes to the address; the certificate must be the name's.
                    "sni_hostname": target.host,
                    "target": target.path.encode("ascii"),
                },
            )
            with contextlib.ExitStack() as stack:
                stack.callback(transport.close)
                try:
                    with _unlogged():
                        response = transport.handle_request(request)
                except httpx.HTTPError as error:
                    failure = error
                    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                        continue  # the next address may answer
                    break
                stack.pop_all()
                return Answer(target, response, transport)
        assert failure is not None
        raise _explained(target, failure) from None

    def _addresses(self, target: Target) -> Sequence[str]:
        """Resolved and checked; all of them must be public, or the name is not to be trusted."""
        try:
            addresses = self._resolver(target.host, target.port)
        except (OSError, UnicodeError):  # unknown, or nothing that the system can encode
            addresses = ()
        if not addresses:
            raise FetchFailed(f"the name {target.host} cannot be resolved; is this machine online?")
        for address in addresses:
            if reason := self._refused(address):
                raise FetchRefused(f"{target.host} resolves to an address that is {reason}")
        return addresses[:_MOST_ADDRESSES]


def named_target(url: str) -> Target:
    """Where an administrator's own setting points: any host that a URL can name. Raises
    `FetchRefused` for what is no https URL to a name.
    """
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    return check_url(url, (authority,))


def _within(address: str) -> str | None:
    reason = refusal(address)
    return None if reason in _WITHIN else reason


def fetch_document(
    url: str,
    limit: int,
    *,
    resolver: Resolver = system_resolver,
    verify: ssl.SSLContext | None = None,
    seconds: float = _DOCUMENT_SECONDS,
) -> bytes:
    """A small document that an administrator has named, and no user can: so its host may have a
    private address. Blocks, for about `seconds` at most once the connection stands.

    Redirects are followed within the URL's own origin only. Raises `FetchRefused`, also for more
    than `limit` bytes, and `FetchFailed`.
    """
    target = named_target(url)
    web = Web(
        (target.authority,),
        resolver=resolver,
        timeouts=Timeouts(read=seconds / 2),
        verify=verify,
        refused=_within,
    )
    over = time.monotonic() + seconds
    with web.request("GET", url) as answer:
        if answer.status != httpx.codes.OK:
            raise FetchFailed(f"{target.host} answered {answer.status}")
        answer.refuse_encoding()
        return answer.read(limit, until=over)


def _explained(target: Target, error: BaseException) -> FetchFailed:
    """In words of ours: what httpx and h11 say may quote the other side."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return FetchFailed(
                f"{target.host} has a certificate that cannot be trusted: {cause.verify_message}"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
        return FetchFailed(f"{target.host} cannot be connected to")
    if isinstance(error, httpx.TimeoutException):
        return FetchFailed(f"{target.host} has stopped sending")
    if isinstance(error, httpx.NetworkError):
        return FetchFailed(f"the connection to {target.host} was lost")
    return FetchFailed(f"{target.host} ended the answer early or does not speak HTTP")


def unexpected(answer: Answer) -> FetchFailed:
    """For a status that is not the one hoped for: what it means and what can be done."""
    host, status = answer.target.host, answer.status
    if status in (401, 403):
        what = "the file is private or its licence must be accepted first; a token may be missing"
    elif status in (404, 410):
        what = "there is no such file or repository, or it is private"
    elif status == 429:
        wait = answer.headers.get("retry-after", "")
        after = f"; try again after {wait} seconds" if _SECONDS.fullmatch(wait) else ""
        what = f"too many requests{after}"
    elif status >= 500:
        what = "it has a problem of its own; try again later"
    else:
        what = "which means nothing for a file"
    failed = FetchFailed(f"{host} answered {status}: {what}")
    failed.answered = status
    code = answer.headers.get("x-error-code", "")
    failed.answer_code = code if _CODE.fullmatch(code) else None
    return failed
