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
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from ..errors import InvalidValue, UnknownParameter, UnsupportedParameter
from ..types import CompletionRequest, Constraint, Message, Principal, Prompt, Sampling

_LABELS = frozenset(
    "user metadata prompt_cache_key prompt_cache_retention safety_identifier".split()
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Beside null. Several become features later; until then they are refused, not ignored."""
_MESSAGE_NEUTRAL = ("audio", "function_call", "refusal", "tool_call_id", "tool_calls")
_MOST_FIELDS = 200
_MOST_BIASES = 1024
_FIELDS = tuple(
    "content description include_usage json_schema name role schema strict text type value".split()
)
_LIMIT = 2**31 - 1
_MOST_CHOICES = 16
_MOST_LOGPROBS = 20


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[Text, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[Text, Field(min_length=1, max_length=512)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=0, le=_LIMIT)]


class Body(BaseModel):
    """Strict: a number is no text, and infinity no number."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


_B = TypeVar("_B", bound=Body)


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
    logit_bias: dict[str, Bias] | None = None
    reproducible: bool | None = None
    max_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None


class _Chat(_Common):
    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None


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
    wrong = next((v for v in value if type(v) is not int or not 0 <= v <= _LIMIT), None)
    if wrong is not None:
        raise ValueError(f"{str(wrong)[:20]!r} is not a token id")
    return tuple(value)


class _Completion(_Common):
    prompt: Annotated[Any, PlainValidator(as_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    suffix: Text | None = None


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
    return _parsed(completion, completion.prompt, completion.max_tokens, request_id, principal)


def validated(kind: type[_B], body: bytes | dict[str, Any]) -> _B:
    """Raises `InvalidValue`, or `UnknownParameter` where the kind forbids further fields."""
    data = _json(body) if isinstance(body, bytes) else body
    if len(data) > _MOST_FIELDS:
        raise InvalidValue(f"the body has {len(data)} fields; {_MOST_FIELDS} are the most")
    bias = data.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > _MOST_BIASES:
        # Here, as pydantic looks at all of them before it counts.
        raise InvalidValue(f"at most {_MOST_BIASES} tokens", param="logit_bias")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])[:64]
            raise UnknownParameter("there is no such field here", param=name) from None
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidValue(message, param=_field(first["loc"])) from None


def _field(location: tuple[int | str, ...]) -> str | None:
    """The field's path as a client writes it; the names of a union's branches are pydantic's."""
    parts = [
        str(part)
        for i, part in enumerate(location)
        if i == 0 or isinstance(part, int) or part in _FIELDS
    ]
    return ".".join(parts) or None


def _json(body: bytes) -> Any:
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidValue("the body must be a JSON object")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


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
        n=body.n or 1,
        adapter=body.adapter or "",
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        reproducible=bool(body.reproducible),
        max_seconds=body.max_seconds,
    )
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidValue("stream_options needs stream to be true", param="stream_options")
    return Parsed(
        request=request,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        ignored=(*_ignored(body.model_extra or {}), *_ignored_inside(body)),
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
    if isinstance(body, _Chat):
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    elif isinstance(body, _Completion):
        logprobs = body.logprobs
    bias = []
    for token, value in (body.logit_bias or {}).items():
        if not re.fullmatch(r"[0-9]{1,10}", token):
            raise InvalidValue(f"{token[:20]!r} is not a token id", param="logit_bias")
        bias.append((int(token), value))
    return Sampling(
        logit_bias=tuple(bias), logprobs=logprobs, constraint=_constraint(body), **given
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


def _ignored(extra: dict[str, Any]) -> tuple[str, ...]:
    ignored = []
    for name, value in extra.items():
        if name in _NEUTRAL:
            # 0 equals False, and `logprobs: 0` asks for something.
            neutral = any(value == n and type(value) is type(n) for n in _NEUTRAL[name])
            if value is not None and not neutral:
                raise UnsupportedParameter(f"{name} is not supported", param=name)
        elif name in _LABELS or value is not None:
            ignored.append(name)
    return tuple(ignored)
