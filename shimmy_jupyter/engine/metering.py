"""What keeps a chat template's work in bounds: a budget, and checks before anything large is made.

Every loop step, call, filter, operator and output is charged by the size of what it touches. What
could make something huge out of something small, or is quadratic, is checked beforehand.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.filters import do_round
from jinja2.utils import Namespace

MAX_STEPS = 400_000
"""Budget of one render: one a step, and more by the size of what is touched."""
_EACH = 800
_MOST_STEPS = 3 * MAX_STEPS
"""With so much more for each message: templates that look back from each one are quadratic, about three seconds."""
MAX_SIZE = 2 * 1024 * 1024
"""Characters of a text that a template may see or make."""
MAX_BITS = 64
MAX_ARGUMENT = 256
"""Characters of what a text is stripped of, split at or searched for: those are quadratic."""

_SHALLOW = frozenset(
    "attr count d default first items last length list map reject rejectattr reverse safe select "
    "selectattr defined undefined none mapping sequence iterable string number boolean true false "
    "integer float callable sameas filter test odd even divisibleby".split()
)
"""Filters and tests that neither compare nor print what is inside their arguments."""
_CONTAINERS = (list, tuple, set, KeysView, ValuesView, ItemsView)
_SIZED = (str, dict, range, *_CONTAINERS)
_TOO_WIDE = re.compile(r"%[^a-zA-Z%]{0,64}?(\*|[0-9]{4,})")
_PLAIN_FIELDS = re.compile(r"[^{}]*(?:\{\w{0,32}\}[^{}]*)*")


class Runaway(jinja2.TemplateRuntimeError):
    """The template wants far more work than any chat needs."""


class QuietNamespace(Namespace):
    """Jinja's, but it does not print what is in it, which may be itself many times over."""

    def __repr__(self) -> str:
        return "<namespace>"


spent: ContextVar[list[int]] = ContextVar("spent")
"""What has been spent, and the most."""


def budget_for(messages: int) -> list[int]:
    return [0, min(MAX_STEPS + _EACH * messages, _MOST_STEPS)]


def charged(value: Any) -> Any:
    """Pay for a value by its size, and return it."""
    budget = spent.get()
    budget[0] += 1
    if isinstance(value, str):
        budget[0] += len(value) // 64
        if len(value) > MAX_SIZE:
            raise Runaway("it makes too long a text")
    elif isinstance(value, _SIZED):
        budget[0] += len(value) // 4
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise Runaway("it computes too large a number")
    if budget[0] > budget[1]:
        raise Runaway("it does more work than a chat may need: one with fewer messages may do")
    return value


def charged_deep(value: Any) -> Any:
    """Pay for everything inside a value too: a list of shared lists prints exponentially long."""
    pending = [value]
    while pending:
        item = charged(pending.pop())
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, _CONTAINERS):
            pending += item
    return value


def as_key(value: Any) -> Any:
    """What a dict may be asked for: hashing or printing a nested key is unbounded work."""
    if not isinstance(value, str | int | float | None | jinja2.Undefined):
        raise Runaway("it uses a list or a dict as a key")
    return charged(value)


def each(values: Iterable[Any]) -> Iterable[Any]:
    """A loop's iterable that pays for every step. Sized ones stay sized, for `loop.length`."""
    return _Charging(values) if isinstance(values, _SIZED) else _charging(values)


def _charging(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        charged(None)
        yield value


class _Charging:
    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _charging(self._values)


def concatenated(*parts: object) -> str:
    return str(charged("".join(str(charged_deep(part)) for part in parts)))


def check_product(left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        repeats = isinstance(text, str | list | tuple) and isinstance(times, int)
        if repeats and len(text) * max(0, times) > MAX_SIZE:
            raise Runaway("it repeats a text too often")


def check_format(text: str, values: Any) -> None:
    charged_deep(values)
    longest = _longest(values.values() if isinstance(values, dict) else values)
    if _TOO_WIDE.search(text) or len(text) + text.count("%") * longest > MAX_SIZE:
        raise Runaway("it pads or repeats a text too far")


def _longest(values: Any) -> int:
    each_of = values if isinstance(values, list | tuple | ValuesView) else [values]
    return max((len(str(value)) for value in each_of), default=0)


def checked_arguments(
    method: str, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a method of a text, if its work and its result stay bounded."""
    if method == "join" and args:
        parts = [str(charged_deep(part)) for part in args[0]]
        _check_size(sum(map(len, parts)) + len(owner) * len(parts))
        return (parts,)
    if method == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        _check_size(len(owner) + (owner.count(old) if old else len(owner) + 1) * len(new))
    elif method == "format":
        charged_deep([*args, *kwargs.values()])
        longest = _longest([*args, *kwargs.values()])
        _check_size(len(owner) + owner.count("{") * longest)
        if not _PLAIN_FIELDS.fullmatch(owner):
            raise Runaway("it formats in a way that no chat needs")
    elif any(isinstance(arg, str) and len(arg) > MAX_ARGUMENT for arg in args):
        raise Runaway("it searches for too long a text")
    return args


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise Runaway("it makes too long a text")


def metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    pay = charged if name in _SHALLOW else charged_deep

    @functools.wraps(function)
    def filter(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            pay(arg)
        # An attribute's path is walked for every element.
        for option in (*args[1:], *kwargs.values()):
            if isinstance(option, str) and len(option) > MAX_ARGUMENT:
                raise Runaway("it gives a filter too long an argument")
        return charged(function(*args, **kwargs))

    return filter


def _replace(text: object, old: object, new: object, count: int = -1) -> str:
    text, (old, new) = str(text), (str(old), str(new))
    checked_arguments("replace", text, (old, new), {})
    return text.replace(old, new, count)


def _join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    parts = [v[attribute] if attribute is not None else v for v in each(values)]
    (texts,) = checked_arguments("join", str(d), (parts,), {})
    return str(d).join(texts)


def _format(text: object, *args: Any) -> str:
    check_format(str(text), args)
    return str(text) % args


def _number(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def convert(value: Any, default: Any = 0) -> Any:
        try:
            return kind(value) if not isinstance(value, str) or len(value) <= 64 else default
        except (TypeError, ValueError, OverflowError):
            return default

    return convert


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 20:
        raise Runaway("it rounds to too many places")
    return do_round(value, precision, method)  # type: ignore[arg-type]


def _indent(text: object, width: int = 4, first: bool = False, blank: bool = False) -> str:
    text = str(text)
    if not 0 <= width <= 64:
        raise Runaway("it indents too far")
    _check_size(len(text) + (text.count("\n") + 1) * width)
    head, *rest = text.split("\n")
    pad = " " * width
    rest = [pad + line if line or blank else line for line in rest]
    return "\n".join([pad + head if first else head, *rest])


def _tojson(value: object, indent: int | None = None, **options: bool) -> str:
    """As transformers defines it for chat templates: plain JSON, not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise Runaway("it indents too far")
    _check_json(value, indent or 0)
    return json.dumps(
        value,
        indent=indent,
        ensure_ascii=bool(options.get("ensure_ascii")),
        sort_keys=bool(options.get("sort_keys")),
    )


def _check_json(value: object, indent: int) -> None:
    size = 0
    pending: list[tuple[object, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        size += indent * depth + (len(item) if isinstance(item, str) else 8)
        _check_size(size)
        inside = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        if isinstance(inside, list | tuple):
            pending += [(part, depth + 1) for part in inside]


FILTERS: dict[str, Callable[..., Any]] = {
    "replace": _replace,
    "join": _join,
    "format": _format,
    "tojson": _tojson,
    "indent": _indent,
    "round": _round,
    "int": _number(int),
    "float": _number(float),
}
"""Our own in place of Jinja's, where those can be made to work without end."""
