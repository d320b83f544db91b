"""What the bodies of all routes have in common: how they are read, what is refused and what ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)

from ..errors import InvalidValue, UnknownParameter, UnsupportedParameter
from ..types import Prompt

LIMIT = 2**31 - 1
_LABELS = frozenset(
    "user metadata prompt_cache_key prompt_cache_retention safety_identifier".split()
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "adapter": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "pin": (),
    "prediction": (),
    "reasoning_effort": (),
    "thinking": (),
    "chat_template_kwargs": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Beside null. Several become features later; until then they are refused, not ignored."""
_SAID = {
    "missing": "this field is missing",
    "string_pattern_mismatch": "a SHA-256 is 64 hex digits in lower case",
    "model_type": "an object is wanted here",
    "dict_type": "an object is wanted here",
}
"""Where pydantic's own words are for programmers. The only pattern is that of `Digest`."""
_MOST_FIELDS = 200
_MOST_LEVELS = 64
_MOST_CONTAINERS = 1 << 18
"""Objects and lists: each takes some twenty times the memory that it takes in a body."""
_MOST_KEYS = {"logit_bias": 1024, "chat_template_kwargs": 32}
_FIELDS = tuple(
    "adapter chat_template content context_size description include_usage json_schema name parts role"
    " schema sha256 size strict text type value".split()
)


_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[Text, Field(min_length=1, max_length=256)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Tokens = Annotated[int, Field(ge=0, le=LIMIT)]


class Body(BaseModel):
    """Strict: a number is no text, and infinity no number."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


_B = TypeVar("_B", bound=Body)


def as_prompt(value: Any) -> Prompt:
    """By hand: pydantic tries every branch of a union on every element before it gives up."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int):
        value = value[0]
    if isinstance(value, str):
        return _unicode(value)
    if not isinstance(value, list):
        raise ValueError("a prompt is a text, or a list of token ids")  # noqa: TRY004  pydantic's
    if len(value) > 1 and isinstance(value[0], str | list):
        raise ValueError("one prompt in a request, please")
    for token in value:
        if type(token) is not int or not 0 <= token <= LIMIT:
            raise ValueError(f"{json.dumps(token)[:20]} is not a token id")
    return tuple(value)


TOKEN_IDS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": LIMIT},
}
AnyPrompt = Annotated[
    Any,
    PlainValidator(as_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                TOKEN_IDS,
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
                {"type": "array", "items": TOKEN_IDS, "minItems": 1, "maxItems": 1},
            ]
        }
    ),
]


def validated(kind: type[_B], body: bytes | dict[str, Any]) -> _B:
    """Raises `InvalidValue`, or `UnknownParameter` where the kind forbids further fields."""
    if not isinstance(body, bytes):
        return _validated(kind, body)
    data, strange = _json(body)
    if strange:
        raise InvalidValue(f"{strange} is not a number here", param=_place(data))
    return _validated(kind, data)


def _validated(kind: type[_B], data: dict[str, Any]) -> _B:
    if len(data) > _MOST_FIELDS:
        raise InvalidValue(f"the body has {len(data)} fields; {_MOST_FIELDS} are the most")
    for name, most in _MOST_KEYS.items():
        given = data.get(name)
        if isinstance(given, dict) and len(given) > most:
            # Here, as pydantic looks at all of them before it counts.
            raise InvalidValue(f"at most {most} of them", param=name)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "extra_forbidden":
            name = ".".join(str(part)[:64] for part in first["loc"])
            raise UnknownParameter(_no_such(kind, len(first["loc"])), param=name) from None
        message = _SAID.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        raise InvalidValue(message, param=_field(first["loc"])) from None


def _no_such(kind: type[Body], depth: int) -> str:
    known = [field.alias or name for name, field in kind.model_fields.items()] if depth == 1 else []
    there = f"; there are {', '.join(known)}" if known else ""
    return f"there is no such field here{there}"


def _field(location: tuple[int | str, ...]) -> str | None:
    """The field's path as a client writes it; the names of a union's branches are pydantic's."""
    parts = [
        str(part)
        for i, part in enumerate(location)
        if i == 0 or isinstance(part, int) or part in _FIELDS
    ]
    return ".".join(parts) or None


def _json(body: bytes) -> tuple[dict[str, Any], str]:
    """An object, of a key that is there twice the last value; and what in it is no number, if
    anything is. Raises `InvalidValue`.
    """
    strange = ""

    def constant(name: str) -> float:
        nonlocal strange
        strange = name
        return math.nan

    def real(digits: str) -> float:
        nonlocal strange
        value = float(digits)
        if math.isinf(value):
            strange = digits[:20]
        return value

    try:
        # `json` would take UTF-16 and UTF-32 as well, and halves of surrogate pairs.
        text = body.decode("utf-8-sig")
        brackets = text.count("[") + text.count("{")
        if brackets > _MOST_CONTAINERS:
            _check_containers(text)
        data = json.loads(text, parse_constant=constant, parse_float=real)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        said = "a whole number is too long" if "int_max_str_digits" in str(error) else str(error)
        raise InvalidValue(f"the body is not JSON: {said}") from None
    if not isinstance(data, dict):
        raise InvalidValue("the body must be a JSON object")
    if brackets > _MOST_LEVELS:
        _check_levels(data)
    return data, strange


def _check_containers(text: str) -> None:
    outside = _STRING.sub("", text)
    if outside.count("[") + outside.count("{") > _MOST_CONTAINERS:
        raise InvalidValue(f"the body has more than {_MOST_CONTAINERS} objects and lists")


def _check_levels(data: Any) -> None:
    level = [data]
    for _ in range(_MOST_LEVELS):
        level = [
            value
            for outer in level
            for value in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _place(value: Any, path: tuple[str, ...] = ()) -> str | None:
    """Where there is a number that is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".".join(path)
    inside: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inside = enumerate(value)
    places = (_place(one, (*path, str(name)[:64])) for name, one in inside)
    return next((place for place in places if place is not None), None)


def _too_deep() -> InvalidValue:
    return InvalidValue(f"the body is nested more than {_MOST_LEVELS} levels deep")


def ignored(extra: dict[str, Any]) -> tuple[str, ...]:
    """The names of those without effect. Raises `UnsupportedParameter` for what would have one."""
    found = []
    for name, value in extra.items():
        if name in NEUTRAL:
            # 0 equals False, and `logprobs: 0` asks for something.
            neutral = any(value == n and type(value) is type(n) for n in NEUTRAL[name])
            if value is not None and not neutral:
                raise UnsupportedParameter(f"{name} is not supported", param=name)
        elif name in _LABELS or value is not None:
            found.append(name)
    return tuple(found)
