"""Values as JSON by the names and in the forms that their types read."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    RootModel,
    WithJsonSchema,
    computed_field,
    field_serializer,
    field_validator,
    model_serializer,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from shimmy_jupyter.notebook.schemas import shape_of


class Read(BaseModel):
    amount: int = Field(validation_alias="betrag")

    @field_validator("amount")
    @classmethod
    def _cents(cls, amount: int) -> int:
        return amount * 100


class Chosen(BaseModel):
    amount: int = Field(validation_alias=AliasChoices(AliasPath("deep", 0), "betrag", "sum"))

    @field_validator("amount")
    @classmethod
    def _cents(cls, amount: int) -> int:
        return amount * 100


class Swapped(BaseModel):
    a: int = Field(serialization_alias="b")
    b: int = Field(serialization_alias="c")


class Hidden(BaseModel):
    seen: int
    secret: int = Field(exclude=True)


class Dressed(BaseModel):
    when: date
    amount: int

    @field_serializer("amount")
    def _euros(self, amount: int) -> str:
        return f"{amount} EUR"

    @field_serializer("when")
    def _year(self, when: date) -> int:
        return when.year

    @computed_field
    def twice(self) -> int:
        return 2 * self.amount


class Whole(BaseModel):
    n: int

    @model_serializer
    def _one(self) -> int:
        return self.n


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=str.upper, populate_by_name=True)
    name: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int = Field(validation_alias="A")


class Tree(BaseModel):
    n: int = Field(validation_alias="N")
    under: list[Tree]


@dataclass
class Plain:
    amount: Annotated[int, Field(validation_alias="betrag")]


@pydantic_dataclass
class Theirs:
    amount: int = Field(validation_alias="betrag")


class Typed(TypedDict, total=False):
    amount: Annotated[int, Field(alias="betrag")]


class Cat(TypedDict):
    kind: Literal["cat"]
    name: Annotated[str, Field(alias="catName")]


class Dog(TypedDict):
    kind: Literal["dog"]
    name: Annotated[str, Field(alias="dogName")]


class Colour(Enum):
    RED = "red"


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


Points = {"type": "array", "items": {"type": "integer"}}
AsPoint = Annotated[Any, PlainValidator(lambda given: Point(given[0])), WithJsonSchema(Points)]


class Ours(BaseModel):
    point: AsPoint

    @field_serializer("point")
    def _numbers(self, point: Point) -> list[int]:
        return [point.x]


@dataclass
class Talk:
    price: Decimal
    title: bytes
    takes: timedelta
    more: Mapping[str, int]
    where: Path
    days: tuple[date, ...]
    colour: Colour


TALK = {
    "price": "1.50", "title": "é", "takes": "P1D", "more": {"a": 1}, "where": "x",
    "days": ["2026-01-02"], "colour": "red",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "given", "written"),
    [
        (Read, {"betrag": 3}, {"betrag": 300}),
        (Chosen, {"betrag": 3}, {"betrag": 300}),
        (Swapped, {"a": 1, "b": 2}, {"a": 1, "b": 2}),
        (Hidden, {"seen": 1, "secret": 2}, {"seen": 1, "secret": 2}),
        (Dressed, {"when": "2026-01-02", "amount": 3}, {"when": "2026-01-02", "amount": 3}),
        (Whole, {"n": 1}, {"n": 1}),
        (Camel, {"NAME": "n"}, {"NAME": "n"}),
        (Open, {"A": 1, "b": [2]}, {"A": 1, "b": [2]}),
        (Tree, {"N": 1, "under": [{"N": 2, "under": []}]}, {"N": 1, "under": [{"N": 2, "under": []}]}),
        (Plain, {"betrag": 3}, {"betrag": 3}),
        (Theirs, {"betrag": 3}, {"betrag": 3}),
        (Typed, {"betrag": 3}, {"betrag": 3}),
        (Typed, {}, {}),
        (RootModel[list[Read]], [{"betrag": 3}], [{"betrag": 300}]),
        (list[Read], [{"betrag": 3}], [{"betrag": 300}]),
        (dict[int, Read], {"7": {"betrag": 3}}, {"7": {"betrag": 300}}),
        (dict[str, int], {"amount": 3}, {"amount": 3}),
        (tuple[int, Read], [1, {"betrag": 3}], [1, {"betrag": 300}]),
        (tuple[Read, ...], [{"betrag": 3}] * 3, [{"betrag": 300}] * 3),
        (deque[Read], [{"betrag": 3}], [{"betrag": 300}]),
        (set[int], [1, 1], [1]),
        (Read | None, None, None),
        (Read | None, {"betrag": 3}, {"betrag": 300}),
        (list[Swapped] | list[Read], [{"betrag": 3}], [{"betrag": 300}]),
        (Cat | dict[str, str], {"name": "3"}, {"name": "3"}),
        (Typed | int, 3, 3),
        (list[Cat | Dog], [{"kind": "dog", "dogName": "d"}], [{"kind": "dog", "dogName": "d"}]),
        (
            Annotated[Cat | Dog, Field(discriminator="kind")],
            {"kind": "dog", "dogName": "d"},
            {"kind": "dog", "dogName": "d"},
        ),
        (Annotated[Read, AfterValidator(lambda read: read.amount)], {"betrag": 3}, 300),
        (dict[str, IPv4Address], {"a": "1.2.3.4"}, {"a": "1.2.3.4"}),
        (Annotated[int, PlainSerializer(lambda n: f"{n} EUR")], 3, 3),
        (Talk, TALK, TALK),
    ],
)  # fmt: skip
def test_names_and_forms_are_those_that_are_read(kind: Any, given: Any, written: Any) -> None:
    shape = shape_of(kind)
    assert shape.plain(shape.parse(json.dumps(given))) == written


@pytest.mark.parametrize(
    "kind", [Ours, dict[Literal["point"], Annotated[AsPoint, PlainSerializer(lambda p: [p.x])]]]
)
def test_what_json_has_no_way_to_write_is_written_as_its_type_says(kind: Any) -> None:
    shape = shape_of(kind)
    assert shape.plain(shape.parse('{"point": [3]}')) == {"point": [3]}


def test_it_is_written_somehow_where_nobody_says() -> None:
    shape = shape_of(Annotated[str, AfterValidator(lambda text: Point(len(text)))])
    assert "Point object" in shape.plain(shape.parse('"a"'))


def test_a_schema_by_itself_has_its_values_already() -> None:
    shape = shape_of({"type": "object"})
    assert shape.plain(shape.parse('{"a": 1}')) == {"a": 1}
