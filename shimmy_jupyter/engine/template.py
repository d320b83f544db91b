"""A model's own chat template, rendered so that a hostile one can neither reach out nor run away.

Jinja's immutable sandbox stops attribute tricks; nothing in it stops `range` inside `range` or
`'a' * 10**9`. A thread cannot be killed, so the render is bounded in itself: the template's tree is
rewritten so that all it does passes through `metering`, and of Jinja's language only what chat
templates use is left.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import escape

from ..errors import InvalidValue
from ..types import Message
from .metering import (
    FILTERS,
    QuietNamespace,
    Runaway,
    as_key,
    budget_for,
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

VARIABLES = "chat_template_kwargs"
"""What clients of other servers call a template's variables."""
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
_RESERVED = frozenset(["messages", "bos_token", "eos_token"])
_NOTHING: Mapping[str, object] = MappingProxyType({})
_TELLING = 16
"""A shorter text may stand in a prompt by chance."""
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


def _each(values: Iterable[Any] | None) -> Iterable[Any]:
    # Templates written for tools loop over them even where there are none. llama.cpp's own
    # renderer takes that for an empty list.
    return each(() if values is None else values)


def _imported(function: Callable[..., Any], *args: Any) -> nodes.Call:
    # By import path: a name could be shadowed by the template's own `set` or `macro`.
    name = nodes.ImportedName(f"{function.__module__}.{function.__name__}")
    return nodes.Call(name, list(args), [], None, None)


class _Meter(NodeTransformer):
    """Rewrites a template's tree so that loops, `~`, comparisons, slices and output are charged."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _imported(_each, node.iter)
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
        if operator == "+":
            # As in llama.cpp's own renderer: what is missing adds nothing to a text.
            if isinstance(left, jinja2.Undefined) and isinstance(right, str):
                return right
            if isinstance(right, jinja2.Undefined) and isinstance(left, str):
                return left
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
        # What a text's method is given, it may print.
        pay = charged_deep if isinstance(owner, str) else charged
        for arg in (*args, *kwargs.values()):
            pay(arg)
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


def _string(value: Any) -> str:
    """Nothing is escaped here unless a template asks for it, so `safe` has nothing to mark."""
    return value if type(value) is str else str(charged_deep(value))


def _escape(value: Any) -> str:
    return str(escape(_string(value)))  # marked as escaped, it would escape what it is added to


def _with_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """`map` and its like print what they are given for a name, where it is none."""

    @functools.wraps(function)
    def checked(context: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        charged_deep([*args, *kwargs.values()])
        return function(context, values, *args, **kwargs)

    return checked


def _tojson(value: Any, *args: Any, **options: Any) -> str:
    # What `map` and `select` give, as in llama.cpp's own renderer.
    given = list(each(value)) if isinstance(value, Iterator) else value
    return str(FILTERS["tojson"](given, *args, **options))


def _filters(env: _Environment) -> dict[str, Any]:
    filters: dict[str, Any] = {name: env.filters[name] for name in _FILTERS} | FILTERS
    for name in ("map", "select", "reject", "selectattr", "rejectattr"):
        filters[name] = _with_name(filters[name])
    filters |= {"string": _string, "safe": _string, "tojson": _tojson}
    filters |= dict.fromkeys(("e", "escape", "forceescape"), _escape)
    return {name: metered(name, function) for name, function in filters.items()}


def _environment() -> _Environment:
    env = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # folding constants would run the template's arithmetic unmetered
        extensions=[loopcontrols, _Generation],
        cache_size=0,
    )
    env.filters = _filters(env)
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

    def render(
        self, messages: tuple[Message, ...], *, variables: Mapping[str, object] = _NOTHING
    ) -> str:
        """The prompt's text, ending where the assistant's answer begins.

        `variables` are the template's own, such as `enable_thinking`: plain JSON, and none that
        stands for the messages, a special token or a function. A message that the template would
        leave out is refused: an answer to half a chat would look like one to the whole.
        """
        reserved = _RESERVED.union(self._special, self._template.globals)
        for name in variables:
            if name in reserved:
                raise InvalidValue(
                    f"{name[:50]!r} is not for a request to set in the chat template",
                    param=VARIABLES,
                )
        text = self._rendered(messages, variables)
        self._check_used(messages, variables, text)
        return text

    def _rendered(self, messages: tuple[Message, ...], variables: Mapping[str, object]) -> str:
        turns = [
            {"role": m.role, "content": m.content} | ({"name": m.name} if m.name else {})
            for m in messages
        ]
        now = dt.datetime.now().astimezone()
        token = spent.set(budget_for(len(messages)))
        try:
            plain = _all_plain(variables)
            given = {
                "add_generation_prompt": True,
                "tools": None,
                # As llama.cpp gives it: without, Llama 3.1 believes that it is July 2024.
                "date_string": now.strftime("%d %b %Y"),
                "datetime": now.strftime("%b %d %Y"),
                **plain,
                **self._special,
                "messages": turns,
            }
            return "".join(self._template.generate(given))
        except _FAILURES as error:
            raise _refused(str(error)) from error
        finally:
            spent.reset(token)

    def _check_used(
        self, messages: tuple[Message, ...], variables: Mapping[str, object], text: str
    ) -> None:
        """Raises for the first message that has no part in the text.

        A template may strip or cut what a message says, and that is its own business. So where
        they do not all stand in the text as they are, other words are put in their places, and
        must come out.
        """
        if _all_stand_in(text, messages):
            return
        word = secrets.token_hex(8)
        said = [i for i, message in enumerate(messages) if message.content.strip()]
        other = list(messages)
        for i in said:
            other[i] = replace(messages[i], content=f"{word}x{i}x")
        try:
            shown = self._rendered(tuple(other), variables)
        except InvalidValue:
            return  # it minds what messages say, and has accepted what they do
        used = {int(i) for i in re.findall(f"{word}x([0-9]+)x", shown.lower())}
        for i in said:
            if i not in used:
                raise InvalidValue(
                    "the model's chat template leaves this message out, whose role is "
                    f"{messages[i].role[:50]!r}",
                    param=f"messages.{i}",
                )


def _all_stand_in(text: str, messages: tuple[Message, ...]) -> bool:
    """Whether their texts follow each other in this one, and are too long to do so by chance."""
    at = 0
    for message in messages:
        content = message.content.strip()
        if not content:
            continue
        at = text.find(content, at) if len(content) >= _TELLING else -1
        if at < 0:
            return False  # at once: a miss has searched the whole text
        at += len(content)
    return True


def _all_plain(variables: Mapping[str, object]) -> dict[str, Any]:
    try:
        return {charged(name): _plain(value) for name, value in variables.items()}
    except InvalidValue:
        raise
    except _FAILURES as error:
        raise InvalidValue(f"for the chat template: {str(error)[:200]}", param=VARIABLES) from error


def _plain(value: object) -> Any:
    """JSON, copied and paid for: nothing that has methods of its own reaches the template."""
    charged(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(type(name) is str for name in value):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if type(value) is str:
        value.encode()  # half of a surrogate pair could not be tokenized
    if value is None or type(value) in {str, bool, int, float}:
        return value
    raise InvalidValue("a chat template's variables are plain JSON", param=VARIABLES)


def _refused(reason: str) -> InvalidValue:
    return InvalidValue(f"the model's chat template: {reason[:500]}", param="messages")
