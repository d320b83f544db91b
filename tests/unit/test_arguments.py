"""The options of a magic's line.

Cases: every option by each of its names, with `=` and without, quoted in both ways; falsy values; what
escapes mean where; repeated ones; the model by itself, before, among and after options; `--`; values at
and beyond their ranges; values that are missing, or that look like options; options that are not known,
and what is close to them; `-m` merged, damaged, contradicting an option; prompts that begin with dashes,
quotes and braces; anything at all.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.core import limits
from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.models import suggest
from shimmy_jupyter.notebook.arguments import (
    FLAGS,
    FORMATS,
    LIMITS,
    TASKS,
    Format,
    Options,
    parse_cell,
    parse_prompt,
)
from shimmy_jupyter.notebook.helptext import written

BACKSLASH = chr(92)


class TestPrompts:
    @pytest.mark.parametrize(
        ("line", "options", "rest"),
        [
            ("", {}, ""),
            ("   ", {}, ""),
            ('What\'s {this}, "then"?', {}, 'What\'s {this}, "then"?'),
            ("'quoted' prompt", {}, "'quoted' prompt"),
            ('{"a": {}}', {}, '{"a": {}}'),
            ("  two  spaces  ", {}, "two  spaces"),
            ("--temperature 0 hi", {"temperature": 0.0}, "hi"),
            ("--temperature=0.5 --seed 0 hi --seed", {"temperature": 0.5, "seed": 0}, "hi --seed"),
            ('--system "Be brief." hi', {"system": "Be brief."}, "hi"),
            ('--system "" hi', {"system": ""}, "hi"),
            ("--max-tokens 0 hi", {"max_tokens": 0}, "hi"),
            ("--max_tokens 0 hi", {"max_tokens": 0}, "hi"),
            ("--seed -5 hi", {"seed": -5}, "hi"),
            ("-- --seed is an option", {}, "--seed is an option"),
            ("--model m -- --x", {"model": "m"}, "--x"),
            ("--", {}, ""),
            ("--  a  ", {}, " a  "),
            ("--dry-run --no-interp {x}", {"dry_run": True, "interpolate": False}, "{x}"),
            ("--logprobs why?", {"logprobs": 5}, "why?"),
            ("--logprobs 20 questions", {"logprobs": 20}, "questions"),
            ("--logprobs=0 20 questions", {"logprobs": 0}, "20 questions"),
            ("-5 + 3", {}, "-5 + 3"),
            ("- first\n- second", {}, "- first\n- second"),
            ("---", {}, "---"),
            ("-->", {}, "-->"),
            ("a\nb", {}, "a\nb"),
        ],
    )
    def test_line(self, line: str, options: dict[str, Any], rest: str) -> None:
        assert parse_prompt(line) == (Options(**options), rest)

    @settings(deadline=None)
    @given(st.text())
    def test_what_follows_two_dashes_comes_back_as_it_stood(self, text: str) -> None:
        assert parse_prompt("-- " + text) == (Options(), text)
        assert parse_prompt("--seed 1 --\t" + text) == (Options(seed=1), text)


VALUES: dict[str, list[tuple[str, Any]]] = {
    "model": [("m", "m"), ('"my model"', "my model"), ("org/m:Q4_K_M", "org/m:Q4_K_M")],
    "format": [(name, shape) for name, shape in FORMATS.items()],
    "output": [("x", "x"), ("_", "_"), ("größe", "größe"), ("match", "match"), ("ﬁ", "fi")],
    "schema": [("Answer", "Answer"), ("a.b.C", "a.b.C")],
    "system": [("Hi", "Hi"), ("'a \"b\" \\n'", 'a "b" \\n'), ('"a \\"b\\" \\\\ \\n"', 'a "b" \\ \\n')],
    "seed": [("0", 0), ("+7", 7), (str(-(2**63)), -(2**63)), (str(2**63 - 1), 2**63 - 1)],
    "temperature": [("0", 0.0), ("2", 2.0), (".5", 0.5), ("1e-1", 0.1), ("-0", 0.0), ("1.", 1.0)],
    "max_tokens": [("0", 0), ("2147483647", 2147483647)],
    "stop": [("x", ("x",)), (r'"\n\n"', ("\n\n",)), (r"'\t'", ("\t",)), (r'"\\n"', (r"\n",)),
             (r"\n", (r"\n",)), (r'"\d"', (r"\d",)), ("'\"'", ('"',)), (r'"\""', ('"',)), ('" "', (" ",))],
    "parameters": [('{"a":1}', {"a": 1}), ("'{\"a\": \"\\n\"}'", {"a": "\n"}), ("{}", {}),
                   (r'"{\"a\": 1}"', {"a": 1}), (r"""'{"a": "\\d"}'""", {"a": r"\d"})],
    "context": [("1", 1), ("12", 12)],
    "leave_out": [("3,1", (3, 1)), ("7", (7,))],
    "logprobs": [("0", 0), ("20", 20)],
    "profile": [("laptop", "laptop")],
}  # fmt: skip
SWITCHES = {
    "interpolate": False,
    "dry_run": True,
    "stream": False,
    "reproducible": True,
    "logprobs": 5,
}


class TestValues:
    def test_every_option_is_tried(self) -> None:
        fields = {flag.field for flag in FLAGS}
        assert fields == VALUES.keys() | SWITCHES.keys()
        assert fields == set(Options.__dataclass_fields__)
        names = [name for flag in FLAGS for name in flag.names]
        assert len(set(names)) == len(names)
        assert {"-f", "-o", "-m"} == {name for name in names if not name.startswith("--")}

    @pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: str(flag.field))
    def test_in_each_way_of_writing(self, flag: Any) -> None:
        for name in flag.names:
            for text, value in VALUES.get(flag.field, []):
                wanted = Options(**{flag.field: value})
                ways = [f"{name} {text}", f"  {name}   {text} ", f"{name}={text}"]
                ways += [f'{name} "{text}"', f"{name} '{text}'"] * text.isalnum()
                for line in ways:
                    assert parse_cell(line) == wanted, line
                    assert parse_prompt(f"{line} -- go") == (wanted, "go"), line
            if flag.field in SWITCHES:
                assert parse_cell(name) == Options(**{flag.field: SWITCHES[flag.field]})

    def test_underscores_are_dashes(self) -> None:
        assert parse_cell("--max_tokens 1 --dry_run --model_parameters {}") == Options(
            max_tokens=1, dry_run=True
        )

    def test_repeated(self) -> None:
        assert parse_cell(r'--stop a --stop "\n"').stop == ("a", "\n")
        line = """-m '{"a": 1, "b": 1}' -m {"b":2} --model-parameters={"c":3}"""
        assert parse_cell(line).parameters == {"a": 1, "b": 2, "c": 3}

    def test_formats(self) -> None:
        assert list(FORMATS) == "code html image json markdown md math text".split()
        assert FORMATS["md"] is Format.MARKDOWN
        assert set(FORMATS.values()) == set(Format)

    def test_lists_that_are_the_servers(self) -> None:
        assert set(LIMITS) == set(limits.NAMES)
        assert suggest.TASKS == TASKS


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "param", "says"),
        [
            ("--nonsense 3 hi", "--nonsense", "--model, --format"),
            ("--nonsense", "--nonsense", "there is no such option"),
            ("--temprature 0", "--temprature", "did you mean --temperature?"),
            ("--max_token 3", "--max-token", "did you mean --max-tokens"),
            ("-seed 3", "-seed", "did you mean --seed"),
            ("-fjson", "-fjson", "did you mean -f json?"),
            ("-x", "-x", "-- ends the options"),
            ("--Seed 3", "--Seed", "did you mean --seed"),
            ("--temperature", "--temperature", "needs a value: --temperature X"),
            ("--temperature --seed 3", "--temperature", "needs a value"),
            ("--temperature -- hi", "--temperature", "needs a value"),
            ("--temperature= 3", "--temperature", "needs a value"),
            ("--output -f json", "--output", "needs a value"),
            ("-o", "--output", "needs a value: --output VAR"),
            ("--logprobs=", "--logprobs", "needs a value"),
            ("--logprobs=x", "--logprobs", "0 to 20"),
            ("--logprobs 21", "--logprobs", "0 to 20"),
            ("--logprobs -1", "--logprobs", "0 to 20"),
            ("--temperature hot hi", "--temperature", "'hot' is not a number from 0 (greedy) to 2"),
            ("--temperature nan", "--temperature", "0 (greedy) to 2"),
            ("--temperature inf", "--temperature", "0 (greedy) to 2"),
            ("--temperature 2.01", "--temperature", "0 (greedy) to 2"),
            ("--temperature -0.1", "--temperature", "0 (greedy) to 2"),
            ("--temperature 1_0", "--temperature", "0 (greedy) to 2"),
            ("--seed 1.5 hi", "--seed", "a whole number of 64 bits"),
            ("--seed ٣", "--seed", "a whole number of 64 bits"),
            ("--seed 1_0", "--seed", "a whole number of 64 bits"),
            (f"--seed {2**63}", "--seed", "a whole number of 64 bits"),
            (f"--seed {'9' * 5000}", "--seed", "a whole number of 64 bits"),
            ("--max-tokens -1", "--max-tokens", "from 0 to"),
            ("--context 0", "--context", "1 or more"),
            ("--leave-out 3,x", "--leave-out", "as in 3,1"),
            ("--leave-out 3,", "--leave-out", "as in 3,1"),
            ("--leave-out 0", "--leave-out", "as in 3,1"),
            ("--leave-out 3,3", "--leave-out", "twice"),
            ("-f yaml", "--format", "code, html, image, json, markdown, md, math, text"),
            ("-f jsn", "--format", "did you mean json?"),
            ("-o 3x", "--output", "not a name for a variable"),
            ("-o a.b", "--output", "not a name for a variable"),
            ("-o class", "--output", "not a name for a variable"),
            ("-o None", "--output", "not a name for a variable"),
            ("--schema a..b", "--schema", "such as Answer"),
            ("--schema list[int]", "--schema", "such as Answer"),
            ("--schema a.class", "--schema", "such as Answer"),
            ('--stop ""', "--stop", "empty"),
            ('--model ""', "--model", "not a name"),
            ('--profile " "', "--profile", "not a name"),
            ("-m 3", "--model-parameters", "JSON object"),
            ("-m {", "--model-parameters", "JSON object"),
            ('-m {"a": 1}', "--model-parameters", "needs quotes"),
            ("-m '{\"a\": NaN}'", "--model-parameters", "JSON object"),
            ('-m {"a":1e999}', "--model-parameters", "JSON object"),
            ('-m {"a":1,"a":2}', "--model-parameters", "each key once"),
            (f'-m {{"a":"{BACKSLASH}ud800"}}', "--model-parameters", "JSON object"),
            ("-m " + "[" * 100_000, "--model-parameters", "JSON object"),
            ('-m {"seed":1} --seed 2', "--model-parameters", "by --seed"),
            ('--temperature 1 -m {"temperature":1}', "--model-parameters", "by --temperature"),
            ("--seed 1 --seed 1", "--seed", "twice"),
            ("-f text --format text", "--format", "twice"),
            ("--no-stream --no_stream", "--no-stream", "twice"),
            ("--dry-run=yes", "--dry-run", "no value"),
            ('--system "never closed', "--system", "not closed"),
            ('--system "a"b', "--system", "a space after"),
        ],
    )
    def test_are_named_and_say_what_is_right(self, line: str, param: str, says: str) -> None:
        for parse in (parse_cell, parse_prompt):
            with pytest.raises(InvalidValue) as caught:
                parse(line)
            assert caught.value.param == param
            assert says in caught.value.message
            assert len(caught.value.message) < 600

    def test_a_request_has_other_names_of_its_own(self) -> None:
        said = parse_cell('-m {"format":1,"output":2} -f json -o x')
        assert said.parameters == {"format": 1, "output": 2}


class TestCells:
    @pytest.mark.parametrize(
        "line", ["m --seed 3", "--seed 3 m", "--model m --seed 3", "--seed 3 --model m", "--seed 3 -- m",
                 '"m" --seed=3', "m --seed 3 --"],
    )  # fmt: skip
    def test_one_model_anywhere(self, line: str) -> None:
        assert parse_cell(line) == Options(model="m", seed=3)

    @pytest.mark.parametrize(
        "line", ["one two", "m --seed 3 n", "--model m n", "m --model n", "m -- n", "explain this code",
                 '"open', '""'],
    )  # fmt: skip
    def test_no_more_than_one(self, line: str) -> None:
        with pytest.raises(InvalidValue) as caught:
            parse_cell(line)
        assert caught.value.param == "model"

    def test_says_where_the_prompt_goes(self) -> None:
        with pytest.raises(InvalidValue, match="the prompt begins in the line below"):
            parse_cell("explain this code")

    def test_nothing(self) -> None:
        assert parse_cell("") == parse_cell("  ") == parse_cell("--") == Options()

    def test_a_model_that_begins_with_a_dash(self) -> None:
        assert parse_cell("-- -m") == parse_cell("--model=-m") == Options(model="-m")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.floats(-9, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(min_size=1).map(str.strip).filter(lambda s: s.isprintable() and s)
VARIABLES = st.sampled_from(["x", "answer", "_", "größe"])
OPTIONS = st.builds(
    Options,
    model=st.none() | NAMES,
    format=st.none() | st.sampled_from(Format),
    output=st.none() | VARIABLES,
    schema=st.none() | st.lists(VARIABLES, min_size=1, max_size=3).map(".".join),
    system=st.none() | st.text(),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    temperature=st.none() | st.floats(0, 2),
    max_tokens=st.none() | st.integers(0, 2**31 - 1),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    parameters=st.dictionaries(st.text().map("x".__add__), JSON, max_size=3),
    context=st.none() | st.integers(1, 99),
    leave_out=st.lists(st.integers(1, 99), unique=True, max_size=3).map(tuple),
    interpolate=st.sampled_from([None, False]),
    dry_run=st.booleans(),
    stream=st.sampled_from([None, False]),
    reproducible=st.sampled_from([None, True]),
    logprobs=st.none() | st.integers(0, 20),
    profile=st.none() | NAMES,
)
PIECES = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "--",
                "-",
                "---",
                "m",
                "{",
                "--x",
                "-x",
                *[name for flag in FLAGS for name in flag.names],
            ]
        ),
        st.sampled_from(["", " ", "=", "= ", "\t"]),
        st.sampled_from(
            [
                "",
                "3",
                "-1",
                "x",
                "é",
                "json",
                '"',
                "'",
                BACKSLASH,
                '"a b"',
                "'{}'",
                "3,1",
                "0.5",
                "{}",
            ]
        ),
        st.sampled_from(["", " ", " ", " "]),
    ).map("".join),
    max_size=6,
).map("".join)


class TestWriting:
    def test_in_one_line(self) -> None:
        options = Options(stop=("\n", "\t"), parameters={"a": "\n"}, leave_out=(3, 1), seed=0)
        line = r"""--seed 0 --stop "\n" --stop "\t" --model-parameters "{\"a\": \"\\n\"}" --leave-out 3,1"""
        assert written(options) == line
        assert written(Options()) == ""


class TestAnything:
    @settings(deadline=None)
    @given(OPTIONS, st.text())
    def test_what_is_written_reads_as_it(self, options: Options, text: str) -> None:
        line = written(options)
        assert parse_cell(line) == options
        assert written(parse_cell(line)) == line
        assert parse_prompt(f"{line} -- {text}") == (options, text)

    @settings(deadline=None)
    @given(st.text() | PIECES)
    def test_only_invalid_values_are_raised(self, line: str) -> None:
        for parse in (parse_cell, parse_prompt):
            try:
                parse(line)
            except InvalidValue as error:
                assert error.param
                assert error.message
