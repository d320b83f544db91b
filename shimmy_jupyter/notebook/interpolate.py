"""`{expression}` in a prompt becomes what it says in the user's kernel; every other brace stays as it is.

An expression is what Python's f-strings take, `!r`, `!s`, `!a` and a format after `:` included, as far as it
names something. It runs in the kernel, calls and all: whoever pastes a text of others' into a prompt lets
them write expressions. A variable that holds the text does not: what was put in is never looked at again.

Braces that stay:
- what names nothing: `{}`, `{2}`, `{"a"}`, `{...}`; dictionaries and sets, JSON among them. Inside, a reference
  is one again: `{"name": "{name}"}`. What reads as a format and as a dictionary (`{x:d}`, `{a:1}`) stays too.
- doubled ones, both of them: `{{x}}` is Jinja's, Vue's or an escape, and not ours to change.
- with blanks inside, `{ x }`: blocks and imports of other languages.
- LaTeX: after a `\\command` or its last argument, after `^`, after a `_` that is no name's (`x_{i}`, and not
  `report_{year}`). `\\n` and `\\t` are no commands.
- after `$`, `#` or a backslash: shells, JavaScript, Ruby. In an f-string, or before `.format`: Python.
- functions, methods, classes and modules, whose text nobody wants: `/users/{id}`; calls for an effect.
- assignments, `await`, `yield` and `lambda`.
- what cannot be evaluated. A name that is not defined is reported if it stands for itself; all else that
  raises is reported always, and does not stop the prompt: who must not send it so looks at `failed`.
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)

from IPython.core.autocall import IPyAutocall

from .display import one_line

Evaluate = Callable[[str], object]

_LONGEST = 2000
"""Characters of an expression with its format."""
_MOST_BRACES = 8
"""In one expression: so no character is read more often than that, whatever the text."""
_DEEPEST = 20

_SHORT = r'"(?:[^"\\\n]++|\\.)*+"' + r"|'(?:[^'\\\n]++|\\.)*+'"
_STRING = r'"""(?:[^\\]|\\.)*?"""' + r"|'{3}(?:[^\\]|\\.)*?'{3}|" + _SHORT
_TOKEN = re.compile(
    rf"(?P<string>{_STRING})|(?P<open>[(\[{{])|(?P<close>[)\]}}])|(?P<end>!(?!=)|:)"
    r"""|(?P<bad>[#\\"'])|(?:!=|[^(\[{)\]}!:#\\"'])+""",
    re.DOTALL,
)
_PAIRS = {")": "(", "]": "[", "}": "{"}
_CONVERSION = re.compile(r"![rsa](?=[:}])")
_CONVERSIONS: dict[str, Callable[[object], str]] = {"r": repr, "s": str, "a": ascii}
_FORMAT = re.compile(r":((?:[^{}\n]|\{[^{}\n]*\})*)\}")
_NESTED = re.compile(r"\{([^{}]*)\}")

_KNOWN_FORMAT = re.compile(
    r"(?! )(?:(?:.?[<>^]|.=)?[-+ ]?z?#?0?\d*[_,]?(?:\.\d+)?[bcdeEfFgGnosxX%]?|.*%-?[A-Za-z].*)"
)
_OR_A_DICTIONARY = re.compile(r"[A-Za-z]|[-+]?(?:0|[1-9]\d*)|\{[^{}]*\}")

_COMMAND = re.compile(r"\\(?![nt]\{)[A-Za-z]+\*?(?:\[[^\[\]{}\n]{0,200}\])*(?=\{)")
_NEXT_ARGUMENT = re.compile(r"(?:\[[^\[\]{}\n]{0,200}\])*(?=\{)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SUBSCRIPT = re.compile(r"(?:[})\]|]|\\[A-Za-z]+|(?<![A-Za-z0-9_])[A-Za-z0-9])_\Z")
# `f'(x)` is a derivative.
_FORMATTED = re.compile(
    rf"""(?<![\w"'])(?:[fFtT][rR]?|[rR][fFtT])(?!'\()(?:{_STRING})""", re.DOTALL
)
_FORMATTED_LATER = re.compile(r"""(?:[^"\n]{0,300}+"|[^'\n]{0,300}+')\.format\b""")

_FOR_AN_EFFECT = frozenset("breakpoint exit help input print quit".split())
_FUNCTIONS = (
    FunctionType, MethodType, BuiltinFunctionType, MethodWrapperType, WrapperDescriptorType,
    IPyAutocall,
)  # fmt: skip
_LATEX = "it is part of a formula in LaTeX"


@dataclass(frozen=True, slots=True)
class Interpolated:
    """`expressions` are those that were put in, in order. `failed` are (what stands in the braces, why it stays),
    each once: what was probably meant to be put in, and was not.
    """

    text: str
    expressions: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]


def interpolate(text: str, evaluate: Evaluate) -> Interpolated:
    """The text with its expressions' values in their place. Raises only what is no `Exception`, such as
    `KeyboardInterrupt`, from within `evaluate`.
    """
    opens = [match.start() for match in re.finditer(r"\{", text)]
    around = _Around(text)
    prompt = _Prompt(evaluate)
    done = 0
    for k, at in enumerate(opens):
        if at < done:
            continue
        further = opens[k + _MOST_BRACES] if k + _MOST_BRACES < len(opens) else len(text)
        field = _read(text, at, min(further, at + _LONGEST))
        if field is None:
            continue
        value = prompt.value(field, around.why_not(at, done))
        if value is not None:
            prompt.parts += [text[done:at], value]
            done = field.end
    prompt.parts.append(text[done:])
    return Interpolated(
        "".join(prompt.parts), tuple(prompt.expressions), tuple(prompt.failed.items())
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """What stands between a brace and the one that closes it, at `end` - 1."""

    body: str
    expression: str
    conversion: str
    format: str | None
    end: int


def _read(text: str, at: int, limit: int) -> _Field | None:
    """The field that the brace at `at` opens, if it ends before `limit` and could be an expression's."""
    stack: list[str] = []
    here = at + 1
    while match := _TOKEN.match(text, here, limit):
        found, kind = match[0], match.lastgroup
        if kind == "bad" or (kind == "open" and (here == at + 1 and found == "{")):
            return None
        if not stack and (kind == "end" or found == "}"):
            return _ended(text, at, here, limit)
        if kind == "open":
            stack.append(found)
            if len(stack) > _DEEPEST:
                return None
        elif kind == "close" and (not stack or stack.pop() != _PAIRS[found]):
            return None
        here = match.end()
    return None


def _ended(text: str, at: int, stop: int, limit: int) -> _Field | None:
    expression, here, conversion, form = text[at + 1 : stop], stop, "", None
    if match := _CONVERSION.match(text, here, limit):
        conversion, here = match[0][1], match.end()
    if match := _FORMAT.match(text, here, limit):
        form, here = match[1], match.end() - 1
    if not expression or not text.startswith("}", here, limit):
        return None
    return _Field(text[at + 1 : here], expression, conversion, form, here + 1)


class _Around:
    """What stands around a brace, by which it is another language's."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._latex = _arguments(text)
        spans = [match.span() for match in _FORMATTED.finditer(text) if "{" in match[0]]
        self._starts = [start for start, _ in spans]
        self._ends = [end for _, end in spans]

    def why_not(self, at: int, done: int) -> str | None:
        """None where a brace may be ours, "" where it is surely not. `done` is where the last field ended."""
        before = self._text[at - 1 : at]
        if before == "{":
            return ""
        if at in self._latex or before == "^":
            return _LATEX
        if before == "_" and at - 1 != done and _SUBSCRIPT.search(self._text, max(0, at - 40), at):
            return _LATEX
        if before and before in "$#\\":
            return f"it follows {before}"
        span = bisect_right(self._starts, at) - 1
        formatted = span >= 0 and at < self._ends[span]
        if formatted or _FORMATTED_LATER.match(self._text, at):
            return "it is in a string that Python formats"
        return None


def _arguments(text: str) -> set[int]:
    """Where the arguments of LaTeX commands begin."""
    first = {match.end() for match in _COMMAND.finditer(text)}
    if not first:
        return first
    closes: dict[int, int] = {}
    stack: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            closes[stack.pop()] = match.end()
    found = set(first)
    for start in first:
        at = start
        while (end := closes.get(at)) and (more := _NEXT_ARGUMENT.match(text, end)):
            at = more.end()
            if at in found:
                break
            found.add(at)
    return found


@dataclass(frozen=True, slots=True)
class _Expression:
    """`root` is the name that a reference begins with; None for anything but names, attributes and items."""

    names: frozenset[str]
    root: str | None


class _Prompt:
    """What has come of a text so far."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.parts: list[str] = []
        self.expressions: list[str] = []
        self.failed: dict[str, str] = {}
        self._evaluate = evaluate
        self._known: dict[str, _Expression | None] = {}

    def value(self, field: _Field, why_not: str | None) -> str | None:
        """What to put in a field's place; None if it stays, and may have others inside. `why_not` is what speaks against it."""
        if why_not == "" or (field.format is not None and not _is_format(field.format)):
            return None
        if field.expression != field.expression.strip() or field.body != field.body.strip():
            why_not = why_not or "there are blanks in its braces"
        expression = self._expression(field.expression.strip())
        if expression is None:
            return None
        if not (why_not or field.conversion) and _OR_A_DICTIONARY.fullmatch(field.format or ""):
            why_not = "it reads as a dictionary, too"
        if why_not:
            self._stays(field, expression, why_not)
            return None
        return self._evaluated(field, expression)

    def _stays(self, field: _Field, expression: _Expression, why: str) -> None:
        """Report it if what it begins with is there, and is no letter of a formula."""
        if expression.root is None or (why == _LATEX and len(expression.root) == 1):
            return
        try:
            value = self._evaluate(expression.root)
        except Exception:  # noqa: BLE001  nothing to mistake it for
            return
        if not _without_a_text(value, expression.root):
            self.failed.setdefault(field.body, why)

    def _evaluated(self, field: _Field, expression: _Expression) -> str:
        """The value's text; the field as it stands, where there is none: what was tried stays whole."""
        try:
            value = self._evaluate(field.expression)
            lone = field.body == field.expression
            why = _without_a_text(value, expression.root) if lone else None
            text = "" if why else self._formatted(value, field)
        except NameError as error:
            # One from inside of what was called is a mistake like others.
            inside = error.name not in {None, *expression.names}
            why = _reason(error) if inside else type(error).__name__
            if expression.root is None and not inside:
                return f"{{{field.body}}}"
        except Exception as error:  # noqa: BLE001  the user's code may raise anything
            why = _reason(error)
        if why:
            self.failed.setdefault(field.body, why)
            return f"{{{field.body}}}"
        self.expressions.append(field.body)
        return text

    def _formatted(self, value: object, field: _Field) -> str:
        if field.conversion:
            value = _CONVERSIONS[field.conversion](value)
        if field.format is None:
            return str(value)
        return format(value, _NESTED.sub(self._nested, field.format))

    def _nested(self, match: re.Match[str]) -> str:
        if self._expression(match[1]) is None and not match[1].isdecimal():
            raise ValueError(f"{match[0]} is no expression")
        return str(self._evaluate(match[1]))

    def _expression(self, text: str) -> _Expression | None:
        if text not in self._known:
            self._known[text] = _parse(text)
        return self._known[text]


def _without_a_text(value: object, root: str | None) -> str | None:
    """What a reference says that nobody would put into a prompt."""
    if root is None:
        return None
    if isinstance(value, ModuleType):
        return "it is a module"
    if isinstance(value, type):
        return "it is a class"
    if isinstance(value, _FUNCTIONS):
        return "it is a function"
    own = root in vars(builtins) and vars(builtins)[root] is value
    return "it is a name of Python's own" if own else None


def _is_format(text: str) -> bool:
    return _KNOWN_FORMAT.fullmatch(_NESTED.sub("1", text)) is not None


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    try:
        said = one_line(str(error))
    except Exception:  # noqa: BLE001  an exception's own text may fail
        said = ""
    return f"{kind}: {said[:200]}" if said else kind


_NEVER = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Lambda)
_IN_AN_INDEX = (ast.Name, ast.Constant, ast.UnaryOp, ast.USub, ast.Slice, ast.Tuple, ast.Load)


def _parse(text: str) -> _Expression | None:
    """What an expression names, if it is one that may run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    nodes = list(ast.walk(tree))
    names = frozenset(node.id for node in nodes if isinstance(node, ast.Name))
    if not names or isinstance(tree, ast.Tuple):
        return None
    if any(isinstance(node, _NEVER) or _has_an_effect(node) for node in nodes):
        return None
    return _Expression(names, _root(tree))


def _has_an_effect(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FOR_AN_EFFECT
    )


def _root(node: ast.expr) -> str | None:
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Subscript):
            if not all(isinstance(part, _IN_AN_INDEX) for part in ast.walk(node.slice)):
                return None
        elif not isinstance(node, ast.Attribute):
            return None
        node = node.value
    return node.id
