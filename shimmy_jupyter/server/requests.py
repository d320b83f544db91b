"""From an OpenAI request body to a `CompletionRequest`, every field honoured, refused or named.

A field has one of four fates: it is honoured; or it is OpenAI's but has no effect here, and then
only its neutral value is accepted; or it only labels a request and is named as ignored; or no API
defines it, and it is named as ignored too, so that unmodified clients work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ..errors import InvalidValue, UnsupportedParameter
from ..types import (
    ChatOptions,
    CompletionRequest,
    Constraint,
    Message,
    PinnedModel,
    Principal,
    Prompt,
    Sampling,
)
from .fields import LIMIT, AnyPrompt, Body, Digest, Name, Text, Tokens, ignored, validated

_MESSAGE_NEUTRAL = ("audio", "function_call", "refusal", "tool_call_id", "tool_calls")
_MOST_CHOICES = 16
_MOST_LOGPROBS = 20


Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[Text, Field(min_length=1, max_length=512)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Part(Body):
    type: Text
    text: Text | None = None


class Turn(Body):
    """One message of a chat, as a client writes it."""

    role: Name
    content: Text | Annotated[list[_Part], Field(max_length=1000, fail_fast=True)] | None = None
    name: Name | None = None


class _Grammar(Body):
    type: Literal["lark", "regex", "gbnf"]
    value: Annotated[Text, Field(min_length=1)]


class _JsonSchema(Body):
    name: Name | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None
    description: Text | None = None


class _ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _Pin(Body):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Digest
    parts: Annotated[list[Digest], Field(max_length=1024)] | None = None
    chat_template: Digest | None = None
    context_size: Annotated[int, Field(ge=1, le=LIMIT)] | None = None
    adapter: Digest | None = None


class _StreamOptions(Body):
    include_usage: bool | None = None


class _Common(Body):
    model: Name
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Tokens | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, Field(ge=0, le=4096)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    min_tokens: Tokens | None = None
    ignore_eos: bool | None = None
    response_format: _ResponseFormat | None = None
    grammar: _Grammar | None = None
    adapter: Name | None = None
    pin: _Pin | None = None
    logit_bias: dict[str, Bias] | None = None
    reproducible: bool | None = None
    max_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None


class Templated(Body):
    """How a chat is rendered."""

    thinking: bool | Annotated[int, Field(ge=0, le=LIMIT)] | None = None
    reasoning_effort: Annotated[Text, Field(min_length=1, max_length=32)] | None = None
    chat_template_kwargs: Annotated[dict[Name, Any], Field(max_length=32)] | None = None

    def given(self) -> str | None:
        """One of these fields that is there."""
        return next(
            (name for name in Templated.model_fields if getattr(self, name) is not None), None
        )

    def chat_options(self) -> ChatOptions:
        return ChatOptions(self.thinking, self.reasoning_effort, self.chat_template_kwargs or {})


class _Chat(_Common, Templated):
    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None


class _Completion(_Common):
    prompt: AnyPrompt
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    suffix: Text | None = None
    echo: bool | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request and how its answer is wanted. `ignored` are the names of fields without effect."""

    request: CompletionRequest
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]


def parse_chat(body: bytes | dict[str, Any], request_id: str, principal: Principal) -> Parsed:
    """Raises `InvalidValue` or `UnsupportedParameter`, naming the field."""
    chat = validated(_Chat, body)
    wanted = chat.max_completion_tokens
    if wanted is not None and chat.max_tokens not in (None, wanted):
        raise InvalidValue(
            f"max_tokens {chat.max_tokens} and max_completion_tokens {wanted} disagree",
            param="max_completion_tokens",
        )
    messages = tuple(as_message(m, f"messages.{i}") for i, m in enumerate(chat.messages))
    limit = chat.max_tokens if wanted is None else wanted
    if chat.top_logprobs is not None and not chat.logprobs:
        raise InvalidValue("top_logprobs needs logprobs to be true", param="top_logprobs")
    return _parsed(chat, messages, limit, request_id, principal)


def parse_completion(body: bytes | dict[str, Any], request_id: str, principal: Principal) -> Parsed:
    """Raises `InvalidValue` or `UnsupportedParameter`, naming the field."""
    completion = validated(_Completion, body)
    if completion.echo and completion.suffix:
        raise InvalidValue("with a suffix the prompt cannot begin the answer", param="echo")
    if completion.echo and completion.logprobs is not None and (completion.n or 1) > 1:
        raise InvalidValue("a prompt's log-probabilities come with one choice", param="n")
    return _parsed(completion, completion.prompt, completion.max_tokens, request_id, principal)


def as_message(message: Turn, path: str) -> Message:
    """Raises `InvalidValue` or `UnsupportedParameter`, naming the field below `path`."""
    extra = message.model_extra or {}
    for name in _MESSAGE_NEUTRAL:
        if extra.get(name):
            raise UnsupportedParameter(f"{name} is not supported", param=f"{path}.{name}")
    if message.content is None:
        raise InvalidValue("a message needs content", param=f"{path}.content")
    # OpenAI's newer name for the same role; no model's own template knows it.
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, message.content, message.name)
    texts = [_part(part, f"{path}.content.{i}") for i, part in enumerate(message.content)]
    return Message(role, "\n".join(texts), message.name)


def _part(part: _Part, path: str) -> str:
    if part.type != "text":
        raise UnsupportedParameter(
            f"content of type {part.type[:40]!r} is not supported; only text is",
            param=f"{path}.type",
        )
    if part.text is None:
        raise InvalidValue("a part of type text needs text", param=f"{path}.text")
    return part.text


def _parsed(
    body: _Common,
    prompt: Prompt,
    max_tokens: int | None,
    request_id: str,
    principal: Principal,
) -> Parsed:
    request = CompletionRequest(
        request_id=request_id,
        principal=principal,
        model=body.model,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=_sampling(body),
        suffix=(body.suffix or "") if isinstance(body, _Completion) else "",
        echo=bool(body.echo) if isinstance(body, _Completion) else False,
        n=body.n or 1,
        chat=body.chat_options() if isinstance(body, _Chat) else ChatOptions(),
        adapter=body.adapter or "",
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        reproducible=bool(body.reproducible),
        pin=_pinned(body),
        max_seconds=body.max_seconds,
    )
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidValue("stream_options needs stream to be true", param="stream_options")
    return Parsed(
        request=request,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        ignored=(*ignored(body.model_extra or {}), *_ignored_inside(body)),
    )


def _pinned(body: _Common) -> PinnedModel | None:
    pin = body.pin
    if pin is None:
        return None
    return PinnedModel(
        pin.size,
        pin.sha256,
        tuple(pin.parts or ()),
        pin.chat_template,
        pin.context_size,
        pin.adapter,
    )


def _sampling(body: _Common) -> Sampling:
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repeat_penalty",
            "repeat_last_n",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "min_tokens",
            "ignore_eos",
        )
        if (value := getattr(body, name)) is not None
    }
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    if isinstance(body, _Chat):
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    elif isinstance(body, _Completion):
        logprobs = body.logprobs
        prompt_logprobs = logprobs if body.echo else None
    bias = []
    for token, value in (body.logit_bias or {}).items():
        if not re.fullmatch(r"[0-9]{1,10}", token):
            raise InvalidValue(f"{token[:20]!r} is not a token id", param="logit_bias")
        bias.append((int(token), value))
    return Sampling(
        logit_bias=tuple(bias),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        constraint=_constraint(body),
        **given,
    )


def _constraint(body: _Common) -> Constraint | None:
    """What `response_format` or `grammar` ask for; whether it can be had is for the engine to say."""
    form, grammar = body.response_format, body.grammar
    wants_json = form is not None and form.type != "text"
    if grammar is not None:
        if wants_json:
            raise InvalidValue("response_format asks for something else", param="grammar")
        return Constraint(grammar.type, grammar.value)
    if form is None or not wants_json:
        return None
    if form.type == "json_object":
        return Constraint("json_object")
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise InvalidValue("json_schema needs a schema", param="response_format.json_schema.schema")
    return Constraint("json_schema", json.dumps(form.json_schema.schema_))


def _ignored_inside(body: _Common) -> Iterator[str]:
    if body.stream_options is not None:
        yield from (f"stream_options.{name}" for name in body.stream_options.model_extra or ())
    if isinstance(body, _Chat):
        for i, message in enumerate(body.messages):
            for name in message.model_extra or ():
                if name not in _MESSAGE_NEUTRAL:
                    yield f"messages.{i}.{name}"
