"""A Hugging Face hub on loopback, over real HTTPS, that behaves or misbehaves as it is told.

python scripts/fake_hub.py --folder FOLDER [--gated ORG/NAME] [--cut-after BYTES] …

serves FOLDER/ORG/NAME/… as repositories and prints its URL and its authority's certificate, until it is interrupted. Its names
are hub.test for the hub and cdn.test for the content network, which nobody resolves: a client must be
told that they are here, as `FakeHub.fetcher` is.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote

from shimmy_jupyter.models.addresses import refusal
from shimmy_jupyter.models.fetch import Fetcher, Timeouts

HUB, CDN = "hub.test", "cdn.test"
SIGNATURE = "s3cretSignature"
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BLOB = re.compile(r"/blobs/([0-9a-f]{64})")
_CHUNK = 64 << 10


def make_certificates(folder: Path) -> None:
    """By the openssl command: ca.pem, an authority, and cert.pem with key.pem for the hub's names."""
    new_key = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec",
               "-pkeyopt", "ec_paramgen_curve:prime256v1"]  # fmt: skip
    names = f"subjectAltName=DNS:{HUB},DNS:{CDN}"
    for arguments in (
        [*new_key, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem",
         "-addext", "keyUsage=critical,keyCertSign"],
        [*new_key, "-subj", "/CN=server", "-keyout", "key.pem", "-out", "cert.pem", "-CA", "ca.pem",
         "-CAkey", "ca.key", "-addext", names, "-addext", "basicConstraints=critical,CA:FALSE"],
    ):  # fmt: skip
        subprocess.run(arguments, cwd=folder, check=True, capture_output=True)


@dataclass
class Tricks:
    """What it does wrong; nothing at first. Sizes are in bytes, `slow` is seconds for each 64 KiB."""

    gated: str = ""
    """A repository (org/name) whose files need a token."""
    missing: str = ""
    """A file that is listed but not there."""
    answers: int = 0
    """A status that the hub answers everything with."""
    size_lie: int = 0
    """Added to what the hub says of each file's size."""
    cut_after: int | None = None
    """The connection ends after so many bytes of a file."""
    stall_after: int | None = None
    """Nothing more comes after so many bytes of a file."""
    slow: float = 0.0
    corrupt: bool = False
    """Some bytes of each file are others."""
    no_ranges: bool = False
    no_commit: bool = False
    no_digest: bool = False
    redirect_to: str = ""
    """Where the hub sends to for a file's bytes, in place of its content network."""
    page: int = 1000
    """Entries of one page of a list."""


@dataclass(frozen=True)
class Entry:
    """A file of a repository. Those that end in .gguf are in large-file storage."""

    path: str
    data: Path
    size: int
    sha256: str
    git: str

    @property
    def large(self) -> bool:
        return self.path.lower().endswith(".gguf")


@dataclass(frozen=True)
class Seen:
    """`sent` is how many bytes of a file were given for it."""

    method: str
    host: str
    path: str
    headers: dict[str, str]
    sent: list[int] = field(default_factory=list)


class FakeHub(socketserver.ThreadingTCPServer):
    """Serves while the `with` block lasts. `folder` has one folder for each org, and in it one for
    each name; what is changed there is a new commit. Everything that was asked is in `seen`.
    """

    daemon_threads = True

    def __init__(self, folder: Path, certificates: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.authority = certificates / "ca.pem"
        self.tricks = Tricks()
        self.seen: list[Seen] = []
        self.over = threading.Event()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
        self._known: dict[tuple[str, int, int], tuple[str, str]] = {}
        self._blobs: dict[str, Path] = {}
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def url(self) -> str:
        return f"https://{HUB}:{self.server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"https://{CDN}:{self.server_address[1]}"

    @property
    def served(self) -> int:
        """Bytes of files that were sent since `seen` was cleared."""
        return sum(sum(one.sent) for one in self.seen)

    def fetcher(self, **options: Any) -> Fetcher:
        """One to which both names are here, and for which being here is no reason to refuse."""
        port = self.server_address[1]
        defaults: dict[str, Any] = {
            "resolver": lambda _host, _port: ["127.0.0.1"],
            "refused": lambda address: None if address == "127.0.0.1" else refusal(address),
            "verify": ssl.create_default_context(cafile=str(self.authority)),
            "timeouts": Timeouts(20, 20, 20),
            "reserve": 0,
        }
        return Fetcher([f"{HUB}:{port}", f"{CDN}:{port}"], **defaults | options)

    def entries(self, repo: str) -> list[Entry]:
        """By path. Raises `FileNotFoundError` for a repository that is not there."""
        root = self.folder / repo
        if not root.is_dir():
            raise FileNotFoundError
        found = []
        for data in sorted(root.rglob("*")):
            if data.is_file():
                size, (sha256, git) = data.stat().st_size, self._digests(data)
                found.append(Entry(data.relative_to(root).as_posix(), data, size, sha256, git))
                self._blobs[sha256] = data
        return found

    def commit(self, repo: str) -> str:
        listed = "\n".join(f"{entry.path} {entry.sha256}" for entry in self.entries(repo))
        return hashlib.sha1(listed.encode()).hexdigest()

    def revisions(self, repo: str) -> dict[str, str]:
        """Each branch's and tag's commit."""
        return {"main": self.commit(repo)}

    def blob(self, sha256: str) -> Path | None:
        return self._blobs.get(sha256)

    def _digests(self, data: Path) -> tuple[str, str]:
        status = data.stat()
        key = str(data), status.st_mtime_ns, status.st_size
        if key not in self._known:
            large = hashlib.sha256()
            git = hashlib.sha1(f"blob {status.st_size}\0".encode())
            with data.open("rb") as file:
                while block := file.read(1 << 20):
                    large.update(block)
                    git.update(block)
            self._known[key] = large.hexdigest(), git.hexdigest()
        return self._known[key]

    def wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        return self._context.wrap_socket(connection, server_side=True)

    def handle_error(self, *_args: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients leave when they like
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def setup(self) -> None:
        self.request.settimeout(20)
        self.request = self.server.wrap(self.request)
        super().setup()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    def do_GET(self) -> None:
        host = self.headers["Host"].partition(":")[0]
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Seen(self.command, host, self.path, headers)
        self.server.seen.append(self.seen)
        self.close_connection = True
        try:
            if host == CDN:
                self._blob(path)
            elif self.server.tricks.answers:
                self._says(self.server.tricks.answers)
            elif tree := _TREE.fullmatch(path):
                self._tree(tree[1], unquote(tree[2]), query)
            elif file := _FILE.fullmatch(path):
                self._resolve(file[1], unquote(file[2]), unquote(file[3]))
            else:
                self._says(404)
        except FileNotFoundError:
            self._says(401 if "authorization" not in headers else 404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _says(self, status: int, error: str = "", body: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("content_length", str(len(body)))
        if error:
            headers["x_error_code"] = error
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _known(self, repo: str, revision: str) -> str | None:
        """The commit, unless the answer is given already."""
        commit = self.server.commit(repo)
        found = commit if revision == commit else self.server.revisions(repo).get(revision)
        if found is None:
            self._says(404, "RevisionNotFound")
        return found

    def _tree(self, repo: str, revision: str, query: str) -> None:
        if self._known(repo, revision) is None:
            return
        entries = self.server.entries(repo)
        start = int(parse_qs(query).get("cursor", ["0"])[0])
        stop = start + self.server.tricks.page
        link = {}
        if stop < len(entries):
            path = self.path.partition("?")[0]
            link = {"link": f'<{self.server.url}{path}?recursive=1&cursor={stop}>; rel="next"'}
        body = json.dumps([_listed(entry) for entry in entries[start:stop]]).encode()
        self._says(200, "", body, content_type="application/json; charset=utf-8", **link)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        tricks = self.server.tricks
        commit = self._known(repo, revision)
        if commit is None:
            return
        entry = next((one for one in self.server.entries(repo) if one.path == path), None)
        if entry is None or tricks.missing == path:
            self._says(404, "EntryNotFound")
        elif tricks.gated == repo and "authorization" not in self.seen.headers:
            self._says(401, "GatedRepo")
        else:
            self._found(entry, "" if tricks.no_commit else commit)

    def _found(self, entry: Entry, commit: str) -> None:
        tricks = self.server.tricks
        headers = {"x_repo_commit": commit} if commit else {}
        if not entry.large:
            body = entry.data.read_bytes()
            self._says(200, "", body, etag=f'"{entry.git}"', **headers)
            return
        if not tricks.no_digest:
            headers["x_linked_etag"] = f'"{entry.sha256}"'
        headers["x_linked_size"] = str(entry.size + tricks.size_lie)
        where = f"{self.server.cdn}/blobs/{entry.sha256}?file={quote(entry.path)}&sig={SIGNATURE}"
        self._says(302, location=tricks.redirect_to or where, **headers)

    def _blob(self, path: str) -> None:
        match = _BLOB.fullmatch(path)
        data = self.server.blob(match[1]) if match else None
        if data is None or match is None or not data.is_file():
            self._says(404)
            return
        etag, size = f'"{match[1]}"', data.stat().st_size
        first = 0
        asked = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        if asked and not self.server.tricks.no_ranges:
            first = int(asked[1]) if self.headers.get("If-Range") in {None, etag} else 0
        self.send_response(206 if first else 200)
        self.send_header("etag", etag)
        self.send_header("content-length", str(size - first))
        if first:
            self.send_header("content-range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        if self.command != "HEAD":
            for chunk in self._chunks(data, first):
                self.wfile.write(chunk)
                self.seen.sent.append(len(chunk))

    def _chunks(self, data: Path, first: int) -> Iterator[bytes]:
        """Of the file from `first` on, as far and as well as the tricks let them come."""
        tricks = self.server.tricks
        limits = [limit for limit in (tricks.cut_after, tricks.stall_after) if limit is not None]
        left = min(limits, default=data.stat().st_size)
        with data.open("rb") as file:
            file.seek(first)
            while chunk := file.read(min(_CHUNK, left)):
                left -= len(chunk)
                yield chunk[:-1] + bytes([chunk[-1] ^ 1]) if tricks.corrupt else chunk
                if tricks.slow and self.server.over.wait(tricks.slow):
                    return
        if tricks.stall_after is not None and not left:
            self.server.over.wait(60)

    def log_message(self, *_args: Any) -> None:
        pass


def _listed(entry: Entry) -> dict[str, Any]:
    said: dict[str, Any] = {
        "type": "file", "oid": entry.git, "size": entry.size, "path": entry.path,
    }  # fmt: skip
    if entry.large:
        said["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 135}
    return said


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A Hugging Face hub on loopback.")
    parser.add_argument("--folder", type=Path, required=True, help="its repositories")
    parser.add_argument("--port", type=int, default=0)
    for option in fields(Tricks):
        name = f"--{option.name.replace('_', '-')}"
        if isinstance(option.default, bool):
            parser.add_argument(name, action="store_true")
        else:
            kind = {"float": float, "str": str}.get(str(option.type), int)
            parser.add_argument(name, type=kind, default=option.default)
    return parser.parse_args()


def main() -> None:
    options = vars(_arguments())
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder))
        # Its threads inherit this: only the one below is told to end.
        signal.pthread_sigmask(signal.SIG_BLOCK, ends := {signal.SIGINT, signal.SIGTERM})
        with FakeHub(options.pop("folder"), Path(folder), options.pop("port")) as hub:
            hub.tricks = Tricks(**options)
            print(hub.url, hub.authority, flush=True)
            signal.sigwait(ends)


if __name__ == "__main__":
    main()
