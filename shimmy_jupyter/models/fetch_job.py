"""One fetch: what is there, what is missing, whether it is right."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import Cancelled
from .addresses import Target
from .fetch_errors import (
    ChecksumMismatch,
    FetchFailed,
    FetchInterrupted,
    FetchRefused,
    FileExists,
    in_words,
)
from .fetch_http import Answer, Web, unexpected
from .fetch_part import Note, PartFile

_REPORT_BYTES = 1 << 20
_STRONG = re.compile(r'"[!#-~]{1,256}"')
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")

Stage = Literal["hashing", "downloading"]


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """What to fetch and where to: `name` in `folder`, which exists. `expected_sha256` is 64 hex
    digits in lower case; `max_bytes` can only tighten the fetcher's own. The URL's query may be
    secret and is shown nowhere. An interrupted fetch is continued by a request of the same `identity`,
    which is the URL without its query unless several URLs lead to the same bytes.
    """

    url: str = field(repr=False)
    folder: Path
    name: str
    expected_size: int | None = None
    expected_sha256: str | None = None
    max_bytes: int | None = None
    identity: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes, of the whole file: read again from the disk (hashing) or there (downloading)."""

    stage: Stage
    done: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is complete. `url` is the one asked for, without its query; `etag` is the last
    server's, None if the file was there or it gave none.
    """

    path: Path
    sha256: str
    size: int
    url: str
    etag: str | None


class Job:
    """Runs once. `limit` is the most bytes the file may have."""

    def __init__(
        self,
        web: Web,
        request: FetchRequest,
        target: Target,
        part: PartFile,
        *,
        limit: int,
        progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.web = web
        self.request = request
        self.target = target
        self.identity = request.identity or target.shown
        self.part = part
        self.limit = limit
        self.progress = progress
        self.cancelled = cancelled
        self.digest = hashlib.sha256()
        self.etag: str | None = None
        self._at = Progress("downloading", 0, None)
        self._reported = 0

    def run(self, validate: Callable[[Path], None]) -> Fetched:
        request, part = self.request, self.part
        if request.expected_size is not None:
            self._check_limit(request.expected_size)
        there = part.existing()
        if there is not None:
            sha256 = self._same(there)
            part.discard()
            return self._fetched(sha256, there.st_size)
        if not self._resume():
            self._download()
        sha256 = self._checked()
        with contextlib.ExitStack() as stack:
            stack.callback(part.discard)
            validate(part.path)
            stack.pop_all()
        self._publish(sha256)
        return self._fetched(sha256, part.size)

    def _fetched(self, sha256: str, size: int) -> Fetched:
        path = self.request.folder / self.request.name
        return Fetched(path, sha256, size, self.target.shown, self.etag)

    # What is there

    def _same(self, there: os.stat_result) -> str:
        """The SHA-256 of the file of that name. Raises `FileExists` if it is not the expected one."""
        name, expected = self.request.name, self.request.expected_sha256
        if not stat.S_ISREG(there.st_mode):
            raise FileExists(f"something that is no file has the name {name}; remove it")
        if expected is None:
            raise FileExists(
                f"there is a file {name}, and no SHA-256 to say whether it is the same; "
                "remove it or choose another name"
            )
        found = None
        if self.request.expected_size in (None, there.st_size):
            self._start("hashing", there.st_size)
            found = self.part.digest_of_existing(self._step)
            self._finish()
        if found != expected:
            raise FileExists(
                f"there is a file {name} with other content; remove it or choose another name"
            )
        return expected

    def _resume(self) -> bool:
        """Reads what is there into the digest, if it can be continued. True if it is all."""
        note, request = self.part.note, self.request
        same = (
            note is not None
            and note.url == self.identity
            and _STRONG.fullmatch(note.etag) is not None
            and request.expected_size in (None, note.size)
            and note.size <= self.limit
        )
        # A complete part without a digest to check cannot be told from another version's.
        complete = note is not None and self.part.size == note.size
        if note is None or not same or (complete and request.expected_sha256 is None):
            self.part.restart(None)
            return False
        self._start("hashing", self.part.size)
        for block in self.part.blocks():
            self.digest.update(block)
            self._step(len(block))
        self._finish()
        self.etag = note.etag
        return complete

    # What is missing

    def _download(self) -> None:
        note, offset = self.part.note, self.part.size
        if note is not None and offset:
            self.part.room_for(note.size - offset)
            headers = {"Range": f"bytes={offset}-", "If-Range": note.etag}
            with self.web.request("GET", self.request.url, headers) as answer:
                if answer.status == 206 and _continues(answer, note, offset):
                    self._receive(answer, note.size)
                    return
                if answer.status == 200:  # another version, or a server without ranges
                    self._receive_anew(answer)
                    return
                if answer.status not in (206, 412, 416):
                    raise unexpected(answer)
        if self.request.expected_size is not None:
            self.part.room_for(self.request.expected_size)
        with self.web.request("GET", self.request.url) as answer:
            if answer.status != 200:
                raise unexpected(answer)
            self._receive_anew(answer)

    def _receive_anew(self, answer: Answer) -> None:
        host, request = answer.target.host, self.request
        answer.refuse_encoding()
        if answer.headers.get("content-type", "").strip().lower().startswith("text/html"):
            raise FetchFailed(f"{host} answered a web page instead of a file; is the URL right?")
        length = answer.length
        total = length if length is not None else request.expected_size
        if total is None and request.expected_sha256 is None:
            raise FetchFailed(
                f"{host} does not say how long the file is, and neither a size nor a SHA-256 "
                "is known, so that its end could not be told; give the SHA-256"
            )
        if request.expected_size not in (None, total):
            raise FetchFailed(
                f"{host} offers {total} bytes where {request.expected_size} were expected"
            )
        if total is not None:
            self._check_limit(total)
        self.part.room_for(total or 0)
        self.etag = answer.headers.get("etag")
        strong = self.etag is not None and _STRONG.fullmatch(self.etag) is not None
        resumable = strong and total is not None
        self.digest = hashlib.sha256()
        self.part.restart(Note(self.identity, str(self.etag), total or 0) if resumable else None)
        self._receive(answer, total)

    def _receive(self, answer: Answer, total: int | None) -> None:
        answer.refuse_encoding()
        part, host = self.part, answer.target.host
        most = self.limit if total is None else total
        self._start("downloading", total, part.size)
        try:
            for chunk in answer.chunks():
                if part.size + len(chunk) > most:
                    raise self._too_much(host, total)
                part.write(chunk)
                self.digest.update(chunk)
                self._step(len(chunk))
        except FetchFailed as error:
            raise self._interrupted(error.message, total) from None
        if total is not None and part.size < total:
            raise self._interrupted(f"{host} sent less than it had announced", total)
        self._finish()

    def _too_much(self, host: str, total: int | None) -> FetchRefused:
        self.part.discard()
        if total is None:
            return FetchRefused(f"the file is longer than {in_words(self.limit)}, which is allowed")
        return FetchRefused(f"{host} sends more than the {total} bytes that the file should have")

    def _interrupted(self, why: str, total: int | None) -> FetchFailed:
        if self.part.note is None or not self.part.size:
            return FetchFailed(f"{why}; nothing could be kept, ask again to start anew")
        size = f" of {in_words(total)}" if total else ""
        return FetchInterrupted(
            f"{why}; {in_words(self.part.size)}{size} are kept, ask again to continue"
        )

    def _check_limit(self, size: int) -> None:
        if size > self.limit:
            raise FetchRefused(
                f"the file has {in_words(size)}, more than the {in_words(self.limit)} allowed"
            )

    # Whether it is right

    def _checked(self) -> str:
        found, size = self.digest.hexdigest(), self.part.size
        request = self.request
        if request.expected_sha256 in (None, found) and request.expected_size in (None, size):
            return found
        self.part.discard()
        raise ChecksumMismatch(
            f"what came from {self.target.host} as {request.name} is not the file that was asked "
            "for (its SHA-256 or size is another); it is removed"
        )

    def _publish(self, sha256: str) -> None:
        try:
            self.part.publish()
        except FileExists:
            if self.part.digest_of_existing(lambda _count: None) != sha256:
                raise
            self.part.discard()  # somebody was quicker, with the same bytes

    # Progress

    def _start(self, stage: Stage, total: int | None, done: int = 0) -> None:
        self._stop_if_cancelled()
        self._at = Progress(stage, done, total)
        self._report()

    def _step(self, count: int) -> None:
        self._stop_if_cancelled()
        self._at = replace(self._at, done=self._at.done + count)
        if self._at.done - self._reported >= _REPORT_BYTES:
            self._report()

    def _finish(self) -> None:
        if self._reported != self._at.done:
            self._report()

    def _report(self) -> None:
        self._reported = self._at.done
        self.progress(self._at)

    def _stop_if_cancelled(self) -> None:
        if self.cancelled():
            raise Cancelled(f"fetching {self.request.name} was cancelled")


def _continues(answer: Answer, note: Note, offset: int) -> bool:
    """Whether the answer is exactly the rest of what the note describes."""
    span = _RANGE.fullmatch(answer.headers.get("content-range", ""))
    if span is None or answer.headers.get("etag") != note.etag:
        return False
    first, last, size = map(int, span.groups())
    right = (first, last, size) == (offset, note.size - 1, note.size)
    return right and answer.length in (None, note.size - offset)
