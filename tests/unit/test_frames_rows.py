"""What is asked for each row, and which columns its answer becomes."""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.frames import columns, rows
from shimmy_jupyter.frames.columns import (
    JSON,
    NUMBER,
    TEXT,
    Kind,
    fit,
    holdable,
    kind_of,
    label_columns,
    layout_of,
)
from shimmy_jupyter.frames.rows import Failed, Table

OPENAPI = Path(__file__).parents[2] / "docs" / "openapi.json"
INTEGER, BOOLEAN = Kind("integer"), Kind("boolean")


def rendered(template, **row):
    prompts = rows.prompts(template, list(row))
    return prompts.render([row[name] for name in prompts.columns])


class TestTemplates:
    def test_a_column_stands_for_its_value(self) -> None:
        assert rendered("Is {text} in {lang}?", text="oui", lang="French") == "Is oui in French?"

    def test_a_column_may_stand_there_twice(self) -> None:
        assert rendered("{a}{a}-{b}-{a}", a="x", b="y") == "xx-y-x"

    @pytest.mark.parametrize(
        "template",
        [
            'As {"a": 1}: %s',
            "{} %s {0} { a }",
            r"$\frac{x}{y}$ %s",
            "{{a}} %s",
            "f'{b!r:>{w}}' %s",
            "{b.c} {a:.2f} {a!r} %s",
            "}}{{ %s }{",
        ],
    )
    def test_every_other_brace_stays(self, template: str) -> None:
        assert rendered(template % "{a}", a="V") == template % "V"

    def test_a_reference_within_json_is_one(self) -> None:
        assert rendered('{"name": {a}}', a=1) == '{"name": 1}'
        assert rendered('[{{"n": "{a}"}}]', a=1) == '[{{"n": "1"}}]'

    def test_what_was_put_in_is_not_looked_at_again(self) -> None:
        assert rendered("{a} {b}", a="{b}", b="{a}") == "{b} {a}"

    def test_columns_need_not_be_called_as_variables_are(self) -> None:
        assert rendered(
            "{0} {the text} {a.b|c} {x}y}", **{"the text": 1, "a.b|c": 2, "x}y": 3, "0": 4}
        ) == ("4 1 2 3")
        prompts = rows.prompts("{7}", [7, "b"])
        assert prompts.columns == (7,)

    def test_the_longest_name_counts(self) -> None:
        assert rendered("{x}y} {x}", **{"x": 1, "x}y": 2}) == "2 1"

    def test_one_that_names_no_column_is_refused(self) -> None:
        with pytest.raises(InvalidValue, match=r"\{text\}, \{b\}"):
            rows.prompts("Is {Text} good?", ["text", "b"])
        with pytest.raises(InvalidValue, match="there are none"):
            rows.prompts("{}", [])

    def test_columns_that_read_the_same_are_refused(self) -> None:
        with pytest.raises(InvalidValue, match="same name"):
            rows.prompts("{1}", [1, "1"])

    @pytest.mark.parametrize("prompt", [None, 3, b"{a}"])
    def test_what_is_no_prompt_is_refused(self, prompt) -> None:
        with pytest.raises(InvalidValue) as caught:
            rows.prompts(prompt, ["a"])
        assert caught.value.param == "prompt"

    @given(
        st.lists(st.text().filter(lambda t: "{a}" not in t and "{b}" not in t), min_size=2),
        st.data(),
    )
    def test_pieces_and_values_alternate(self, texts: list[str], data) -> None:
        names = [data.draw(st.sampled_from("ab")) for _ in texts[1:]]
        template = texts[0]
        for name, text in zip(names, texts[1:], strict=True):
            # A brace on either side makes it a doubled one.
            template = template.rstrip("{") + f"{{{name}}}" + text.lstrip("}")
        row = {"a": "{b}1", "b": "{a}2"}
        expected = template
        for name, mark in (("a", "\0"), ("b", "\1")):
            expected = expected.replace(f"{{{name}}}", mark)
        if "\0" in "".join(texts) or "\1" in "".join(texts):
            return
        assert rendered(template, **row) == expected.replace("\0", row["a"]).replace("\1", row["b"])


class TestNulls:
    @pytest.mark.parametrize("value", [None, math.nan, np.float32("nan"), pd.NA, pd.NaT])
    def test_a_row_with_one_is_not_asked(self, value) -> None:
        assert rendered("{a}: {b}", a="x", b=value) == Failed(
            "invalid_value", "'b' is null in this row"
        )

    def test_one_in_another_column_does_not_matter(self) -> None:
        assert rendered("{a}", a="x", b=None) == "x"

    @pytest.mark.parametrize(
        ("value", "text"), [(0, "0"), (False, "False"), ("", ""), ("nan", "nan")]
    )
    def test_what_is_only_falsy_is_none(self, value, text: str) -> None:
        assert rendered("{a}.", a=value) == f"{text}."

    def test_lists_and_mappings_are_written_as_json(self) -> None:
        found = rendered("{a} {b}", a=["é", None], b={"d": dt.date(2026, 1, 2)})
        assert found == '["é", null] {"d": "2026-01-02"}'


class TestFunctions:
    def test_it_gets_the_row(self) -> None:
        prompts = rows.prompts(lambda row: f"{row['a']}/{row[1]}", ["a", 1])
        assert prompts.render(["x", "y"]) == "x/y"

    def test_none_leaves_the_row_out(self) -> None:
        assert rows.prompts(lambda row: None, ["a"]).render(["x"]) is None

    def test_anything_else_is_refused(self) -> None:
        with pytest.raises(InvalidValue, match="gave int"):
            rows.prompts(lambda row: 3, ["a"]).render(["x"])  # type: ignore[arg-type, return-value]

    def test_its_errors_are_its_own(self) -> None:
        with pytest.raises(ZeroDivisionError):
            rows.prompts(lambda row: str(1 / 0), ["a"]).render(["x"])


class TestBodies:
    def test_zeros_are_kept_and_none_is_not_sent(self) -> None:
        asked = rows.body(None, None, {"temperature": 0, "seed": 0, "max_tokens": 0, "top_p": None})
        assert asked == {"temperature": 0, "seed": 0, "max_tokens": 0}

    def test_a_schema_is_held_to(self) -> None:
        asked = rows.body(None, {"type": "object"}, {})
        assert asked["response_format"]["json_schema"]["schema"] == {"type": "object"}
        assert asked["response_format"]["type"] == "json_schema"

    @pytest.mark.parametrize(
        "name", ["n", "stream", "messages", "logprobs", "response_format", "temprature"]
    )
    def test_what_a_row_cannot_be_asked_with_is_refused(self, name: str) -> None:
        with pytest.raises(InvalidValue, match="top_p") as caught:
            rows.body(None, None, {name: 1})
        assert caught.value.param == name

    def test_a_system_message_is_a_text(self) -> None:
        with pytest.raises(InvalidValue):
            rows.body(3, None, {})  # type: ignore[arg-type]

    def test_fields_are_those_of_the_http_api(self) -> None:
        chat = json.loads(OPENAPI.read_text())["components"]["schemas"]["Chat"]["properties"]
        assert set(chat) >= rows.PARAMETERS
        # Neither a row's, nor `map`'s own, nor without effect, and refused nevertheless.
        other = {
            "logprobs",
            "top_logprobs",
            "n",
            "stream",
            "stream_options",
            "max_completion_tokens",
        }
        own = {"model", "messages", "response_format", "max_tokens", "temperature", "seed"}
        takes_something = {
            name for name, field in chat.items() if set(field) != {"enum"} and "$ref" not in field
        }
        assert takes_something <= rows.PARAMETERS | own | other

    def test_what_rows_share_comes_first(self) -> None:
        before = rows.instruction({"type": "object"})
        one, two = (
            rows.messages("Be brief.", before + rendered("Judge this:\n{a}", a=text))
            for text in ("good", "bad")
        )
        assert one[0] == two[0] == {"role": "system", "content": "Be brief."}
        assert one[1]["content"].removesuffix("good") == two[1]["content"].removesuffix("bad")
        assert '{"type":"object"}' in before
        assert rows.messages(None, "x") == [{"role": "user", "content": "x"}]

    @pytest.mark.parametrize(
        ("given", "same"),
        [
            ({"temperature": 0}, True),
            ({"temperature": 0.0, "seed": None}, True),
            ({"temperature": 0.7, "seed": 0}, True),
            ({"temperature": 0.7, "seed": None}, False),
            ({"temperature": None}, False),
        ],
    )
    def test_which_requests_have_one_answer(self, given, same: bool) -> None:
        assert rows.is_repeatable(given) is same


class Colour(enum.Enum):
    RED = "red"


class Address(BaseModel):
    street: str
    number: int | None


class Person(BaseModel):
    name: str
    age: int | None
    height: float
    married: bool
    colour: Colour
    mood: Literal["good", "bad"]
    tags: list[str]
    address: Address
    friends: list[Person]
    more: dict[str, int]
    either: int | str
    sizes: int | float
    day: dt.date


def closed(schema):
    """As the notebook makes schemas: an object has its fields and no others."""
    if isinstance(schema, dict):
        made = {name: closed(one) for name, one in schema.items()}
        if "properties" in made:
            made.setdefault("additionalProperties", False)
        return made
    return [closed(one) for one in schema] if isinstance(schema, list) else schema


PERSON = closed(Person.model_json_schema())


class TestColumns:
    def test_fields_become_columns_of_their_kinds(self) -> None:
        found = layout_of(PERSON, None)
        assert found.names == tuple(Person.model_fields)
        kinds = dict(zip(found.names, found.kinds, strict=True))
        address = Kind(
            "record", (("street", TEXT), ("number", INTEGER)), frozenset(["street", "number"])
        )
        assert kinds["address"] == address
        # What has no end of fields, or several kinds, is kept as it comes.
        assert {name for name, kind in kinds.items() if kind == JSON} == {
            "friends",
            "more",
            "either",
        }
        assert {name for name, kind in kinds.items() if kind == TEXT} == {
            "name", "colour", "mood", "day",
        }  # fmt: skip
        assert (kinds["age"], kinds["height"], kinds["married"]) == (INTEGER, NUMBER, BOOLEAN)
        assert (kinds["tags"], kinds["sizes"]) == (Kind("list", (("", TEXT),)), NUMBER)

    @pytest.mark.parametrize(
        ("schema", "kind"),
        [
            ({"type": ["string", "null"]}, TEXT),
            ({"enum": ["a", "b", None]}, TEXT),
            ({"enum": [1, 2.5]}, NUMBER),
            ({"enum": [True, False]}, BOOLEAN),
            ({"enum": [1, "a"]}, JSON),
            ({"const": 3}, INTEGER),
            ({"const": None}, JSON),
            ({"type": "array"}, JSON),
            ({"type": "array", "prefixItems": [{}], "items": {"type": "string"}}, JSON),
            ({"type": "object", "properties": {"a": {"type": "string"}}}, JSON),
            ({"$ref": "#/$defs/a~1b~0"}, BOOLEAN),
            ({"$ref": "#/$defs/none"}, JSON),
            ({"$ref": "#/$defs/loop"}, JSON),
            ({"allOf": [{"$ref": "#/$defs/a~1b~0"}]}, BOOLEAN),
            (True, JSON),
        ],
    )
    def test_kinds(self, schema, kind: Kind) -> None:
        root = {"$defs": {"a/b~": {"type": "boolean"}, "loop": {"$ref": "#/$defs/loop"}}}
        assert kind_of(schema, root) == kind

    def test_a_prefix_and_a_mapping_name_them(self) -> None:
        schema = {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
        assert layout_of(schema, "x").names == ("x_a", "x_b")
        assert layout_of(schema, "x").error == "x_error"
        found = layout_of(schema, {"b": "count"})
        assert (found.names, found.fields, found.kinds) == (("count",), ("b",), (INTEGER,))
        assert found.error == "answer_error"
        assert found.values({"a": "gone", "b": 3.0}) == (3,)

    def test_one_value_has_one_column(self) -> None:
        assert layout_of(None, None).names == ("answer",)
        assert layout_of(None, "summary").names == ("summary",)
        assert layout_of(None, "summary").error == "summary_error"
        found = layout_of({"type": "array", "items": {"type": "integer"}}, "sizes")
        assert found.kinds == (Kind("list", (("", INTEGER),)),)
        assert found.values([1, None]) == ([1, None],)

    def test_a_model_that_holds_itself_has_fields_too(self) -> None:
        schema = {"$ref": "#/$defs/N", "$defs": {"N": {"properties": {"a": {"type": "string"}}}}}
        assert layout_of(schema, None).names == ("a",)

    @pytest.mark.parametrize(
        ("schema", "into", "said"),
        [
            ({"properties": {"a": {}}}, {"b": "x"}, "no field 'b'"),
            ({"properties": {"a": {}}}, {}, "not empty"),
            ({"properties": {"error": {}}}, "x", "x_error"),
            ({"properties": {"a": {}, "b": {}}}, {"a": "x", "b": "x"}, "'x'"),
            ({"properties": {"a": {}}}, {"a": ""}, "not empty"),
            ({"properties": {"a": {}}}, {"a": 3}, "are texts"),
            (None, {"a": "x"}, "no fields"),
            (None, 3, "a mapping"),
            (None, "", "not empty"),
        ],
    )
    def test_names_that_cannot_be_are_refused(self, schema, into, said: str) -> None:
        with pytest.raises(InvalidValue, match=said) as caught:
            layout_of(schema, into)
        assert caught.value.param == "into"

    @pytest.mark.parametrize(
        "labels", ["ab", ["a"], ["a", "a"], ["a", ""], ["a", 3], ["a", "error"]]
    )
    def test_labels_that_cannot_be_are_refused(self, labels) -> None:
        with pytest.raises(InvalidValue):
            label_columns("label", labels)

    def test_labels_have_columns(self) -> None:
        assert label_columns("is", ["a", "b c"]).names == ("is", "is_a", "is_b c")

    @pytest.mark.parametrize(
        ("schema", "may"),
        [
            ({"type": "object"}, False),
            ({"type": ["object", "null"]}, False),
            ({"type": ["object", "string"]}, True),
            ({"anyOf": [{"type": "array"}, {"$ref": "#/$defs/n"}]}, False),
            ({"oneOf": [{"type": "array"}, {"type": "string"}]}, True),
            ({"enum": [1, "a"]}, True),
            ({}, True),
            ({"$ref": "#/$defs/none"}, True),
        ],
    )
    def test_what_is_never_a_text(self, schema, may: bool) -> None:
        root = {"properties": {"a": schema, "b": {}}, "$defs": {"n": {"type": "null"}}}
        assert layout_of(root, {"a": "column"}).never_text == (
            {"column"} - ({"column"} if may else set())
        )
        whole = {**schema, "$defs": root["$defs"]}
        assert layout_of(whole, "x").never_text == (set() if may else {"x"})


class TestValues:
    @pytest.mark.parametrize(
        ("value", "kind", "fitted"),
        [
            (3.0, INTEGER, 3),
            (-(1 << 63), INTEGER, -(1 << 63)),
            (3, NUMBER, 3.0),
            ("-1.50", NUMBER, -1.5),
            (None, INTEGER, None),
            ([1.0, None], Kind("list", (("", INTEGER),)), [1, None]),
            ({"a": "x", "z": 1}, Kind("record", (("a", TEXT), ("b", TEXT))), {"a": "x", "b": None}),
            ({"a": [1]}, JSON, {"a": [1]}),
        ],
    )
    def test_what_fits(self, value, kind: Kind, fitted) -> None:
        found = fit(value, kind)
        assert found == fitted
        assert type(found) is type(fitted)

    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (3.5, INTEGER),
            (True, INTEGER),
            (True, NUMBER),
            (1 << 63, INTEGER),
            (10**400, NUMBER),
            (math.inf, INTEGER),
            (math.nan, INTEGER),
            ("one", NUMBER),
            ("inf", NUMBER),
            ("1", INTEGER),
            (3, TEXT),
            (1, BOOLEAN),
            ({}, Kind("list", (("", TEXT),))),
            (["a", 1], Kind("list", (("", TEXT),))),
            ([], Kind("record", (("a", TEXT),))),
            ({}, Kind("record", (("a", TEXT),), frozenset(["a"]))),
        ],
    )
    def test_what_does_not(self, value, kind: Kind) -> None:
        with pytest.raises(
            ValueError, match=r"the schema (has|requires)|64 bits|too large|infinity|NaN"
        ):
            columns.Layout(("a",), (kind,), "e").values(value)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda more: st.lists(more) | st.dictionaries(st.text(), more),
        ),
        st.sampled_from([TEXT, INTEGER, NUMBER, BOOLEAN, Kind("list", (("", INTEGER),))]),
    )
    def test_it_fits_or_it_is_said(self, value, kind: Kind) -> None:
        wanted = {"text": str, "integer": int, "number": float, "boolean": bool, "list": list}
        try:
            (found,) = columns.Layout(("a",), (kind,), "e").values(value)
        except ValueError:
            return
        assert found is None or type(found) is wanted[kind.name]

    @pytest.mark.parametrize("value", ["\ud800", {"a": [{"b": "x\udfff"}]}, {"\udc00": 1}])
    def test_half_of_a_surrogate_pair_is_for_no_column(self, value) -> None:
        with pytest.raises(ValueError, match="surrogate pair is not a character"):
            holdable(value)


class TestTable:
    def test_what_is_put_in_is_there(self) -> None:
        table = Table(4, 2)
        table.put(0, ["a", 1])
        table.fail(1, Failed("x", "why"))
        table.copy(0, 2)
        assert table.columns == [["a", None, "a", None], [1, None, 1, None]]
        assert list(table.said()) == [
            None, "x: why", None, "cancelled: it ended before this row was answered",
        ]  # fmt: skip
        assert [table.state(k) for k in range(4)] == [
            Table.DONE, Table.FAILED, Table.DONE, Table.OPEN,
        ]  # fmt: skip

    def test_a_failure_is_copied_too(self) -> None:
        table = Table(2, 1)
        table.fail(0, Failed("x", "why"))
        table.copy(0, 1)
        assert table.errors == {0: "x: why", 1: "x: why"}
        assert table.state(1) == Table.FAILED

    def test_the_same_error_is_kept_once(self) -> None:
        table = Table(2, 1)
        for row in range(2):
            table.fail(row, Failed("x", "w" * 10))
        assert table.errors[0] is table.errors[1]
