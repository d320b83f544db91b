"""What made an answer, as it lies in an output's metadata: enough to ask for the same again, and to
see what has changed since.

The whole conversation is part of it, as it was sent: a cell shows neither what stood for `{name}` nor
what was said before. It lies in a notebook, and a notebook comes from anybody: what is read is checked,
bounded, and nothing but text and numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from ..errors import InvalidValue
from ..types import MadeBy, Timings, Usage

KEY = "shimmy"
"""Under which it lies in an output's metadata."""
VERSION = 1
LARGEST = 1 << 18
"""Characters of a request, as JSON, that are kept in a notebook."""
SEEDS = 1 << 31

_MOST_CHARACTERS, _MOST_VALUES, _DEEPEST = 1 << 20, 1 << 16, 80
_ROOM, _FIELDS = 1 << 14, 256
"""Characters and values of all that is not the request."""
_NAME, _HEX = 256, frozenset("0123456789abcdef")
_EXACT = 1 << 53
_ENDS = ("stop", "length")
_ASKED = frozenset(
    "messages stop logit_bias response_format grammar adapter thinking reasoning_effort"
    " chat_template_kwargs".split()
)
"""What a request says of itself and a server has no default for."""
_NUMBERS = (
    "temperature top_p min_p repeat_penalty presence_penalty frequency_penalty top_k repeat_last_n"
    " min_tokens max_tokens".split()
)
_SWITCHES = ("ignore_eos", "reproducible")
PARAMETERS = (*_NUMBERS, *_SWITCHES, "seed")
_T = TypeVar("_T")
_Read = Callable[[object, str], _T]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Of one answer. `request` is what was asked: the messages, and what else has no default; None where
    that was too long to be kept. `parameters` are those that had effect, a seed of None chance's.

    `request_sha256`, `answer_sha256` and `reasoning_sha256` are of texts in UTF-8, the request's as JSON
    with sorted keys, its numbers as JavaScript has them; `receipt` is the ledger's, `created` in seconds since 1970. `variable` is where the
    answer was put, and `origin` says which project has pinned the model.
    """

    model: str
    made_by: MadeBy
    parameters: Mapping[str, int | float | bool | None]
    request: Mapping[str, Any] | None
    request_sha256: str
    answer_sha256: str
    reasoning_sha256: str | None
    finish_reason: str
    usage: Usage
    timings: Timings
    request_id: str
    receipt: Mapping[str, str | int] | None
    created: int
    variable: str = ""
    origin: str = ""

    @property
    def chance(self) -> bool:
        """Whether chance chose the answer, and nothing can bring it back."""
        return self.parameters["temperature"] != 0 and self.parameters["seed"] is None

    def to_json(self) -> dict[str, Any]:
        """For an output's metadata, under `KEY`. A request over `LARGEST` is left out; a seed that would be
        rounded on its way through a browser is a text.
        """
        request, seed = self.request, self.parameters["seed"]
        if request is not None and len(_canonical(request)) > LARGEST:
            request = None
        said = {"version": VERSION, **asdict(replace(self, request=request))}
        if seed is not None and abs(seed) >= _EXACT:
            said["parameters"] = {**self.parameters, "seed": str(seed)}
        return said


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer with what made it. `text` None: it is not known as it was. `cell` is the number that the
    cell had when it was run, `id` what the notebook calls it; None where that is not known.
    """

    provenance: Provenance
    text: str | None
    cell: int | None = None
    id: str | None = None

    @property
    def variable(self) -> str:
        return self.provenance.variable


def digest(text: str) -> str:
    """SHA-256 of a text in UTF-8; half of a surrogate pair, which has none, is as if it had."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Mapping[str, Any]) -> str:
    # A notebook's file is JavaScript's, to which 1.0 is 1, and which rounds what is over `_EXACT`.
    found = json.loads(json.dumps(value), parse_int=_rounded, parse_float=_rounded)
    return json.dumps(found, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _rounded(digits: str) -> int | float:
    number = float(digits)
    return int(number) if number.is_integer() else number


def with_seed(body: dict[str, Any], draw: Callable[[int], int]) -> dict[str, Any]:
    """A request that says its seed, so that it can be replayed: where chance would choose one that nobody
    is told, `draw(SEEDS)` does, a number from 0 and below. It is no slower for it, and not yet
    `reproducible`, as the company that it has in a batch can still tip a token that is nearly level.
    """
    if body.get("seed") is not None or body.get("temperature") == 0 or body.get("reproducible"):
        return body
    return {**body, "seed": draw(SEEDS)}


def of(
    body: Mapping[str, Any],
    last: Mapping[str, Any],
    text: str,
    finish_reason: str,
    *,
    reasoning: str = "",
    variable: str = "",
    origin: str = "",
) -> Provenance | None:
    """Of a chat request's body and of what carries the answer's figures, with `usage`: its last event, or
    the whole body. None where the server does not say what made it, or not as it is understood here, as
    of another release: an answer is not lost for that.
    """
    figures, usage = last.get("shimmy") or {}, last.get("usage")
    by, parameters = figures.get("made_by"), figures.get("parameters")
    if by is None or parameters is None or usage is None:
        return None
    request = {name: body[name] for name in body.keys() & _ASKED if body[name] is not None}
    said = {
        "version": VERSION,
        "model": last["model"],
        "made_by": {f.name: by.get(f.name) for f in fields(MadeBy)},
        "parameters": {name: parameters.get(name) for name in PARAMETERS},
        "request": request if _is_kept(request) else None,
        "request_sha256": digest(_canonical(request)),
        "answer_sha256": digest(text),
        "reasoning_sha256": digest(reasoning) if reasoning else None,
        "finish_reason": finish_reason,
        "usage": _counted(usage),
        "timings": {f.name: figures.get(f.name) for f in fields(Timings)},
        "request_id": figures["request_id"],
        "receipt": figures["receipt"],
        "created": last["created"],
        "variable": variable,
        "origin": origin,
    }
    try:
        return from_json(said)
    except InvalidValue:
        return None


def _is_kept(request: Mapping[str, Any]) -> bool:
    """Whether it is small enough for what stays in memory."""
    try:
        _bounded([request, "." * _ROOM, *[0] * _FIELDS])
    except InvalidValue:
        return False
    return True


def _counted(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
    }


def from_json(data: object) -> Provenance:
    """Raises `InvalidValue` that names the field, and nothing else, whatever it is given."""
    _bounded(data)
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is int and version > VERSION:
        raise InvalidValue(
            f"a newer release has written this (version {version}); this one reads {VERSION}",
            param="version",
        )
    own = _object(data, "", {"version", *(f.name for f in fields(Provenance))})
    if type(version) is not int or version != VERSION:
        raise InvalidValue(f"must be {VERSION}", param="version")
    request, sha256 = own["request"], _digest(own["request_sha256"], "request_sha256")
    if request is not None:
        request = _request(request)
        if digest(_canonical(request)) != sha256:
            raise InvalidValue("this is not the request that was answered", param="request")
    return Provenance(
        model=_text(own["model"], "model", empty=False),
        made_by=_made_by(own["made_by"]),
        parameters=_parameters(own["parameters"]),
        request=request,
        request_sha256=sha256,
        answer_sha256=_digest(own["answer_sha256"], "answer_sha256"),
        reasoning_sha256=_optional(_digest, own["reasoning_sha256"], "reasoning_sha256"),
        finish_reason=_end(own["finish_reason"]),
        usage=Usage(**_all(_count, own["usage"], "usage", Usage)),
        timings=_timings(own["timings"]),
        request_id=_text(own["request_id"], "request_id"),
        receipt=_optional(_receipt, own["receipt"], "receipt"),
        created=_count(own["created"], "created"),
        variable=_text(own["variable"], "variable"),
        origin=_text(own["origin"], "origin"),
    )


def _bounded(data: object) -> None:
    """Before anything goes through it again: neither deep, nor many, nor long, and nothing but JSON."""
    waiting: list[tuple[object, int]] = [(data, 0)]
    characters = values = 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
            if not all(isinstance(key, str) for key in value):
                raise InvalidValue("an object's keys are texts", param=KEY)
        elif isinstance(value, list | tuple):
            waiting += [(part, depth + 1) for part in value]
        else:
            characters += len(value) if isinstance(value, str) else 0
            _plain(value)
        too_many = values + len(waiting) > _MOST_VALUES
        if characters > _MOST_CHARACTERS or too_many or depth > _DEEPEST:
            raise InvalidValue("this is larger than what an answer leaves behind", param=KEY)


def _plain(value: object) -> None:
    """A text, a number, true, false or null, as JSON has them."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidValue("half of a surrogate pair is not a character", param=KEY) from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidValue("infinity and NaN are no numbers here", param=KEY)
    elif isinstance(value, int):
        if abs(value) >= 10**21:  # a browser writes 1e20 as a whole number
            raise InvalidValue("a whole number has 21 digits at most", param=KEY)
    elif value is not None:
        raise InvalidValue(f"{type(value).__name__} is nothing of JSON's", param=KEY)


def _wrong(path: str, wanted: str) -> InvalidValue:
    return InvalidValue(f"{wanted} is wanted here", param=path or KEY)


def _object(data: object, path: str, names: Collection[str]) -> dict[str, Any]:
    """With these names, all of them and no other."""
    if not isinstance(data, dict):
        raise _wrong(path, "an object")
    at = f"{path}." if path else ""
    if missing := sorted(names - data.keys()):
        raise InvalidValue("this field is missing", param=f"{at}{missing[0]}")
    if extra := sorted(data.keys() - names):
        raise InvalidValue(f"there is no such field in version {VERSION}", param=at + extra[0][:64])
    return data


def _all(read: _Read[_T], data: object, path: str, shape: type[Any]) -> dict[str, _T]:
    """An object with the fields of `shape`, each of them read so."""
    own = _object(data, path, {f.name for f in fields(shape)})
    return {name: read(value, f"{path}.{name}") for name, value in own.items()}


def _optional(read: _Read[_T], value: object, path: str) -> _T | None:
    return None if value is None else read(value, path)


def _text(value: object, path: str, *, empty: bool = True) -> str:
    if not isinstance(value, str) or len(value) > _NAME or not (empty or value):
        raise _wrong(path, f"a text of up to {_NAME} characters")
    return value


def _digest(value: object, path: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or not _HEX.issuperset(value):
        raise _wrong(path, "a SHA-256 in 64 hex digits, in lower case,")
    return value


def _count(value: object, path: str) -> int:
    if type(value) is not int or value < 0:
        raise _wrong(path, "a whole number from 0")
    return value


def _number(value: object, path: str) -> int | float:
    if type(value) is not int and type(value) is not float:
        raise _wrong(path, "a number")
    return value


def _end(value: object) -> str:
    if value not in _ENDS:
        raise _wrong("finish_reason", " or ".join(_ENDS))
    return str(value)


def _several(read: _Read[str], value: object, path: str, *, empty: bool) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not (empty or value):
        raise _wrong(path, "a list")
    return tuple(read(one, f"{path}[{i}]") for i, one in enumerate(value))


def _made_by(data: object) -> MadeBy:
    own = _object(data, "made_by", {f.name for f in fields(MadeBy)})

    def read(name: str, how: _Read[_T]) -> _T:
        return how(own[name], f"made_by.{name}")

    def maybe(name: str, how: _Read[_T]) -> _T | None:
        return _optional(how, own[name], f"made_by.{name}")

    return MadeBy(
        sha256=maybe("sha256", lambda v, p: _several(_digest, v, p, empty=False)),
        quantization=maybe("quantization", _text),
        chat_template=maybe("chat_template", _digest),
        adapter=maybe("adapter", _digest),
        prompt=read("prompt", _digest),
        engine=read("engine", _text),
        build=maybe("build", _digest),
        cpu=maybe("cpu", _text),
        cpu_features=read("cpu_features", lambda v, p: _several(_text, v, p, empty=True)),
        context_size=read("context_size", _count),
        kv_type=read("kv_type", _text),
        threads=read("threads", _count),
        gpu_layers=read("gpu_layers", _count),
    )


def _parameters(data: object) -> dict[str, int | float | bool | None]:
    own = _object(data, "parameters", set(PARAMETERS))
    for name in _NUMBERS:
        _number(own[name], f"parameters.{name}")
    for name in _SWITCHES:
        if not isinstance(own[name], bool):
            raise _wrong(f"parameters.{name}", "true or false")
    seed = own["seed"]
    if isinstance(seed, str) and re.fullmatch("-?[0-9]{1,19}", seed, re.ASCII):
        seed = int(seed)
    if seed is not None and type(seed) is not int:
        raise _wrong("parameters.seed", "a whole number, or null,")
    return {**own, "seed": seed}


def _request(data: object) -> dict[str, Any]:
    """What else is in it the server checks, as it does anybody's."""
    if not isinstance(data, dict):
        raise _wrong("request", "an object")
    if extra := sorted(data.keys() - _ASKED):
        raise InvalidValue("this is no part of what is kept", param=f"request.{extra[0][:64]}")
    messages = data.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise _wrong("request.messages", "a list of messages")
    return dict(data)


def _timings(data: object) -> Timings:
    own = _all(lambda v, p: _optional(_number, v, p), data, "timings", Timings)
    queue = own["queue_ms"]
    if queue is None:
        raise _wrong("timings.queue_ms", "a number")
    return Timings(queue, own["ttft_ms"], own["tokens_per_second"])


def _receipt(data: object, path: str) -> dict[str, str | int]:
    own = _object(data, path, {"request_id", "seq", "leaf_hash"})
    return {
        "request_id": _text(own["request_id"], f"{path}.request_id"),
        "seq": _count(own["seq"], f"{path}.seq"),
        "leaf_hash": _digest(own["leaf_hash"], f"{path}.leaf_hash"),
    }
