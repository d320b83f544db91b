"""Models worth beginning with, by task and by the memory that they need. A list kept by hand.

What it says of sizes is approximate: `parameters` and `size_bytes` have three digits. `memory_bytes`
is for one context of 4096 tokens, rounded up to 0.1 GB: the file, its KV in F16 (4 bytes x layers x KV
heads x their width, for each token; for an embedding model that can also generate, half as much
again), and 0.3 GB for computing. An engine without settings takes more where there is more. No
checksum is kept here: what is downloaded is checked against the hub's own.

Models under a licence that restricts what they are used for come after all others.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidValue

TASKS = ("chat", "code", "reasoning", "embedding", "rerank")
PERMISSIVE = frozenset({"Apache-2.0", "MIT"})

_FILE = Path(__file__).with_name("suggested.json")
_VERSION = 1
_EASY = 4e9
"""Bytes of memory."""
_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_REPO = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_GGUF = re.compile(r"[A-Za-z0-9._-]+\.gguf")
_QUANTISATION = re.compile(r"[A-Z][A-Z0-9_]{1,15}")
_TEXT = re.compile(r"\S(?:[^\x00-\x1f]*\S)?")


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A file of a repository on the hub; without a `file`, whichever has that quantisation.

    `licence` is an SPDX identifier, or the licence's own name where it has none.
    """

    id: str
    tasks: tuple[str, ...]
    repo: str
    file: str | None
    quantisation: str
    licence: str
    parameters: int
    size_bytes: int
    memory_bytes: int
    note: str

    @property
    def reference(self) -> str:
        """What is pulled: owner/name:file, or owner/name:quantisation."""
        return f"{self.repo}:{self.file or self.quantisation}"

    @property
    def restricted(self) -> bool:
        """Whether the licence forbids some uses, or asks for more than to be passed on."""
        return self.licence not in PERMISSIVE


def suggestions(task: str | None = None) -> tuple[Suggestion, ...]:
    """All of them, or those for a task, in the list's order. Raises `InvalidValue` for a task that
    there is none for.
    """
    if task is not None and task not in TASKS:
        raise InvalidValue(f"there is no task {task!r}; there are {', '.join(TASKS)}", param="task")
    return tuple(one for one in _listed() if task is None or task in one.tasks)


def fitting(available: int, task: str | None = None) -> tuple[Suggestion, ...]:
    """Those that fit into so many bytes of memory, each once: by their first task, then what is
    restricted last, then the largest first. Raises `InvalidValue` as `suggestions` does.
    """

    def order(one: Suggestion) -> tuple[int, bool, int, str]:
        first = TASKS.index(task or one.tasks[0])
        return first, one.restricted, -one.memory_bytes, one.id

    return tuple(
        sorted((one for one in suggestions(task) if one.memory_bytes <= available), key=order)
    )


def first(chosen: Sequence[Suggestion], here: Collection[str], available: int) -> Suggestion | None:
    """The one to begin with: the largest, of those that are not `here` (as repositories), that leaves
    half of the memory to work with and answers at a bearable speed without a GPU; else the smallest.
    """
    left = [one for one in chosen if one.repo not in here]
    easy = [one for one in left if one.memory_bytes <= min(available / 2, _EASY)]
    if easy:
        return max(easy, key=lambda one: one.memory_bytes)
    return min(left, key=lambda one: one.memory_bytes, default=None)


@functools.cache
def _listed() -> tuple[Suggestion, ...]:
    return parse(_FILE.read_text(encoding="utf-8"))


def parse(text: str) -> tuple[Suggestion, ...]:
    """The list as the file has it. Raises ValueError naming the entry and the key that is wrong:
    the file is a part of this package, so that is a defect.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or document.keys() != {"version", "models"}:
        raise ValueError("suggested.json: must have the keys version and models, and no others")
    if document["version"] != _VERSION or not isinstance(document["models"], list):
        raise ValueError(f"suggested.json: version must be {_VERSION}, and models a list")
    found = tuple(_entry(entry, place) for place, entry in enumerate(document["models"]))
    if len({one.id for one in found}) < len(found):
        raise ValueError("suggested.json: an id is there twice")
    if sorted(found, key=lambda one: one.restricted) != list(found):
        raise ValueError("suggested.json: a restricted model stands before one that is not")
    return found


def _entry(entry: Any, place: int) -> Suggestion:
    names = [field.name for field in fields(Suggestion)]
    if not isinstance(entry, dict) or entry.keys() != set(names):
        raise ValueError(f"suggested.json: models[{place}] must have the keys {', '.join(names)}")
    for key, right in _RIGHT.items():
        if not right(entry[key], entry):
            raise ValueError(f"suggested.json: models[{place}].{key} is not as it must be")
    return Suggestion(**entry | {"tasks": tuple(entry["tasks"])})


def _matches(pattern: re.Pattern[str]) -> Any:
    return lambda value, _entry: isinstance(value, str) and pattern.fullmatch(value)


def _are_tasks(value: Any, _entry: Mapping[str, Any]) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) == len({str(task) for task in value})
        and all(task in TASKS for task in value)
    )


def _is_file(value: Any, _entry: Mapping[str, Any]) -> bool:
    return value is None or (isinstance(value, str) and bool(_GGUF.fullmatch(value)))


def _is_size(value: Any, _entry: Mapping[str, Any]) -> bool:
    return type(value) is int and value > 0


_RIGHT = {
    "id": _matches(_ID),
    "tasks": _are_tasks,
    "repo": _matches(_REPO),
    "file": _is_file,
    "quantisation": _matches(_QUANTISATION),
    "licence": _matches(_TEXT),
    "parameters": _is_size,
    "size_bytes": _is_size,
    "memory_bytes": lambda value, entry: _is_size(value, entry) and value >= entry["size_bytes"],
    "note": _matches(_TEXT),
}
