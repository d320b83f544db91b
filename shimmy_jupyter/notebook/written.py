"""A value as JSON that its type would read again.

Pydantic writes values for whoever they are sent to: under other names, in other forms, without what
others must not see. An answer's schema has the names and forms that are read, so values are written
here by that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import Any

_WRAPPERS = {
    "definitions": "schema",
    "nullable": "schema",
    "default": "schema",
    "custom-error": "schema",
    "function-before": "schema",
    "function-after": "schema",
    "function-wrap": "schema",
    "json-or-python": "json_schema",
    "lax-or-strict": "lax_schema",
}
"""Of pydantic's core schemas those that are about another, and where they have it."""
_SCALARS: Mapping[str, Any] = {
    "str": str,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "none": type(None),
}
Schema = Mapping[str, Any]


class Writer:
    """By the core schema that pydantic has of the type."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._known = {one["ref"]: one for one in schema.get("definitions", ())}

    def __call__(self, value: Any) -> Any:
        """Raises `ValueError` for what cannot be written."""
        return self._written(value, self._schema)

    def _written(self, value: Any, schema: Schema, own: Schema | None = None) -> Any:
        """`own` is how a type of the user's is written, where JSON has no way by itself."""
        found, own = self._core(schema, own)
        match found["type"]:
            case "union" | "tagged-union":
                chosen = next((one for one in _choices(found) if self._is_of(value, one)), None)
                return _leaf(value, own) if chosen is None else self._written(value, chosen, own)
            case "model" | "dataclass" if isinstance(value, found["cls"]):
                return self._instance(value, found)
            case "typed-dict" if isinstance(value, Mapping):
                return self._fields(value, value, found, value)
            case _ if "values_schema" in found and isinstance(value, Mapping):
                each = found["values_schema"]
                keys = [next(iter(_leaf({key: None}))) for key in value]
                whole = [self._written(one, each) for one in value.values()]
                return dict(zip(keys, whole, strict=True))
            case _ if "items_schema" in found and _is_several(value):
                items = _items(found, len(value))
                return [self._written(*both) for both in zip(value, items, strict=False)]
        return _leaf(value, own)

    def _core(self, schema: Schema, own: Schema | None = None) -> tuple[Schema, Schema | None]:
        """What the schema is about in the end. How the outermost is written counts, as in pydantic."""
        while True:
            own = own or schema.get("serialization")
            kind = schema["type"]
            if kind == "definition-ref":
                schema = self._known[schema["schema_ref"]]
            elif kind == "chain":
                schema = schema["steps"][-1]
            elif kind in _WRAPPERS:
                schema = schema[_WRAPPERS[kind]]
            else:
                return schema, own

    def _instance(self, value: Any, found: Schema) -> Any:
        if found.get("root_model"):
            return self._written(value.root, found["schema"])
        there = {name: getattr(value, name) for name in self._names(found) if hasattr(value, name)}
        extra = getattr(value, "__pydantic_extra__", None) or {}
        return self._fields(value, {**extra, **there}, found, extra)

    def _names(self, found: Schema) -> list[str]:
        # What only the making of an instance is given, it does not have; a default would stand for it.
        fields = _fields_of(self._core(found["schema"])[0])
        return [name for name, field in fields.items() if not field.get("init_only")]

    def _fields(
        self, whole: Any, values: Mapping[str, Any], found: Schema, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        inner = found if found["type"] == "typed-dict" else self._core(found["schema"])[0]
        by_alias = found.get("config", {}).get("validate_by_alias") is not False
        fields = _fields_of(inner)
        made = {name: _leaf(extra[name]) for name in extra if name not in fields}
        for name, field in fields.items():
            if name in values:
                one = field["schema"]
                own = _bound(self._core(one)[1], whole)
                key = _read_name(name, field) if by_alias else name
                made[key] = self._written(values[name], one, own)
        return made

    def _is_of(self, value: Any, schema: Schema) -> bool:
        """Whether the value may have been read by it: what has other names is told apart."""
        if value is None and schema["type"] == "nullable":
            return True
        found, _ = self._core(schema)
        possible = True
        match found["type"]:
            case "union" | "tagged-union":
                possible = any(self._is_of(value, one) for one in _choices(found))
            case "model" | "dataclass":
                possible = isinstance(value, found["cls"])
            case "typed-dict":
                possible = isinstance(value, Mapping) and self._has_fields(value, found)
            case _ if "values_schema" in found:
                each = repeat(found["values_schema"])
                possible = isinstance(value, Mapping) and self._are_of(value.values(), each)
            case _ if "items_schema" in found:
                possible = _is_several(value) and self._are_of(value, _items(found, len(value)))
            case "literal":
                possible = any(
                    type(one) is type(value) and one == value for one in found["expected"]
                )
            case str(kind) if kind in _SCALARS:
                possible = isinstance(value, _SCALARS[kind])
        return possible

    def _are_of(self, values: Iterable[Any], schemas: Iterable[Schema]) -> bool:
        return all(self._is_of(*both) for both in zip(values, schemas, strict=False))

    def _has_fields(self, value: Mapping[str, Any], found: Schema) -> bool:
        fields = _fields_of(found)
        total = found.get("total", True)
        for name, field in fields.items():
            if name not in value:
                if field.get("required", total):
                    return False
            elif not self._is_of(value[name], field["schema"]):
                return False
        return found.get("extra_behavior") == "allow" or set(value) <= set(fields)


def _choices(found: Schema) -> list[Schema]:
    several = found["choices"]
    each = several.values() if isinstance(several, Mapping) else several
    return [one[0] if isinstance(one, tuple) else one for one in each]


def _fields_of(found: Schema) -> dict[str, Schema]:
    fields = found.get("fields", {})
    return dict(fields) if isinstance(fields, Mapping) else {one["name"]: one for one in fields}


def _items(found: Schema, count: int) -> Iterator[Schema]:
    if found["type"] != "tuple":
        yield from repeat(found["items_schema"], count)
        return
    places, rest = list(found["items_schema"]), found.get("variadic_item_index")
    if rest is not None:
        places[rest : rest + 1] = [places[rest]] * (count - len(places) + 1)
    yield from places


def _is_several(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _read_name(name: str, field: Schema) -> str:
    """The one that pydantic puts into the schema, of the several that it reads."""
    alias = field.get("validation_alias", name)
    if isinstance(alias, str):
        return alias
    paths = [path for path in alias if isinstance(path, list) and len(path) == 1]
    return str(paths[0][0]) if paths else name


def _bound(own: Schema | None, whole: Any) -> Schema | None:
    """A field's serializer takes the instance first."""
    if own is None or not own.get("is_field_serializer"):
        return own
    return {**own, "function": partial(own["function"], whole), "is_field_serializer": False}


def _leaf(value: Any, own: Schema | None = None) -> Any:
    from pydantic_core import PydanticSerializationError, SchemaSerializer, to_jsonable_python

    try:
        return to_jsonable_python(value, by_alias=True)
    except PydanticSerializationError:
        if own is None:
            return to_jsonable_python(value, by_alias=True, fallback=_otherwise)
        by_itself: Any = {"type": "any", "serialization": own}
        return SchemaSerializer(by_itself).to_python(value, mode="json", fallback=_otherwise)


def _otherwise(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
