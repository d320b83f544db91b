"""Types become schemas that an answer can be held to, and answers values of these types.

Cases: each kind of type there and back; what the engine says of each schema; objects are closed, sets
may repeat, decimals are numbers; a schema as it is; types that have none; names; what is asked; cut
off; what validators refuse, with the field and the text; text that is no JSON.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from decimal import Decimal
from typing import Any, Literal

import pydantic
import pytest
from typing_extensions import TypedDict

from shimmy_jupyter.engine.json_schema import translate
from shimmy_jupyter.errors import (
    AnswerCutOff,
    AnswerInvalid,
    GenerationFailed,
    InvalidValue,
    RequestError,
)
from shimmy_jupyter.notebook import schemas
from shimmy_jupyter.notebook.result import Completion
from shimmy_jupyter.notebook.schemas import Shape, shape_of
from shimmy_jupyter.types import Usage

from .test_asking import answer, asker


class Address(pydantic.BaseModel):
    street: str
    zip: str = pydantic.Field(pattern="^[0-9]{5}$")


class Person(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(ge=0, le=150)
    address: Address | None = None
    titles: list[str] = []

    @pydantic.field_validator("name")
    @classmethod
    def capital(cls, value: str) -> str:
        if not value[:1].isupper():
            raise ValueError("a name begins with a capital")
        return value


class Tree(pydantic.BaseModel):
    value: int
    children: list[Tree] = []


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Home(pydantic.BaseModel):
    pet: Cat | Dog = pydantic.Field(discriminator="kind")


class Open(pydantic.BaseModel, extra="allow"):
    known: int


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Row(TypedDict):
    id: int
    word: str


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Fakes:
    """No type of data."""


class Odd(pydantic.BaseModel):
    """A default that JSON does not have, and a way that it does not."""

    what: int | type[int] = 1
    why: Any = object()


CASES: list[tuple[Any, str, Any]] = [
    (Address, '{"street":"a","zip":"12345"}', Address(street="a", zip="12345")),
    (Person, '{"name":"Ann","age":3}', Person(name="Ann", age=3)),
    (list[Address], '[{"street":"a","zip":"12345"}]', [Address(street="a", zip="12345")]),
    (Tree, '{"value":1,"children":[{"value":2}]}', Tree(value=1, children=[Tree(value=2)])),
    (Home, '{"pet":{"kind":"dog","tricks":[]}}', Home(pet=Dog(kind="dog", tricks=[]))),
    (Point, '{"x":1.5}', Point(1.5)),
    (Row, '{"id":1,"word":"a"}', {"id": 1, "word": "a"}),
    (Colour, '"red"', Colour.RED),
    (Literal["a", 1], "1", 1),
    (list[str], '["a"]', ["a"]),
    (dict[str, int], '{"a":1}', {"a": 1}),
    (tuple[int, str], '[1,"a"]', (1, "a")),
    (set[int], "[1,1,2]", {1, 2}),
    (frozenset[str], '["a","a"]', frozenset({"a"})),
    (int, "0", 0),
    (str, '""', ""),
    (bool, "false", False),
    (None, "null", None),
    (Odd, '{"what":1}', Odd(what=1)),
    (int | None, "null", None),
    (Decimal, "1.10", Decimal("1.10")),
    ({"type": "object", "properties": {"a": {}}}, '{"a":[1]}', {"a": [1]}),
    ({"enum": [1, 2]}, "2", 2),
]


@pytest.mark.parametrize(("kind", "text", "value"), CASES, ids=lambda case: str(case)[:30])
async def test_there_and_back(kind: Any, text: str, value: Any) -> None:
    translate(dict(shape_of(kind).schema), "response_format")  # it can be held to
    ask, _ = asker(answers=[answer(text)])
    reply = await schemas.extract(ask, kind, "the text")
    assert reply.parsed == value
    assert type(reply.parsed) is type(value)
    assert reply.text == text


class TestSchemas:
    def test_objects_are_closed_unless_the_type_says_so(self) -> None:
        schema = shape_of(Person).schema
        assert schema["additionalProperties"] is False
        assert schema["$defs"]["Address"]["additionalProperties"] is False
        assert schema["required"] == ["name", "age"]
        assert shape_of(Point).schema["additionalProperties"] is False
        assert shape_of(Row).schema["additionalProperties"] is False
        assert shape_of(Open).schema["additionalProperties"] is True
        assert shape_of(dict[str, int]).schema["additionalProperties"] == {"type": "integer"}

    def test_fields_are_not_named_twice(self) -> None:
        assert shape_of(Address).schema["properties"]["street"] == {"type": "string"}

    def test_a_schema_is_taken_as_it_is(self) -> None:
        schema = {"type": "object", "properties": {"a": {"not": {}}}, "title": "My thing!"}
        shape = shape_of(schema)
        assert shape.schema == schema
        assert shape.response_format == {
            "type": "json_schema",
            "json_schema": {"name": "My_thing_", "schema": schema, "strict": True},
        }

    @pytest.mark.parametrize(
        ("kind", "name"), [(Person, "Person"), (list[Person], "answer"), (int | None, "answer"),
                           ({}, "answer"), ({"title": 3}, "answer"), (Colour, "Colour")],
    )  # fmt: skip
    def test_names(self, kind: Any, name: str) -> None:
        assert shape_of(kind).name == name

    @pytest.mark.parametrize(
        "kind",
        [
            3,
            pytest,
            "Unheard",
            asker,
            functools.partial(print),
            Fakes,
            Person(name="A", age=1),
            {"enum": {1}},
        ],
    )
    def test_what_has_none(self, kind: Any) -> None:
        with pytest.raises(InvalidValue) as caught:
            shape_of(kind)
        assert caught.value.param == "kind"
        assert "\n" not in caught.value.message
        assert "arbitrary_types" not in caught.value.message

    @pytest.mark.parametrize("kind", [bytes, dict[Colour, str]])
    def test_what_cannot_be_held_to_is_left_to_the_engine_to_refuse(self, kind: Any) -> None:
        with pytest.raises(RequestError):
            translate(dict(shape_of(kind).schema), "response_format")


class TestAsking:
    async def test_what_is_asked(self) -> None:
        ask, sent = asker(answers=[answer('{"x":1}')])
        reply = await schemas.extract(ask, Point, "one, nil")
        assert reply.parsed == Point(1)
        body = sent.body
        (message,) = body["messages"]
        schema = json.dumps(dict(shape_of(Point).schema), separators=(",", ":"))
        assert schema in message["content"]
        assert message["content"].endswith("\n\none, nil")
        assert body["response_format"] == shape_of(Point).response_format
        assert body["temperature"] == 0

    @pytest.mark.parametrize("text", [None, float("nan"), 5, ["a"], b"a"])
    async def test_what_is_no_text(self, text: Any) -> None:
        ask, sent = asker(answers=[answer('{"x":1}')])
        with pytest.raises(InvalidValue, match=f"not {type(text).__name__}") as caught:
            await schemas.extract(ask, Point, text)
        assert (caught.value.param, sent.asked) == ("text", [])

    async def test_as_the_caller_wants_it(self) -> None:
        ask, sent = asker(answers=[answer('{"x":1}')])
        shape = shape_of(Point)
        await schemas.extract(
            ask, shape, "t", "Where is it?", temperature=0.5, system="s", seed=0, max_tokens=0
        )
        assert [one["role"] for one in sent.body["messages"]] == ["system", "user"]
        assert sent.body["messages"][1]["content"].startswith("Where is it?\n")
        assert (sent.body["temperature"], sent.body["seed"], sent.body["max_tokens"]) == (0.5, 0, 0)

    async def test_a_constraint_is_its_own(self) -> None:
        ask, _ = asker()
        with pytest.raises(TypeError):
            await schemas.extract(ask, Point, "t", response_format={})  # type: ignore[call-arg]


class TestReading:
    SHAPE: Shape = shape_of(Person)

    def test_cut_off(self) -> None:
        reply = Completion('{"name":"A', finish_reason="length", request_id="r1",
                      usage=Usage(1, 7))  # fmt: skip
        with pytest.raises(AnswerCutOff, match="7 tokens") as caught:
            self.SHAPE.read(reply)
        assert (caught.value.text, caught.value.param) == ('{"name":"A', "max_tokens")
        assert caught.value.request_id == "r1"
        assert isinstance(caught.value, GenerationFailed)

    def test_cut_off_where_it_could_have_ended(self) -> None:
        with pytest.raises(AnswerCutOff):
            shape_of(int).read(Completion("12", finish_reason="length"))

    @pytest.mark.parametrize(
        ("text", "param", "says"),
        [
            ('{"name":"ann","age":3}', "name", "begins with a capital"),
            ('{"name":"Ann","age":200}', "age", "less than or equal to 150"),
            ('{"name":"Ann","age":1,"address":{"street":"a","zip":"1"}}', "address.zip", "pattern"),
            ('{"name":"Ann","age":1,"titles":["a",2]}', "titles.1", "string"),
            ("{", None, "JSON"),
            ("", None, "JSON"),
        ],
    )
    def test_what_the_type_refuses(self, text: str, param: str | None, says: str) -> None:
        with pytest.raises(AnswerInvalid, match=says) as caught:
            self.SHAPE.read(Completion(text, finish_reason="stop"))
        assert (caught.value.param, caught.value.text) == (param, text)
        assert "Person" in caught.value.message

    def test_text_that_is_no_json_for_a_schema(self) -> None:
        with pytest.raises(AnswerInvalid) as caught:
            shape_of({"type": "object"}).read(Completion("{]", finish_reason="stop"))
        assert caught.value.text == "{]"
