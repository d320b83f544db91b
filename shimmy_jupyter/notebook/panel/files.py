"""Files that are written for people, in the folder that the kernel works in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from ...errors import DiskFull, FileExists, InvalidValue
from . import export
from . import messages as m
from .auditing import PATH, address
from .fetched import Problem
from .reach import Transport

_ROWS = 1000
"""Records that are asked for at once."""


class NewFile:
    """A file that must not be there yet, and is gone again unless it is kept. Raises `FileExists`,
    `InvalidValue` and `DiskFull`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kept = False

    def __enter__(self) -> Self:
        name = self._name
        try:
            # The whole path: a kernel can change its folder before the file is closed.
            self._path = Path.cwd() / name
            self._file = self._path.open("x", encoding="utf-8", newline="")
        except FileExistsError as error:
            raise FileExists(f"there is a file {name} already: choose another name") from error
        except OSError as error:
            said = os.strerror(error.errno or 0)
            raise InvalidValue(f"{name} cannot be written: {said}", param="name") from error
        return self

    def write(self, text: str) -> None:
        with self._room():
            self._file.write(text)

    def keep(self) -> None:
        with self._room():
            self._file.close()
        self._kept = True

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = os.strerror(error.errno or 0)
            raise DiskFull(f"{self._name} cannot be written: {said}") from error

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            with suppress(OSError):  # what could not be written is not kept anyway
                self._file.close()
            self._path.unlink(missing_ok=True)


class Exporting:
    """Page by page, the newest record first."""

    def __init__(self, request: m.Export) -> None:
        self._request = request

    def steps(self, transport: Transport) -> Iterator[m.Event | None]:
        request, cursor, count = self._request, None, 0
        with NewFile(request.name) as file:
            file.write(export.heading(request.format))
            while True:
                query = {**request.query, "cursor": cursor, "limit": _ROWS}
                page = transport.get(address(PATH, query))
                file.write(export.lines(page["records"], request.format))
                count += len(page["records"])
                cursor = page["next_cursor"]
                if cursor is None:
                    break
                yield m.Wrote(request.number, request.name, count, whole=False)
            file.keep()
        yield m.Wrote(request.number, request.name, count, whole=True)

    def stopped(self) -> m.Event:
        problem = Problem("cancelled", "the export was stopped; nothing of it is kept")
        return m.Refused(self._request.number, problem)


class Saving:
    def __init__(self, request: m.Save) -> None:
        self._request = request

    def steps(self, transport: Transport) -> Iterator[m.Event | None]:
        with NewFile(self._request.name) as file:
            file.write(self._request.text)
            file.keep()
        yield m.Wrote(self._request.number, self._request.name, 1, whole=True)

    def stopped(self) -> m.Event:
        return m.Refused(self._request.number, Problem("cancelled", "nothing is saved"))
