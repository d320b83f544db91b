"""Bodies of our own routes about tokens. What they do not define is refused, not ignored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from ..errors import InvalidValue
from ..types import ChatOptions, Message, Prompt
from .fields import TOKEN_IDS, Body, Name, as_prompt, validated
from .requests import Templated, Turn, as_message

MAX_TOKENS = 1 << 17
"""The most that are made a text of at once."""


_TEXT: dict[str, Any] = {"type": "string"}
_TOKENS = {**TOKEN_IDS, "maxItems": MAX_TOKENS}


def _or_listed(schema: dict[str, Any]) -> WithJsonSchema:
    """As `as_prompt` takes it: by itself, or as the only one of a list."""
    listed = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    return WithJsonSchema({"anyOf": [schema, listed]})


class _Own(Body):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: Name


class _Tokenize(Templated, _Own):
    prompt: Annotated[Any, PlainValidator(as_prompt), _or_listed(_TEXT)] | None = None
    messages: (
        Annotated[list[Turn], Field(min_length=1, max_length=10_000, fail_fast=True)] | None
    ) = None


class _Detokenize(_Own):
    tokens: Annotated[Any, PlainValidator(as_prompt), _or_listed(_TOKENS)]


class _Template(Templated, _Own):
    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000, fail_fast=True)]


@dataclass(frozen=True, slots=True)
class Tokenize:
    """What to count: a text, or a chat."""

    model: str
    prompt: Prompt
    options: ChatOptions = field(default_factory=ChatOptions)


@dataclass(frozen=True, slots=True)
class Detokenize:
    model: str
    tokens: tuple[int, ...]


def parse_tokenize(body: bytes) -> Tokenize:
    """Raises `InvalidValue` or `UnknownParameter`, naming the field."""
    asked = validated(_Tokenize, body)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidValue("either a prompt or messages, please", param="prompt")
    if asked.messages is not None:
        return Tokenize(asked.model, _messages(asked.messages), asked.chat_options())
    if not isinstance(asked.prompt, str):
        raise InvalidValue("a prompt to tokenize is a text", param="prompt")
    if (given := asked.given()) is not None:
        raise InvalidValue("this is for messages, not for a prompt", param=given)
    return Tokenize(asked.model, asked.prompt)


def parse_detokenize(body: bytes) -> Detokenize:
    """Raises `InvalidValue` or `UnknownParameter`, naming the field."""
    asked = validated(_Detokenize, body)
    if isinstance(asked.tokens, str):
        raise InvalidValue("tokens are a list of token ids", param="tokens")
    if len(asked.tokens) > MAX_TOKENS:
        raise InvalidValue(
            f"{len(asked.tokens)} tokens; at most {MAX_TOKENS} at once", param="tokens"
        )
    return Detokenize(asked.model, asked.tokens)


def parse_template(body: bytes) -> Tokenize:
    """Raises `InvalidValue` or `UnknownParameter`, naming the field."""
    asked = validated(_Template, body)
    return Tokenize(asked.model, _messages(asked.messages), asked.chat_options())


def _messages(turns: list[Turn]) -> tuple[Message, ...]:
    return tuple(as_message(turn, f"messages.{i}") for i, turn in enumerate(turns))
