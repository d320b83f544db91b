"""Types as people write them become JSON schemas that an answer is held to, and answers become values
of these types.

A schema says less than a type can: what a validator of pydantic's refuses beyond it is found out when
the answer is there. Everything else is ruled out while it is made. The server takes any root, so
nothing is wrapped: the answer to `list[str]` is a list.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

from ..errors import AnswerCutOff, AnswerInvalid, InvalidValue
from .asking import Asker, ExtractParameters, check_text
from .result import Completion
from .written import Writer

_TASK = "Extract what the text below says."
_UNKNOWN = re.compile(r"Unable to generate pydantic-core schema for (.*?)\. Set ")
_UNNAMED = re.compile(r"[^A-Za-z0-9_-]+")


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Shape:
    """What answers are to be: a JSON schema to hold them to, and how a value is made of their text.
    `parse` raises pydantic's `ValidationError`, or `ValueError`. `plain` gives such a value as JSON again, by
    the schema's names.
    """

    name: str
    schema: Mapping[str, Any]
    parse: Callable[[str], Any]
    plain: Callable[[Any], Any] = _as_it_is

    @property
    def response_format(self) -> dict[str, Any]:
        schema = {"name": self.name, "schema": dict(self.schema), "strict": True}
        return {"type": "json_schema", "json_schema": schema}

    def read(self, reply: Completion) -> Any:
        """The answer's value. Raises `AnswerCutOff` or `AnswerInvalid`."""
        if reply.finish_reason == "length":
            used = reply.usage.completion_tokens if reply.usage else "some"
            raise AnswerCutOff(
                f"the answer was cut off after {used} tokens: allow more, as far as the model's "
                "context has room beside the prompt",
                param="max_tokens",
                request_id=reply.request_id,
                text=reply.text,
            )
        return self.value(reply.text, reply.request_id)

    def value(self, text: str, request_id: str | None = None) -> Any:
        """Of an answer that is whole. Raises `AnswerInvalid`."""
        try:
            return self.parse(text)
        except ValueError as error:
            field, reason = _why(error)
            raise AnswerInvalid(
                f"the answer is not a valid {self.name}: {reason}",
                param=field,
                request_id=request_id,
                text=text,
            ) from error


def shape_of(kind: Any) -> Shape:
    """Of a pydantic model, a dataclass, a `TypedDict`, an enumeration, a `Literal`, anything else that
    pydantic makes a schema of, such as `list[Model]`, or a JSON schema itself.

    Objects take the fields that the type has, and no further ones unless it says so; sets may be
    written with repetitions, which disappear. Raises `InvalidValue`, naming `kind`.
    """
    if isinstance(kind, Mapping):
        _check_json(kind)
        title = kind.get("title")
        return Shape(_named(title if isinstance(title, str) else ""), kind, json.loads)
    from pydantic import PydanticUserError, TypeAdapter
    from pydantic.errors import PydanticUndefinedAnnotation

    try:
        adapter: Any = TypeAdapter(kind)
        schema = adapter.json_schema(schema_generator=_generator())
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise InvalidValue(_no_schema(error), param="kind") from error
    name = getattr(kind, "__name__", "") if isinstance(kind, type) else ""
    return Shape(_named(name), schema, adapter.validate_json, Writer(adapter.core_schema))


def _check_json(schema: Mapping[str, Any]) -> None:
    try:
        json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(f"this is no JSON schema: {error}", param="kind") from None


def _no_schema(error: Exception) -> str:
    """Without what only helps whoever can change pydantic's configuration."""
    reason = str(error).partition("\n")[0]
    unknown = _UNKNOWN.match(reason)
    if unknown is None:
        return f"this type has no JSON schema: {reason}"
    return (
        f"{unknown[1][:100]} is no type that has a JSON schema: name a pydantic model, a dataclass, a "
        "TypedDict, an enumeration, a type such as list[str], or a JSON schema itself"
    )


async def ask(
    asker: Asker,
    shape: Shape,
    text: str,
    prompt: str | None = None,
    **parameters: Unpack[ExtractParameters],
) -> Completion:
    """An answer held to the shape, not read yet. Greedy, unless a temperature is given.

    The model is told the schema, too: what holds an answer to it only keeps the model from saying
    anything else. The text comes last, so that requests which differ in it share the rest. Raises
    what the service refuses the schema with, before anything is decoded, and `InvalidValue` for what is
    no text.
    """
    check_text(text)
    if parameters.get("temperature") is None:
        parameters["temperature"] = 0
    asked = (
        f"{_TASK if prompt is None else prompt}\nAnswer with JSON that fits this schema:\n"
        f"{json.dumps(shape.schema, ensure_ascii=False, separators=(',', ':'))}\n\n{text}"
    )
    return await asker.chat(asked, response_format=shape.response_format, **parameters)


async def extract(
    asker: Asker,
    kind: Any,
    text: str,
    prompt: str | None = None,
    **parameters: Unpack[ExtractParameters],
) -> Completion:
    """The answer, its value as `parsed`. Raises as `shape_of`, `ask` and `Shape.read` do."""
    shape = kind if isinstance(kind, Shape) else shape_of(kind)
    reply = await ask(asker, shape, text, prompt, **parameters)
    return replace(reply, parsed=shape.read(reply))


def _named(name: str) -> str:
    return _UNNAMED.sub("_", name)[:64] or "answer"


def _why(error: ValueError) -> tuple[str | None, str]:
    """The field that is wrong, and what is."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return None, str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]) or None, first["msg"]


@functools.cache
def _generator() -> Any:
    """Pydantic's, of schemas that can be held to."""
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        def emit_warning(self, kind: Any, detail: str) -> None:
            """Defaults are annotations, and of a union the ways that JSON has are enough."""

        def call_schema(self, schema: Any) -> dict[str, Any]:
            # Pydantic would call a function with what the model says.
            return self.handle_invalid_for_json_schema(schema, "a function")

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False  # they say the field's name again, in tokens

        def model_schema(self, schema: Any) -> dict[str, Any]:
            return _closed(super().model_schema(schema))

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            return _closed(super().dataclass_schema(schema))

        def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
            return _closed(super().typed_dict_schema(schema))

        def set_schema(self, schema: Any) -> dict[str, Any]:
            return _repeating(super().set_schema(schema))

        def frozenset_schema(self, schema: Any) -> dict[str, Any]:
            return _repeating(super().frozenset_schema(schema))

        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            found = super().decimal_schema(schema)
            # A text of digits is the other way to write it, by a pattern that looks ahead.
            ways = found.get("anyOf", [found])
            return next((way for way in ways if way.get("type") == "number"), found)

    return Generator


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def _repeating(schema: dict[str, Any]) -> dict[str, Any]:
    schema.pop("uniqueItems", None)
    return schema
