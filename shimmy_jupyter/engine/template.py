"""A model's own chat template, rendered so that a hostile one can neither reach out nor run away.

Jinja's immutable sandbox stops attribute tricks; nothing in it stops `range` inside `range` or
`'a' * 10**9`. A thread cannot be killed, so the render is bounded in itself: every loop step,
call, filter, operator and output piece is charged to a budget, by the size of what it made, and
whatever could make something huge out of something small is refused or checked beforehand.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_round
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import InvalidValue
from ..types import Message

MAX_TEMPLATE_BYTES = 256 * 1024
MAX_STEPS = 400_000
"""Budget of one render: one a step, and one more for every 64 characters or elements touched."""
MAX_SIZE = 16 * 1024 * 1024
"""Characters of a text, or elements of a list, that a template may make."""

MAX_BITS = 4096
"""Of a number: what is multiplied again and again grows without end."""

_METHODS = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isdigit islower isnumeric "
        "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace "
        "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title "
        "upper".split()
    ),
    dict: frozenset("copy get items keys values".split()),
    list: frozenset("count index".split()),
    tuple: frozenset("count index".split()),
}
_FILTERS = frozenset(
    "abs attr capitalize count d default dictsort e escape first float forceescape format int "
    "items join last length list lower map max min reject rejectattr replace reverse round safe "
    "select selectattr sort string title trim unique upper".split()
)
_TOO_WIDE = re.compile(r"%[^a-zA-Z%]*?(\*|\d{4,})")
_TOO_WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(\d{4,}|\{)")
_SHALLOW = frozenset(
    "attr count d default first items last length list map reject rejectattr reverse safe select "
    "selectattr defined undefined none mapping sequence iterable string number boolean true false "
    "integer float callable sameas filter test odd even divisibleby".split()
)
"""Filters and tests that neither compare nor print what is inside their arguments."""
_FORBIDDEN = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_SIZED = (str, list, tuple, dict, range, set)
# What evaluating a template's expressions can raise, beside Jinja's own errors.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Runaway(jinja2.TemplateRuntimeError):
    """The template wants far more work than any chat needs."""


_spent: ContextVar[list[int]] = ContextVar("spent")


def charged(value: Any) -> Any:
    """Pay for a value by its size, and return it."""
    size = len(value) if isinstance(value, _SIZED) else 0
    budget = _spent.get()
    budget[0] += 1 + size // 64
    if size > MAX_SIZE:
        raise _Runaway("it makes too long a text or list")
    if budget[0] > MAX_STEPS:
        raise _Runaway("it does far more work than its messages need")
    return value


def charged_deep(value: Any) -> Any:
    """Pay for everything inside a value too: a list of shared lists prints exponentially long."""
    pending = [value]
    while pending:
        item = charged(pending.pop())
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            pending += item
    return value


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


def _imported(function: Callable[..., Any], *args: Any) -> nodes.Call:
    # By import path: a name could be shadowed by the template's own `set` or `macro`.
    name = nodes.ImportedName(f"{__name__}.{function.__name__}")
    return nodes.Call(name, list(args), [], None, None)


class _Meter(NodeTransformer):
    """Rewrites a template's tree so that loops, `~`, comparisons, slices and output are charged."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _imported(each, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _imported(concatenated, *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _imported(charged_deep, node.expr)
        for operand in node.ops:
            operand.expr = _imported(charged_deep, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _imported(charged, node.node)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            _imported(charged_deep, nodes.Const(n.data) if isinstance(n, nodes.TemplateData) else n)
            for n in node.nodes
        ]
        return node


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise _Runaway("it uses **, which no chat needs")
        if operator == "*":
            _check_product(left, right)
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            charged_deep(right)
        charged(left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise _Runaway("it computes too large a number")
        return charged(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind) and callable(value):
                return attr in allowed
        return True

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            if _TOO_WIDE_FIELD.search(value.__self__):
                raise _Runaway("it pads a text too far")
            charged_deep([*args, *kwargs.values()])
            return str(charged(wrapped(*args, **kwargs)))

        return formatted

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        charged(owner)
        if isinstance(owner, str):
            _check_growth(obj.__name__, owner, args)
        elif isinstance(owner, list | tuple):
            charged_deep([*args, *owner])  # `index` and `count` compare
        return charged(super().call(context, obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Parser(self, source, name, filename).parse()
        for kind in _FORBIDDEN:
            if tree.find(kind) is not None:
                raise jinja2.TemplateSyntaxError("a chat template cannot load another", 1)
        metered = _Meter().visit(tree)
        assert isinstance(metered, nodes.Template)
        return metered


def _check_product(left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        repeats = isinstance(text, str | list | tuple) and isinstance(times, int)
        if repeats and len(text) * max(0, times) > MAX_SIZE:
            raise _Runaway("it repeats a text too often")


def _check_format(text: str) -> None:
    if _TOO_WIDE.search(text):
        raise _Runaway("it pads a text too far")


def _check_growth(method: str, owner: str, args: tuple[Any, ...]) -> None:
    size = 0
    if method == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        size = len(owner) + (owner.count(old) if old else len(owner) + 1) * len(new)
    elif method == "join" and args and isinstance(args[0], _SIZED):
        size = sum(len(str(charged_deep(part))) + len(owner) for part in args[0])
    if size > MAX_SIZE:
        raise _Runaway("it makes too long a text")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only text."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    pay = charged if name in _SHALLOW else charged_deep

    @functools.wraps(function)
    def filter(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            pay(arg)
        return charged(function(*args, **kwargs))

    return filter


def _replace(text: object, old: object, new: object, count: int = -1) -> str:
    text = str(text)
    _check_growth("replace", text, (old, new))
    return text.replace(str(old), str(new), count)


def _join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    parts = [v[attribute] if attribute is not None else v for v in values]
    _check_growth("join", str(d), (parts,))
    return str(d).join(str(part) for part in parts)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 20:
        raise _Runaway("it rounds to too many places")
    return do_round(value, precision, method)  # type: ignore[arg-type]


def _indent(text: object, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not 0 <= width <= 64:
        raise _Runaway("it indents too far")
    head, *rest = str(text).split("\n")
    pad = " " * width
    rest = [pad + line if line or blank else line for line in rest]
    return "\n".join([pad + head if first else head, *rest])


def _format(text: object, *args: Any) -> str:
    _check_format(str(text))
    return str(text) % args


def _tojson(value: object, indent: int | None = None, **options: bool) -> str:
    """As transformers defines it for chat templates: plain JSON, not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise _Runaway("it indents too far")
    return json.dumps(
        value,
        indent=indent,
        ensure_ascii=bool(options.get("ensure_ascii")),
        sort_keys=bool(options.get("sort_keys")),
    )


def _raise(message: object) -> None:
    raise jinja2.TemplateRuntimeError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 100:
        raise _Runaway("its date format is too long")
    return dt.datetime.now().astimezone().strftime(format)


def _environment() -> _Environment:
    env = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # folding constants would run the template's arithmetic unmetered
        extensions=[loopcontrols, _Generation],
        cache_size=0,
    )
    own = {"replace": _replace, "join": _join, "format": _format}
    own |= {"tojson": _tojson, "indent": _indent, "round": _round}
    filters: dict[str, Any] = {name: env.filters[name] for name in _FILTERS} | own
    env.filters = {name: _metered(name, function) for name, function in filters.items()}
    tests: dict[str, Any] = dict(env.tests)
    env.tests = {name: _metered(name, function) for name, function in tests.items()}
    env.globals = {
        "range": env.globals["range"],
        "dict": dict,
        "namespace": env.globals["namespace"],
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    return env


class ChatTemplate:
    """A compiled chat template. Raises `InvalidValue` where the template is refused or refuses."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        self._special = special
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise _refused(f"it is longer than {MAX_TEMPLATE_BYTES // 1024} KiB")
        try:
            self._template = _environment().from_string(source)
        except (*_FAILURES, SyntaxError, MemoryError) as error:
            raise _refused(str(error)) from error

    def render(self, messages: tuple[Message, ...]) -> str:
        """The prompt's text, ending where the assistant's answer begins."""
        turns = [
            {"role": m.role, "content": m.content} | ({"name": m.name} if m.name else {})
            for m in messages
        ]
        token = _spent.set([0])
        try:
            pieces = self._template.generate(
                messages=turns, add_generation_prompt=True, tools=None, **self._special
            )
            return "".join(pieces)
        except _FAILURES as error:
            raise _refused(str(error)) from error
        finally:
            _spent.reset(token)


def _refused(reason: str) -> InvalidValue:
    return InvalidValue(f"the model's chat template: {reason}", param="messages")
