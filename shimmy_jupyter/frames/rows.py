"""What is asked for each row, and where the answers are put. Nothing here waits or opens anything."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidValue
from ..notebook.values import python_value

PARAMETERS = frozenset(
    """adapter chat_template_kwargs frequency_penalty grammar ignore_eos logit_bias max_seconds min_p
    min_tokens pin presence_penalty reasoning_effort repeat_last_n repeat_penalty reproducible stop thinking
    top_k top_p""".split()
)
"""Fields of a chat request that a row's answer can be asked with, beside those that `map` names itself."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a row has no answer."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that was answered before, with its prompt."""

    prompt: str
    values: tuple[Any, ...]


Outcome = str | Failed | Kept | None
"""What a row comes to before anything is asked: a prompt, or why there is none. None: it is left out."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """`render` takes the values of `columns`, in that order."""

    columns: tuple[Any, ...]
    render: Callable[[Sequence[Any]], str | Failed | None]


def is_null(value: object) -> bool:
    """None, NaN, NaT and pandas' NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    # NumPy's floats of other widths are no subclass of float.
    return hasattr(value, "is_integer") and bool(value != value)  # noqa: PLR0124


def text_of(value: object) -> str:
    """As it stands in a prompt: lists and mappings as JSON."""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def prompts(
    prompt: str | Callable[[dict[Any, Any]], str | None], columns: Sequence[Any]
) -> Prompts:
    """Raises `InvalidValue` for a template that names no column, and what is neither that nor callable."""
    if isinstance(prompt, str):
        return _template(prompt, columns)
    if not callable(prompt):
        raise InvalidValue("a text with {column} in it, or a function of a row", param="prompt")
    called, names = prompt, tuple(columns)

    def render(values: Sequence[Any]) -> str | None:
        text = called(dict(zip(names, values, strict=True)))
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise InvalidValue(
                f"the function gave {kind}: it has to give a text, or None to leave the row out",
                param="prompt",
            )
        return text

    return Prompts(names, render)


def _template(template: str, columns: Sequence[Any]) -> Prompts:
    """`{column}` is that column's value in the row. Every other brace stays, doubled ones too."""
    named = {str(name): name for name in columns}
    if len(named) < len(columns):
        raise InvalidValue("two columns have the same name as a text", param="prompt")
    texts, names = _pieces(template, named)
    if not names:
        known = ", ".join(f"{{{name}}}" for name in list(named)[:20])
        raise InvalidValue(
            f"it names no column, so every row would ask the same: there are {known or 'none'}",
            param="prompt",
        )
    used = list(dict.fromkeys(names))
    places = [used.index(name) for name in names]

    def render(values: Sequence[Any]) -> str | Failed:
        for name, value in zip(used, values, strict=True):
            if is_null(value):
                return Failed("invalid_value", f"{name!r} is null in this row")
        shown = [text_of(value) for value in values]
        between = zip(places, texts[1:], strict=True)
        return texts[0] + "".join(part for k, text in between for part in (shown[k], text))

    return Prompts(tuple(named[name] for name in used), render)


def _pieces(template: str, named: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The texts around the columns, and these."""
    texts, names, done = [], [], 0
    # The longest first, for a name may hold another and a brace after it.
    longest = sorted(map(re.escape, named), key=len, reverse=True)
    for found in re.finditer(rf"\{{({'|'.join(longest)})\}}", template) if named else ():
        if template[: found.start()].endswith("{") and template[found.end() :].startswith("}"):
            continue
        texts.append(template[done : found.start()])
        names.append(found[1])
        done = found.end()
    return [*texts, template[done:]], names


def column(name: Any, columns: Sequence[Any]) -> Prompts:
    """The text of one column, as it is. Raises `InvalidValue`."""
    if name not in columns:
        there = ", ".join(str(one) for one in columns[:20]) or "none"
        raise InvalidValue(f"there is no column {name!r}: there are {there}", param="column")
    null = Failed("invalid_value", f"{str(name)!r} is null in this row")
    return Prompts((name,), lambda values: null if is_null(values[0]) else text_of(values[0]))


def body(
    system: str | None, schema: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """A chat request without its model and messages. What is None is left to the server. Raises
    `InvalidValue`.
    """
    own = {"max_tokens", "temperature", "seed"}
    for name in given:
        if name not in PARAMETERS | own:
            known = ", ".join(sorted(PARAMETERS | own))
            raise InvalidValue(f"a row is not asked with this; there are {known}", param=name)
    if system is not None and not isinstance(system, str):
        raise InvalidValue("it is a text", param="system")
    found = {name: python_value(value) for name, value in given.items() if value is not None}
    if schema is not None:
        found["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "row", "schema": dict(schema), "strict": True},
        }
    return found


def instruction(schema: Mapping[str, Any] | None) -> str:
    """What stands before each row's prompt: whatever holds an answer to a schema tells the model nothing."""
    if schema is None:
        return ""
    written = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return f"Answer with JSON that fits this schema:\n{written}\n\n"


def messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    """What rows share comes first, where the server need not compute it again."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def is_repeatable(given: Mapping[str, Any]) -> bool:
    """Whether the same prompt is to have the same answer: greedy, or with a seed."""
    return given.get("temperature") == 0 or given.get("seed") is not None


class Table:
    """The answers, column by column. Beside them it has 8 bytes for each cell and one for each row; what
    failed has its error, and the same error is kept once.
    """

    OPEN, DONE, FAILED = range(3)

    def __init__(self, rows: int, columns: int) -> None:
        self.columns: list[list[Any]] = [[None] * rows for _ in range(columns)]
        self.errors: dict[int, str] = {}
        self._states = bytearray(rows)
        self._same: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._states)

    def state(self, row: int) -> int:
        return self._states[row]

    def put(self, row: int, values: Sequence[Any]) -> None:
        for column, value in zip(self.columns, values, strict=True):
            column[row] = value
        self._states[row] = self.DONE

    def fail(self, row: int, why: Failed) -> None:
        said = str(why)
        self.errors[row] = self._same.setdefault(said, said)
        self._states[row] = self.FAILED

    def copy(self, source: int, row: int) -> None:
        """What the row's prompt came to in an earlier one. Whoever changes a list or a vector of one row
        means that row.
        """
        for column in self.columns:
            column[row] = copy.deepcopy(column[source])
        if source in self.errors:
            self.errors[row] = self.errors[source]
        self._states[row] = self._states[source]

    def said(self) -> Iterator[str | None]:
        """The error of each row, null where there is none; rows that nothing has been heard of say so."""
        open_ = str(Failed("cancelled", "it ended before this row was answered"))
        for row, state in enumerate(self._states):
            yield open_ if state == self.OPEN else self.errors.get(row)
