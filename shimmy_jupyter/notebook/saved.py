"""Answers out of a saved notebook, where a kernel no longer has its own. The file may come from anybody:
it is read within bounds, and one answer of it is taken at its word as far as `provenance` lets it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import InvalidValue, NotFound
from .provenance import KEY, Kept, digest, from_json

LARGEST = 64 << 20
"""Bytes of a notebook that is looked into."""


class _Answer(Protocol):
    @property
    def cell(self) -> int | None: ...
    @property
    def id(self) -> str | None: ...
    @property
    def variable(self) -> str: ...


_A = TypeVar("_A", bound=_Answer)


def pick(answers: Sequence[_A], which: str) -> _A | None:
    """The last; or the last of the cell that was run under this number; or the last that went into this
    variable; or the last of the cell with this id.
    """
    if not which:
        return answers[-1] if answers else None
    for mine in (
        lambda one: one.cell is not None and str(one.cell) == which,
        lambda one: one.variable == which,
        lambda one: one.id == which,
    ):
        found = [one for one in answers if mine(one)]
        if found:
            return found[-1]
    return None


def names(answers: Sequence[_Answer]) -> list[str]:
    """What `pick` takes them by."""
    found = [(str(one.cell or ""), one.variable, one.id or "") for one in answers]
    return [name for several in found for name in several if name]


@dataclass(frozen=True, slots=True)
class _Row:
    """An output that says what made it, as it stands in the file."""

    cell: int | None
    id: str | None
    variable: str
    said: Mapping[str, Any]
    data: Mapping[str, Any]


def answer_of(path: Path, which: str = "") -> Kept:
    """The last answer of a saved notebook, or the one that `pick` takes. Its text is None where none of the
    output's is the one that was answered.

    Raises `NotFound` where there is none, or no notebook, and `InvalidValue` for one that is damaged.
    """
    rows = list(_rows(_read(path)))
    row = pick(rows, which)
    if row is None:
        there = ", ".join(dict.fromkeys(str(r.cell) for r in rows if r.cell is not None))
        wanted = f"no answer of {which[:64]!r}" if which else "no answer that says what made it"
        hint = f"; there are those of cells {there[:200]}" if there else ""
        raise NotFound(f"the saved notebook has {wanted}{hint}")
    made = from_json(row.said)
    texts = (text for text in _texts(row.data) if digest(text) == made.answer_sha256)
    return Kept(made, next(texts, None), row.cell, row.id)


def names_of(path: Path) -> list[str]:
    """What `answer_of` finds answers by in a saved notebook; nothing where there is none that can be read,
    as a word of a prompt may be looked for among them.
    """
    try:
        return names(list(_rows(_read(path))))
    except (NotFound, InvalidValue):
        return []


def _read(path: Path) -> Mapping[str, Any]:
    name = path.name
    if path.suffix != ".ipynb":
        raise NotFound(f"{name[:100]!r} is no notebook")
    try:
        # A named pipe in its place is not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise InvalidValue(f"{name} is no regular file", param="notebook")
            with os.fdopen(handle, "rb", closefd=False) as file:
                data = file.read(LARGEST + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise NotFound(f"{name} is not saved yet, or not where this kernel can see it") from None
    except OSError as error:
        raise NotFound(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > LARGEST:
        raise InvalidValue(f"{name} has more than {LARGEST >> 20} MiB", param="notebook")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidValue(f"{name} is no notebook, or is damaged", param="notebook") from None
    return found if isinstance(found, dict) else {}


def _rows(notebook: Mapping[str, Any]) -> Iterator[_Row]:
    for cell in _objects(notebook.get("cells")):
        number, id = cell.get("execution_count"), cell.get("id")
        for output in _objects(cell.get("outputs")):
            metadata, data = output.get("metadata"), output.get("data")
            said = metadata.get(KEY) if isinstance(metadata, dict) else None
            if isinstance(said, dict) and isinstance(data, dict):
                variable = said.get("variable")
                yield _Row(
                    number if type(number) is int else None,
                    id if isinstance(id, str) else None,
                    variable if isinstance(variable, str) else "",
                    said,
                    data,
                )


def _objects(value: object) -> Iterable[dict[str, Any]]:
    return (one for one in value if isinstance(one, dict)) if isinstance(value, list) else ()


def _texts(data: Mapping[str, Any]) -> Iterator[str]:
    """What the answer may have been, by each of an output's representations."""
    for value in data.values():
        if isinstance(value, dict):
            value = value.get("text")  # noqa: PLW2901
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            value = "".join(value)  # noqa: PLW2901
        if not isinstance(value, str):
            continue
        yield from _unnoted(value)


def _unnoted(text: str) -> Iterator[str]:
    """As it is, and without the line of figures that may stand below it."""
    yield text
    before, line, _ = text.rpartition("\n[")
    if line:
        yield before
