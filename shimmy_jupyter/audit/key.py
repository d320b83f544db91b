"""The key of the digests: made once, kept beside the ledger, the owner's alone."""

from __future__ import annotations

import contextlib
import functools
import hmac
import logging
import os
import re
import secrets
import stat
import time
from pathlib import Path

from .writer import StoreFailed

log = logging.getLogger("shimmy_jupyter.audit")

_UNWRITTEN = 1.0
"""Seconds for which another process may take to write the key that it has made the file for."""
_KEY = re.compile(rb"[0-9a-f]{64}\n?")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Digests:
    """Keyed digests, HMAC-SHA-256. Each user's are made with a key of their own, so that nobody can
    tell by two digests whether two users sent the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._key: bytes | None = None
        self._subkey = functools.lru_cache(maxsize=1000)(self._derive)

    def of(self, data: bytes | str, user: str) -> str:
        """Raises `StoreFailed` where there can be no key."""
        return _digest(self._subkey("user", user), data)

    def of_name(self, user: str) -> str:
        """What stands for a user where the name must not: who has the key can tell whether it is theirs."""
        return _digest(self._subkey("name", ""), user)

    def _derive(self, use: str, user: str) -> bytes:
        self._key = self._key or self._read()
        return hmac.digest(self._key, f"{use}\0{user}".encode("utf-8", "surrogatepass"), "sha256")

    def _read(self) -> bytes:
        """Somebody else may be making it at the same time; all get the one that was there first."""
        name = self.path.name
        try:
            if not os.path.lexists(self.path):
                self._make()
            file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                self._make_private(file)
                deadline = time.monotonic() + _UNWRITTEN
                while not (text := os.pread(file, 100, 0)) and time.monotonic() < deadline:
                    time.sleep(0.01)
            finally:
                os.close(file)
        except OSError as error:
            raise StoreFailed(f"{name} cannot be used: {os.strerror(error.errno or 0)}") from error
        if not _KEY.fullmatch(text):
            raise StoreFailed(f"{name} is damaged: 64 hex digits would be right")
        return bytes.fromhex(text.decode())

    def _make_private(self, file: int) -> None:
        name = self.path.name
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise StoreFailed(f"{name} is not a file of this account")
        if not stat.S_IMODE(found.st_mode) & 0o077:
            return
        os.fchmod(file, 0o600)
        kept = not stat.S_IMODE(os.fstat(file).st_mode) & 0o077
        text = (
            f"others {'could' if kept else 'can'} read {name}"
            f"{'; now they cannot, but' if kept else ', and its file system keeps it so:'} who has "
            "read it can tell whether a text is one that was digested"
        )
        log.warning("%s", text)
        self.notes += (text,)

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        file = os.open(beside, _NEW, 0o600)
        try:
            with os.fdopen(file, "w") as handle:
                handle.write(secrets.token_hex(32) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
            with contextlib.suppress(FileExistsError):
                self._put(beside)
        finally:
            beside.unlink()

    def _put(self, beside: Path) -> None:
        """Unlike a rename, this leaves one that has come in the meantime."""
        try:
            os.link(beside, self.path)
        except FileExistsError:
            raise
        except OSError:  # not every file system has hard links
            file = os.open(self.path, _NEW, 0o600)
            try:
                os.write(file, beside.read_bytes())
                os.fsync(file)
            finally:
                os.close(file)


def _digest(key: bytes, data: bytes | str) -> str:
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return "hmac-sha256:" + hmac.digest(key, raw, "sha256").hex()
