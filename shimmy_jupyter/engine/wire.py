"""What crosses between the server and the engine's process: frames of JSON.

A frame is its length in four bytes, then JSON in ASCII. A message is a list of its class's name and
its fields in order; bytes are text of the code points up to 255. Never pickle: a hostile model file
may own the other end. Whatever arrives is a message each of whose fields has its type, and whose
numbers can be counted with, or it is a `WireError`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

from ..core.messages import Aside, AsideRead, PromptScores, Row, Sampled, Step
from ..types import EmbeddingFacts, Failure, ModelFacts, Scored
from .backend import Embedded, StepResult
from .calls import Failed, SideRequest, WorkRequest
from .channel import WireError

T = TypeVar("T")
Read = Callable[[Any], Any]

MAX_REPLY = 16 << 20
"""A hostile child's JSON takes up to some twenty times its size once it is parsed."""
MAX_STEP_REPLY = 1 << 20
MAX_REQUEST = 1 << 30
"""The server is trusted with whatever the child can hold."""

_ID = 1 << 31  # token ids, slots and positions are the native library's 32-bit integers
_SIZE = 1 << 53
_MOST_SLOTS = 1 << 16
_MOST_NUMBERS = 1 << 20
"""Of a vector, or tokens of a call that makes some."""


# Messages


def encode(message: Any) -> bytes:
    """The frame of a message."""
    payload = _to_json(message).encode("ascii")
    if len(payload) > MAX_REQUEST:
        raise WireError(f"a message of {len(payload)} bytes is too long to send")
    return len(payload).to_bytes(4) + payload


def work_request(payload: bytes) -> WorkRequest:
    found: WorkRequest = _decode(payload, WorkRequest)
    return found


def side_request(payload: bytes) -> SideRequest:
    found: SideRequest = _decode(payload, SideRequest)
    return found


def reply(payload: bytes, kind: type[T]) -> T | Failed:
    found: T | Failed = _decode(payload, kind | Failed)
    return found


def _decode(payload: bytes, kind: Any) -> Any:
    try:
        return _reader(kind)(json.loads(payload.decode("ascii")))
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError("a frame that is not JSON") from error


def _plain(value: Any) -> Any:
    """For what JSON has no form of."""
    if type(value) is bytes:
        return value.decode("latin-1")
    if type(value) is Step:
        rows = value.rows
        return [
            "Step",
            [row.slot for row in rows],
            [row.start for row in rows],
            [row.tokens for row in rows],
            [row.sample for row in rows],
            [row.scores for row in rows],
            [row.guessed for row in rows],
            value.adapter,
            value.aside,
        ]
    if type(value) is StepResult:
        found = value.sampled
        return [
            "StepResult",
            value.seconds,
            value.aborted,
            [one.slot for one in found],
            [one.token for one in found],
            [one.piece.decode("latin-1") for one in found],
            [one.end_of_generation for one in found],
            [one.failure for one in found],
            [one.scored for one in found],
            [one.held for one in found],
            value.prompts,
            value.aside,
            value.unsaved,
        ]
    if is_dataclass(value):
        return _named_fields(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} does not cross")


def _named_fields(value: Any) -> list[Any]:
    kind: Any = type(value)
    return [kind.__name__, *(get(value) for get in _getters(kind))]


_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_plain).encode


@functools.cache
def _getters(kind: Any) -> list[Callable[[Any], Any]]:
    return [attrgetter(field.name) for field in fields(kind)]


@functools.cache
def _reader(kind: Any) -> Read:
    """What makes a value of this type from parsed JSON, or raises `WireError`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:
        return _union(inner)
    if is_dataclass(kind):
        return _union((kind,))
    if kind == tuple[int, ...]:
        return _ids
    if origin is tuple:
        return _many(inner[0]) if inner[-1] is ... else _several(inner)
    return _mapping(*inner) if origin is Mapping else _plain_reader(kind)


def _plain_reader(kind: Any) -> Read:
    allowed = {float, int} if kind is float else {str} if kind is bytes else {kind}

    def read(value: Any) -> Any:
        if type(value) not in allowed:
            raise WireError(f"{type(value).__name__}, where {kind.__name__} belongs")
        if kind is str:
            value.encode()  # half of a surrogate pair could not be sent on
        return value.encode("latin-1") if kind is bytes else value

    return read


def _record(kind: Any) -> Read:
    hints = typing.get_type_hints(kind)
    readers = [_reader(hints[field.name]) for field in fields(kind)]

    def read(values: list[Any]) -> Any:
        _same_length(values, readers)
        return kind(*[read(value) for read, value in zip(readers, values, strict=True)])

    return read


def _tagged(readers: Mapping[str, Read]) -> Read:
    def read(value: Any) -> Any:
        tag = value[0] if type(value) is list and value else None
        reader = readers.get(tag) if type(tag) is str else None
        if reader is None:
            raise WireError(f"no {' or '.join(readers)}")
        return reader(value[1:])

    return read


def _union(kinds: tuple[Any, ...]) -> Read:
    others = [kind for kind in kinds if kind is not types.NoneType]
    if all(map(is_dataclass, others)):
        some = _tagged({kind.__name__: _BY_HAND.get(kind) or _record(kind) for kind in others})
    else:
        (only,) = others
        some = _reader(only)
    if len(others) == len(kinds):
        return some
    return lambda value: None if value is None else some(value)


def _many(kind: Any) -> Read:
    one = _reader(kind)
    return lambda values: tuple(map(one, _list(values)))


def _several(kinds: tuple[Any, ...]) -> Read:
    readers = [_reader(kind) for kind in kinds]

    def read(values: Any) -> Any:
        _same_length(_list(values), readers)
        return tuple(one(value) for one, value in zip(readers, values, strict=True))

    return read


def _mapping(key: Any, value: Any) -> Read:
    one = _reader(value)
    assert key is str

    def read(values: Any) -> Any:
        if type(values) is not dict:
            raise WireError("no object where one belongs")
        return {name: one(found) for name, found in values.items()}

    return read


# Whole columns at once: a step's rows cross for every token.


def _list(values: Any, kind: type | None = None) -> list[Any]:
    if type(values) is not list or (kind and not {kind}.issuperset(map(type, values))):
        raise WireError("no list where one belongs, or one with something else in it")
    return values


def _ids(values: Any) -> tuple[int, ...]:
    if _list(values, int) and (min(values) < -_ID or max(values) >= _ID):
        raise WireError("an id that is out of range")
    return tuple(values)


def _same_length(*lists: Any) -> None:
    if len(set(map(len, lists))) > 1:
        raise WireError("too many fields, or too few")


def _step(values: list[Any]) -> Step:
    _same_length(values, "........")
    (adapter,) = _list(values[6:7], str)
    aside = _reader(Aside | None)(values[7])
    slots, starts = _ids(values[0]), _ids(values[1])
    tokens, samples, scores = _list(values[2], list), _list(values[3], bool), _list(values[4], list)
    guessed = _ids(values[5])
    _same_length(slots, starts, tokens, samples, scores, guessed)
    _ids(list(chain.from_iterable([*tokens, *scores])))
    rows = map(Row, slots, starts, map(tuple, tokens), samples, map(tuple, scores), guessed)
    return Step(tuple(rows), adapter, aside)


_MOST_SCORED = 64
_LONGEST_PIECE = 4096
"""Bytes. A stream's bound counts pieces."""


def _step_result(values: list[Any]) -> StepResult:
    _same_length(values, "............")
    seconds, aborted = values[:2]
    if type(seconds) not in {float, int} or type(aborted) is not bool:
        raise WireError("a step's result without its time")
    _check_time(seconds)
    slots, tokens = _ids(values[2]), _ids(values[3])
    pieces = [piece.encode("latin-1") for piece in _list(values[4], str)]
    if any(len(piece) > _LONGEST_PIECE for piece in pieces):
        raise WireError("a token's text that none can be")
    ends, failures, scores = _list(values[5], bool), _list(values[6]), _list(values[7])
    held = _list(values[8], bool)
    _same_length(slots, tokens, pieces, ends, failures, scores, held)
    why, scored = _rarely(Failure, failures), _rarely(Scored, scores)
    found = map(Sampled, slots, tokens, pieces, ends, why, scored, held)
    prompts = _reader(tuple[PromptScores, ...])(values[9])
    aside = _reader(AsideRead | None)(values[10])
    return StepResult(tuple(found), seconds, aborted, prompts, aside, _ids(values[11]))


def answers(step: Step, result: StepResult) -> bool:
    """Whether there is a token for each row that asked, or more where that had guesses."""
    if result.aborted:
        return not result.sampled and not result.prompts and result.aside is None
    if (step.aside is None) != (result.aside is None):
        return False
    asked = [row for row in step.rows if row.sample]
    scored = [(row.slot, len(row.scores)) for row in step.rows if row.scores]
    given = [
        (slot, len(list(some)))
        for slot, some in itertools.groupby(result.sampled, lambda one: one.slot)
    ]
    return (
        [slot for slot, _ in given] == [row.slot for row in asked]
        and all(count <= row.guessed + 1 for (_, count), row in zip(given, asked, strict=True))
        and [(one.slot, len(one.scored)) for one in result.prompts] == scored
    )


def _rarely(kind: Any, values: list[Any]) -> Iterable[Any]:
    none = values.count(None) == len(values)
    return values if none else map(_reader(kind | None), values)


def _scored(values: list[Any]) -> Scored:
    """A server computes with them, and prints them as JSON."""
    scored: Scored = _record(Scored)(values)
    tokens = [(scored.token, scored.piece, scored.logprob), *scored.top]
    _ids([token for token, _, _ in tokens])
    if len(tokens) > _MOST_SCORED or any(
        len(piece) > _LONGEST_PIECE or not -math.inf < logprob <= 0 for _, piece, logprob in tokens
    ):
        raise WireError("a log-probability that none can be")
    return scored


def _aside_read(values: list[Any]) -> AsideRead:
    read: AsideRead = _record(AsideRead)(values)
    _check_time(read.seconds)
    if read.done and read.refused:
        raise WireError("tokens that are done and refused")
    return read


def _embedded(values: list[Any]) -> Embedded:
    found: Embedded = _record(Embedded)(values)
    _check_time(found.seconds)
    return found


def _check_time(seconds: float) -> None:
    if not 0 <= seconds < _SIZE:  # not with math: it takes no integer that is too large for a float
        raise WireError("a time that none can be")


def _check_sizes(facts: ModelFacts | EmbeddingFacts) -> None:
    sizes = [size for field in fields(facts) if type(size := getattr(facts, field.name)) is int]
    if min(sizes) < 0 or max(sizes) >= _SIZE:
        raise WireError("a size that none can be")


def _embedding_facts(values: list[Any]) -> EmbeddingFacts:
    facts: EmbeddingFacts = _record(EmbeddingFacts)(values)
    _check_sizes(facts)
    sizes = facts.width, facts.tokens, facts.batch_tokens, facts.sequences
    if min(sizes) < 1 or facts.sequences > _MOST_SLOTS or max(sizes) > _MOST_NUMBERS:
        raise WireError("a size that none can be")
    return facts


def _facts(values: list[Any]) -> ModelFacts:
    """The scheduler counts with them."""
    facts: ModelFacts = _record(ModelFacts)(values)
    _check_sizes(facts)
    if min(facts.kv_bytes_per_token, facts.threads, facts.slots, facts.context_size) < 1:
        raise WireError("a size of nothing")
    if facts.vocabulary >= _ID or facts.slots > _MOST_SLOTS or len(facts.infill) not in {0, 3}:
        raise WireError("a vocabulary or slots that none can be")
    return facts


_BY_HAND: dict[Any, Read] = {
    Step: _step,
    StepResult: _step_result,
    ModelFacts: _facts,
    EmbeddingFacts: _embedding_facts,
    AsideRead: _aside_read,
    Embedded: _embedded,
    Scored: _scored,
}
