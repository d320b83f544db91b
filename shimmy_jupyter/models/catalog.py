"""Which models this machine offers, looked for off the event loop; and what their headers say."""

from __future__ import annotations

import asyncio
import difflib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from ..errors import GgufError, ModelNotFound
from .gguf import GgufFacts, validate
from .jobs import in_thread
from .scan import Warning
from .sources import Found, Scan

log = logging.getLogger("shimmy_jupyter.models")

PAUSE = 1.0
"""Seconds after a look in which a name that is not known is no reason for another."""
_NAMED = 20
_COMPARED = 2000
"""Names that one that is not known is compared with."""
_Stamp = tuple[tuple[int, int, int, int, int], ...]
_CHANGED = "it changed while it was looked at"


class Scans(Protocol):
    def scan(self, stop: Callable[[], bool]) -> Scan: ...


class Catalog:
    """Models by id. Looks at the disk when it is first asked, when a name is not known, and when it is
    told to; those who ask meanwhile wait for the same look.
    """

    def __init__(self, scanner: Scans, clock: Callable[[], float] = time.monotonic) -> None:
        self._scanner = scanner
        self._clock = clock
        self._models: dict[str, Found] | None = None
        self._looking: asyncio.Task[dict[str, Found]] | None = None
        self._looked = 0.0
        self._asked = self._answered = 0
        """How many looks were asked for while another was made, and up to which this is the answer."""
        self._said: set[Warning] = set()
        self.warnings: tuple[Warning, ...] = ()
        """Of the last look. They hold paths: for the log, and for who owns the server's account."""

    async def models(self) -> dict[str, Found]:
        return self._models if self._models is not None else await self._glance()

    async def look(self) -> dict[str, Found]:
        """What there is now: a look that had begun before may have passed by it already."""
        if self._looking is not None and not self._looking.done():
            self._asked += 1
            mine = self._asked
            await asyncio.wait([self._looking])
            if self._answered >= mine and self._models is not None:
                return self._models
        return await self._glance()

    async def _glance(self) -> dict[str, Found]:
        """By a look that may have begun before."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    async def find(self, id: str, tell: Callable[[str], bool] = lambda _: False) -> Found:
        """Raises `ModelNotFound`, which names other models, those that `tell` allows. Looks again before it
        says so.
        """
        models = await self.models()
        if id not in models and self._clock() - self._looked >= PAUSE:
            models = await self.look()
        if id not in models:
            said = await in_thread(lambda _: missing(id, models, tell))
            raise ModelNotFound(said, param="model")
        return models[id]

    async def _look(self) -> dict[str, Found]:
        asked = self._asked
        scan = await in_thread(self._scanner.scan)
        self._models = {found.id: found for found in scan.found}
        self._looked, self._answered = self._clock(), asked
        self.warnings = scan.warnings
        for warning in scan.warnings:
            if warning not in self._said:
                log.warning("looking for models: %r %s", warning.place, warning.reason)
        self._said = set(scan.warnings)
        return self._models

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)


def missing(id: str, models: Mapping[str, Found], tell: Callable[[str], bool]) -> str:
    """What to say of a name that no model has: the names that are like it, or what there is."""
    usable = [name for name, found in models.items() if found.problem is None and tell(name)]
    plain = id.rpartition("/")[2].removesuffix(".gguf")
    by_case = {name.lower(): name for name in usable}
    few = list(by_case)[:_COMPARED]
    close = difflib.get_close_matches(plain.lower(), few, n=3, cutoff=0.7)
    if close:
        names = " or ".join(repr(by_case[name]) for name in close)
        return f"there is no model {id!r}; did you mean {names}?"
    names = ", ".join(usable[:_NAMED] + ["…"] * (len(usable) > _NAMED))
    return f"there is no model {id!r}" + (f"; there are: {names}" if names else "")


class HeaderFacts:
    """What files' headers say, remembered while the files do not change. Blocking, for any thread."""

    def __init__(self) -> None:
        # Of an error what it says: itself it would keep all that was read when it was raised.
        self._known: dict[Path, tuple[_Stamp, GgufFacts | str]] = {}
        self._lock = threading.Lock()

    def of(self, found: Found) -> GgufFacts:
        """Raises `GgufError` for what llama.cpp must not be given."""
        before = stamp_of(found)
        known = self._known.get(found.path)
        if known is None or known[0] != before:
            try:
                said: GgufFacts | str = validate(found.path, found.parts)
            except GgufError as error:
                said = error.message
            if stamp_of(found) != before:
                raise GgufError(_CHANGED)
            with self._lock:
                self._known[found.path] = known = before, said
        if isinstance(known[1], str):
            raise GgufError(known[1])
        return known[1]

    def keep(self, models: Iterable[Found]) -> None:
        """Forget what is known of others."""
        paths = {found.path for found in models}
        with self._lock:
            for path in self._known.keys() - paths:
                del self._known[path]


def stamp_of(found: Found) -> _Stamp:
    """Changes when a file of the model is changed or replaced. Raises `GgufError` where one is gone."""
    try:
        facts = [part.lstat() for part in found.parts]
    except OSError as error:
        raise GgufError(f"its file cannot be read: {error.strerror}") from None
    return tuple((f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in facts)
