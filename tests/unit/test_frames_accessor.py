"""`df.shimmy` on real frames of pandas and polars, with a model that is made up."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from pydantic import AfterValidator, BaseModel, Field, field_serializer, field_validator

from shimmy_jupyter import frames
from shimmy_jupyter.errors import (
    AccessDenied,
    GenerationFailed,
    InternalError,
    InvalidValue,
    Misconfigured,
    ModelNotFound,
    RateLimitExceeded,
    RequestError,
)
from shimmy_jupyter.frames import fill, opened, progress
from shimmy_jupyter.frames.accessor import FrameAccessor
from shimmy_jupyter.frames.cache import NAME, CacheWarning
from shimmy_jupyter.frames.fill import Interrupted, Wiring
from shimmy_jupyter.frames.progress import Html, Progress, Terminal, span
from shimmy_jupyter.frames.run import Counts
from shimmy_jupyter.notebook.asking import Asker
from shimmy_jupyter.notebook.schemas import shape_of

KINDS = {"pandas": pd.DataFrame, "polars": pl.DataFrame}


class Service:
    """A server of one model. `say` makes an answer of the last message, and may raise."""

    def __init__(self, folder: Path | None = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.embedded: list[list[str]] = []
        self.say: Callable[[str], str] = lambda text: f"{text}!"
        self.finish = "stop"
        self.sha = "a" * 64
        self.interrupt_after: int | None = None
        self.wiring = Wiring(
            self.run,
            self.ask,
            lambda model: self.embed,
            lambda model: self.classify,
            self.resolve,
            self.identity,
            self.structure,
            folder,
        )

    @property
    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]

    def run(self, work) -> None:
        async def main() -> None:
            self.task = asyncio.current_task()
            await work

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        if len(self.bodies) == self.interrupt_after:
            self.task.cancel()
            await asyncio.sleep(60)
        self.bodies.append(body)
        await asyncio.sleep(0)
        text = self.say(body["messages"][-1]["content"])
        return {
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": self.finish,
                }
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3},
            "shimmy": {},
        }

    async def embed(self, texts: list[str]) -> list[list[float]]:
        self.embedded.append(texts)
        if "" in texts:
            raise InvalidValue("a text is not empty", param=f"input[{texts.index('')}]")
        return [[float(len(text)), 0.5] for text in texts]

    async def classify(self, text: str, labels) -> dict[str, float]:
        self.bodies.append({"messages": [{"content": text}]})
        weights = [1.0 + text.count(label) for label in labels]
        return {label: w / sum(weights) for label, w in zip(labels, weights, strict=True)}

    async def resolve(self, model: str | None, task: str) -> str:
        if model == "none":
            raise ModelNotFound("there is no model none")
        return model or f"default-{task}"

    async def identity(self, model: str) -> str:
        return self.sha

    def structure(self, kind):
        if isinstance(kind, dict):
            return kind, json.loads
        shape = shape_of(kind)
        return shape.schema, lambda text: shape.plain(shape.parse(text))


@pytest.fixture
def service(tmp_path: Path):
    made = Service(tmp_path / "cache")
    frames.register(lambda: made.wiring)
    yield made
    frames.unregister()


@pytest.fixture(params=sorted(KINDS))
def make(request) -> Callable[[dict[str, Any]], Any]:
    return KINDS[request.param]


def column(frame, name: str) -> list[Any]:
    """With None for all that is null."""
    found = frame[name]
    values = found.to_list() if isinstance(found, pl.Series) else found.astype(object).tolist()
    return [
        None
        if value is None or value is pd.NA or (isinstance(value, float) and isnan(value))
        else value
        for value in values
    ]


def mapped(frame, *args, **more):
    return frame.shimmy.map(*args, **{"progress": False, **more})


class TestMap:
    def test_answers_stand_beside_their_rows(self, service, make) -> None:
        frame = make({"a": ["x", "y", "z"], "n": [1, 2, 3]})
        found = mapped(frame, "{a}{n}")
        assert type(found) is type(frame)
        assert list(found.columns) == ["a", "n", "answer", "answer_error"]
        assert column(found, "answer") == ["x1!", "y2!", "z3!"]
        assert column(found, "answer_error") == [None] * 3
        assert list(frame.columns) == ["a", "n"]

    def test_requests_are_as_they_were_asked_for(self, service, make) -> None:
        mapped(
            make({"a": ["x"]}), "{a}", model="m", system="Be brief.", max_tokens=0, seed=0,
            temperature=0, top_p=0.5, stop=["."],
        )  # fmt: skip
        assert service.bodies == [
            {
                "model": "m",
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "x"},
                ],
                "max_tokens": 0,
                "seed": 0,
                "temperature": 0,
                "top_p": 0.5,
                "stop": ["."],
            }
        ]

    def test_without_a_word_it_is_greedy_and_the_default_model(self, service, make) -> None:
        mapped(make({"a": ["x"]}), "{a}")
        (body,) = service.bodies
        assert {**body, "messages": 0} == {"model": "default-chat", "temperature": 0, "messages": 0}

    def test_a_function_of_the_row(self, service, make) -> None:
        frame = make({"a": ["x", "y"], "n": [1, 2]})
        found = mapped(frame, lambda row: None if row["n"] == 1 else f"<{row['a']}>", into="out")
        assert column(found, "out") == [None, "<y>!"]
        assert column(found, "out_error") == [None, None]

    def test_nulls_are_not_asked(self, service, make) -> None:
        found = mapped(make({"a": ["x", None]}), "{a}")
        assert service.asked == ["x"]
        assert column(found, "answer_error") == [None, "invalid_value: 'a' is null in this row"]

    def test_lists_in_cells_are_read(self, service, make) -> None:
        assert column(mapped(make({"a": [[1, 2], [3]]}), "{a}"), "answer") == ["[1, 2]!", "[3]!"]

    def test_a_frame_without_rows(self, service, make) -> None:
        found = mapped(make({"a": []}), "{a}")
        assert (len(found), list(found.columns)) == (0, ["a", "answer", "answer_error"])

    def test_a_column_of_that_name_is_replaced_where_it_is(self, service, make) -> None:
        found = mapped(make({"answer": ["x"], "b": [1]}), "{answer}")
        assert list(found.columns) == ["answer", "b", "answer_error"]
        assert column(found, "answer") == ["x!"]

    def test_the_same_prompt_is_asked_once(self, service, make) -> None:
        frame = make({"a": ["x", "x"]})
        mapped(frame, "{a}", cache=False)
        assert service.asked == ["x"]
        mapped(frame, "{a}", cache=False, temperature=0.5)
        assert service.asked == ["x"] * 3

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            ({"concurrency": 0}, "concurrency"),
            ({"concurrency": 257}, "concurrency"),
            ({"concurrency": True}, "concurrency"),
            ({"errors": "ignore"}, "errors"),
            ({"max_wait": -1}, "max_wait"),
            ({"max_wait": None}, "max_wait"),
            ({"cache": 1}, "cache"),
            ({"progress": None}, "progress"),
            ({"model": ""}, "model"),
            ({"into": ""}, "into"),
            ({"n": 2}, "n"),
            ({"stream": True}, "stream"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_is_asked(self, service, more, param) -> None:
        with pytest.raises(InvalidValue) as caught:
            mapped(pd.DataFrame({"a": ["x"]}), "{a}", **more)
        assert caught.value.param == param
        assert service.bodies == []

    def test_numbers_of_numpy_are_asked_with_as_those_of_python(self, service, make) -> None:
        frame = make({"a": ["x"]})
        mapped(frame, "{a}", seed=np.int64(3), stop=np.array(["."]))
        mapped(frame, "{a}", seed=3, stop=["."])
        (body,) = service.bodies
        assert (body["seed"], body["stop"], type(body["seed"])) == (3, ["."], int)

    def test_what_is_no_answer_is_an_error(self, service, make) -> None:
        async def ask(body):
            return {"choices": []}

        service.ask = ask
        service.wiring = Wiring(
            **{f: getattr(service.wiring, f) for f in Wiring.__slots__} | {"ask": ask}
        )
        found = mapped(make({"a": ["x"]}), "{a}")
        assert column(found, "answer_error")[0].startswith("generation_failed: the answer is not")


class TestPandas:
    @pytest.mark.parametrize(
        "index",
        [
            pd.Index([7, 7, 3]),
            pd.MultiIndex.from_tuples([("a", 1), ("a", 1), ("b", 2)]),
            pd.date_range("2026-01-01", periods=3),
        ],
    )
    def test_the_index_stays(self, service, index) -> None:
        frame = pd.DataFrame({"a": ["x", "y", "z"]}, index=index)
        frame.attrs["source"] = "here"
        found = mapped(frame, "{a}")
        pd.testing.assert_index_equal(found.index, index)
        assert list(found["answer"]) == ["x!", "y!", "z!"]
        assert found.attrs == {"source": "here"}

    def test_a_part_of_a_frame(self, service) -> None:
        frame = pd.DataFrame({"a": list("xyz")})
        found = mapped(frame[frame["a"] != "y"], "{a}")
        assert found.loc[2, "answer"] == "z!"

    def test_columns_with_numbers_for_names(self, service) -> None:
        found = mapped(pd.DataFrame([["x", "y"]]), "{1}{0}")
        assert list(found.columns) == [0, 1, "answer", "answer_error"]
        assert found["answer"][0] == "yx!"

    def test_columns_with_the_same_name_are_refused(self, service) -> None:
        with pytest.raises(InvalidValue):
            mapped(pd.DataFrame([[1, 2]], columns=["a", "a"]), "{a}")

    def test_rows_without_columns(self, service) -> None:
        found = mapped(pd.DataFrame(index=[1, 2]), lambda row: "x")
        assert list(found["answer"]) == ["x!", "x!"]

    def test_texts_have_the_type_that_texts_have(self, service) -> None:
        found = mapped(pd.DataFrame({"a": ["x"]}), "{a}")
        assert found["answer"].dtype == found["answer_error"].dtype == found["a"].dtype


class Address(BaseModel):
    model_config = {"extra": "forbid"}
    street: str
    number: int | None


class Person(BaseModel):
    name: str
    age: int | None
    height: float
    married: bool
    tags: list[str]
    address: Address
    other: dict[str, int]

    @field_validator("name")
    @classmethod
    def _tidy(cls, name: str) -> str:
        if name == "nobody":
            raise ValueError("nobody is no name")
        return name.strip().title()


def person(name: str, **more) -> str:
    address = {"street": "S", "number": None}
    made = {
        "name": name,
        "age": 3,
        "height": 1,
        "married": True,
        "tags": ["t"],
        "address": address,
        "other": {},
    }
    return json.dumps(made | more)


class Priced(BaseModel):
    price: Decimal


class Booked(BaseModel):
    amount: int = Field(validation_alias="betrag")
    tax: int = Field(serialization_alias="amount", exclude=True)

    @field_validator("amount")
    @classmethod
    def _cents(cls, amount: int) -> int:
        return amount * 100

    @field_serializer("amount")
    def _euros(self, amount: int) -> str:
        return f"{amount} EUR"


class Account(BaseModel):
    booked: Booked
    all: list[Booked]


class TestSchemas:
    def said(self, service) -> None:
        answers = {
            "a": person(" ann "),
            "b": person("bob", age=None, other={"k": 1}),
            "c": person("nobody"),
            "d": '{"name": "cut',
            "e": person("e", age=1 << 70),
        }
        service.say = lambda text: answers[text[-1]]

    def test_fields_become_columns(self, service, make) -> None:
        self.said(service)
        found = mapped(make({"k": list("abcde")}), "Who? {k}", schema=Person)
        assert list(found.columns) == ["k", *Person.model_fields, "answer_error"]
        # As its validator has made it.
        assert column(found, "name") == ["Ann", "Bob", None, None, None]
        assert column(found, "age") == [3, None, None, None, None]
        assert column(found, "married") == [True, True, None, None, None]
        assert column(found, "address")[0] == {"street": "S", "number": None}
        assert list(column(found, "tags")[0]) == ["t"]
        errors = column(found, "answer_error")
        assert errors[:2] == [None, None]
        assert "nobody is no name" in errors[2]
        assert all(error.startswith("generation_failed: ") for error in errors[2:])
        assert "64 bits" in errors[4]

    def test_columns_have_types(self, service) -> None:
        self.said(service)
        one = mapped(pd.DataFrame({"k": list("abc")}), "{k}", schema=Person)
        kinds = {name: str(kind) for name, kind in one.dtypes.items()}
        assert kinds["age"] == "Int64"
        assert (kinds["height"], kinds["married"]) == ("float64", "boolean")
        assert one["other"][1] == {"k": 1}
        two = mapped(pl.DataFrame({"k": list("abc")}), "{k}", schema=Person)
        assert two.schema["age"] == pl.Int64
        assert (two.schema["height"], two.schema["married"]) == (pl.Float64, pl.Boolean)
        assert two.schema["tags"] == pl.List(pl.String)
        assert two.schema["address"] == pl.Struct({"street": pl.String, "number": pl.Int64})
        # It may have any keys, and a column of polars cannot.
        assert two["other"].to_list() == ["{}", '{"k": 1}', None]

    def test_they_have_them_without_a_single_row(self, service, make) -> None:
        found = mapped(make({"k": []}), "{k}", schema=Person, into="p")
        assert list(found.columns) == [
            "k",
            *(f"p_{name}" for name in Person.model_fields),
            "p_error",
        ]

    def test_every_request_is_held_to_it_and_told_it(self, service, make) -> None:
        self.said(service)
        mapped(make({"k": ["a", "b"]}), "Who? {k}", schema=Person)
        formats = [body["response_format"] for body in service.bodies]
        assert formats[0] == formats[1]
        assert formats[0]["json_schema"]["schema"] == shape_of(Person).schema
        one, two = service.asked
        assert one.removesuffix("a") == two.removesuffix("b")
        assert one.startswith("Answer with JSON that fits this schema:\n{")
        assert "\n\nWho? " in one

    def test_values_have_the_names_and_types_of_the_schema(self, service, make) -> None:
        service.say = lambda text: '{"betrag": 3, "tax": 1}'
        found = mapped(make({"k": ["a"]}), "{k}", schema=Booked)
        assert list(found.columns) == ["k", "betrag", "tax", "answer_error"]
        assert [column(found, name)[0] for name in found.columns] == ["a", 300, 1, None]

    def test_so_they_have_within_others(self, service, make) -> None:
        booked = {"betrag": 3, "tax": 1}
        service.say = lambda text: json.dumps({"booked": booked, "all": [booked] * 2})
        found = mapped(make({"k": ["a"]}), "{k}", schema=Account)
        assert column(found, "answer_error") == [None]
        assert column(found, "booked") == [{"betrag": 300, "tax": 1}]
        assert list(found["all"][0]) == [{"betrag": 300, "tax": 1}] * 2

    @pytest.mark.parametrize("said", ['{"a": 1}', '{"a": 1, "in": {}}'])
    def test_what_a_schema_requires_is_no_null(self, service, make, said: str) -> None:
        inner = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
        schema = {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "in": {**inner, "additionalProperties": False},
            },
            "required": ["a", "in"],
        }
        service.say = lambda text: said
        found = mapped(make({"k": ["x"]}), "{k}", schema=schema)
        assert column(found, "a") == [None]
        missing = "b" if "in" in json.loads(said) else "in"
        assert column(found, "answer_error") == [
            f"generation_failed: there is no {missing!r}, which the schema requires"
        ]

    def test_what_is_not_required_is(self, service, make) -> None:
        part = {"type": "object", "properties": {"b": {"type": "integer"}}}
        schema = {**part, "properties": {"a": {"type": "integer"}, "in": part}}
        service.say = lambda text: '{"in": {}}'
        found = mapped(make({"k": ["x"]}), "{k}", schema=schema, into={"a": "n"})
        assert (column(found, "n"), column(found, "answer_error")) == ([None], [None])

    def test_a_type_that_ends_as_another_is_its_rows_own(self, service, make) -> None:
        service.say = lambda text: '{"betrag": 3, "tax": 1}'
        kind = Annotated[Booked, AfterValidator(lambda booked: booked.amount)]
        found = mapped(make({"k": ["x"]}), "{k}", schema=kind)
        assert column(found, "answer_error") == [
            "generation_failed: int where the schema has fields"
        ]

    def test_wanted_fields_alone(self, service, make) -> None:
        self.said(service)
        found = mapped(
            make({"k": ["a"]}), "{k}", schema=Person, into={"age": "years", "name": "who"}
        )
        assert list(found.columns) == ["k", "years", "who", "answer_error"]
        assert (column(found, "years"), column(found, "who")) == ([3], ["Ann"])

    def test_a_list_is_one_column(self, service, make) -> None:
        service.say = lambda text: "[1, 2]"
        schema = {"type": "array", "items": {"type": "integer"}}
        found = mapped(make({"a": ["x"]}), "{a}", schema=schema, into="sizes")
        assert list(
            column(found, "sizes")[0] if make is not pl.DataFrame else found["sizes"][0]
        ) == [1, 2]

    def test_decimal_numbers_are_numbers(self, service, make) -> None:
        service.say = lambda text: '{"price": 1.5}'
        found = mapped(make({"k": ["a"]}), "{k}", schema=Priced)
        assert (column(found, "price"), column(found, "answer_error")) == ([1.5], [None])
        service.say = lambda text: "[1.5, 2]"
        found = mapped(make({"k": ["a"]}), "{k}", schema=list[Decimal])
        assert list(found["answer"][0]) == [1.5, 2.0]

    def test_what_a_type_refuses_is_said_with_its_field(self, service, make) -> None:
        def structure(kind):
            shape = shape_of(kind)
            return shape.schema, lambda text: shape.plain(shape.value(text))

        service.wiring = replace(service.wiring, structure=structure)
        service.say = lambda text: person("nobody")
        found = mapped(make({"k": ["a"]}), "{k}", schema=Person)
        assert column(found, "answer_error") == [
            "generation_failed: the answer is not a valid Person: Value error, nobody is no name (field 'name')"
        ]

    def test_half_a_character_is_one_rows_own(self, service, make) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        service.say = lambda text: json.dumps({"a": "\ud800" if text.endswith("x") else "fine"})
        found = mapped(make({"k": ["x", "y"]}), "{k}", schema=schema)
        assert column(found, "a") == [None, "fine"]
        said = "generation_failed: half of a surrogate pair is not a character"
        assert column(found, "answer_error") == [said, None]

    def test_a_list_is_its_rows_own(self, service) -> None:
        service.say = lambda text: "[1, 2]"
        schema = {"type": "array", "items": {"type": "integer"}}
        found = mapped(pd.DataFrame({"a": ["x", "x"]}), "{a}", schema=schema)
        assert len(service.bodies) == 1
        found["answer"][0].append(3)
        assert found["answer"][1] == [1, 2]

    def test_an_answer_cut_off_says_so(self, service, make) -> None:
        self.said(service)
        service.finish = "length"
        found = mapped(make({"k": ["a"]}), "{k}", schema=Person)
        (error,) = column(found, "answer_error")
        assert error == (
            "generation_failed: the answer was cut off after 3 tokens: allow more by max_tokens"
        )

    def test_what_is_said_of_it_is_short_and_one_line(self, service, make) -> None:
        service.say = lambda text: "\x1b[2J" + "{" * 5000
        found = mapped(make({"k": ["a"]}), "{k}", schema=Person)
        (error,) = column(found, "answer_error")
        assert len(error) < 400
        assert error.isprintable()


class TestErrors:
    def test_of_an_earlier_call_do_not_stay(self, service, make) -> None:
        def say(text: str) -> str:
            raise GenerationFailed("no")

        service.say = say
        first = mapped(make({"a": ["x"]}), "{a}")
        assert column(first, "answer_error") == ["generation_failed: no"]
        service.say = lambda text: "yes"
        found = mapped(first, "{a}", errors="raise")
        assert (column(found, "answer"), column(found, "answer_error")) == (["yes"], [None])

    def test_of_a_row_stand_beside_it(self, service, make) -> None:
        def say(text: str) -> str:
            if text == "y":
                raise GenerationFailed("not a number")
            return text

        service.say = say
        found = mapped(make({"a": ["x", "y", "z"]}), "{a}", into="out")
        assert column(found, "out") == ["x", None, "z"]
        assert column(found, "out_error") == [None, "generation_failed: not a number", None]
        assert frames.last() is None

    def test_the_first_can_be_raised(self, service, make) -> None:
        self.test_of_a_row_stand_beside_it(service, make)
        with pytest.raises(GenerationFailed, match="row 1: not a number") as caught:
            mapped(make({"a": ["x", "y", "z"]}), "{a}", errors="raise", concurrency=1, cache=False)
        assert column(caught.value.partial, "answer") == ["x", None, None]
        assert frames.last() is caught.value.partial

    def test_all_well_there_is_no_column_of_errors_then(self, service, make) -> None:
        found = mapped(make({"a": ["x"]}), "{a}", errors="raise")
        assert list(found.columns) == ["a", "answer"]

    @pytest.mark.parametrize("error", [AccessDenied("denied"), ModelNotFound("gone")])
    def test_those_of_all_rows_are_raised_at_once(self, service, make, error) -> None:
        def say(text: str) -> str:
            raise error

        service.say = say
        with pytest.raises(type(error)) as caught:
            mapped(make({"a": [str(k) for k in range(1000)]}), "{a}", concurrency=4)
        assert caught.value is error
        assert len(service.bodies) <= 4
        assert column(error.partial, "answer_error")[0].startswith("cancelled: ")

    def test_a_model_that_is_not_there(self, service, make) -> None:
        with pytest.raises(ModelNotFound):
            mapped(make({"a": ["x"]}), "{a}", model="none")
        assert service.bodies == []

    def test_an_error_of_the_users_keeps_its_cause(self, service, make) -> None:
        def prompt(row) -> str:
            raise ZeroDivisionError from KeyError("why")

        with pytest.raises(ZeroDivisionError) as caught:
            mapped(make({"a": ["x"]}), prompt)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_waiting_has_a_bound(self, service, make) -> None:
        def say(text: str) -> str:
            raise RateLimitExceeded("tomorrow", limit="tokens_per_day", retry_after=1e5)

        service.say = say
        with pytest.raises(RateLimitExceeded):
            mapped(make({"a": ["x", "y"]}), "{a}")

    def test_nothing_answers_before_it_is_told_how(self) -> None:
        fill.connect(None)
        with pytest.raises(Misconfigured, match="load_ext"):
            FrameAccessor(pd.DataFrame({"a": ["x"]})).map("{a}")


class TestGoingOn:
    def interrupted(self, service, frame, after: int = 5, **more) -> Interrupted:
        service.interrupt_after = after
        with pytest.raises(KeyboardInterrupt) as caught:
            mapped(frame, "{a}", concurrency=2, **more)
        service.interrupt_after = None
        assert isinstance(caught.value, Interrupted)
        return caught.value

    @pytest.mark.parametrize("temperature", [0, 0.8])
    def test_the_same_call_again_repeats_nothing(self, service, make, temperature) -> None:
        frame = make({"a": [f"r{k % 15}" for k in range(20)]})
        stopped = self.interrupted(service, frame, temperature=temperature)
        before = len(service.bodies)
        done = [text for text in column(stopped.partial, "answer") if text is not None]
        assert 3 <= len(done) <= before
        found = mapped(frame, "{a}", temperature=temperature)
        assert None not in column(found, "answer")
        rows = 15 if temperature == 0 else 20
        assert len(service.bodies) - before == rows - len(set(done))
        again = mapped(frame, "{a}", temperature=temperature)
        assert len(service.bodies) - before == rows - len(set(done))
        assert column(again, "answer") == column(found, "answer")

    def test_what_is_done_is_kept(self, service, make) -> None:
        stopped = self.interrupted(service, make({"a": list("uvwxyz")}), 3)
        assert frames.last() is stopped.partial
        answers, errors = (column(stopped.partial, name) for name in ("answer", "answer_error"))
        assert answers[0] == "u!"
        assert [answer is None for answer in answers] == [error is not None for error in errors]
        assert errors[-1] == "cancelled: it ended before this row was answered"
        assert "2 of 6 rows" in str(stopped) or "3 of 6 rows" in str(stopped)
        assert stopped._render_traceback_() == [f"KeyboardInterrupt: {stopped}"]

    @pytest.mark.parametrize("cached", [True, False])
    def test_what_is_said_of_going_on_is_so(self, service, make, cached: bool) -> None:
        said = str(self.interrupted(service, make({"a": list("uvwxyz")}), 3, cache=cached))
        assert said.endswith(
            "rows are done: the same call goes on from the cache, and shimmy.frames.last() is the frame so far"
            if cached
            else "rows are done: shimmy.frames.last() is the frame so far, to go on from by resume="
        )

    def test_a_cache_that_failed_is_nothing_to_go_on_from(self, service, make) -> None:
        service.wiring.folder.mkdir(mode=0o755)
        service.wiring.folder.chmod(0o755)
        with pytest.warns(CacheWarning):
            stopped = self.interrupted(service, make({"a": list("uvwxyz")}), 3)
        assert str(stopped).endswith("to go on from by resume=")

    def test_a_frame_can_be_gone_on_with_without_a_cache(self, service, make) -> None:
        frame = make({"a": list("uvwxyz")})
        stopped = self.interrupted(service, frame, 3, cache=False)
        done = set(service.asked) & {text[0] for text in column(stopped.partial, "answer") if text}
        service.bodies.clear()
        service.say = lambda text: f"{text}?"
        found = mapped(frame, "{a}", cache=False, resume=stopped.partial)
        assert set(service.asked) == set("uvwxyz") - done
        assert column(found, "answer") == [f"{c}!" if c in done else f"{c}?" for c in "uvwxyz"]
        assert frames.last() is None

    def test_rows_that_failed_or_ask_something_else_are_asked_again(self, service, make) -> None:
        frame = make({"a": ["x", "y", "z"]})
        done = make(
            {
                "a": ["x", "other", "z"],
                "answer": ["1", "2", None],
                "answer_error": [None, None, "no"],
            }
        )
        found = mapped(frame, "{a}", resume=done)
        assert column(found, "answer") == ["1", "y!", "z!"]
        assert service.asked == ["y", "z"]

    def test_fields_are_gone_on_with(self, service, make) -> None:
        service.say = lambda text: person(text[-1])
        frame = make({"a": ["x", "y"]})
        found = mapped(frame, "{a}", schema=Person)
        again = mapped(frame, "{a}", schema=Person, resume=found, cache=False)
        assert len(service.bodies) == 2
        for name in found.columns:
            assert str(column(found, name)) == str(column(again, name))

    def test_vectors_are_gone_on_with(self, service, make) -> None:
        frame = make({"a": ["x", "yy"]})
        found = frame.shimmy.embed("a", progress=False)
        again = frame.shimmy.embed("a", progress=False, resume=found, cache=False)
        assert len(service.embedded) == 1
        assert [list(v) for v in again["embedding"]] == [[1, 0.5], [2, 0.5]]

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"a": ["x"], "answer": ["1"], "answer_error": [None]}, "1 rows, and the frame 2"),
            ({"a": ["x", "y"], "answer": ["1", "2"]}, "no column 'answer_error'"),
            ({"answer": ["1", "2"], "answer_error": [None, None]}, "no column 'a'"),
        ],
    )
    def test_a_frame_that_does_not_match_is_refused(self, service, make, other, said) -> None:
        with pytest.raises(InvalidValue, match=said) as caught:
            mapped(make({"a": ["x", "y"]}), "{a}", resume=make(other))
        assert caught.value.param == "resume"

    def test_nor_can_it_be_told_what_was_asked_of_a_column_that_is_gone(
        self, service, make
    ) -> None:
        frame = make({"a": ["x"]})
        done = mapped(frame, "{a}", into="a")
        with pytest.raises(InvalidValue, match="was replaced"):
            mapped(frame, "{a}", into="a", resume=done)

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("tags", "['t']", "row 1, column 'tags': str where the schema has list"),
            ("age", "x", "row 1, column 'age': str where the schema has integer"),
            ("name", 3, "row 1, column 'name': int where the schema has text"),
            ("other", "{'k': 1}", "row 1, column 'other': str where the schema has no text"),
            ("address", {"street": "S"}, "row 1, column 'address': there is no 'number'"),
        ],
    )
    def test_values_that_do_not_fit_are_refused_before_anything_is_asked(
        self, service, name: str, value, said: str
    ) -> None:
        service.say = lambda text: person(text[-1])
        frame = pd.DataFrame({"a": ["x", "y", "z"]})
        done = mapped(frame, "{a}", schema=Person)
        done[name] = [done[name][0], value, done[name][2]]
        done["answer_error"] = ["asked again", None, None]
        service.bodies.clear()
        with pytest.raises(InvalidValue, match=said) as caught:
            mapped(frame, "{a}", schema=Person, resume=done, cache=False)
        assert caught.value.param == "resume"
        assert service.bodies == []

    def test_those_of_a_row_that_is_asked_again_need_not_fit(self, service, make) -> None:
        schema = {"type": "integer"}
        service.say = lambda text: "3"
        done = make({"a": ["x"], "answer": ["text"], "answer_error": ["no"]})
        found = mapped(make({"a": ["x"]}), "{a}", schema=schema, resume=done)
        assert column(found, "answer") == [3]

    def test_a_file_without_types_is_refused(self, service, make) -> None:
        frame = make({"a": ["x", "yy"]})
        vectors = make(
            {"a": ["x", "yy"], "embedding": ["[1, 0.5]"] * 2, "embedding_error": [None] * 2}
        )
        with pytest.raises(InvalidValue, match="row 0, column 'embedding': str where") as caught:
            frame.shimmy.embed("a", progress=False, resume=vectors, cache=False)
        assert (caught.value.param, service.embedded) == ("resume", [])

    def test_vectors_of_another_width_are_refused(self, service, make) -> None:
        done = make(
            {"a": ["x", "y"], "embedding": [[1.0, 2.0, 3.0]] * 2, "embedding_error": [None, "no"]}
        )
        frame = make({"a": ["x", "y"]})
        found = frame.shimmy.embed("a", progress=False, resume=done, cache=False)
        assert column(found, "embedding_error") == [
            None, "generation_failed: a vector of 2 numbers, where others have 3",
        ]  # fmt: skip
        widths = make(
            {"a": ["x", "y"], "embedding": [[1.0], [1.0, 2.0]], "embedding_error": [None] * 2}
        )
        with pytest.raises(InvalidValue, match="row 1: a vector of 2 numbers, where others have 1"):
            frame.shimmy.embed("a", progress=False, resume=widths, cache=False)

    def test_a_file_with_types_is_gone_on_with(self, service) -> None:
        service.say = lambda text: person(text[-1])
        frame = pd.DataFrame({"a": ["x", "y"]})
        done = mapped(frame, "{a}", schema=Person)
        # As Arrow gives lists back.
        done["tags"] = [np.array(tags, dtype=object) for tags in done["tags"]]
        again = mapped(frame, "{a}", schema=Person, resume=done, cache=False)
        assert len(service.bodies) == 2
        assert again["tags"].tolist() == [["t"], ["t"]]

    def test_answers_are_kept_where_a_column_cannot_hold_them(
        self, service, make, monkeypatch
    ) -> None:
        name = "_pandas_series" if make is pd.DataFrame else "_series"
        made = getattr(opened, name)

        def strict(*given):
            if any(getattr(one, "name", "") == "integer" for one in given):
                raise TypeError("no such column")
            return made(*given)

        monkeypatch.setattr(opened, name, strict)
        service.say = lambda text: "3"
        with pytest.raises(TypeError, match="no such column") as caught:
            mapped(make({"a": ["x"]}), "{a}", schema={"type": "integer"})
        assert frames.last() is caught.value.partial
        assert str(frames.last()["answer"][0]) == "3"

    def test_what_is_no_frame_is_refused(self, service, make) -> None:
        with pytest.raises(InvalidValue) as caught:
            mapped(make({"a": ["x"]}), "{a}", resume=[1])
        assert caught.value.param == "resume"


class TestCache:
    def test_it_is_another_answer_where_anything_differs(self, service, make) -> None:
        frame = make({"a": ["x"]})
        different = [
            {},
            {"system": "s"},
            {"max_tokens": 3},
            {"seed": 1},
            {"temperature": 0.5},
            {"top_p": 0.5},
            {"schema": {"type": "string"}},
        ]
        service.say = lambda text: '"x"'
        for k, more in enumerate(different, 1):
            for _ in range(2):
                mapped(frame, "{a}", **more)
            assert len(service.bodies) == k
        service.sha = "b" * 64
        mapped(frame, "{a}")
        assert len(service.bodies) == len(different) + 1

    def test_neither_the_names_nor_the_frame_matter(self, service) -> None:
        mapped(pd.DataFrame({"a": ["x", "y"]}), "{a}", model="one")
        mapped(pl.DataFrame({"b": ["y"]}), "{b}", model="the same bytes", into="out", concurrency=1)
        assert sorted(service.asked) == ["x", "y"]

    def test_it_can_be_emptied(self, service, make) -> None:
        for _ in range(2):
            mapped(make({"a": ["x", "y"]}), "{a}")
        assert (frames.clear_cache(), frames.clear_cache()) == (2, 0)
        mapped(make({"a": ["x", "y"]}), "{a}")
        assert len(service.bodies) == 4

    def test_warnings_are_given_where_the_frame_is(self, service, tmp_path) -> None:
        """Not in the thread in which the event loop runs."""
        (tmp_path / "cache").mkdir(mode=0o755)
        threads: list[threading.Thread] = []

        def run(work) -> None:
            threads.append(threading.Thread(target=asyncio.run, args=(work,)))
            threads[0].start()
            threads[0].join()

        parts = {f: getattr(service.wiring, f) for f in Wiring.__slots__}
        service.wiring = Wiring(**parts | {"run": run})
        with pytest.warns(CacheWarning) as caught:
            mapped(pd.DataFrame({"a": ["x"]}), "{a}")
        assert [Path(one.filename).name for one in caught] == [Path(__file__).name]

    def test_it_can_be_left_out(self, service, make, tmp_path) -> None:
        for _ in range(2):
            mapped(make({"a": ["x"]}), "{a}", cache=False)
        assert service.asked == ["x", "x"]
        assert not (tmp_path / "cache").exists()

    def test_a_broken_one_is_said_and_no_failure(self, service, make, tmp_path) -> None:
        (tmp_path / "cache").mkdir(mode=0o755)
        with pytest.warns(CacheWarning, match="0700"):
            found = mapped(make({"a": ["x"]}), "{a}")
        assert column(found, "answer") == ["x!"]

    def test_so_is_a_model_that_nobody_can_identify(self, service, make) -> None:
        async def identity(model: str) -> str:
            raise InternalError("it cannot be hashed")

        parts = {f: getattr(service.wiring, f) for f in Wiring.__slots__}
        service.wiring = Wiring(**parts | {"identity": identity})
        with pytest.warns(CacheWarning, match="cannot be hashed"):
            found = mapped(make({"a": ["x", "x"]}), "{a}")
        assert column(found, "answer") == ["x!", "x!"]
        assert service.asked == ["x"]

    @pytest.mark.parametrize("unknown", ["m", "lora"])
    def test_and_one_that_nobody_knows(self, service, make, tmp_path, unknown: str) -> None:
        async def identity(name: str) -> str:
            return "" if name == unknown else name

        service.wiring = replace(service.wiring, identity=identity)
        with pytest.warns(CacheWarning, match="nobody can tell what the model's bytes are"):
            mapped(make({"a": ["x"]}), "{a}", model="m", adapter="lora")
        assert not (tmp_path / "cache").exists()

    def test_an_adapters_bytes_count(self, service, make) -> None:
        bytes_of = {"m": "1", "lora": "2"}

        async def identity(name: str) -> str:
            return bytes_of[name]

        service.wiring = replace(service.wiring, identity=identity)
        for given in ("2", "2", "3"):
            bytes_of["lora"] = given
            mapped(make({"a": ["x"]}), "{a}", model="m", adapter="lora")
        assert len(service.bodies) == 2

    def test_an_answer_that_fits_no_longer_is_an_error(self, service, make, tmp_path) -> None:
        frame = make({"a": ["x"]})
        frame.shimmy.embed("a", progress=False)
        import sqlite3

        connection = sqlite3.connect(tmp_path / "cache" / NAME)
        connection.execute("UPDATE answers SET text = 'abcde'")
        connection.commit()
        connection.close()
        found = frame.shimmy.embed("a", progress=False)
        assert column(found, "embedding_error")[0].startswith("generation_failed: ")


class TestEmbed:
    def test_vectors_stand_beside_their_texts(self, service, make) -> None:
        found = make({"a": ["x", None, "yyy"]}).shimmy.embed("a", progress=False)
        vectors = found["embedding"].to_list()
        assert [None if v is None else list(v) for v in vectors] == [[1, 0.5], None, [3, 0.5]]
        assert column(found, "embedding_error")[1] == "invalid_value: 'a' is null in this row"
        if isinstance(found, pl.DataFrame):
            assert found.schema["embedding"] == pl.Array(pl.Float32, 2)
        else:
            assert vectors[0].dtype == np.float32
            assert np.stack(found["embedding"].dropna()).shape == (2, 2)

    def test_many_texts_go_together(self, service, make) -> None:
        make({"a": [f"t{k}" for k in range(150)]}).shimmy.embed("a", concurrency=1, progress=False)
        assert [len(texts) for texts in service.embedded] == [64, 64, 22]

    def test_one_that_cannot_be_does_not_spoil_the_others(self, service, make) -> None:
        found = make({"a": ["x", "", "z"]}).shimmy.embed("a", into="v", progress=False)
        assert [v is None for v in found["v"].to_list()] == [False, True, False]
        assert column(found, "v_error")[1] == "invalid_value: a text is not empty"

    def test_they_are_kept(self, service, make) -> None:
        for _ in range(2):
            found = make({"a": ["x", "yy"]}).shimmy.embed("a", progress=False)
        assert len(service.embedded) == 1
        assert list(found["embedding"][1]) == [2, 0.5]

    def test_one_that_the_kernel_refuses_does_not_spoil_the_others(self, service, make) -> None:
        async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            service.embedded.append(body["input"])
            vector = base64.b64encode(np.array([1.0, 0.5], np.float32).tobytes()).decode()
            return {"data": [{"embedding": vector} for _ in body["input"]]}

        asker = Asker(lambda: pytest.fail("nothing else is asked"))
        asker.post = post  # type: ignore[method-assign]

        async def embed(texts: list[str]):
            return await asker.embed(texts, model="m")

        service.wiring = replace(service.wiring, embed=lambda model: embed)
        found = make({"a": ["x", "", "z"]}).shimmy.embed("a", progress=False)
        assert [v is None for v in found["embedding"].to_list()] == [False, True, False]
        said = "invalid_value: an empty text has no vector"
        assert column(found, "embedding_error") == [None, said, None]

    def test_a_vector_is_its_rows_own(self, service) -> None:
        found = pd.DataFrame({"a": ["x", "x"]}).shimmy.embed("a", progress=False)
        assert service.embedded == [["x"]]
        found["embedding"][0][:] = 0
        assert list(found["embedding"][1]) == [1, 0.5]

    def test_another_width_is_an_error(self, service, make) -> None:
        async def embed(texts):
            return [[1.0] * len(text) for text in texts]

        parts = {f: getattr(service.wiring, f) for f in Wiring.__slots__}
        service.wiring = Wiring(**parts | {"embed": lambda model: embed})
        found = make({"a": ["xx", "y", "zz"]}).shimmy.embed("a", progress=False)
        assert [error is None for error in column(found, "embedding_error")] == [True, False, True]

    def test_a_frame_in_which_none_succeeds(self, service, make) -> None:
        found = make({"a": ["", ""]}).shimmy.embed("a", progress=False)
        assert found["embedding"].to_list() == [None, None]

    def test_a_column_that_is_not_there(self, service, make) -> None:
        with pytest.raises(InvalidValue, match="there are a") as caught:
            make({"a": ["x"]}).shimmy.embed("b")
        assert caught.value.param == "column"


class TestClassify:
    def test_the_likeliest_and_all_probabilities(self, service, make) -> None:
        frame = make({"t": ["good good", "bad", "good good"]})
        found = frame.shimmy.classify("t", ["good", "bad"], progress=False)
        assert list(found.columns) == ["t", "label", "label_good", "label_bad", "label_error"]
        assert column(found, "label") == ["good", "bad", "good"]
        assert column(found, "label_good") == [0.75, pytest.approx(1 / 3), 0.75]
        assert service.asked == ["good good", "bad"]

    def test_labels_are_part_of_what_is_asked(self, service, make) -> None:
        frame = make({"t": ["x"]})
        for labels in (["a", "b"], ["b", "a"], ["a", "b"]):
            found = frame.shimmy.classify("t", labels, progress=False)
            assert column(found, "label") == [labels[0]]
        assert len(service.bodies) == 2

    def test_labels_that_cannot_be_are_refused(self, service, make) -> None:
        with pytest.raises(InvalidValue) as caught:
            make({"t": ["x"]}).shimmy.classify("t", "ab")
        assert caught.value.param == "labels"


class TestSeries:
    @pytest.mark.parametrize("series", [pd.Series, lambda values: pl.Series("", values)])
    def test_a_column_is_mapped_to_a_column(self, service, series) -> None:
        found = series(["x", "y"]).shimmy.map("<{value}>", progress=False)
        assert type(found) is type(series([]))
        assert list(found) == ["<x>!", "<y>!"]

    def test_by_its_name_and_under_its_index(self, service) -> None:
        series = pd.Series(["x", "y"], index=[5, 3], name="text")
        found = series.shimmy.map("{text}", progress=False)
        assert found.to_dict() == {5: "x!", 3: "y!"}
        assert pl.Series("answer", ["x"]).shimmy.map("{answer}", progress=False)[0] == "x!"

    def test_a_row_that_fails_is_raised(self, service) -> None:
        with pytest.raises(RequestError, match="row 1"):
            pd.Series(["x", None]).shimmy.map("{value}", progress=False)

    @pytest.mark.parametrize("more", [{"errors": "column"}, {"into": "x"}, {"schema": Person}])
    def test_what_it_has_no_place_for_is_refused(self, service, more) -> None:
        service.say = lambda text: person("x")
        with pytest.raises(InvalidValue, match="map the frame"):
            pd.Series(["x"]).shimmy.map("{value}", progress=False, **more)
        assert service.bodies == []


class TestRegistration:
    def run(self, code: str) -> None:
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)

    def test_neither_library_is_imported_by_it(self) -> None:
        self.run(
            "import sys\nfrom shimmy_jupyter import frames\nframes.register(lambda: None)\n"
            "heavy = {'pandas', 'polars', 'narwhals', 'numpy', 'pydantic', 'httpx'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )

    @pytest.mark.parametrize("library", ["pandas", "polars"])
    def test_frames_have_it_whichever_comes_first(self, library: str) -> None:
        self.run(
            "import sys\nfrom shimmy_jupyter import frames\nframes.register(lambda: None)\n"
            f"frames.register(lambda: None)\nimport {library} as lib\n"
            "frame = lib.DataFrame({'a': [1]})\nassert frame.shimmy.map and frame['a'].shimmy.map\n"
            "frames.register(lambda: None)\nassert frame.shimmy.map\n"
            "assert type(lib.__spec__.loader).__name__ == 'SourceFileLoader'\n"
            "assert type(lib.__loader__).__name__ == 'SourceFileLoader'\n"
            "assert sum(type(f).__name__ == '_AfterImport' for f in sys.meta_path) == 1\n"
            "frames.unregister()\nframes.unregister()\nassert not hasattr(lib.DataFrame, 'shimmy')\n"
            "assert not [f for f in sys.meta_path if type(f).__name__ == '_AfterImport']\n"
            "frames.register(lambda: None)\nassert frame.shimmy.map\n"
        )

    def test_looking_for_a_library_does_not_import_it(self) -> None:
        self.run(
            "import importlib.util, sys\nfrom shimmy_jupyter import frames\n"
            "frames.register(lambda: None)\nassert importlib.util.find_spec('polars') is not None\n"
            "assert importlib.util.find_spec('no_such_module') is None\nassert 'polars' not in sys.modules\n"
            "import polars\nassert polars.DataFrame.shimmy\n"
        )

    def test_its_files_are_found_as_ever(self) -> None:
        self.run(
            "import copy, importlib.util, pkgutil, sys\nfrom shimmy_jupyter import frames\n"
            "frames.register(lambda: None)\nloader = importlib.util.find_spec('polars').loader\n"
            "assert loader.get_filename('polars').endswith('.py') and loader.is_package('polars')\n"
            "assert not hasattr(loader, 'no_such_thing') and copy.copy(loader)\n"
            "assert 'polars' not in sys.modules\n"
            "assert b'polars' in pkgutil.get_data('polars', '__init__.py')\n"
            "import polars\nassert polars.DataFrame.shimmy\n"
        )

    def test_one_that_is_not_installed_stays_so(self) -> None:
        self.run(
            "import sys\nfrom shimmy_jupyter import frames\nframes.register(lambda: None)\n"
            "sys.path_importer_cache.clear(); sys.path[:] = []\n"
            "try:\n    import polars\nexcept ModuleNotFoundError as error:\n"
            "    assert error.name == 'polars'\nelse:\n    raise SystemExit(1)\n"
        )

    def test_an_import_does_not_fail_by_us(self, monkeypatch) -> None:
        def broken(name, module) -> None:
            raise RuntimeError("why")

        monkeypatch.setattr(frames, "_attach", broken)
        monkeypatch.delitem(sys.modules, "colorsys", raising=False)
        monkeypatch.setattr(frames, "_REGISTER", {"colorsys": ("", "")})
        finder = frames._AfterImport()
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        with pytest.warns(RuntimeWarning, match=r"colorsys has no \.shimmy: RuntimeError: why"):
            import colorsys
        assert colorsys.rgb_to_hsv

    def test_somebody_elses_is_not_ours(self) -> None:
        class Other:
            pass

        assert not frames._is_ours(Other)
        assert not frames._is_ours(None)


def test_a_hundred_thousand_rows_take_less_than_250_bytes_each(service) -> None:
    """Beside the frame and the answers: for the table, what is known of prompts, and the new columns."""
    n = 100_000
    frame = pd.DataFrame({"a": [f"number {k}" for k in range(n)]})

    async def ask(body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        return {
            "choices": [{"message": {"content": f"{text}!"}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 1},
        }

    parts = {f: getattr(service.wiring, f) for f in Wiring.__slots__}
    service.wiring = Wiring(**parts | {"ask": ask})
    mapped(frame[:2], "{a}", cache=False)  # what is imported for it is no row's
    tracemalloc.start()
    try:
        found = mapped(frame, "{a}", cache=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found["answer"][n - 1] == f"number {n - 1}!"
    answers = sum(map(sys.getsizeof, found["answer"]))
    assert (peak - answers) / n < 250


class Screen(io.StringIO):
    def __init__(self, *, live: bool) -> None:
        super().__init__()
        self._live = live

    def isatty(self) -> bool:
        return self._live


class TestProgress:
    def test_a_line_is_written_over_in_a_terminal_and_the_last_one_stays(self) -> None:
        screen, now = Screen(live=True), [0.0]
        shown = Progress(200, Terminal(screen), clock=lambda: now[0])
        counts = Counts(200)
        for k in range(1, 101):
            now[0] = k * 0.05
            counts.done, counts.asked, counts.tokens, counts.cached = k, k - 1, 10 * k, 1
            shown.update(counts)
        now[0] = 10.0
        counts.done, counts.asked, counts.errors = 200, 199, 2
        shown.end()
        lines = screen.getvalue().split("\r")
        # Five seconds, ten a second, and the first and the last.
        assert 45 <= len(lines) <= 53
        assert "50%" in lines[-2]
        assert "s left" in lines[-2]
        assert lines[-1].rstrip(" \n") == (
            "200 rows · in 10 s · 19.9 rows/s · 100 tokens/s · 1 from the cache · 2 without an answer"
        )
        assert screen.getvalue().endswith("\n")
        assert lines[-1].count("\n") == 1

    def test_only_the_last_line_is_written_elsewhere(self) -> None:
        screen = Screen(live=False)
        shown = Progress(3, Terminal(screen), clock=lambda: 0.0)
        shown.update(Counts(3, done=1))
        assert screen.getvalue() == ""
        shown.end("stopped")
        assert screen.getvalue() == "stopped: 1 of 3 rows · in 0.0 s\n"

    def test_what_is_waited_for_is_said(self) -> None:
        said: list[str] = []
        now = [0.0]
        shown = Progress(
            9, Html(lambda bundle, first: said.append(bundle["text/plain"])), clock=lambda: now[0]
        )
        now[0] = 1.0
        shown.update(Counts(9, done=3, waiting="queue_full", until=13.5, at_once=4))
        assert said[-1] == "3 of 9 rows · 33% · queue_full: asking again in 13 s, 4 at once"

    def test_a_notebook_shows_one_display_that_changes(self) -> None:
        put: list[tuple[dict[str, str], bool]] = []
        now = [0.0]
        shown = Progress(4, Html(lambda *one: put.append(one)), "<b>", clock=lambda: now[0])
        now[0] = 1.0
        shown.update(Counts(4, done=2))
        shown.end("ended by x")
        assert [first for _, first in put] == [True, False, False]
        html = put[1][0]["text/html"]
        assert '<progress value="2" max="4"' in html
        assert "&lt;b&gt;2 of 4 rows" in html

    def test_no_rows_are_no_division_by_zero(self) -> None:
        screen = Screen(live=True)
        shown = Progress(0, Terminal(screen), clock=lambda: 0.0)
        shown.end()
        assert "0 rows · in 0.0 s" in screen.getvalue()

    @pytest.mark.parametrize(
        ("seconds", "said"), [(0.26, "0.3 s"), (59, "59 s"), (61, "1 min 1 s"), (7322, "2 h 2 min")]
    )
    def test_times_are_for_people(self, seconds: float, said: str) -> None:
        assert span(seconds) == said

    def test_a_map_shows_how_it_ended(self, service, capsys) -> None:
        pd.DataFrame({"a": ["x", "x", None]}).shimmy.map("{a}")
        assert "3 rows · in " in (said := capsys.readouterr().err)
        assert "1 the same as another · 1 without an answer" in said
        service.interrupt_after = 1
        with pytest.raises(KeyboardInterrupt):
            pd.DataFrame({"a": ["y"]}).shimmy.map("{a}")
        assert "stopped: 0 of 1 rows" in capsys.readouterr().err

        def say(text: str) -> str:
            raise AccessDenied("denied")

        service.say, service.interrupt_after = say, None
        with pytest.raises(AccessDenied):
            pd.DataFrame({"a": ["z"]}).shimmy.map("{a}")
        assert "ended by policy_denied: 0 of 1 rows" in capsys.readouterr().err

    def test_what_came_together_is_shown_before_more_comes(self, service, monkeypatch) -> None:
        monkeypatch.setattr(fill, "_TICK", 0.001)
        screen = Screen(live=True)
        monkeypatch.setattr(fill, "_output", lambda: Terminal(screen))

        async def ask(body: dict[str, Any]) -> dict[str, Any]:
            if body["messages"][-1]["content"] == "last":
                async with asyncio.timeout(60):
                    while "4 of 5 rows" not in screen.getvalue():
                        await asyncio.sleep(0.001)
            return await service.ask(body)

        parts = {f: getattr(service.wiring, f) for f in Wiring.__slots__}
        service.wiring = Wiring(**parts | {"ask": ask})
        pd.DataFrame({"a": [*"wxyz", "last"]}).shimmy.map("{a}")
        assert "5 rows · in" in screen.getvalue()

    def test_in_a_kernel_it_is_a_display(self, service, monkeypatch) -> None:
        put: list[tuple[str, bool]] = []
        monkeypatch.setattr(
            progress,
            "displayed",
            lambda: Html(lambda b, first: put.append((b["text/plain"], first))),
        )
        monkeypatch.setattr(fill, "displayed", progress.displayed)

        class Shell:
            kernel = None

        import IPython

        monkeypatch.setattr(IPython, "get_ipython", Shell)
        pd.DataFrame({"a": ["x"]}).shimmy.map("{a}")
        assert put[0] == ("0 of 1 rows · 0%", True)
        assert put[-1][0].startswith("1 rows · in")
