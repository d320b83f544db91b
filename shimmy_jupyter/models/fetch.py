"""Large files from the network into the models' folder: the one place that opens an outbound
connection, by `fetch_http`.

A fetch is a plain blocking call for a thread of the caller's. It decides nothing about time: no
attempt is repeated here, but an interrupted fetch goes on where it ended when it is asked for
again. The SHA-256 is the real gate; everything before it only keeps us from doing harm on the way.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import InvalidValue
from .addresses import refusal
from .fetch_errors import (
    ChecksumMismatch,
    DiskFull,
    FetchFailed,
    FetchInterrupted,
    FetchRefused,
    FileExists,
)
from .fetch_http import Resolver, Timeouts, Web, system_resolver
from .fetch_job import Fetched, FetchRequest, Job, Progress
from .fetch_part import PartFile, explained

__all__ = [
    "ChecksumMismatch",
    "DiskFull",
    "FetchFailed",
    "FetchInterrupted",
    "FetchRefused",
    "FetchRequest",
    "Fetched",
    "Fetcher",
    "FileExists",
    "Progress",
    "Timeouts",
]

MAX_BYTES = 1 << 40
RESERVE = 1 << 30
"""Bytes of the disk that stay free, so that notebooks can be saved."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _ignored(_progress: Progress) -> None:
    pass


def _never() -> bool:
    return False


def _anything(_path: Path) -> None:
    pass


class Fetcher:
    """Fetches files from allowed hosts. Safe to share between threads.

    `resolver` and `refused` (why an address may not be connected to) are for tests: the defaults
    are the system's and `addresses.refusal`. `reserve` is bytes of disk that stay free. `token_for`
    names the bearer token of a host, if there is one. Raises `Misconfigured` for an entry of
    `allowed_hosts` that names no host, and for a context that does not check certificates.
    """

    def __init__(
        self,
        allowed_hosts: Iterable[str],
        *,
        resolver: Resolver = system_resolver,
        max_bytes: int = MAX_BYTES,
        reserve: int = RESERVE,
        timeouts: Timeouts | None = None,
        token_for: Callable[[str], str | None] = lambda _host: None,
        verify: ssl.SSLContext | None = None,
        refused: Callable[[str], str | None] = refusal,
    ) -> None:
        self.web = Web(
            allowed_hosts,
            resolver=resolver,
            timeouts=timeouts,
            token_for=token_for,
            verify=verify,
            refused=refused,
        )
        self.max_bytes = max_bytes
        self.reserve = reserve

    def fetch(
        self,
        request: FetchRequest,
        progress: Callable[[Progress], None] = _ignored,
        cancelled: Callable[[], bool] = _never,
        validate: Callable[[Path], None] = _anything,
    ) -> Fetched:
        """The file, complete and checked, under its name. Blocks; for a thread of the caller's.

        `progress` is called at each stage's ends and every MiB between, `cancelled` with every
        chunk, and `validate` with the complete part, before it gets its name: what it raises ends
        the fetch and removes the part. A file that is there and has the expected SHA-256 is the
        answer without any request.

        Raises `FetchInterrupted` where the same request would continue (and keeps the part, as
        `Cancelled` does), `FetchFailed`, `ChecksumMismatch`, `FetchRefused`, `FileExists`,
        `DiskFull`, and `InvalidValue` for a request that is none.
        """
        _check(request)
        target = self.web.check(request.url)
        with (
            explained(request.name),
            PartFile(request.folder, request.name, self.reserve) as part,
        ):
            own = self.max_bytes if request.max_bytes is None else request.max_bytes
            limit = min(self.max_bytes, own)
            job = Job(
                self.web, request, target, part, limit=limit, progress=progress, cancelled=cancelled
            )
            return job.run(validate)

    def discard(self, folder: Path, name: str) -> None:
        """Removes what an interrupted fetch has kept. Raises `FetchRefused` while one is running."""
        _check_name(name)
        with explained(name), PartFile(folder, name, 0) as part:
            part.discard()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name.endswith((".part", ".part.json")):
        raise InvalidValue(
            "a file's name is made of A-Z a-z 0-9 . _ + @ -, begins with none of . + @ -, and "
            "ends neither in .part nor in .part.json",
            param="name",
        )


def _check(request: FetchRequest) -> None:
    _check_name(request.name)
    if request.expected_sha256 is not None and not _SHA256.fullmatch(request.expected_sha256):
        raise InvalidValue("a SHA-256 is 64 hex digits in lower case", param="expected_sha256")
    for name in ("expected_size", "max_bytes"):
        if (getattr(request, name) or 0) < 0:
            raise InvalidValue("a number of bytes is not negative", param=name)
