"""How a kernel reaches the service: by HTTP to its own server, found and never guessed."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from ..errors import (
    InternalError,
    InvalidValue,
    RateLimitExceeded,
    ServerUnreachable,
    ShimmyError,
    from_code,
)
from .values import json_value


class Transport(Protocol):
    """Where requests go. Bodies and answers are the HTTP API's, whoever carries them."""

    def get(self, path: str) -> dict[str, Any]: ...

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]: ...

    def delete(self, path: str) -> dict[str, Any]: ...

    def fetch(self, path: str) -> Iterator[bytes]:
        """The pieces of a file."""
        ...

    def stream(self, path: str, body: dict[str, Any]) -> AbstractContextManager[Iterable[bytes]]:
        """The answer's server-sent events as they arrive. Leaving the block cancels the request."""
        ...


@dataclass(frozen=True, slots=True)
class Server:
    """A Jupyter server and the token for it. The token is left out of the representation."""

    url: str
    token: str = field(repr=False)
    socket: str | None = None


_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}  # noqa: S104
"""Where to ask a server that listens on every address; tornado's `::` does not include IPv4."""


def find_server(
    server_url: str | None, kernel_token: str | None, server_pid: int | None, runtime_dir: Path
) -> Server | None:
    """The server that this kernel belongs to: the one that is named, else the one that started
    the kernel; None if there is neither. Any other server is somebody else's.

    Raises `ServerUnreachable` if the server's own record cannot be read.
    """
    if server_url:
        return Server(server_url.rstrip("/") + "/", kernel_token or "")
    if server_pid is None:
        return None
    record = runtime_dir / f"jpserver-{server_pid}.json"
    try:
        info = json.loads(record.read_text())
    except FileNotFoundError:
        return None  # whatever started the kernel is no Jupyter server: nbclient, an editor
    except (OSError, ValueError) as error:
        raise ServerUnreachable(f"the server's record {record.name} is unreadable") from error
    try:
        return _server(info, kernel_token)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerUnreachable(f"the server's record {record.name} is damaged") from error


def _server(info: dict[str, Any], kernel_token: str | None) -> Server:
    url = str(info["url"])
    here = _EVERYWHERE.get(info.get("hostname", "localhost"))
    if here is not None:
        scheme = "https" if info.get("secure") else "http"
        url = f"{scheme}://{here}:{int(info['port'])}{info['base_url']}"
    return Server(url, str(info.get("token") or kernel_token or ""), info.get("sock") or None)


class HttpTransport:
    """Talks to one server. Ignores proxy settings: the token is for that server only."""

    def __init__(self, server: Server, labels: Callable[[], Mapping[str, str]] = dict) -> None:
        self.server = server
        self._labels = labels
        uds: Any = {"transport": httpx.HTTPTransport(uds=server.socket)} if server.socket else {}
        self._client = httpx.Client(headers=headers(server), **reached(server), **uds)

    def get(self, path: str) -> dict[str, Any]:
        return self._asked("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._asked("POST", path, body)

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._asked("PUT", path, body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._asked("DELETE", path)

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        # An answer, or a ledger's verification, takes as long as it takes.
        timeout = httpx.Timeout(30.0, read=None if method == "POST" else 30.0)
        content = None if body is None else written(body)
        with unreachable():
            response = self._client.request(
                method, path, content=content, timeout=timeout, headers=dict(self._labels())
            )
            return read(response)

    def fetch(self, path: str) -> Iterator[bytes]:
        with (
            unreachable(),
            self._client.stream("GET", path, headers=dict(self._labels())) as response,
        ):
            if response.status_code != httpx.codes.OK:
                response.read()
            check(response)
            yield from response.iter_bytes()

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterable[bytes]]:
        with unreachable(), self._sent(path, body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
            check(response)
            yield response.iter_bytes()

    def _sent(self, path: str, body: dict[str, Any]) -> AbstractContextManager[httpx.Response]:
        return self._client.stream(
            "POST", path, content=written(body), headers=dict(self._labels())
        )


def headers(server: Server) -> dict[str, str]:
    """Of every request, beside its labels."""
    token = {"Authorization": f"token {server.token}"} if server.token else {}
    return {"Content-Type": "application/json", **token}


def reached(server: Server) -> dict[str, Any]:
    """How a client of httpx reaches this server: settings that every kind of it takes."""
    return {
        "base_url": "http://localhost/" if server.socket else server.url,
        "timeout": httpx.Timeout(10.0, read=None),
        "trust_env": False,
        # The system's certificates, and what SSL_CERT_FILE names, as for other programs.
        "verify": server.url.startswith("https") and ssl.create_default_context(),
    }


_DOWN = httpx.codes.SERVICE_UNAVAILABLE


def _tells(response: httpx.Response) -> bool:
    """Whether it says which part is down: that is an answer, and no error."""
    with contextlib.suppress(ValueError):
        return "dependencies" in response.json()
    return False


def plain_client(server: Server) -> httpx.Client:
    """For another library that speaks to this server, and knows its address and token itself."""
    settings = reached(server)
    del settings["base_url"]
    if server.socket:
        settings["transport"] = httpx.HTTPTransport(uds=server.socket)
    return httpx.Client(**settings)


def check(response: httpx.Response) -> None:
    """Raises the error that an answer carries, or `ServerUnreachable` if it is not one of ours."""
    if response.is_success or (response.status_code == _DOWN and _tells(response)):
        return
    try:
        error = _error(response.json())
    except (ValueError, KeyError, TypeError):
        reason = "is shimmy-jupyter installed where the server runs?"
        raise ServerUnreachable(
            f"the Jupyter server answered {response.status_code}: {reason}"
        ) from None
    after = response.headers.get("retry-after", "")
    if isinstance(error, RateLimitExceeded) and after.isdecimal():
        error.retry_after = float(after)
    raise error


_NO_JSON = "the Jupyter server's answer is not JSON"


def read(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON. Raises as `check` does, and `ServerUnreachable` if it is none: a proxy's page."""
    check(response)
    try:
        return dict(response.json())
    except (ValueError, TypeError):
        raise ServerUnreachable(_NO_JSON) from None


def written(body: dict[str, Any]) -> bytes:
    """A body as JSON. Raises `InvalidValue`, naming the field that cannot be written as such."""
    try:
        return _dump(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"this cannot be written as JSON: {error}", param=_odd(body)) from None


def _dump(value: Any) -> bytes:
    # Half of a surrogate pair is no UTF-8, and infinity no JSON.
    return json.dumps(
        value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=json_value
    ).encode()


def _odd(body: dict[str, Any]) -> str | None:
    for name, value in body.items():
        try:
            _dump(value)
        except (TypeError, ValueError, RecursionError):
            return name
    return None


@contextlib.contextmanager
def unreachable() -> Iterator[None]:
    """Raises `ServerUnreachable` where a server is not reached, or no longer."""
    try:
        yield
    except httpx.TransportError as error:
        reason = type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            reason = "its certificate is not trusted here: name the authority in SSL_CERT_FILE"
        raise ServerUnreachable(
            f"this kernel's Jupyter server did not answer ({reason})"
        ) from error


def _error(body: dict[str, Any]) -> ShimmyError:
    error = body["error"]
    return from_code(
        error["code"], error["message"], param=error["param"], request_id=error["request_id"]
    )


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to `[DONE]`.

    What a comment says of waiting comes as `{"waiting": {...}, "choices": []}`. Raises the error that
    the stream carries; a stream that just ends was cut off.
    """
    blocks = Blocks()
    for chunk in chunks:
        yield from blocks.feed(chunk)
        if blocks.done:
            return
    blocks.close()


class Blocks:
    """Server-sent events, however they are cut; `done` after `[DONE]`."""

    def __init__(self) -> None:
        self._pending = b""
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """What has become whole, as `events` yields it."""
        *whole, self._pending = (self._pending + chunk).split(b"\n\n")
        for block in whole:
            if block.startswith(b":"):
                with contextlib.suppress(ValueError):
                    yield {"waiting": json.loads(block[1:]), "choices": []}
                continue
            data = block.removeprefix(b"data: ")
            if data == b"[DONE]":
                self.done = True
                return
            try:
                item = json.loads(data)
            except ValueError:
                raise ServerUnreachable(_NO_JSON) from None
            if "error" in item:
                raise _error(item)
            yield item

    def close(self) -> None:
        """Raises `InternalError` unless it is done."""
        if not self.done:
            raise InternalError("the answer was cut off")


def say_inside() -> None:
    """Once, before a model answers in the kernel itself."""
    print("shimmy: no Jupyter server started this kernel; the model runs inside it.")


class Connection:
    """Finds the transport once, when it is first needed; says so when it is not a server. `labels` are
    headers of every request.
    """

    def __init__(
        self,
        find: Callable[[], Server | None],
        local: Callable[[], Transport],
        labels: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._find, self._local, self._labels = find, local, labels
        self._transport: Transport | None = None

    def at_hand(self) -> Transport | None:
        """What there is without a model in this kernel. None where there is only that, and it has not been
        asked for yet.
        """
        if self._transport is None and self._find() is None:
            return None
        return self.transport()

    def transport(self) -> Transport:
        if self._transport is None:
            server = self._find()
            if server is not None:
                self._transport = HttpTransport(server, self._labels)
            else:
                say_inside()
                self._transport = self._local()
        return self._transport
