"""The public keys that a gateway signs with (a JWK Set, RFC 7517), from a file or from a URL.

PyJWT and cryptography are imported on first use: only a server that is set up for it needs them.
"""

from __future__ import annotations

import asyncio
import json
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Protocol

from ..errors import Misconfigured, ShimmyError

MAX_JWKS_BYTES = 256 << 10
_MIN_RSA_BITS = 2048

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_FIT: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(_RSA, ("RSA", ())),
    "ES256": ("EC", ("P-256",)),
    "ES384": ("EC", ("P-384",)),
    "ES512": ("EC", ("P-521",)),
    "EdDSA": ("OKP", ("Ed25519", "Ed448")),
}
"""Each algorithm's type of key, and its curves. None here is symmetric: whoever can check such a
signature can make one, and a public key taken for a shared secret is the classic forgery.
"""
ALGORITHMS = tuple(_FIT)


@dataclass(frozen=True, slots=True)
class Key:
    """One public key and what it may verify."""

    id: str | None
    algorithms: frozenset[str]
    public: Any


Keys = tuple[Key, ...]


def parse_jwks(data: bytes, algorithms: frozenset[str], log: Logger) -> Keys:
    """The keys that can be used with any of the algorithms; the log says why others cannot.

    Raises `Misconfigured` for what is no JWK Set.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise Misconfigured("the JWKS is not JSON") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise Misconfigured('the JWKS is not an object with a list "keys"')
    keys = []
    for number, entry in enumerate(entries):
        key = _key(entry, algorithms)
        if isinstance(key, Key):
            keys.append(key)
        else:
            log.info("key %d of the JWKS is not used: %s", number, key)
    return tuple(keys)


def _key(entry: Any, algorithms: frozenset[str]) -> Key | str:
    """The key, or why it is none of ours."""
    if not isinstance(entry, dict):
        return "it is no JSON object"
    if "d" in entry or "k" in entry:
        return "it is secret; only public keys belong into a JWKS"
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not (
        isinstance(operations, list) and "verify" in operations
    ):
        return "it is not for verifying signatures"
    id = entry.get("kid")
    if not isinstance(id, str | None):
        return "its kid is no text"
    fitting = frozenset(name for name in algorithms if _fits(entry, name))
    if not fitting:
        return "none of the configured algorithms is for such a key"
    public = _public(entry, min(fitting))
    return Key(id, fitting, public) if public is not None else "it is damaged or too short"


def _fits(entry: dict[str, Any], algorithm: str) -> bool:
    kind, curves = _FIT[algorithm]
    return (
        entry.get("kty") == kind
        and (not curves or entry.get("crv") in curves)
        and entry.get("alg", algorithm) == algorithm
    )


def _public(entry: dict[str, Any], algorithm: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from jwt import PyJWK, PyJWTError

    try:
        public = PyJWK(entry, algorithm).key
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, KeyError):
        return None
    short = entry["kty"] == "RSA" and public.key_size < _MIN_RSA_BITS
    return None if short else public


def pick(keys: Keys, algorithm: str, id: str | None) -> Key | None:
    """The one key that a token may have been signed with. A token that names none is only accepted
    where there is no choice; two keys of one name are none.
    """
    fitting = [key for key in keys if algorithm in key.algorithms and id in (None, key.id)]
    return fitting[0] if len(fitting) == 1 else None


class KeySource(Protocol):
    async def find(self, algorithm: str, id: str | None) -> Key | None: ...


class FileKeys:
    """Keys of a file, read again whenever another has taken its place or it was written.

    While the file cannot be read, or is no JWKS, there are no keys: nobody is signed in. Writing
    to another name and renaming leaves no such moment.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], Keys], log: Logger) -> None:
        self._path, self._parse, self._log = path, parse, log
        self._seen: tuple[int, ...] | None = None
        self._keys: Keys = ()

    def read(self) -> Keys:
        """What the file has now. Raises `Misconfigured`."""
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):
                raise Misconfigured(f"{self._path.name} is no regular file")
            with self._path.open("rb") as file:
                data = file.read(MAX_JWKS_BYTES + 1)
        except OSError as error:
            raise Misconfigured(f"{self._path.name} cannot be read: {error.strerror}") from None
        if len(data) > MAX_JWKS_BYTES:
            raise Misconfigured(f"{self._path.name} is larger than {MAX_JWKS_BYTES >> 10} KiB")
        return self._parse(data)

    async def find(self, algorithm: str, id: str | None) -> Key | None:
        # The file's state is taken before it is read: what is written meanwhile is read next time.
        state = self._state()
        if state != self._seen:
            try:
                self._keys = self.read()
            except Misconfigured as error:
                self._keys = ()
                self._log.error("nobody can sign in: %s", error)
            self._seen = state
        return pick(self._keys, algorithm, id)

    def _state(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)


class UrlKeys:
    """Keys of a URL, fetched in a thread: when they are first needed, for a key that is not among
    them, and when they are five minutes old, so that a key that was taken away ends with it. Never
    more than one fetch a minute. Where fetching fails, or takes longer than two seconds, the last
    keys are still good until they are an hour old.

    `fetch` blocks and raises `ShimmyError`; `clock` is in seconds.
    """

    WAIT = 60.0
    FRESH = 300.0
    GOOD = 3600.0
    PATIENCE = 2.0

    def __init__(
        self,
        fetch: Callable[[], bytes],
        parse: Callable[[bytes], Keys],
        log: Logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch, self._parse, self._log, self._clock = fetch, parse, log, clock
        # One tuple, as the thread replaces it while the event loop reads it.
        self._last: tuple[Keys, float] | None = None
        self._asked: float | None = None
        self._running: Future[None] | None = None

    async def find(self, algorithm: str, id: str | None) -> Key | None:
        if self._age() > self.FRESH:
            await self._renewed(self.PATIENCE)
        found = pick(self._current(), algorithm, id)
        if found is None:
            await self._renewed(None)
            found = pick(self._current(), algorithm, id)
        return found

    async def _renewed(self, patience: float | None) -> None:
        running = self._refresh()
        if running is not None:
            # Which leaves the fetch alone when the request that waits here goes away.
            await asyncio.wait([asyncio.wrap_future(running)], timeout=patience)

    def _age(self) -> float:
        return float("inf") if self._last is None else self._clock() - self._last[1]

    def _current(self) -> Keys:
        last = self._last
        return last[0] if last is not None and self._age() <= self.GOOD else ()

    def _refresh(self) -> Future[None] | None:
        """The fetch that is running, perhaps since now; None where it is too early for one."""
        if self._running is None or self._running.done():
            now = self._clock()
            if self._asked is not None and now - self._asked < self.WAIT:
                return None
            self._asked = now
            self._running = Future()
            threading.Thread(
                target=self._renew, args=(self._running,), name="shimmy-jwks", daemon=True
            ).start()
        return self._running

    def _renew(self, running: Future[None]) -> None:
        try:
            self._last = (self._parse(self._fetch()), self._clock())
        except ShimmyError as error:
            self._log.warning("the gateway's keys cannot be fetched: %s", error)
        finally:
            running.set_result(None)
