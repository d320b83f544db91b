"""Fetching from a real HTTPS server on loopback that plays a hub and its content network. Cases:

way: a file through a redirect to another host; certificate and SNI are the name's while the address
 is the checked one; nothing else is looked up; one resolution for a connection (rebinding); the next
 address where one does not answer; a name that is unknown, private, or public and private; redirects
 to http, to an address, to a name that is private, to a host not allowed, in a circle, five, six,
 without a location, relative, with a space; certificates of another name and of nobody; a context
 that checks none; the environment's proxies; cookies
tokens: to the host they are for, along its own redirects, to no other host, not back again, none;
 unusable ones
sizes: as expected; announced less or more than expected; announced more than sent; sent more than
 announced; none announced with and without something to check; over the limit, announced and
 streamed; empty; compressed; a web page; a length that is no number
resuming: after a drop, a cancel, a kill of the process; complete but not published; ranges ignored;
 another version; another range; a weak tag, none; 416; a note that is broken, of another URL or longer
 than the limit; a mismatch after resuming; what never reached the disk is dropped
digest: right, wrong (the part goes), wrong size
time: a server that stands still, before and within the answer; a slow one
disk: no room at first, later, really full, a folder that is not there or not writable
files: an existing one that is the same, another, without a digest, a link, a folder; appearing
 meanwhile, the same and another; a link, a pipe, a folder, another's link in place of the part; two at
 once; no hard links; modes; names that are none; validation refuses; discard
hub: resolve of large and small files, moved repositories, gated, missing; list in pages, elsewhere,
 without end, of hostile names, not JSON; names that are none
Always: no secret, no path in what is raised or logged.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import logging
import os
import random
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shimmy_jupyter.errors import Cancelled, InvalidValue, Misconfigured, ShimmyError
from shimmy_jupyter.models import fetch_http, fetch_job, fetch_part
from shimmy_jupyter.models.addresses import refusal
from shimmy_jupyter.models.fetch import (
    ChecksumMismatch,
    DiskFull,
    Fetcher,
    FetchFailed,
    FetchInterrupted,
    FetchRefused,
    FetchRequest,
    FileExists,
    Progress,
    Timeouts,
)
from shimmy_jupyter.models.fetch_hub import HubFile, hub_file_url, hub_files, hub_resolve
from shimmy_jupyter.models.fetch_part import PartFile

TOKEN = "hf_s3cretToken"
SIGNATURE = "s3cretSignature"
BODY = random.Random(5).randbytes(200_000)
SHA = hashlib.sha256(BODY).hexdigest()
NAME = "model.gguf"

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes certificates")


# The server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: Any) -> Path:
    """An authority, and a certificate of its own for the names that tests use."""
    folder = tmp_path_factory.mktemp("certificates")
    new_key = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec",
               "-pkeyopt", "ec_paramgen_curve:prime256v1"]  # fmt: skip
    names = "subjectAltName=DNS:hub.test,DNS:cdn.test,DNS:mirror.test"
    for arguments in (
        [*new_key, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem",
         "-addext", "keyUsage=critical,keyCertSign"],
        [*new_key, "-subj", "/CN=server", "-keyout", "key.pem", "-out", "cert.pem", "-CA", "ca.pem",
         "-CAkey", "ca.key", "-addext", names, "-addext", "basicConstraints=critical,CA:FALSE"],
    ):  # fmt: skip
        subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    return folder


@dataclass
class Seen:
    method: str
    host: str
    path: str
    headers: dict[str, str]
    sni: str | None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # type: ignore[assignment]

    def setup(self) -> None:
        self.request.settimeout(20)
        self.sni: list[str | None] = []
        self.request = self.server.wrap(self.request, self.sni)
        super().setup()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    def do_GET(self) -> None:
        host = self.headers["Host"].partition(":")[0]
        path = self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(Seen(self.command, host, self.path, headers, self.sni[0]))
        self.close_connection = True
        self.server.routes[host, path](self)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Says exactly what it is told; a length only if none is among it."""
        self.send_response(status)
        headers.setdefault("content_length", str(len(body)))
        for name, value in headers.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


Route = Callable[[Handler], None]


class Hub(socketserver.ThreadingTCPServer):
    """Plays the answers that a test has put into `routes`, by host and path."""

    def __init__(self, certificates: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[tuple[str, str], Route] = {}
        self.seen: list[Seen] = []
        self.over = threading.Event()
        self.certificates = certificates

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def wrap(self, connection: socket.socket, sni: list[str | None]) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificates / "cert.pem", self.certificates / "key.pem")
        context.sni_callback = lambda _socket, name, _context: sni.append(name)
        return context.wrap_socket(connection, server_side=True)

    def handle_error(self, *args: Any) -> None:
        if isinstance(sys.exception(), OSError):
            return  # clients of these tests leave when they like
        traceback.print_exc()

    def url(self, path: str = "/a", host: str = "hub.test", query: str = "") -> str:
        return f"https://{host}:{self.port}{path}{query}"

    def serve(self, route: Route, path: str = "/a", host: str = "hub.test") -> None:
        self.routes[host, path] = route


@pytest.fixture
def hub(certificates: Path) -> Iterator[Hub]:
    with Hub(certificates) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def whole(body: bytes = BODY, **headers: str) -> Route:
    headers = {"etag": '"v1"', **headers}

    def route(handler: Handler) -> None:
        handler.answer(200, body, **headers)

    return route


def ranged(body: bytes = BODY, etag: str = '"v1"') -> Route:
    """Answers ranges of this version as a content network does."""

    def route(handler: Handler) -> None:
        asked = handler.headers.get("Range")
        if asked is None or handler.headers.get("If-Range") != etag:
            return handler.answer(200, body, etag=etag)
        first = int(asked.removeprefix("bytes=").rstrip("-"))
        span = f"bytes {first}-{len(body) - 1}/{len(body)}"
        return handler.answer(206, body[first:], etag=etag, content_range=span)

    return route


def dropping(sent: int = 100_000, **headers: str) -> Route:
    """Announces everything, sends a part of it."""
    return whole(BODY[:sent], content_length=str(len(BODY)), **headers)


def redirect(location: str, status: int = 302, **headers: str) -> Route:
    def route(handler: Handler) -> None:
        handler.answer(status, location=location, **headers)

    return route


# What tests do


def near(address: str) -> str | None:
    return None if address.startswith("127.0.0.") else refusal(address)


@dataclass
class Client:
    """A fetcher whose every name is the server, if `addresses` does not say otherwise."""

    hub: Hub
    folder: Path
    context: ssl.SSLContext
    addresses: dict[str, list[list[str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    timeouts: Timeouts = field(default_factory=lambda: Timeouts(20, 20, 20))
    progress: list[Progress] = field(default_factory=list)

    def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.addresses.get(host)
        if answers is None:
            return ["127.0.0.1"]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return found

    def fetcher(self, **options: Any) -> Fetcher:
        hosts = ("hub.test", "cdn.test", "mirror.test", "wrong.test", "private.test")
        defaults: dict[str, Any] = {
            "resolver": self.resolve, "reserve": 0, "timeouts": self.timeouts,
            "token_for": self.tokens.get, "verify": self.context, "refused": near,
        }  # fmt: skip
        allowed = [f"{host}:{self.hub.port}" for host in hosts]
        return Fetcher(allowed, **defaults | options)

    def request(self, url: str = "", **fields: Any) -> FetchRequest:
        url = url or self.hub.url(query=f"?sig={SIGNATURE}")
        return FetchRequest(url, self.folder, fields.pop("name", NAME), **fields)

    def fetch(self, url: str = "", *, options: dict[str, Any] | None = None, **fields: Any) -> Any:
        hooks = {key: fields.pop(key) for key in ("cancelled", "validate") if key in fields}
        request = self.request(url, **fields)
        return self.fetcher(**options or {}).fetch(request, self.progress.append, **hooks)

    def fails(self, error: type[ShimmyError], why: str, url: str = "", **fields: Any) -> str:
        """The same, but it must fail, in words that give nothing away."""
        with pytest.raises(error, match=why) as caught:
            self.fetch(url, **fields)
        assert caught.type is error
        message = caught.value.message
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        assert not leaks(told), told
        assert str(self.folder) not in message
        assert "127.0.0.1" not in message
        return message

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    @property
    def part(self) -> Path:
        return self.folder / f"{NAME}.part"

    @property
    def note(self) -> Path:
        return self.folder / f"{NAME}.part.json"

    def dropped(self, **headers: str) -> None:
        """Leaves the first half there."""
        self.hub.serve(dropping(**headers))
        self.fails(FetchInterrupted, "100.0 kB of 200.0 kB are kept", expected_sha256=SHA)
        assert self.part.read_bytes() == BODY[:100_000]
        self.hub.seen.clear()


def leaks(text: str) -> bool:
    return TOKEN in text or SIGNATURE in text


@pytest.fixture
def client(hub: Hub, tmp_path: Path, certificates: Path, caplog: Any) -> Iterator[Client]:
    folder = tmp_path / "models"
    folder.mkdir()
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    caplog.set_level(logging.DEBUG)
    yield Client(hub, folder, context)
    told = "\n".join(record.getMessage() for record in caplog.get_records("call"))
    assert not leaks(told)
    assert "authorization" not in told.lower()


def complete(client: Client, fetched: Any, name: str = NAME) -> None:
    assert (fetched.sha256, fetched.size, fetched.path) == (SHA, len(BODY), client.folder / name)
    assert fetched.path.read_bytes() == BODY
    assert client.files == [name]


class TestWay:
    def test_through_a_redirect_to_another_host(self, client: Client, hub: Hub) -> None:
        hub.serve(redirect(hub.url("/b", "cdn.test", f"?sig={SIGNATURE}")))
        hub.serve(whole(), "/b", "cdn.test")
        fetched = client.fetch(expected_size=len(BODY), expected_sha256=SHA)
        complete(client, fetched)
        assert (fetched.url, fetched.etag) == (hub.url("/a"), '"v1"')
        assert [(seen.host, seen.sni) for seen in hub.seen] == [
            ("hub.test", "hub.test"),
            ("cdn.test", "cdn.test"),
        ]
        assert hub.seen[1].path == f"/b?sig={SIGNATURE}"
        assert hub.seen[0].headers["accept-encoding"] == "identity"
        assert client.progress[0] == Progress("downloading", 0, len(BODY))
        assert client.progress[-1] == Progress("downloading", len(BODY), len(BODY))

    def test_a_query_reaches_the_server_as_it_is(self, client: Client, hub: Hub) -> None:
        query = "?a=%2F&b=%2f+c'd&e=%C3%A9&~;=|{}"
        hub.serve(whole(), "/a%20b/%2E/c")
        complete(client, client.fetch(hub.url("/a%20b/%2E/c", query=query)))
        assert hub.seen[0].path == f"/a%20b/%2E/c{query}"

    def test_only_the_injected_resolver_sees_names(
        self, client: Client, hub: Hub, monkeypatch: Any
    ) -> None:
        hub.serve(whole())
        before, looked_up = socket.getaddrinfo, []

        def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
            looked_up.append(host)
            return before(host, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        client.fetch()
        assert (client.asked, looked_up) == (["hub.test"], ["127.0.0.1"])

    def test_rebinding_between_check_and_connect(self, client: Client, hub: Hub) -> None:
        client.addresses["hub.test"] = [["127.0.0.1"], ["169.254.169.254"]]
        hub.serve(whole())
        complete(client, client.fetch())
        assert client.asked == ["hub.test"]

    def test_rebinding_between_two_requests(self, client: Client, hub: Hub) -> None:
        client.addresses["hub.test"] = [["127.0.0.1"], ["169.254.169.254"]]
        hub.serve(redirect("/b"))
        client.fails(FetchRefused, "hub.test resolves to an address that is link-local")
        assert len(hub.seen) == 1

    def test_the_next_address(self, client: Client, hub: Hub) -> None:
        client.addresses["hub.test"] = [["127.0.0.2", "127.0.0.1"]]
        hub.serve(whole())
        complete(client, client.fetch())

    def test_no_address_answers(self, client: Client) -> None:
        client.addresses["hub.test"] = [["127.0.0.2"]]
        client.fails(FetchFailed, "hub.test cannot be connected to")
        assert client.files == []

    def test_an_unknown_name(self, client: Client) -> None:
        client.addresses["hub.test"] = [[]]
        client.fails(FetchFailed, "hub.test cannot be resolved; is this machine online")

    @pytest.mark.parametrize("more", [[], ["127.0.0.1"]])
    @pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1"])
    def test_private_addresses(self, client: Client, hub: Hub, address: str, more: Any) -> None:
        client.addresses["hub.test"] = [[*more, address]]
        client.fails(FetchRefused, "hub.test resolves to an address that is")
        assert hub.seen == []

    def test_loopback_by_default(self, client: Client, hub: Hub) -> None:
        client.fails(FetchRefused, "address that is loopback", options={"refused": refusal})
        assert hub.seen == []

    def test_redirects_to_where_nothing_is_fetched(self, client: Client, hub: Hub) -> None:
        client.addresses["private.test"] = [["192.168.0.1"]]
        secret = f"?sig={SIGNATURE}"
        for location, why in (
            (f"http://cdn.test:{hub.port}/b{secret}", "only https"),
            (f"https://169.254.169.254/latest{secret}", "names an address"),
            (f"https://[::1]:{hub.port}/{secret}", "names an address"),
            (f"https://evil.test:{hub.port}/{secret}", "evil.test:.* is not among the hosts"),
            (f"https://cdn.test:1/{secret}", "cdn.test:1 is not among"),
            (f"//evil.test/{secret}", "is not among"),
            (f"\\\\evil.test/{secret}", "backslash"),
            (f"https://{TOKEN}@cdn.test:{hub.port}/", "credentials"),
            (f"https://[/{secret}", "no URL"),
            (f"/b c{secret}", "no URL"),
            ("file:///etc/passwd", "only https"),
            (hub.url("/b", "private.test", secret), "private.test resolves to an address"),
            ("", "without saying where to"),
        ):
            hub.serve(redirect(location))
            error = FetchFailed if not location else FetchRefused
            client.fails(error, why)
        assert {seen.host for seen in hub.seen} == {"hub.test"}
        assert client.files == []

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_five_redirects(self, client: Client, hub: Hub, status: int) -> None:
        for number in range(5):
            path = f"/{number}" if number else "/a"
            hub.serve(redirect(f"/{number + 1}" if number < 4 else "end", status), path)
        hub.serve(whole(), "/end")
        complete(client, client.fetch())

    def test_redirects_in_a_circle(self, client: Client, hub: Hub) -> None:
        hub.serve(redirect(hub.url("/a", "cdn.test")))
        hub.serve(redirect(hub.url("/a")), host="cdn.test")
        client.fails(FetchFailed, "redirects more than 5 times")
        assert len(hub.seen) == 6

    @pytest.mark.parametrize(
        ("status", "why"),
        [(401, "token"), (403, "licence"), (404, "no such file"), (429, "too many"), (500, "later"),
         (503, "later"), (204, "nothing"), (206, "nothing"), (304, "nothing")],
    )  # fmt: skip
    def test_other_answers(self, client: Client, hub: Hub, status: int, why: str) -> None:
        hub.serve(lambda handler: handler.answer(status, content_length=""))
        client.fails(FetchFailed, f"hub.test answered {status}: .*{why}")

    def test_too_many_requests(self, client: Client, hub: Hub) -> None:
        hub.serve(lambda handler: handler.answer(429, retry_after="17"))
        client.fails(FetchFailed, "try again after 17 seconds")

    def test_certificates(self, client: Client, hub: Hub) -> None:
        why = "wrong.test has a certificate that cannot be trusted: Hostname mismatch"
        client.fails(FetchFailed, why, hub.url(host="wrong.test"))
        options = {"verify": fetch_http.default_context()}
        client.fails(FetchFailed, "hub.test has a certificate that cannot", options=options)
        assert hub.seen == []

    def test_a_context_that_checks_nothing(self, client: Client) -> None:
        for check_name in (True, False):
            context = ssl.create_default_context()
            context.check_hostname = False
            if check_name:
                context.verify_mode = ssl.CERT_NONE
            with pytest.raises(Misconfigured, match="certificates must be checked"):
                client.fetcher(verify=context)

    def test_proxies_of_the_environment(self, client: Client, hub: Hub, monkeypatch: Any) -> None:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        hub.serve(whole())
        complete(client, client.fetch())

    def test_cookies(self, client: Client, hub: Hub) -> None:
        hub.serve(redirect("/b", set_cookie=f"a={SIGNATURE}"))
        hub.serve(whole(), "/b")
        client.fetch()
        assert "cookie" not in hub.seen[1].headers

    def test_other_users_of_the_library_keep_their_log(self) -> None:
        record = logging.makeLogRecord({"msg": "x"})
        assert logging.getLogger("httpcore.http11").filter(record)


class TestTokens:
    def authorizations(self, client: Client) -> list[str | None]:
        return [seen.headers.get("authorization") for seen in client.hub.seen]

    def test_the_host_itself_and_no_other(self, client: Client, hub: Hub) -> None:
        client.tokens = {"hub.test": TOKEN, "cdn.test": TOKEN}
        hub.serve(redirect("/b", 307))
        hub.serve(redirect(hub.url("/c", "cdn.test")), "/b")
        hub.serve(redirect(hub.url("/d")), "/c", "cdn.test")
        hub.serve(whole(), "/d")
        complete(client, client.fetch())
        assert self.authorizations(client) == [f"Bearer {TOKEN}", f"Bearer {TOKEN}", None, None]

    def test_none(self, client: Client, hub: Hub) -> None:
        client.tokens = {"cdn.test": TOKEN}
        hub.serve(redirect(hub.url("/c", "cdn.test")))
        hub.serve(whole(), "/c", "cdn.test")
        complete(client, client.fetch())
        assert self.authorizations(client) == [None, None]

    @pytest.mark.parametrize("token", ["", f"{TOKEN}\r\nHost: evil", f"{TOKEN} ", f"{TOKEN}é"])
    def test_unusable(self, client: Client, hub: Hub, token: str) -> None:
        client.tokens = {"hub.test": token}
        client.fails(Misconfigured, "the token for hub.test")
        assert hub.seen == []


class TestSizes:
    def test_not_what_was_expected(self, client: Client, hub: Hub) -> None:
        hub.serve(whole())
        for size in (0, len(BODY) - 1, len(BODY) + 1):
            client.fails(FetchFailed, "offers 200000 bytes where", expected_size=size)
        assert client.files == []

    def test_sent_less_than_announced(self, client: Client, hub: Hub) -> None:
        hub.serve(dropping(etag=""))
        client.fails(FetchFailed, "nothing could be kept", expected_sha256=SHA)
        assert client.files == []

    def test_sent_more_than_announced(self, client: Client, hub: Hub) -> None:
        hub.serve(whole(BODY + b"more", content_length=str(len(BODY))))
        complete(client, client.fetch(expected_sha256=SHA))

    def chunked(self, body: bytes) -> Route:
        data = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 5000]), body[i : i + 5000])
                        for i in range(0, len(body), 5000))  # fmt: skip
        return whole(data + b"0\r\n\r\n", transfer_encoding="chunked", content_length="")

    def test_no_length_announced(self, client: Client, hub: Hub) -> None:
        for route in (self.chunked(BODY), whole(content_length="")):
            hub.serve(route)
            client.fails(FetchFailed, "does not say how long the file is")
            complete(client, client.fetch(expected_sha256=SHA))
            (client.folder / NAME).unlink()
            complete(client, client.fetch(expected_size=len(BODY)))
            (client.folder / NAME).unlink()

    def test_no_length_and_another_size(self, client: Client, hub: Hub) -> None:
        for body, error, why in (
            (BODY + b"more", FetchRefused, "sends more than the 200000 bytes"),
            (BODY[:-1], FetchInterrupted, "sent less than it had announced"),
        ):
            for route in (self.chunked(body), whole(body, content_length="")):
                hub.serve(route)
                client.fails(error, why, expected_size=len(BODY))

    def test_a_length_beside_chunks_means_nothing(self, client: Client, hub: Hub) -> None:
        both = self.chunked(BODY)

        def route(handler: Handler) -> None:
            handler.send_response = lambda status: (  # type: ignore[method-assign]
                BaseHTTPRequestHandler.send_response(handler, status),
                handler.send_header("content-length", "7"),
            )
            both(handler)

        hub.serve(route)
        complete(client, client.fetch(expected_sha256=SHA))

    def test_over_the_limit(self, client: Client, hub: Hub) -> None:
        hub.serve(whole())
        for options, fields in (
            ({"max_bytes": len(BODY) - 1}, {}),
            ({"max_bytes": len(BODY) - 1}, {"max_bytes": len(BODY)}),
            ({}, {"max_bytes": len(BODY) - 1}),
            ({}, {"max_bytes": 0}),
        ):
            client.fails(FetchRefused, "more than the .* allowed", options=options, **fields)
        seen = len(hub.seen)
        client.fails(FetchRefused, "allowed", max_bytes=5, expected_size=6)
        assert len(hub.seen) == seen
        hub.serve(self.chunked(BODY))
        client.fails(FetchRefused, "longer than", max_bytes=len(BODY) - 1, expected_sha256=SHA)
        assert client.files == []
        complete(client, client.fetch(max_bytes=len(BODY), expected_sha256=SHA))

    def test_empty(self, client: Client, hub: Hub) -> None:
        hub.serve(whole(b""))
        assert client.fetch(expected_size=0).size == 0
        assert client.files == [NAME]

    def test_compressed(self, client: Client, hub: Hub) -> None:
        hub.serve(whole(gzip.compress(BODY), content_encoding="gzip"))
        client.fails(FetchFailed, "compressed", expected_sha256=SHA)
        assert client.files == []

    def test_a_web_page(self, client: Client, hub: Hub) -> None:
        hub.serve(whole(b"<html>", content_type="text/html; charset=utf-8"))
        client.fails(FetchFailed, "a web page")

    def test_a_length_that_is_no_number(self, client: Client, hub: Hub) -> None:
        hub.serve(whole(content_length="many"))
        client.fails(FetchFailed, "hub.test")

    def test_not_http(self, client: Client, hub: Hub) -> None:
        hub.serve(lambda handler: handler.wfile.write(SIGNATURE.encode() + b"\r\n\r\n"))
        client.fails(FetchFailed, "does not speak HTTP")


class TestResuming:
    def test_after_a_drop(self, client: Client, hub: Hub) -> None:
        client.dropped()
        assert json.loads(client.note.read_text()) == {
            "url": hub.url(), "etag": '"v1"', "size": len(BODY), "safe": 100_000,
        }  # fmt: skip
        assert {path.stat().st_mode & 0o777 for path in (client.part, client.note)} == {0o600}
        hub.serve(ranged())
        client.progress.clear()
        complete(client, client.fetch(expected_sha256=SHA))
        assert hub.seen[0].headers["range"] == "bytes=100000-"
        assert hub.seen[0].headers["if-range"] == '"v1"'
        assert client.progress == [
            Progress("hashing", 0, 100_000),
            Progress("hashing", 100_000, 100_000),
            Progress("downloading", 100_000, len(BODY)),
            Progress("downloading", len(BODY), len(BODY)),
        ]

    def test_through_a_redirect_with_another_signature(self, client: Client, hub: Hub) -> None:
        client.dropped()
        hub.serve(redirect(hub.url("/b", "cdn.test", "?sig=2")))
        hub.serve(ranged(), "/b", "cdn.test")
        complete(client, client.fetch(hub.url("/a", query="?other"), expected_sha256=SHA))
        assert [seen.headers.get("range") for seen in hub.seen] == ["bytes=100000-"] * 2

    def test_without_a_digest(self, client: Client, hub: Hub) -> None:
        client.dropped()
        hub.serve(ranged())
        complete(client, client.fetch())
        assert len(hub.seen) == 1

    def test_after_a_cancel(self, client: Client, hub: Hub) -> None:
        hub.serve(ranged())
        calls = iter(range(100))
        client.fails(Cancelled, "model.gguf was cancelled", cancelled=lambda: next(calls) == 4)
        kept = client.part.stat().st_size
        assert 0 < kept < len(BODY)
        complete(client, client.fetch(expected_sha256=SHA))
        assert hub.seen[1].headers["range"] == f"bytes={kept}-"

    def test_cancelled_at_once(self, client: Client, hub: Hub) -> None:
        hub.serve(ranged())
        client.fails(Cancelled, "cancelled", cancelled=lambda: True)
        assert client.files == []

    def test_after_a_kill(
        self, client: Client, hub: Hub, certificates: Path, tmp_path: Path
    ) -> None:
        """A process of its own, which the server keeps waiting until it has been killed."""

        def half(handler: Handler) -> None:
            handler.answer(200, BODY[:100_000], content_length=str(len(BODY)), etag='"v1"')
            hub.over.wait(20)

        hub.serve(half)
        script = f"""
import ssl
from pathlib import Path
from shimmy_jupyter.models import fetch_job, fetch_part
from shimmy_jupyter.models.fetch import Fetcher, FetchRequest
fetch_part.CHECK_BYTES, fetch_job._REPORT_BYTES = 1000, 1
fetcher = Fetcher(
    ["hub.test:{hub.port}"], resolver=lambda host, port: ["127.0.0.1"], reserve=0,
    verify=ssl.create_default_context(cafile={str(certificates / "ca.pem")!r}),
    refused=lambda address: None,
)
request = FetchRequest({hub.url()!r}, Path({str(client.folder)!r}), {NAME!r})
fetcher.fetch(request, lambda progress: print(progress.done, flush=True))
"""
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if int(line) == 100_000:
                    child.kill()
                    break
        assert child.returncode == -9
        assert sorted(client.files) == [NAME + ".part", NAME + ".part.json"]
        hub.serve(ranged())
        complete(client, client.fetch(expected_sha256=SHA))
        assert hub.seen[1].headers["range"] == "bytes=100000-"

    def test_what_had_not_reached_the_disk(self, client: Client, hub: Hub) -> None:
        client.dropped()
        client.part.write_bytes(BODY[:100_000] + bytes(50_000))  # as after a power cut
        hub.serve(ranged())
        complete(client, client.fetch(expected_sha256=SHA))
        assert hub.seen[0].headers["range"] == "bytes=100000-"

    def test_complete_but_not_published(self, client: Client, hub: Hub) -> None:
        client.dropped()
        client.part.write_bytes(BODY)
        note = json.loads(client.note.read_text())
        client.note.write_text(json.dumps(note | {"safe": len(BODY)}))
        complete(client, client.fetch(expected_sha256=SHA))
        assert hub.seen == []

    def test_complete_without_a_digest_is_fetched_again(self, client: Client, hub: Hub) -> None:
        client.dropped()
        client.part.write_bytes(bytes(len(BODY)))
        note = json.loads(client.note.read_text())
        client.note.write_text(json.dumps(note | {"safe": len(BODY)}))
        hub.serve(ranged())
        complete(client, client.fetch())
        assert "range" not in hub.seen[0].headers

    def test_ranges_ignored(self, client: Client, hub: Hub) -> None:
        client.dropped()
        hub.serve(whole())
        complete(client, client.fetch(expected_sha256=SHA))
        assert len(hub.seen) == 1

    def test_another_version(self, client: Client, hub: Hub) -> None:
        other = BODY[::-1]
        client.dropped()
        hub.serve(ranged(other, '"v2"'))
        fetched = client.fetch()
        assert fetched.path.read_bytes() == other
        assert (fetched.sha256, fetched.etag) == (hashlib.sha256(other).hexdigest(), '"v2"')

    @pytest.mark.parametrize(
        "headers",
        [
            {"content_range": "bytes 0-199999/200000"},
            {"content_range": "bytes 99999-199999/200000"},
            {"content_range": "bytes 100000-199998/200000"},
            {"content_range": "bytes 100000-199999/200001"},
            {"content_range": "bytes 100000-199999/*"},
            {"content_range": "bytes */200000"},
            {"content_range": ""},
            {"content_range": "bytes 100000-199999/200000", "etag": '"v2"'},
            {"content_range": "bytes 100000-199999/200000", "etag": ""},
            {"content_range": "bytes 100000-199999/200000", "content_length": "5"},
        ],
    )
    def test_another_range(self, client: Client, hub: Hub, headers: dict[str, str]) -> None:
        client.dropped()

        def route(handler: Handler) -> None:
            if handler.headers.get("Range"):
                return handler.answer(206, BODY[100_000:], **{"etag": '"v1"', **headers})
            return handler.answer(200, BODY, etag='"v1"')

        hub.serve(route)
        complete(client, client.fetch(expected_sha256=SHA))
        assert len(hub.seen) == 2

    @pytest.mark.parametrize("status", [412, 416])
    def test_the_range_is_refused(self, client: Client, hub: Hub, status: int) -> None:
        client.dropped()

        def route(handler: Handler) -> None:
            asked = handler.headers.get("Range")
            handler.answer(status if asked else 200, b"" if asked else BODY)

        hub.serve(route)
        complete(client, client.fetch(expected_sha256=SHA))

    def test_an_error_keeps_what_is_there(self, client: Client, hub: Hub) -> None:
        client.dropped()
        hub.serve(lambda handler: handler.answer(503))
        client.fails(FetchFailed, "later", expected_sha256=SHA)
        assert client.part.stat().st_size == 100_000

    @pytest.mark.parametrize("etag", ['W/"v1"', "v1", ""])
    def test_no_strong_tag(self, client: Client, hub: Hub, etag: str) -> None:
        hub.serve(dropping(etag=etag))
        client.fails(FetchFailed, "nothing could be kept", expected_sha256=SHA)
        assert client.files == []

    @pytest.mark.parametrize(
        "changed",
        [{"url": "https://hub.test/other"}, {"etag": 'W/"v1"'}, {"etag": '"v\r\n1"'}, {"size": 99_999},
         {"size": -1}, {"size": True}, {"safe": 200_001}, {"safe": "x"}, {"etag": None}, {"size": 1 << 50}],
    )  # fmt: skip
    def test_notes_of_something_else(self, client: Client, hub: Hub, changed: Any) -> None:
        client.dropped()
        note = json.loads(client.note.read_text())
        client.note.write_text(json.dumps(note | changed))
        hub.serve(ranged())
        complete(client, client.fetch(expected_sha256=SHA))
        assert "range" not in hub.seen[0].headers

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "1", "[" * 60_000, "\x00", '{"url": 1}'])
    def test_notes_that_are_broken(self, client: Client, hub: Hub, text: str) -> None:
        client.dropped()
        client.note.write_text(text)
        hub.serve(ranged())
        complete(client, client.fetch(expected_sha256=SHA))
        assert "range" not in hub.seen[0].headers

    def test_a_note_that_is_a_link(self, client: Client, hub: Hub, tmp_path: Path) -> None:
        client.dropped()
        note = client.note.rename(tmp_path / "note")
        client.note.symlink_to(note)
        before = note.read_text()
        hub.serve(dropping())
        client.fails(FetchInterrupted, "kept", expected_sha256=SHA)
        assert note.read_text() == before
        assert not client.note.is_symlink()

    def test_a_part_that_was_changed(self, client: Client, hub: Hub) -> None:
        client.dropped()
        client.part.write_bytes(bytes(100_000))
        hub.serve(ranged())
        client.fails(ChecksumMismatch, "it is removed", expected_sha256=SHA)
        assert client.files == []
        complete(client, client.fetch(expected_sha256=SHA))

    def test_another_expected_size(self, client: Client, hub: Hub) -> None:
        client.dropped()
        hub.serve(ranged())
        client.fails(FetchFailed, "offers", expected_size=7)


class TestDigest:
    def test_wrong(self, client: Client, hub: Hub) -> None:
        hub.serve(whole(BODY[::-1]))
        client.fails(ChecksumMismatch, "not the file that was asked for", expected_sha256=SHA)
        assert client.files == []

    @pytest.mark.parametrize("digest", ["", SHA.upper(), SHA[:-1], SHA + "0", "../" + SHA[3:]])
    def test_no_digest(self, client: Client, hub: Hub, digest: str) -> None:
        client.fails(InvalidValue, "64 hex digits", expected_sha256=digest)
        assert hub.seen == []


class TestTime:
    def test_standing_still(self, client: Client, hub: Hub) -> None:
        client.timeouts = Timeouts(20, 0.5, 20)

        def silent(handler: Handler) -> None:
            hub.over.wait(20)

        def stalled(handler: Handler) -> None:
            handler.answer(200, BODY[:100_000], content_length=str(len(BODY)), etag='"v1"')
            hub.over.wait(20)

        hub.serve(silent)
        client.fails(FetchFailed, "hub.test has stopped sending")
        hub.serve(stalled)
        client.fails(FetchInterrupted, "has stopped sending; 100.0 kB of 200.0 kB are kept")

    def test_slow(self, client: Client, hub: Hub) -> None:
        """Longer in all than the limit for the next bytes."""
        client.timeouts = Timeouts(20, 0.5, 20)

        def route(handler: Handler) -> None:
            handler.answer(200, b"", content_length="8")
            for number in range(8):
                hub.over.wait(0.1)
                handler.wfile.write(b"%d" % number)

        hub.serve(route)
        assert client.fetch().path.read_bytes() == b"01234567"


class TestDisk:
    def free(self, monkeypatch: Any, *sizes: int) -> None:
        left = iter(sizes)

        def usage(_path: Path) -> Any:
            return SimpleNamespace(free=next(left))

        monkeypatch.setattr(shutil, "disk_usage", usage)

    def test_no_room(self, client: Client, hub: Hub, monkeypatch: Any) -> None:
        hub.serve(whole())
        self.free(monkeypatch, 1_199_999)
        why = "needs 200.0 kB, the disk has 1.2 MB free, of which 1.0 MB are kept"
        client.fails(DiskFull, why, options={"reserve": 1_000_000})
        assert client.files == []
        self.free(monkeypatch, 1_199_999)
        client.fails(DiskFull, why, options={"reserve": 1_000_000}, expected_size=len(BODY))
        assert len(hub.seen) == 1

    def test_no_room_later(self, client: Client, hub: Hub, monkeypatch: Any) -> None:
        hub.serve(ranged())
        monkeypatch.setattr(fetch_part, "CHECK_BYTES", 50_000)
        self.free(monkeypatch, 2_000_000, 1_000_000, 999_999)
        client.fails(DiskFull, "free", options={"reserve": 1_000_000})
        kept = client.part.stat().st_size
        assert 100_000 <= kept < len(BODY)
        self.free(monkeypatch, *[2_000_000] * 9)
        complete(client, client.fetch(expected_sha256=SHA))
        assert hub.seen[1].headers["range"] == f"bytes={kept}-"

    def test_no_room_for_the_rest(self, client: Client, hub: Hub, monkeypatch: Any) -> None:
        client.dropped()
        self.free(monkeypatch, 1_099_999)
        client.fails(DiskFull, "needs 100.0 kB", options={"reserve": 1_000_000})
        assert (hub.seen, client.part.stat().st_size) == ([], 100_000)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_really_full(self, client: Client, hub: Hub, monkeypatch: Any, number: int) -> None:
        hub.serve(whole())
        before, written = fetch_part._write_all, []

        def write(fd: int, data: bytes) -> None:
            written.append(len(data))
            if sum(written) > 100_000:
                raise OSError(number, os.strerror(number), str(client.folder))
            before(fd, data)

        monkeypatch.setattr(fetch_part, "_write_all", write)
        client.fails(DiskFull, "disk or the quota is full")
        assert client.files == []

    def test_a_write_that_fails(self, client: Client, hub: Hub, monkeypatch: Any) -> None:
        hub.serve(whole())

        def write(fd: int, data: bytes) -> None:
            raise OSError(errno.EIO, "x", str(client.folder))

        monkeypatch.setattr(fetch_part, "_write_all", write)
        client.fails(FetchRefused, "model.gguf cannot be kept in the models' folder: Input/output")

    def test_no_folder(self, client: Client, hub: Hub) -> None:
        client.folder.rmdir()
        client.fails(FetchRefused, "models' folder: No such file or directory")
        client.folder.write_text("")
        client.fails(FetchRefused, "models' folder: Not a directory")
        assert hub.seen == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_is_not_writable(self, client: Client, hub: Hub) -> None:
        client.folder.chmod(0o500)
        client.fails(FetchRefused, "models' folder: Permission denied")
        assert hub.seen == []


class TestFiles:
    def test_the_same_is_there(self, client: Client, hub: Hub) -> None:
        (client.folder / NAME).write_bytes(BODY)
        fetched = client.fetch(expected_sha256=SHA, expected_size=len(BODY))
        complete(client, fetched)
        assert (hub.seen, fetched.etag) == ([], None)
        assert {progress.stage for progress in client.progress} == {"hashing"}

    @pytest.mark.parametrize(
        ("fields", "why"),
        [({}, "no SHA-256"), ({"expected_sha256": SHA}, "other content"),
         ({"expected_sha256": SHA, "expected_size": len(BODY)}, "other content")],
    )  # fmt: skip
    def test_another_is_there(self, client: Client, hub: Hub, fields: Any, why: str) -> None:
        (client.folder / NAME).write_bytes(b"mine")
        client.fails(FileExists, why, **fields)
        assert (client.folder / NAME).read_bytes() == b"mine"
        assert (client.files, hub.seen) == ([NAME], [])

    def test_a_link_or_a_folder_is_there(self, client: Client, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "other").write_bytes(BODY)
        (client.folder / NAME).symlink_to(tmp_path / "other")
        client.fails(FileExists, "no file has the name", expected_sha256=SHA)
        (client.folder / NAME).unlink()
        (client.folder / NAME).mkdir()
        client.fails(FileExists, "no file has the name", expected_sha256=SHA)

    @pytest.mark.parametrize("links", [True, False])
    def test_another_appears(self, client: Client, hub: Hub, monkeypatch: Any, links: bool) -> None:
        hub.serve(whole())
        if not links:
            self.no_links(monkeypatch)

        def appear(_part: Path) -> None:
            (client.folder / NAME).write_bytes(b"mine")

        client.fails(FileExists, "has appeared", validate=appear, expected_sha256=SHA)
        assert (client.folder / NAME).read_bytes() == b"mine"
        (client.folder / NAME).unlink()
        complete(client, client.fetch(expected_sha256=SHA))
        assert len(hub.seen) == 1

    @pytest.mark.parametrize("links", [True, False])
    def test_the_same_appears(
        self, client: Client, hub: Hub, monkeypatch: Any, links: bool
    ) -> None:
        hub.serve(whole())
        if not links:
            self.no_links(monkeypatch)
        complete(
            client, client.fetch(validate=lambda _part: (client.folder / NAME).write_bytes(BODY))
        )

    def no_links(self, monkeypatch: Any) -> None:
        def link(*args: Any, **options: Any) -> None:
            raise PermissionError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)

    def test_no_hard_links(self, client: Client, hub: Hub, monkeypatch: Any) -> None:
        self.no_links(monkeypatch)
        hub.serve(whole())
        complete(client, client.fetch())

    def test_the_mode(self, client: Client, hub: Hub) -> None:
        hub.serve(whole())
        client.part.write_bytes(b"old")
        client.part.chmod(0o666)
        assert client.fetch().path.stat().st_mode & 0o777 == 0o600

    def test_in_place_of_the_part(self, client: Client, hub: Hub, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(b"mine")
        for make, why in (
            (lambda: client.part.symlink_to(victim), "a link has the name model.gguf.part"),
            (lambda: client.part.symlink_to(tmp_path / "nothing"), "a link has the name"),
            (lambda: client.part.hardlink_to(victim), "is not ours"),
            (lambda: os.mkfifo(client.part), "is not ours"),
            (client.part.mkdir, "Is a directory"),
        ):
            make()
            client.fails(FetchRefused, why, expected_sha256=SHA)
            assert victim.read_bytes() == b"mine"
            client.part.rmdir() if client.part.is_dir() else client.part.unlink()
        assert (hub.seen, (tmp_path / "nothing").exists()) == ([], False)

    def test_exchanged_before_it_gets_its_name(self, client: Client, hub: Hub) -> None:
        hub.serve(whole())

        def exchange(part: Path) -> None:
            part.unlink()
            part.write_bytes(b"evil")

        client.fails(FetchFailed, "was exchanged", validate=exchange)

    def test_two_at_once(self, client: Client, hub: Hub) -> None:
        hub.serve(whole())
        inner: list[str] = []

        def again(_part: Path) -> None:
            inner.append(client.fails(FetchRefused, "already being fetched"))
            with pytest.raises(FetchRefused, match="already being fetched"):
                client.fetcher().discard(client.folder, NAME)

        complete(client, client.fetch(validate=again))
        assert inner

    def test_finished_but_for_its_second_name(self, client: Client, hub: Hub) -> None:
        (client.folder / NAME).write_bytes(BODY)
        client.part.hardlink_to(client.folder / NAME)
        complete(client, client.fetch(expected_sha256=SHA))
        assert hub.seen == []

    def test_finished_by_another_while_waiting(self, client: Client, monkeypatch: Any) -> None:
        """Opened under its part's name, locked when it had its own already."""
        client.part.write_bytes(BODY)
        lock, calls = fetch_part.fcntl.flock, []

        def flock(fd: int, how: int) -> None:
            if not calls:
                client.part.rename(client.folder / NAME)
            calls.append(fd)
            lock(fd, how)

        monkeypatch.setattr(fetch_part.fcntl, "flock", flock)
        complete(client, client.fetch(expected_sha256=SHA))
        assert len(calls) == 2

    @pytest.mark.parametrize(
        "name",
        ["", ".", "..", "a/b", "/a", "..\\a", ".hidden", "a\x00", "a\n", "a" * 201, "é", "a.part",
         "a.part.json", "-a"],
    )  # fmt: skip
    def test_names_that_are_none(self, client: Client, hub: Hub, name: str) -> None:
        client.fails(InvalidValue, "name", name=name)
        with pytest.raises(InvalidValue):
            client.fetcher().discard(client.folder, name)
        assert (client.files, hub.seen) == ([], [])

    @pytest.mark.parametrize("name", ["expected_size", "max_bytes"])
    def test_negative_sizes(self, client: Client, name: str) -> None:
        client.fails(InvalidValue, "not negative", **{name: -1})

    @pytest.mark.parametrize("error", [InvalidValue("no model"), ValueError("a defect")])
    def test_validation(self, client: Client, hub: Hub, error: Exception) -> None:
        hub.serve(whole())
        looked_at: list[bytes] = []

        def validate(part: Path) -> None:
            looked_at.append(part.read_bytes())
            raise error

        with pytest.raises(type(error)):
            client.fetch(validate=validate)
        assert (looked_at, client.files) == ([BODY], [])

    def test_discard(self, client: Client) -> None:
        client.dropped()
        client.fetcher().discard(client.folder, NAME)
        assert client.files == []
        client.fetcher().discard(client.folder, NAME)
        assert client.files == []

    def test_no_descriptor_is_left_open(self, client: Client, hub: Hub) -> None:
        def ours() -> int:
            links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
            return sum(str(client.folder) in str(link.readlink()) for link in links)

        client.dropped()
        hub.serve(ranged())
        with pytest.raises(ValueError, match="x"), PartFile(client.folder, NAME, 0):
            raise ValueError("x")
        client.fetch()
        client.part.symlink_to("nowhere")
        client.fails(FetchRefused, "link")
        assert ours() == 0

    def test_no_secret_in_what_is_shown_of_a_request(self, client: Client) -> None:
        assert not leaks(repr(client.request()) + repr(client.fetcher()))

    def test_reports_are_a_mebibyte_apart(self, client: Client, hub: Hub, monkeypatch: Any) -> None:
        monkeypatch.setattr(fetch_job, "_REPORT_BYTES", 90_000)
        hub.serve(whole())
        client.fetch()
        assert len(client.progress) == 4
        assert [p.done for p in client.progress] == sorted(p.done for p in client.progress)


COMMIT = "0123456789" * 4
REPO = "owner/Model-GGUF"


class TestHub:
    def base(self, hub: Hub) -> str:
        return hub.url("")

    def resolve(self, client: Client, file: str = "q4/model.gguf") -> HubFile:
        return hub_resolve(client.fetcher(), REPO, "main", file, base=self.base(client.hub))

    def test_a_large_file(self, client: Client, hub: Hub) -> None:
        client.tokens = {"hub.test": TOKEN}
        location = hub.url("/b", "cdn.test", f"?sig={SIGNATURE}")
        facts = {"x_linked_etag": f'"{SHA}"', "x_linked_size": "200000", "x_repo_commit": COMMIT}
        hub.serve(redirect(location, **facts), f"/{REPO}/resolve/main/q4/model.gguf")
        assert self.resolve(client) == HubFile("q4/model.gguf", 200_000, SHA, COMMIT)
        assert [(seen.method, seen.host) for seen in hub.seen] == [("HEAD", "hub.test")]
        assert hub.seen[0].headers["authorization"] == f"Bearer {TOKEN}"

    def test_a_small_file_of_a_moved_repository(self, client: Client, hub: Hub) -> None:
        hub.serve(redirect("/new/x/resolve/main/a.json", 307), f"/{REPO}/resolve/main/a.json")
        hub.serve(
            lambda handler: handler.answer(200, b"{}", etag='"abc"', x_repo_commit="nonsense"),
            "/new/x/resolve/main/a.json",
        )
        assert self.resolve(client, "a.json") == HubFile("a.json", 2, None, None)

    def test_no_size(self, client: Client, hub: Hub) -> None:
        for route in (redirect(hub.url("/b", "cdn.test")), whole(content_length="")):
            hub.serve(route, f"/{REPO}/resolve/main/a")
            with pytest.raises(FetchFailed, match="does not say how long"):
                self.resolve(client, "a")

    def test_not_allowed_or_not_there(self, client: Client, hub: Hub) -> None:
        client.tokens = {"hub.test": TOKEN}
        for status, why in ((401, "token"), (403, "licence"), (404, "no such file")):
            hub.serve(
                lambda handler, status=status: handler.answer(status), f"/{REPO}/resolve/main/a"
            )
            with pytest.raises(FetchFailed, match=why) as caught:
                self.resolve(client, "a")
            assert not leaks(caught.value.message)

    def test_it_leads_to_a_fetch(self, client: Client, hub: Hub) -> None:
        path = f"/{REPO}/resolve/main/{NAME}"
        facts = {"x_linked_etag": f'"{SHA}"', "x_linked_size": "200000"}
        hub.serve(redirect(hub.url("/b", "cdn.test"), **facts), path)
        hub.serve(whole(), "/b", "cdn.test")
        file = self.resolve(client, NAME)
        url = hub_file_url(REPO, "main", file.path, base=self.base(hub))
        complete(client, client.fetch(url, expected_size=file.size, expected_sha256=file.sha256))

    def test_urls(self) -> None:
        assert (
            hub_file_url("a/b.c_d-e", "refs/pr/1", "x y/é#?.gguf")
            == "https://huggingface.co/a/b.c_d-e/resolve/refs%2Fpr%2F1/x%20y/%C3%A9%23%3F.gguf"
        )

    @pytest.mark.parametrize(
        ("repo", "revision", "file"),
        [("a", "main", "f"), ("a/b/c", "main", "f"), ("../b", "main", "f"), ("a/..", "main", "f"),
         ("a b/c", "main", "f"), ("a/b?x", "main", "f"), ("a/b\n", "main", "f"), ("/b", "main", "f"),
         ("a/b", "", "f"), ("a/b", "..", "f"), ("a/b", "x/../y", "f"), ("a/b", "/x", "f"),
         ("a/b", "x y", "f"), ("a/b", "main", ""), ("a/b", "main", "../f"), ("a/b", "main", "/f"),
         ("a/b", "main", "x/../f"), ("a/b", "main", "x//f"), ("a/b", "main", "f/"),
         ("a/b", "main", "x\\f"), ("a/b", "main", "x\x00"), ("a/b", "main", "\u202ef")],
    )  # fmt: skip
    def test_names_that_are_none(self, repo: str, revision: str, file: str) -> None:
        with pytest.raises(InvalidValue):
            hub_file_url(repo, revision, file)

    def listing(self, hub: Hub, *entries: Any, path: str = "", **headers: str) -> None:
        body = json.dumps(entries).encode()
        headers.setdefault("content_type", "application/json; charset=utf-8")
        path = path or f"/api/models/{REPO}/tree/main"
        hub.serve(lambda handler: handler.answer(200, body, **headers), path)

    def files(self, client: Client) -> list[HubFile]:
        return hub_files(client.fetcher(), REPO, "main", base=self.base(client.hub))

    large = {"type": "file", "path": "q/m.gguf", "size": 9, "oid": "0" * 40,
             "lfs": {"oid": SHA, "size": 7, "pointerSize": 130}}  # fmt: skip
    small = {"type": "file", "path": "README.md", "size": 5, "oid": "1" * 40}

    def test_lists_in_pages(self, client: Client, hub: Hub) -> None:
        client.tokens = {"hub.test": TOKEN}
        link = f'<{hub.url("/more", query="?cursor=x")}>; rel="next"'
        self.listing(hub, {"type": "directory", "path": "q"}, self.large, link=link)
        self.listing(hub, self.small, path="/more")
        assert self.files(client) == [HubFile("q/m.gguf", 7, SHA), HubFile("README.md", 5, None)]
        assert [seen.path for seen in hub.seen] == [
            f"/api/models/{REPO}/tree/main?recursive=1",
            "/more?cursor=x",
        ]
        assert {seen.headers["authorization"] for seen in hub.seen} == {f"Bearer {TOKEN}"}

    def test_pages_elsewhere(self, client: Client, hub: Hub) -> None:
        for link, why in (
            (f'<{hub.url("/x", "cdn.test")}>; rel="next"', "at another host"),
            ("<http://169.254.169.254/>; rel=next", "only https"),
            ("<https://[/>; rel=next", "no URL"),
        ):
            self.listing(hub, self.small, link=link)
            with pytest.raises((FetchRefused, FetchFailed), match=why):
                self.files(client)
        assert {seen.host for seen in hub.seen} == {"hub.test"}

    def test_a_redirect_elsewhere(self, client: Client, hub: Hub) -> None:
        hub.serve(redirect(hub.url("/x", "cdn.test")), f"/api/models/{REPO}/tree/main")
        with pytest.raises(FetchFailed, match="answered 302"):
            self.files(client)
        assert len(hub.seen) == 1

    def test_pages_without_end(self, client: Client, hub: Hub) -> None:
        self.listing(hub, self.small, link='<?again>; rel="next"')
        with pytest.raises(FetchRefused, match="too many files"):
            self.files(client)
        assert len(hub.seen) == 20

    def test_a_page_without_end(self, client: Client, hub: Hub) -> None:
        self.listing(hub, "x" * (9 << 20))
        with pytest.raises(FetchRefused, match=r"more than 8\.4 MB"):
            self.files(client)

    @pytest.mark.parametrize(
        "changed",
        [{"path": "../../etc/passwd"}, {"path": "/etc/passwd"}, {"path": ""}, {"path": None},
         {"path": "a\nb"}, {"size": -1}, {"size": "5"}, {"size": True}, {"size": None},
         {"lfs": {"oid": "../" + SHA[3:], "size": 1}}, {"lfs": {"oid": None, "size": 1}},
         {"lfs": {"oid": SHA}}],
    )  # fmt: skip
    def test_hostile_entries(self, client: Client, hub: Hub, changed: Any) -> None:
        self.listing(hub, self.small | changed)
        with pytest.raises((FetchRefused, FetchFailed), match=r"hub\.test lists a"):
            self.files(client)

    @pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"[" * 100_000, b"\xff", b"<html>"])
    def test_no_list(self, client: Client, hub: Hub, body: bytes) -> None:
        path = f"/api/models/{REPO}/tree/main"
        hub.serve(whole(body, content_type="application/json"), path)
        with pytest.raises(FetchFailed, match=r"hub\.test (answered something else|lists a file)"):
            self.files(client)

    def test_another_type(self, client: Client, hub: Hub) -> None:
        self.listing(hub, content_type="text/html")
        with pytest.raises(FetchFailed, match="something else"):
            self.files(client)
