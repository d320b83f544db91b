"""Answers that must match a schema or a grammar, on the real engine, in both isolations.

Cases: generated schemas on the bundled model and on random weights: valid, or cut off at max_tokens; the
other kinds of grammars; sixteen at once, mixed with free ones, which answer as without; reproducible ones;
the same seed the same answer; what is refused, before anything is decoded; a hostile list, each a typed
error while somebody else's answer goes on undisturbed; log-probabilities are those of the free model; more
at once than are remembered.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest

from shimmy_jupyter.engine.llama import constraints
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import QueueFull, RequestError, ShimmyError
from shimmy_jupyter.types import Constraint, Ended, FinishReason, Sampling

from .conftest import ask, loaded, self_test_path

pytestmark = pytest.mark.usefixtures("isolation")
RANDOM = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)
PROMPT = tuple(b"Some facts about a Python function: ")
SCHEMAS_EACH = 100


def schema(random: Random, depth: int = 0) -> Any:  # noqa: PLR0911
    """Nested, with enums, unions, lists, patterns, bounded numbers and references."""
    kinds = ["enum", "integer", "number", "boolean", "null", "pattern", "string"]
    if depth < 3:
        kinds += ["object"] * 3 + ["array", "anyOf", "ref"]
    match random.choice(kinds):
        case "enum":
            return {"enum": random.sample(["a", "b c", 1, 2.5, None, True, "é"], 3)}
        case "integer":
            low = random.randrange(-100, 100)
            return {"type": "integer", "minimum": low, "maximum": low + random.randrange(50)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": random.randrange(1, 9)}
        case "boolean":
            return {"type": "boolean"}
        case "null":
            return {"type": "null"}
        case "pattern":
            return {"type": "string", "pattern": random.choice(["^[a-z]{2,5}$", "^[0-9]+-[ab]$"])}
        case "string":
            return {"type": "string", "maxLength": random.randrange(1, 12)}
        case "array":
            items = schema(random, depth + 1)
            return {"type": "array", "items": items, "minItems": 1, "maxItems": 3}
        case "anyOf":
            return {"anyOf": [schema(random, depth + 1) for _ in range(2)]}
        case "ref":
            return {"$ref": "#/$defs/tree"}
        case _:
            names = random.sample(["name", "size", "tags", "next", "ok"], random.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: schema(random, depth + 1) for name in names},
                "required": names,
                "additionalProperties": False,
            }


def with_definitions(random: Random) -> dict[str, Any]:
    tree = {
        "type": "object",
        "properties": {
            "leaf": {"type": "boolean"},
            "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        },
        "required": ["leaf"],
        "additionalProperties": False,
    }
    properties = {"it": schema(random, 0)}
    return {
        "type": "object", "properties": properties, "required": ["it"],
        "additionalProperties": False, "$defs": {"tree": tree},
    }  # fmt: skip


async def held_to(
    model: LoadedModel, kind: str, source: str, sampling: Sampling = RANDOM, **options: Any
) -> tuple[str, Ended]:
    constraint = Constraint(kind, source)
    await model.compile(constraint)
    options = {"max_tokens": 200} | options
    return await ask(model, PROMPT, sampling=replace(sampling, constraint=constraint), **options)


@pytest.mark.parametrize("which", ["bundled", "random"])
async def test_answers_match_their_schema(which: str, random_model: Path) -> None:
    path = self_test_path() if which == "bundled" else random_model
    random = Random(which)
    schemas = [with_definitions(random) for _ in range(SCHEMAS_EACH)]
    async with loaded(path, kv_tokens=16384) as model:
        found = await asyncio.gather(
            *(
                held_to(model, "json_schema", json.dumps(one), replace(RANDOM, seed=i))
                for i, one in enumerate(schemas)
            )
        )
    whole = 0
    for one, (text, ended) in zip(schemas, found, strict=True):
        if ended.reason is FinishReason.LENGTH:
            continue
        whole += 1
        jsonschema.validate(json.loads(text), one)
    assert whole > SCHEMAS_EACH // 2


async def test_other_kinds(random_model: Path) -> None:
    async with loaded(random_model) as model:
        text, ended = await held_to(model, "regex", "[a-f]{3}-[0-9]{4}")
        assert re.fullmatch("[a-f]{3}-[0-9]{4}", text)
        assert ended.reason is FinishReason.STOP
        text, _ = await held_to(model, "gbnf", 'root ::= ("yes" | "no") " " [0-9]')
        assert re.fullmatch("(yes|no) [0-9]", text)
        text, _ = await held_to(model, "lark", 'start: WORD ", " WORD\nWORD: /[xyz]{2}/')
        assert re.fullmatch("[xyz]{2}, [xyz]{2}", text)
        text, ended = await held_to(model, "json_object", "", max_tokens=60)
        assert text.startswith("{")
        if ended.reason is FinishReason.STOP:
            assert isinstance(json.loads(text), dict)


async def test_cut_off_is_length(random_model: Path) -> None:
    async with loaded(random_model) as model:
        text, ended = await held_to(model, "regex", "[a-z]{50}", max_tokens=5)
        assert (ended.reason, ended.usage.completion_tokens) == (FinishReason.LENGTH, 5)
        assert re.fullmatch("[a-z]{1,50}", text)


async def test_together_as_each_alone(random_model: Path) -> None:
    """Half of them are free, and do not notice. Each has its own part of the cache: where all share one,
    company may change what is nearly level, by how busy the machine is at the moment.
    """
    async with loaded(random_model) as model:

        async def one(i: int) -> str:
            if i % 2:
                return (await held_to(model, "regex", "[a-z ]{20}", replace(RANDOM, seed=i)))[0]
            return (await ask(model, PROMPT, 30, replace(RANDOM, seed=i)))[0]

        alone = [await one(i) for i in range(16)]
        assert await asyncio.gather(*(one(i) for i in range(16))) == alone


async def test_reproducible(random_model: Path) -> None:
    async with loaded(random_model) as model:
        found = {
            (await held_to(model, "regex", "[a-z]{9}", reproducible=True))[0] for _ in range(3)
        }
    assert len(found) == 1


async def test_log_probabilities_are_of_the_free_model(random_model: Path) -> None:
    async with loaded(random_model) as model:
        constraint = Constraint("regex", "zzzz")
        await model.compile(constraint)
        sampling = replace(RANDOM, constraint=constraint, logprobs=2)
        async with model.submit("local", PROMPT, 8, sampling, ()) as stream:
            scored = []
            while pieces := await stream.read():
                scored += [one for piece in pieces for one in piece.scored]
        assert b"".join(one.piece for one in scored) == b"zzzz"
        assert all(one.logprob < one.top[0][2] for one in scored)


@pytest.mark.parametrize(
    ("kind", "source", "param", "says"),
    [
        ("json_schema", "{", "response_format", "JSON"),
        ("json_schema", '{"type": "wrong"}', "response_format", "type"),
        ("json_schema", '{"not": {"type": "null"}}', "response_format", "not"),
        ("json_schema", '{"$ref": "http://x/y"}', "response_format", "ref"),
        ("regex", "(", "grammar", ""),
        ("gbnf", "root ::= nothing", "grammar", ""),
        ("lark", "start: (", "grammar", ""),
    ],
)
async def test_refused_before_decoding(
    random_model: Path, kind: str, source: str, param: str, says: str
) -> None:
    async with loaded(random_model) as model:
        with pytest.raises(RequestError) as refused:
            await model.compile(Constraint(kind, source))
        assert refused.value.param == param
        assert says in refused.value.message
        assert model.engine.statistics.steps == 0


HOSTILE = {
    "monstrous pattern": ("regex", "(a{1,3000}){1,3000}"),
    "monstrous schema": (
        "json_schema", json.dumps({"type": "string", "pattern": "^(a{1,3000}){1,3000}$"}),
    ),
    "ambiguous": ("lark", 'start: a\na: a a | "x" | ""'),
    "ambiguous words": ("lark", "start: (A | B | C)*\nA: /[a-z]*/\nB: /[a-z ]*/\nC: /.*/"),
    "deep": ("json_schema", '{"items":' * 2000 + "{}" + "}" * 2000),
    "deep gbnf": ("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "million": ("json_schema", json.dumps({"description": "x" * 1_000_000})),
    "endless": ("lark", "start: start"),
    "wide": ("json_schema", json.dumps({"enum": [str(i) for i in range(4000)]})),
    "choices": ("regex", "|".join("a" * i for i in range(1, 90)) + "(x|y|z){1,400}"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile(random_model: Path, name: str) -> None:
    kind, source = HOSTILE[name]
    async with loaded(random_model) as model:
        expected, _ = await ask(model, PROMPT, 60, replace(RANDOM, seed=1))
        beside = asyncio.create_task(ask(model, PROMPT, 60, replace(RANDOM, seed=1)))
        try:
            _, ended = await held_to(model, kind, source, max_tokens=40)
            assert ended.reason in (FinishReason.STOP, FinishReason.LENGTH)
        except ShimmyError as error:
            assert error.code in (
                "invalid_value", "unsupported_parameter", "constraint_too_complex",
                "generation_failed",
            )  # fmt: skip
            assert error.message
        assert (await beside)[0] == expected


class TestForgotten:
    """One remembered; the engine's thread compiles only what takes no time."""

    DIGITS, LETTERS = Constraint("regex", "[0-9]{3}"), Constraint("regex", "[a-z]{3}")

    @pytest.fixture(autouse=True)
    def little_is_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constraints, "_REMEMBERED", 1)
        monkeypatch.setattr(constraints, "_SECONDS", 0.0)

    async def held_to(self, model: LoadedModel, constraint: Constraint) -> str:
        sampling = replace(RANDOM, constraint=constraint)
        text, _ = await ask(model, PROMPT, sampling=sampling, max_tokens=20)
        return text

    @pytest.mark.parametrize("isolation", ["none"], indirect=True)
    async def test_what_takes_long(
        self, random_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constraints, "_SHORT", 0.0)
        async with loaded(random_model) as model:
            for constraint in (self.DIGITS, self.LETTERS):
                await model.compile(constraint)
            expected, _ = await ask(model, PROMPT, 60, replace(RANDOM, seed=1))
            beside = asyncio.create_task(ask(model, PROMPT, 60, replace(RANDOM, seed=1)))
            with pytest.raises(QueueFull, match="large schemas"):
                await self.held_to(model, self.DIGITS)
            assert re.fullmatch("[a-z]{3}", await self.held_to(model, self.LETTERS))
            assert (await beside)[0] == expected
            await model.compile(self.DIGITS)
            assert re.fullmatch("[0-9]{3}", await self.held_to(model, self.DIGITS))

    @pytest.mark.parametrize("isolation", ["none"], indirect=True)
    async def test_what_does_not(self, random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constraints, "_SHORT", 10.0)
        async with loaded(random_model) as model:
            for constraint in (self.DIGITS, self.LETTERS):
                await model.compile(constraint)
            assert re.fullmatch("[0-9]{3}", await self.held_to(model, self.DIGITS))

    @pytest.mark.parametrize("isolation", ["none"], indirect=True)
    async def test_as_many_as_it_takes_little_time_to_compile(
        self, random_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constraints, "_SECONDS", 1000.0)
        monkeypatch.setattr(constraints, "_MOST", 3)
        monkeypatch.setattr(constraints, "_SHORT", 0.0)
        many = [Constraint("regex", f"[0-9]{{{n}}}") for n in range(1, 5)]
        async with loaded(random_model) as model:
            for constraint in many:
                await model.compile(constraint)
            with pytest.raises(QueueFull):
                await self.held_to(model, many[0])
            for n in (2, 3, 4):
                assert re.fullmatch(f"[0-9]{{{n}}}", await self.held_to(model, many[n - 1]))
