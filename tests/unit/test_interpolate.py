"""Braces in a prompt: what is put in, and everything that stays as it was written.

Cases: names, attributes, items, calls, conversions, formats; values of every kind, also with braces in them;
what names nothing; JSON, sets, JavaScript, C, CSS, Jinja, LaTeX, f-strings, regular expressions, shells; strings
within expressions; names that are not there and errors of every kind; functions, classes, modules; assignments and
calls for an effect; other front ends' escapes; text that is all braces. By property: no reference, no change; all
that is not put in survives in order; nothing is evaluated twice that stands once.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.notebook import interpolate as module
from shimmy_jupyter.notebook.interpolate import Interpolated, interpolate


class Person:
    name = "Ada"

    @property
    def broken(self) -> str:
        raise RuntimeError("no \x1b[31mway\n{out}")


class Unprintable:
    def __str__(self) -> str:
        raise OSError("cannot be shown")


def fails() -> None:
    raise NameError("deep inside", name="deep")


NAMES: dict[str, Any] = {
    "x": 5, "a": 1, "b": 2, "i": 3, "n": 4, "w": 8, "price": 9.5, "year": 2024, "quarter": 2,
    "name": "Ada", "text": "has {x} and {{a}}", "nothing": None, "person": Person(), "xs": [1, 2],
    "d": {"}": "brace", "k": {"z": 9}, "it's": "quoted"}, "date": dt.date(2024, 1, 2),
    "unprintable": Unprintable(), "fails": fails, "re": re, "Person": Person, "input": "mine",
    "color": "red", "margin": 3, "v": 7, "yes": 1, "no": 2, "_": "last",
}  # fmt: skip


def evaluate(expression: str) -> object:
    return eval(expression, dict(NAMES))


def put_in(text: str) -> str:
    return interpolate(text, evaluate).text


class TestPutIn:
    @pytest.mark.parametrize(
        ("text", "becomes"),
        [
            ("{x}", "5"),
            ("Hello {name}, {name}!", "Hello Ada, Ada!"),
            ("{a}{b}", "12"),
            ("{person.name}", "Ada"),
            ('{d["k"]["z"]} {xs[0]} {xs[-1]} {xs[0:1]}', "9 1 2 [1]"),
            ('{d["}"]}', "brace"),
            ("""{d["it's"]}""", "quoted"),
            ("{', '.join(str(k) for k in xs)}", "1, 2"),
            ("{', '.join(f'{k}!' for k in xs)}", "1!, 2!"),
            ("{len(xs)} {max(xs)} {name.upper()}", "2 2 ADA"),
            ("{x + 1} {x if a else b} {a != b} {not a} {xs + [3]}", "6 5 True False [1, 2, 3]"),
            ("{dict(k={'v': x})}", "{'k': {'v': 5}}"),
            ("{nothing}", "None"),
            ("{_}", "last"),
            ("{input}", "mine"),
            ("{len(\n  xs\n)}", "2"),
            ("don't say \"{name}\", it's `{x}`", 'don\'t say "Ada", it\'s `5`'),
            ("v{x} Q{quarter} <p>{name}</p> k={n} /users/{n} *{name}* _{name}_ @{name}",
             "v5 Q2 <p>Ada</p> k=4 /users/4 *Ada* _Ada_ @Ada"),
            ("report_{year}_{quarter}.csv my_{name}", "report_2024_2.csv my_Ada"),
            (r"one\n{x}\t{a}", r"one\n5\t1"),
            ("f'(x) = {a}, g'(x) = {b}", "f'(x) = 1, g'(x) = 2"),
            ('{"name": "{name}", "n": {n}}', '{"name": "Ada", "n": 4}'),
            ("function f() {\n  return {x}\n}", "function f() {\n  return 5\n}"),
            ("```python\n{name}\n```", "```python\nAda\n```"),
        ],
    )  # fmt: skip
    def test_expressions(self, text: str, becomes: str) -> None:
        assert put_in(text) == becomes

    @pytest.mark.parametrize(
        "field",
        [
            "x!r", "name!r", "name!s", "name!a", "name!r:>10", "price:.2f", "price:.3", "price:8.1f",
            "price:,.3f", "x:>4", "x:<4", "x:^4", "x:*^6", "x:03", "x:04d", "x:,", "x:+d", "x:#x", "x:",
            "year:_", "price:.1%", "date:%Y-%m-%d", "date:%d. %B", "name:>8s", "price:.{a}f", "x:>{w}",
            "price:>{w}.{a}f", "len(xs):02", "name!r:*<{w}", "price:z.0f", "x:x<5",
        ],
    )  # fmt: skip
    def test_formats_are_those_of_an_f_string(self, field: str) -> None:
        found = interpolate(f"[{{{field}}}]", evaluate)
        assert found.text == f"[{eval('f' + repr('{' + field + '}'), dict(NAMES))}]"
        assert found.expressions == (field,)

    def test_what_was_put_in_is_not_looked_at_again(self) -> None:
        assert put_in("{text} {x}") == "has {x} and {{a}} 5"
        assert put_in("{xs[9]['{x}']} {nope({x})}") == "{xs[9]['{x}']} {nope({x})}"
        assert put_in("{text}}") == "has {x} and {{a}}}"

    def test_reported_in_order(self) -> None:
        found = interpolate("{x} {nope} {name!r} {x} {gone.y} {nope}", evaluate)
        assert found == Interpolated(
            "5 {nope} 'Ada' 5 {gone.y} {nope}",
            ("x", "name!r", "x"),
            (("nope", "NameError"), ("gone.y", "NameError")),
        )

    def test_every_occurrence_is_evaluated(self) -> None:
        numbers = iter(range(5))
        assert interpolate("{f()} {f()}", lambda _: next(numbers)).text == "0 1"


UNTOUCHED = [
    "", "no braces", "{", "}", "{}", "{ }", "}{", "{{}}", "{x", "x}", "{(x}", "{x)}", "{[x}]",
    # what names nothing
    "{2}", "{-1}", "{1.5}", '{"a"}', "{'a' 'b'}", "{True}", "{None}", "{...}", "{1 + 1}", "{[1, 2]}",
    # dictionaries and sets
    '{"a": 1}', '{"a": {"b": [1, {}]}}', '{"a": x}', "{1, 2}", "{x, a}", "{x: a}", "{a: 1}", "{*xs}", "{**d}",
    "{v:k for k,v in d.items()}", "{v for v in xs}", "{name:value}", "{x:d}", "{x:10}", "{x:-5}",
    # doubled
    "{{x}}", "{{ x }}", "{{{x}}}", "{% if x %}{# x #}{{ name }}{% endif %}", "style={{color}}",
    # other languages
    "{ x }", "{x }", "{ x}", "{\n  x\n}", "import { name } from 'x'", "for (const { name, v } of xs) {}",
    "p {color: red; margin: 0}", "p{color:red}", "p{margin:0}", "if (x) {return x;}", "{x;}", "{x++}", "{return x}",
    "struct s { int x; };", "int m[] = {x, a};", "do {x = 1} while (a)", "{x = 1}", "{x=}", "{x := 1}",
    "${x} $${x} ${name.x}", "#{x}", "`${name}`", "\\{x\\}", "\\{x}", "{x\\}", "{x # a}", "{x!z}", "{!x}", "{x!}",
    # formatted elsewhere
    'f"{x}"', "f'{x} {a:.2f}'", 'rf"{x}"', "fR'{x}'", 'f"""\n{x}\n"""', "f'''{x}'''", 't"{x}"', 'f"a\\"{x}"',
    '"{x}".format(x=1)', "'{x} {a}'.format(**d)", 'print(f"{x} is {name!r}")',
    # LaTeX
    r"\frac{a}{b}", r"\frac{\frac{a}{b}}{n}", r"\frac{a + 1}{b}", r"\frac{\alpha}{b}", r"\sqrt[3]{x}", r"\hat{x}",
    "x^{2}", "x^{n}", "e^{x}", "x_{i}", "x_{i}^{n}", "x_{2}", "{}_{i}", "f(x)_{i}", r"\sum_{i}^{n}", r"\sum_{i=1}^n",
    r"\begin{equation}", r"\section*{x}", r"\newcommand{\x}[1]{b}", r"\left\{x\right\}", r"\text{a}{b}",
    "$A_{i}$ and $b_{n}$", r"\textbf{n}", r"\u{x}", r"\d{n}", r"a\\{x}",
    # never
    "{(y := 3)}", "{[y := x]}", "{lambda: x}", "{(lambda: x)()}", "{await x}", "{(yield x)}", "{print(x)}",
    "{exit(x)}", "{[quit() for k in xs]}", "{breakpoint(x)}",
    # not there
    "{nope}", "{nope.x}", "{nope[0]}", "{nope()}", "{yes|nope}", "{person.nope}", "{xs[7]}", '{d["nope"]}',
    "{x.y.z}", "{x / 0}", "{price:d!}", "{name:.2f}", "{unprintable}", "{person.broken}", "{fails()}",
    "{len}", "{re}", "{Person}", "{int}", "{id}", "{license}", "{name.upper}", "{fails}", "{list}", "{person.__init__}",
    '{f("}', "{'x}", '{x"}', "{x\x00}", "{x y}", "{async}", "{x if}",
]  # fmt: skip


class TestStays:
    @pytest.mark.parametrize("text", UNTOUCHED)
    def test_as_it_was_written(self, text: str) -> None:
        found = interpolate(text, evaluate)
        assert (found.text, found.expressions) == (text, ())

    @pytest.mark.parametrize("text", UNTOUCHED)
    def test_beside_a_reference(self, text: str) -> None:
        assert put_in(f"{{name}} says\n{text}\nto {{name}}") == f"Ada says\n{text}\nto Ada"

    def test_a_whole_page_of_another_language(self) -> None:
        page = """
            private _addToolbar(model: ICellModel): void {
              const cell = this._getCell(model);
              if (cell) { const toolbarWidget = new Toolbar(); toolbarWidget.addClass(CELL_CLASS); }
              for (const { name, widget } of this._toolbar) {
                if (widget instanceof ReactWidget) {(widget as ReactWidget).update();}
              }
            }
            fn main() { let p = Point { x: 1.0, y: 2.0 }; println!("{}", p.x); }
            @media (min-width: 30em) { .a:hover { color: red } }
        """
        assert put_in(page) == page

    def test_functions_by_name_only(self) -> None:
        assert put_in("{id} {type(x)} {len!r} {fails.__name__}") == (
            "{id} <class 'int'> <built-in function len> fails"
        )


class TestReports:
    @pytest.mark.parametrize(
        ("text", "failed"),
        [
            ("{nope}", ("nope", "NameError")),
            ("{nope.x[0]['k']}", ("nope.x[0]['k']", "NameError")),
            ("{nope[i + 1]}", None),
            ("{nope:.2f}", ("nope:.2f", "NameError")),
            ("{nope()}", None),
            ("{nope + 1}", None),
            ("{yes|nope}", None),
            ("{ nope }", None),
            ("{{nope}} ${nope} #{nope} \\text{nope} x_{nope} f'{nope}' {nope:d}", None),
            ("{person.nope}", ("person.nope", "AttributeError: 'Person' object has no attribute 'nope'")),
            ("{xs[7]}", ("xs[7]", "IndexError: list index out of range")),
            ("{x / 0}", ("x / 0", "ZeroDivisionError: division by zero")),
            ("{fails()}", ("fails()", "NameError: deep inside")),
            ("{name:.2f}", ("name:.2f", "ValueError: Unknown format code 'f' for object of type 'str'")),
            ("{unprintable}", ("unprintable", "OSError: cannot be shown")),
            ("{person.broken}", ("person.broken", "RuntimeError: no [31mway {out}")),
            ("{price:.{nope}f}", ("price:.{nope}f", "NameError: name 'nope' is not defined")),
            ("{id}", ("id", "it is a function")),
            ("{name.upper}", ("name.upper", "it is a function")),
            ("{Person}", ("Person", "it is a class")),
            ("{re}", ("re", "it is a module")),
            ("{license}", ("license", "it is a name of Python's own")),
            ("${price:.2f}", ("price:.2f", "it follows $")),
            ("${id}", None),
            ("#{x}", ("x", "it follows #")),
            ("C:\\data\\{name}", ("name", "it follows \\")),
            ("{ x }", (" x ", "there are blanks in its braces")),
            ("{ len(xs) }", None),
            ("{x:d}", ("x:d", "it reads as a dictionary, too")),
            ("f'{x}'", ("x", "it is in a string that Python formats")),
            ("'{x}'.format()", ("x", "it is in a string that Python formats")),
            (r"\section{name}", ("name", "it is part of a formula in LaTeX")),
            (r"\frac{a}{b} x_{i} x^{n}", None),
            ('{"a": 1} {} {2} {{x}} {x, a} {x;} {v:k for k,v in d.items()}', None),
        ],
    )  # fmt: skip
    def test_what_was_probably_meant(self, text: str, failed: tuple[str, str] | None) -> None:
        assert interpolate(text, evaluate).failed == (() if failed is None else (failed,))

    def test_reasons_are_short_and_in_one_line(self) -> None:
        def complain(_: str) -> object:
            raise ValueError("x\n\u202e" * 10_000)

        ((_, reason),) = interpolate("{x}", complain).failed
        assert len(reason) < 250
        assert not {"\n", "\u202e"} & set(reason)

    def test_an_interrupt_is_none(self) -> None:
        def interrupt(_: str) -> object:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interpolate("{x}", interrupt)


PIECES = st.sampled_from([
    "{", "}", "{{", "}}", "{}", "{x}", "{ x }", "{a.b}", "{x!r}", "{x:.2f}", '{"a": 1}', "(", ")", "[", "]",
    '"', "'", '"""', "\\", "\\frac", "\\n", "f'", "^", "_", "$", "#", ":", "!", "!r", " ", "\n", "x", "0", "é",
    ".format", ",", "lambda", "\x00", "\ud800",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=60)


def unknown(_: str) -> object:
    raise NameError


class TestProperties:
    @given(TEXTS)
    def test_nothing_known_nothing_changed(self, text: str) -> None:
        found = interpolate(text, unknown)
        assert (found.text, found.expressions) == (text, ())

    @given(st.text(alphabet=st.characters(exclude_characters="{}"), max_size=60))
    def test_without_braces_nothing_is_asked(self, text: str) -> None:
        assert interpolate(text, lambda _: pytest.fail("asked")).text == text

    @given(TEXTS, st.text(alphabet="{}x\\'\"", max_size=8))
    def test_the_rest_survives_whatever_is_put_in(self, text: str, value: str) -> None:
        """With each value by a mark, taking the marks out again must leave the text."""
        asked: list[str] = []
        marks: list[str] = []

        def mark(expression: str) -> object:
            asked.append(expression)
            return "\ue000" + value

        found = interpolate(text, mark)
        assert found.text.count("\ue000") >= len(found.expressions) or "!r" in text
        rest = found.text
        for body in found.expressions:
            plain = "\ue000" + value
            shown = {"r": repr(plain)}.get(body[-1], plain) if "!" in body else plain
            marks.append(shown)
            assert shown in rest
            rest = rest.replace(shown, "{" + body + "}", 1)
        assert rest == text

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5).filter(lambda t: "{" not in t),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5).filter(
                lambda t: "{" not in t), inner, max_size=3),
            max_leaves=8,
        ),
        st.sampled_from([None, 1]),
    )  # fmt: skip
    def test_json_survives(self, value: Any, indent: int | None) -> None:
        text = json.dumps(value, indent=indent)
        assert interpolate(text, lambda _: pytest.fail("asked")).text == text


class Meter:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parsed = self.read = self.evaluated = 0
        parse, tokens = module.ast.parse, module._TOKEN

        def counted(*args: Any, **more: Any) -> Any:
            self.parsed += 1
            return parse(*args, **more)

        class Tokens:
            def match(_, *args: Any) -> Any:  # noqa: N805
                found = tokens.match(*args)
                self.read += 1
                return found

        monkeypatch.setattr(module.ast, "parse", counted)
        monkeypatch.setattr(module, "_TOKEN", Tokens())

    def evaluate(self, expression: str) -> object:
        self.evaluated += 1
        raise NameError(name=expression)


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "{a",
        "{(",
        '{"',
        "{a()",
        "{a:{",
        "}",
        "{{}",
        "\\a{",
        "_{",
        "{[x",
        'f"{',
        "{'\"{\"'",
        "{a ",
        "{}",
        '"\\',
    ],
)
def test_work_is_bounded_by_length(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the text is twice the work, and of a text in which nothing closes nothing is parsed."""
    work = []
    for length in (20_000, 40_000):
        meter = Meter(monkeypatch)
        text = piece * (length // len(piece))
        assert interpolate(text, meter.evaluate).text == text
        assert meter.read <= 20 * length
        assert (meter.parsed, meter.evaluated) == (0, 0)
        work.append(meter.read)
        monkeypatch.undo()
    assert work[1] <= 2.1 * work[0] + 10


def test_a_million_braces(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(monkeypatch)
    text = "{" * 1_000_000
    assert interpolate(text, meter.evaluate).text == text
    assert (meter.read, meter.parsed, meter.evaluated) == (1_000_000, 0, 0)


def test_a_reference_is_parsed_once_and_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(monkeypatch)
    interpolate("{a} {b + a}" * 1000, meter.evaluate)
    assert (meter.parsed, meter.evaluated) == (2, 2000)


@pytest.mark.parametrize(
    "inside",
    ["-" * 1990 + "x", "(" * 25 + "x" + ")" * 25, "x" * 2001, "not " * 490 + "x", "x." * 990 + "x", "[" * 15 + "x" + "]" * 15],
)  # fmt: skip
def test_deep_and_long_ones_do_no_harm(inside: str) -> None:
    found = interpolate(f"{{{inside}}} {{x}}", evaluate)
    assert found.text.endswith(" 5")
