"""A model's own chat template, rendered so that a hostile one can neither reach out nor run away.

Jinja's immutable sandbox stops attribute tricks; nothing in it stops `range` inside `range` or
`'a' * 10**9`. A thread cannot be killed, so the render is bounded in itself: the template's tree is
rewritten so that all it does passes through `metering`, and of Jinja's language only what chat
templates use is left.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import InvalidValue
from ..types import Message
from .metering import (
    FILTERS,
    QuietNamespace,
    Runaway,
    as_key,
    charged,
    charged_deep,
    check_format,
    check_product,
    checked_arguments,
    concatenated,
    each,
    metered,
    spent,
)

MAX_TEMPLATE_BYTES = 64 * 1024
"""The longest that llama.cpp ships is 17 kB; compiling takes a second at this size."""
_METHODS = {
    str: frozenset(
        "capitalize casefold count endswith find format index isalnum isalpha isdigit islower "
        "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
        "replace rsplit rstrip split splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset("copy get items keys values".split()),
    list: frozenset("count index".split()),
    tuple: frozenset("count index".split()),
    LoopContext: frozenset(["cycle"]),
}
_FILTERS = frozenset(
    "abs attr capitalize count d default dictsort e escape first forceescape items last length "
    "list lower map max min reject rejectattr reverse safe select selectattr sort string title "
    "trim upper".split()
)
_FORBIDDEN = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
# What evaluating a template's expressions can raise, beside Jinja's own errors.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def _imported(function: Callable[..., Any], *args: Any) -> nodes.Call:
    # By import path: a name could be shadowed by the template's own `set` or `macro`.
    name = nodes.ImportedName(f"{function.__module__}.{function.__name__}")
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
        else:
            node.arg = _imported(as_key, node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _imported(as_key, node.key)
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
            raise Runaway("it uses **, which no chat needs")
        if operator == "*":
            check_product(left, right)
        if operator == "%" and isinstance(left, str):
            check_format(left, right)
        charged(left)
        return charged(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind) and callable(value):
                return attr in allowed
        return True

    def wrap_str_format(self, value: Any) -> None:
        return None  # `format` is a method like any other here, and checked in `call`

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        charged(owner)
        for arg in (*args, *kwargs.values()):
            charged(arg)
        if isinstance(owner, str):
            args = checked_arguments(obj.__name__, owner, args, kwargs)
        elif isinstance(owner, dict):
            as_key(args[0] if args else None)
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


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only text."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: object) -> None:
    raise jinja2.TemplateRuntimeError(str(charged_deep(message))[:500])


def _dict(**values: Any) -> dict[str, Any]:
    return values  # a function, for the type would bring its unbound methods along


def _strftime_now(format: str) -> str:
    if len(format) > 100:
        raise Runaway("its date format is too long")
    return dt.datetime.now().astimezone().strftime(format)


def _environment() -> _Environment:
    env = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # folding constants would run the template's arithmetic unmetered
        extensions=[loopcontrols, _Generation],
        cache_size=0,
    )
    filters: dict[str, Any] = {name: env.filters[name] for name in _FILTERS} | FILTERS
    env.filters = {name: metered(name, function) for name, function in filters.items()}
    tests: dict[str, Any] = dict(env.tests)
    env.tests = {name: metered(name, function) for name, function in tests.items()}
    env.globals = {
        "range": env.globals["range"],
        "dict": _dict,
        "namespace": QuietNamespace,
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
        except (*_FAILURES, SyntaxError) as error:
            raise _refused(str(error)) from error

    def render(self, messages: tuple[Message, ...]) -> str:
        """The prompt's text, ending where the assistant's answer begins."""
        turns = [
            {"role": m.role, "content": m.content} | ({"name": m.name} if m.name else {})
            for m in messages
        ]
        token = spent.set([0])
        try:
            pieces = self._template.generate(
                messages=turns, add_generation_prompt=True, tools=None, **self._special
            )
            return "".join(pieces)
        except _FAILURES as error:
            raise _refused(str(error)) from error
        finally:
            spent.reset(token)


def _refused(reason: str) -> InvalidValue:
    return InvalidValue(f"the model's chat template: {reason[:500]}", param="messages")
