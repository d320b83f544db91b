"""JSON schemas of draft 2020-12, checked and put so that llguidance enforces every word of them.

What it would ignore, or enforce only half, is refused here by name and place (`properties.a.not`).
What it would choke on (it recurses natively, and a deep enough chain of references overflows the
stack and kills the process) is bounded here. Annotations are dropped and references renamed, so
that nothing of a schema reaches it that has not been looked at; nothing is ever fetched.

Narrower than the draft: keys come in the order of `properties`, there is no whitespace, control
characters that only `\\u` can write do not come. Wider: a key that `properties` does not name may
come twice (a reader takes the last), February has 29 days, any minute a leap second, and patterns
are Rust's, no lookaround.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, TypeGuard
from urllib.parse import unquote

from ..errors import InvalidValue, UnsupportedParameter
from .json_bounds import excludes, put_beyond

MAX_NODES = 2000  # subschemas, and the lists and objects in `const` and `enum`
MAX_DEPTH = 48  # of a place in the schema, or in one of its definitions
MAX_DEPTHS = 400  # of all definitions in use together: each takes llguidance 4 kB of stack
MAX_KEYS = 500  # of one object: the time for a grammar grows with their square
MAX_PATTERN_KEYS = 16
MAX_TEXT = 1024  # characters of a pattern, a key or a string
MAX_COUNT = 100_000
MAX_NUMBER = 1 << 53  # beyond, llguidance's arithmetic is no longer exact
MAX_STEPS = 500  # of `multipleOf`, as a whole number of its last decimal: states of a machine

APPLICATORS = ("const", "enum", "allOf", "anyOf", "oneOf", "$ref")
SUPPORTED = (
    *"type properties patternProperties additionalProperties required".split(),
    *"minProperties maxProperties prefixItems items minItems maxItems minLength maxLength".split(),
    *"pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split(),
    *APPLICATORS,
)
"""In the order in which llguidance gets them: `additionalProperties` is about those before."""
FORMATS = tuple("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
"""Those of strings that are enforced. Any other is refused; on other types all are annotations."""
ANNOTATIONS = tuple(
    "title description default example examples $comment deprecated readOnly writeOnly $schema $id"
    " discriminator $defs definitions".split()
)
"""Without effect by themselves, as are keywords that begin with `x-`."""
UNSUPPORTED = tuple(
    "not if then else contains minContains maxContains uniqueItems dependentRequired"
    " dependentSchemas dependencies propertyNames unevaluatedItems unevaluatedProperties"
    " additionalItems contentEncoding contentMediaType contentSchema $anchor $dynamicRef"
    " $dynamicAnchor $recursiveRef $recursiveAnchor $vocabulary".split()
)
"""Keywords of JSON Schema that cannot be enforced. Any further keyword is refused as unknown."""
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

Path = tuple[str | int, ...]
Schema = dict[str, Any] | bool


def translate(root: Any, param: str) -> dict[str, Any]:
    """A parsed schema for llguidance. Raises with `param`."""
    return _Translator(root, param).translated()


class _Translator:
    """Definitions wait until the schema that named them is done: only nesting recurses."""

    def __init__(self, root: Any, param: str) -> None:
        self._root = root
        self._param = param
        self._names: dict[str, str] = {}
        self._waiting: list[tuple[str, Any, Path]] = []
        self._choices: list[dict[str, Any]] = []
        self._defs: dict[str, Schema] = {}
        self._nodes = self._depths = self._deepest = self._pattern_keys = 0
        self._multiples: set[Decimal] = set()
        self._merged: Path | None = None
        self._excluding: list[tuple[dict[str, Any], Path]] = []
        self._readers: dict[str, Callable[[Any, Path], Any]] = {
            "type": self._type, "required": self._required, "pattern": self._text,
            "multipleOf": self._multiple, "const": self._literal, "enum": self._enum,
            "$ref": self._ref,
        }  # fmt: skip
        self._readers |= dict.fromkeys(("properties", "patternProperties"), self._map)
        self._readers |= dict.fromkeys(("additionalProperties", "items"), self._schema)
        self._readers |= dict.fromkeys(("prefixItems", "allOf", "anyOf", "oneOf"), self._list)
        kinds = ("Items", "Length", "Properties")
        self._readers |= dict.fromkeys((m + k for m in ("min", "max") for k in kinds), self._count)
        bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        self._readers |= dict.fromkeys(bounds, self._number)

    def translated(self) -> dict[str, Any]:
        top = self._begin(self._root, ())
        while self._waiting:
            name, schema, path = self._waiting.pop()
            self._defs[name] = self._begin(schema, path)
        several = self._pattern_keys > 1 or len(self._multiples) > 1
        if several and self._merged is not None:
            # Each merge would compare all patterns anew, and a common multiple can overflow.
            what = "several patternProperties, or several multipleOf, where schemas are merged"
            raise self._unsupported(self._merged, what)
        for schema, path in self._excluding:
            if not put_beyond(schema, merged=self._merged is not None):
                raise self._unsupported(path, "a bound that excludes so large a whole number")
        for choice in self._choices:
            options = [self._resolved(option) for option in choice["oneOf"]]
            if "anyOf" not in choice and _apart(options):
                choice["anyOf"] = choice.pop("oneOf")
        self._require_ends(top)
        found = {"allOf": [top]} if isinstance(top, bool) else top
        return found | {"$defs": self._defs} if self._defs else found

    def _begin(self, schema: Any, path: Path) -> Schema:
        self._deepest = 0
        self._base = len(path)
        found = self._schema(schema, path)
        self._depths += self._deepest
        if self._depths > MAX_DEPTHS:
            raise self._invalid(path, f"definitions are nested {MAX_DEPTHS} deep, taken together")
        return found

    # Schemas

    def _schema(self, schema: Any, path: Path) -> Schema:
        self._node(path)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._invalid(path, "a schema is an object, true or false")
        for key in schema:
            self._known(key, schema[key], path)
        found = {
            key: self._readers[key](schema[key], (*path, key))
            for key in SUPPORTED
            if key in schema and key != "format"
        }
        self._format(schema, found, (*path, "format"))
        if excludes(found):
            self._excluding.append((found, path))
        self._keys(found, path)
        self._note_merge(found, path)
        if "oneOf" in found:
            self._choices.append(found)
        return found

    def _known(self, key: str, value: Any, path: Path) -> None:
        if key == "uniqueItems" and value is False:
            return
        if key in UNSUPPORTED or (key == "$id" and path):
            raise self._unsupported((*path, key), "this keyword")
        if key not in SUPPORTED and key not in ANNOTATIONS and not key.startswith("x-"):
            raise self._unsupported((*path, key), "a keyword that JSON Schema does not have")

    def _keys(self, found: dict[str, Any], path: Path) -> None:
        required = found.get("required", [])
        if len({*found.get("properties", ()), *required}) > MAX_KEYS:
            raise self._invalid(path, f"an object has at most {MAX_KEYS} keys")
        self._pattern_keys += len(found.get("patternProperties", ()))
        if self._pattern_keys > MAX_PATTERN_KEYS:
            raise self._invalid(path, f"a schema has at most {MAX_PATTERN_KEYS} patternProperties")
        open_ = "patternProperties" in found or found.get("additionalProperties") is not False
        if open_ and found.get("minProperties", 0) > len(required) + 1:
            raise self._unsupported((*path, "minProperties"), "counting keys that may come twice")

    def _note_merge(self, found: dict[str, Any], path: Path) -> None:
        parts = len(found.get("allOf", ())) + any(key not in APPLICATORS for key in found)
        if parts + sum(key in found for key in ("anyOf", "oneOf", "$ref")) > 1:
            self._merged = path

    def _list(self, value: Any, path: Path) -> list[Schema]:
        return [self._schema(v, (*path, i)) for i, v in enumerate(self._several(value, path))]

    def _map(self, value: Any, path: Path) -> dict[str, Schema]:
        if not isinstance(value, dict):
            raise self._invalid(path, "an object of schemas is wanted")
        return {self._text(k, path): self._schema(v, (*path, k)) for k, v in value.items()}

    def _ref(self, value: Any, path: Path) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise self._unsupported(path, "a reference that does not begin with #/")
        name = self._names.get(value, f"d{len(self._names)}")
        if value not in self._names:
            self._names[value] = name
            self._waiting.append((name, *self._target(value, path)))
        return f"#/$defs/{name}"

    def _target(self, reference: str, path: Path) -> tuple[Any, Path]:
        at, where = self._root, []
        for part in reference.split("/")[1:]:
            key: str | int = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                key = int(key) if isinstance(at, list) else key
                at = at[key]
            except (LookupError, TypeError, ValueError):
                raise self._invalid(path, "the reference leads nowhere") from None
            where.append(key)
        return at, tuple(where)

    # Values

    def _several(self, value: Any, path: Path) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self._invalid(path, "a list is wanted, and not an empty one")
        return value

    def _type(self, value: Any, path: Path) -> str | list[str]:
        names = self._several(value if isinstance(value, list) else [value], path)
        if not all(isinstance(name, str) and name in TYPES for name in names):
            raise self._invalid(path, f"a type is one of {', '.join(TYPES)}")
        return list(dict.fromkeys(names)) if isinstance(value, list) else value

    def _required(self, value: Any, path: Path) -> list[str]:
        keys = self._several(value, path) if value != [] else []
        return list(dict.fromkeys(self._text(key, path) for key in keys))

    def _format(self, schema: dict[str, Any], found: dict[str, Any], path: Path) -> None:
        if "format" in schema and "string" in found.get("type", ("string",)):
            if schema["format"] not in FORMATS:
                raise self._unsupported(path, f"a format other than {', '.join(FORMATS)}")
            found["format"] = schema["format"]

    def _count(self, value: Any, path: Path) -> int:
        if not _is_number(value) or not 0 <= value <= MAX_COUNT or value != int(value):
            raise self._invalid(path, f"a whole number from 0 to {MAX_COUNT} is wanted")
        return int(value)

    def _number(self, value: Any, path: Path) -> Any:
        if not _is_number(value) or abs(value) > MAX_NUMBER:
            raise self._invalid(path, "a number from -2^53 to 2^53 is wanted")
        return value

    def _multiple(self, value: Any, path: Path) -> Any:
        given = value if _is_number(value) and 0 < value <= MAX_STEPS else 0
        step = Decimal(str(given)).normalize()
        if not 0 < step.scaleb(-min(0, int(step.as_tuple().exponent))) <= MAX_STEPS:
            raise self._invalid(path, f"a number of 1 to {MAX_STEPS} is wanted, less its point")
        self._multiples.add(step)
        return value

    def _enum(self, value: Any, path: Path) -> list[Any]:
        return [self._literal(item, path) for item in self._several(value, path)]

    def _literal(self, value: Any, path: Path) -> Any:
        if isinstance(value, str):
            return self._text(value, path)
        if value is None or isinstance(value, bool):
            return value
        if not isinstance(value, (list, dict)):
            return self._number(value, path)
        self._node((*path, 0))
        if isinstance(value, list):
            return [self._literal(item, (*path, i)) for i, item in enumerate(value)]
        return {self._text(k, path): self._literal(v, (*path, k)) for k, v in value.items()}

    def _text(self, value: Any, path: Path) -> str:
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise self._invalid(path, f"a string of at most {MAX_TEXT} characters is wanted")
        # Without \u an answer could not write them; with it, it could write any key in two ways.
        if any((c < " " and c not in "\b\f\n\r\t") or c == "\x7f" for c in value):
            raise self._unsupported(path, "a control character")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self._invalid(path, "half of a surrogate pair is no character")
        return value

    # What the schemas are together

    def _resolved(self, schema: Schema) -> Schema:
        for _ in self._defs:
            if isinstance(schema, bool) or set(schema) != {"$ref"}:
                break
            schema = self._defs[schema["$ref"].rpartition("/")[2]]
        return schema

    def _require_ends(self, top: Schema) -> None:
        """Refuses what requires itself, and would never be complete."""
        ending: set[str] = set()
        left = list(self._names.items())
        before = -1
        while len(ending) > before:
            before = len(ending)
            for _, name in reversed(left):  # those behind are often what those before need
                if _ends(self._defs[name], ending):
                    ending.add(f"#/$defs/{name}")
            left = [pair for pair in left if f"#/$defs/{pair[1]}" not in ending]
        if left or not _ends(top, ending):
            where = tuple(left[0][0].split("/")[1:]) if left else ()
            raise self._invalid(where, "it requires itself, and would never be complete")

    # Bounds, and what is said of them

    def _node(self, path: Path) -> None:
        self._nodes += 1
        depth = len(path) - self._base
        self._deepest = max(self._deepest, depth + 1)
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            limits = f"{MAX_NODES} parts, and is at most {MAX_DEPTH} deep"
            raise self._invalid(path, f"a schema has at most {limits}")

    def _invalid(self, path: Path, why: str) -> InvalidValue:
        return InvalidValue(f"{_dotted(path)}: {why}", param=self._param)

    def _unsupported(self, path: Path, what: str) -> UnsupportedParameter:
        return UnsupportedParameter(f"{_dotted(path)}: {what} is not supported", param=self._param)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _dotted(path: Path) -> str:
    return ".".join(str(part)[:40] for part in path[-8:]) or "the schema"


def _types(schema: dict[str, Any]) -> set[str]:
    given = schema.get("type", TYPES)
    return {given} if isinstance(given, str) else set(given)


def _ends(schema: Schema, ending: set[str]) -> bool:
    """Whether some answer is complete, if references into `ending` have one."""
    if isinstance(schema, bool):
        return True  # or is refused by llguidance

    def every(parts: Iterable[Schema]) -> bool:
        return all(_ends(part, ending) for part in parts)

    def some(parts: Iterable[Schema]) -> bool:
        return any(_ends(part, ending) for part in parts)

    if "$ref" in schema and schema["$ref"] not in ending:
        return False
    choices = [schema[key] for key in ("anyOf", "oneOf") if key in schema]
    if not every(schema.get("allOf", ())) or not all(some(options) for options in choices):
        return False
    types, required = _types(schema), schema.get("required", [])
    if "const" in schema or "enum" in schema or types - {"array", "object"}:
        return True
    least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    rest = [schema.get("items", True)] if least > len(first) else []
    if "array" in types and every([*first[:least], *rest]):
        return True
    properties = schema.get("properties", {})
    other = "patternProperties" in schema or schema.get("additionalProperties", True)
    enough = schema.get("minProperties", 0) <= len(required)
    fits = "object" in types and every(properties.get(key, other) for key in required)
    return fits and (enough or some([*properties.values(), other]))


def _apart(options: list[Schema]) -> bool:
    """Whether no value can match two of them. llguidance sees as much but through references."""
    first = options[0]
    keys = first.get("required", ()) if isinstance(first, dict) else ()
    return (
        _differ(_values(option) for option in options)
        or _differ(_wide_types(option) for option in options)
        or any(_differ(_tag(option, key) for option in options) for key in keys)
    )


def _differ(found: Iterable[set[Any]]) -> bool:
    seen: set[Any] = set()
    for values in found:
        if not values or not seen.isdisjoint(values):
            return False
        seen |= values
    return True


def _values(schema: Schema) -> set[Any]:
    """What it is one of; empty where that is not so simple."""
    if isinstance(schema, bool) or not ("const" in schema or "enum" in schema):
        return set()
    values = [schema["const"]] if "const" in schema else schema["enum"]
    simple = not any(isinstance(value, (list, dict)) for value in values)
    return {(isinstance(value, bool), value) for value in values} if simple else set()


def _wide_types(schema: Schema) -> set[str]:
    types = _types(schema) if isinstance(schema, dict) else set(TYPES)
    return types | {"integer"} if "number" in types else types


def _tag(schema: Schema, key: str) -> set[Any]:
    """What a required key is one of, of what can only be an object."""
    if isinstance(schema, bool) or schema.get("type") != "object":
        return set()
    required = key in schema.get("required", ())
    return _values(schema.get("properties", {}).get(key, True)) if required else set()
