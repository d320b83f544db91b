"""How answers become columns: which ones a JSON schema makes, and what each of them can hold."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidValue

_WHOLE = 1 << 63
_DEEPEST = 16
"""Schemas within each other that are looked into."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a column holds: text, integer, number, boolean, list (of one kind), record (of named
    kinds), vector (of float32), or json: whatever comes. `required` are parts that a record has.
    """

    name: str
    parts: tuple[tuple[str, Kind], ...] = ()
    required: frozenset[str] = frozenset()


_NOTHING = object()
TEXT, NUMBER, VECTOR, JSON = Kind("text"), Kind("number"), Kind("vector"), Kind("json")
_SCALARS = {
    "string": TEXT,
    "integer": Kind("integer"),
    "number": NUMBER,
    "boolean": Kind("boolean"),
}


def kind_of(schema: object, root: Mapping[str, Any], depth: int = 0) -> Kind:
    """Of what a JSON schema lets through, null aside. `root` has the definitions."""
    found = _followed(schema, root)
    if found is None or depth > _DEEPEST:
        return JSON
    branches = found.get("anyOf") or found.get("oneOf") or found.get("allOf")
    if branches and "type" not in found:
        return _merged(
            [kind_of(one, root, depth + 1) for one in branches if not _is_null_only(one)]
        )
    types = found.get("type", [])
    named = [one for one in ([types] if isinstance(types, str) else types) if one != "null"]
    if not named:
        values = found.get("enum", [found["const"]] if "const" in found else [])
        return _merged([_kind_of_value(value) for value in values if value is not None])
    return _merged([_kind_of_type(one, found, root, depth) for one in named])


def _kind_of_type(name: str, found: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> Kind:
    if name == "array" and "items" in found and "prefixItems" not in found:
        of = kind_of(found["items"], root, depth + 1)
        return JSON if of == JSON else Kind("list", (("", of),))
    properties = found.get("properties")
    # A record has these fields and no others, or a column of records would lose them.
    if name == "object" and properties and found.get("additionalProperties", True) is False:
        parts = tuple((key, kind_of(one, root, depth + 1)) for key, one in properties.items())
        if any(kind == JSON for _, kind in parts):
            return JSON
        return Kind("record", parts, _required(found))
    return _SCALARS.get(name, JSON)


def _kind_of_value(value: object) -> Kind:
    if isinstance(value, bool):
        return _SCALARS["boolean"]
    named = {str: "string", int: "integer", float: "number"}
    return _SCALARS.get(named.get(type(value), ""), JSON)


def _merged(kinds: list[Kind]) -> Kind:
    different = set(kinds)
    if len(different) == 1:
        return different.pop()
    return NUMBER if different == {NUMBER, _SCALARS["integer"]} else JSON


def _may_be_text(schema: object, root: Mapping[str, Any], depth: int = 0) -> bool:
    found = _followed(schema, root)
    if found is None or depth > _DEEPEST:
        return True
    if "type" in found:
        return "string" in found["type"]
    if branches := found.get("anyOf") or found.get("oneOf"):
        return any(_may_be_text(one, root, depth + 1) for one in branches)
    return True


def _is_null_only(schema: object) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "null"


def _followed(schema: object, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that a local reference leads to; None where there is none, or no end."""
    for _ in range(_DEEPEST):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            break
        here: object = root
        for part in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            here = here.get(name) if isinstance(here, Mapping) else None
        schema = here
    return schema if isinstance(schema, Mapping) and "$ref" not in schema else None


def fit(value: Any, kind: Kind) -> Any:
    """The value as its column holds it. Raises `ValueError` or `OverflowError`."""
    number = _is_number(value)
    fitted: Any = _NOTHING
    match kind.name:
        case "text" | "boolean":
            fitted = value if isinstance(value, str if kind == TEXT else bool) else _NOTHING
        case "number":
            # A decimal number is written as a text, so that no digit of it is lost.
            fitted = float(value) if number or _is_decimal(value) else _NOTHING
        case "integer":
            fitted = int(value) if number and value == int(value) else _NOTHING
        case "list" if isinstance(value, list):
            fitted = [fit(one, kind.parts[0][1]) for one in value]
        case "record" if isinstance(value, dict):
            _check_whole(value, kind.required)
            fitted = {name: fit(value.get(name), part) for name, part in kind.parts}
        case "vector" if isinstance(value, list) and all(map(_is_number, value)):
            fitted = array("f", value)
    if value is None or kind == JSON:
        return value
    if fitted is _NOTHING:
        raise ValueError(f"{type(value).__name__} where the schema has {kind.name}")
    if kind.name == "integer" and not -_WHOLE <= fitted < _WHOLE:
        raise OverflowError("a whole number does not fit into 64 bits")
    return fitted


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _required(schema: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(schema.get("required", ()))


def _check_whole(value: Mapping[str, Any], required: frozenset[str]) -> None:
    """A null would say that the answer has no such value."""
    if missing := sorted(required - value.keys()):
        raise ValueError(f"there is no {missing[0]!r}, which the schema requires")


def _is_decimal(value: object) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns an answer becomes. `fields` are its properties; empty where it is one value, and then
    there is one column. `required` are those that an answer has. `never_text` are columns of JSON that
    has no text at its root.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    error: str
    fields: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    never_text: frozenset[str] = frozenset()

    def values(self, answer: Any) -> tuple[Any, ...]:
        """Raises `ValueError` where the answer does not fit."""
        found = [answer]
        if self.fields:
            if not isinstance(answer, dict):
                raise ValueError(f"{type(answer).__name__} where the schema has fields")
            _check_whole(answer, self.required)
            found = [answer.get(name) for name in self.fields]
        try:
            return tuple(fit(one, kind) for one, kind in zip(found, self.kinds, strict=True))
        except OverflowError as error:
            raise ValueError(str(error)) from None


def layout_of(
    schema: Mapping[str, Any] | None, into: str | Mapping[str, str] | None, default: str = "answer"
) -> Layout:
    """`into` names the column, or is what the names of an object's columns begin with, or says for each
    field that is wanted which column it becomes. Raises `InvalidValue`.
    """
    if into is not None and (not isinstance(into, str | Mapping) or not into):
        raise InvalidValue(
            "a text that is not empty, or a mapping of fields to columns", param="into"
        )
    error = f"{into if isinstance(into, str) else default}_error"
    root = (schema or {}) if schema is None or isinstance(schema, Mapping) else {}
    top = _followed(root, root) or {}
    properties = top.get("properties") if schema is not None else None
    if not properties:
        if isinstance(into, Mapping):
            raise InvalidValue("the answer has no fields: name its one column", param="into")
        kind = TEXT if schema is None else kind_of(root, root)
        name = default if into is None else into
        never = frozenset() if schema is None or _may_be_text(root, root) else frozenset([name])
        return _checked(Layout((name,), (kind,), error, never_text=never))
    if isinstance(into, Mapping):
        if unknown := [name for name in into if name not in properties]:
            there = ", ".join(properties)
            raise InvalidValue(
                f"the schema has no field {unknown[0]!r}: there are {there}", param="into"
            )
        columns = {str(name): column for name, column in into.items()}
    else:
        columns = {name: f"{into}_{name}" if into is not None else name for name in properties}
    kinds = tuple(kind_of(properties[name], root) for name in columns)
    required = _required(top) & columns.keys()
    never = frozenset(columns[name] for name in columns if not _may_be_text(properties[name], root))
    return _checked(Layout(tuple(columns.values()), kinds, error, tuple(columns), required, never))


def one_column(into: str, kind: Kind) -> Layout:
    """Raises `InvalidValue`."""
    return _checked(Layout((into,), (kind,), f"{into}_error"))


def label_columns(into: str, labels: Sequence[str]) -> Layout:
    """The label and the probability of each. Raises `InvalidValue`."""
    if isinstance(labels, str) or not all(isinstance(one, str) and one for one in labels):
        raise InvalidValue("a list of texts that are not empty", param="labels")
    if len(set(labels)) < max(2, len(labels)):
        raise InvalidValue("at least two labels, each once", param="labels")
    names = (into, *(f"{into}_{label}" for label in labels))
    return _checked(Layout(names, (TEXT, *[NUMBER] * len(labels)), f"{into}_error"))


def _checked(found: Layout) -> Layout:
    names = [*found.names, found.error]
    if not found.names or not all(isinstance(name, str) and name for name in names):
        raise InvalidValue("columns have names that are texts, and not empty", param="into")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidValue(f"two columns would have the name {twice[0]!r}", param="into")
    return found


def holdable(value: Any) -> Any:
    """JSON, as it is. Raises `ValueError` for text that no frame can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character") from None
    return value
