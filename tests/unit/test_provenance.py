"""What made an answer, in and out of a notebook's metadata.

Cases: of a request and its answer: what is taken from each, what is left out, figures of a newer server, of an
older one, and of another; seeds that are drawn and those that are not; whether chance chose. There and back
through JSON, for all that there can be. Requests too long for a notebook, and too long altogether. What
comes from a stranger: each field missing, of a wrong type, extra; versions; a request that was edited;
numbers that JSON cannot have; depth, number and length; anything anywhere.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.notebook import provenance
from shimmy_jupyter.notebook.provenance import (
    LARGEST,
    PARAMETERS,
    SEEDS,
    Provenance,
    digest,
    from_json,
    of,
    with_seed,
)
from shimmy_jupyter.types import MadeBy, Timings, Usage

HEX = "0123456789abcdef" * 4
BODY: dict[str, Any] = {
    "model": "tutor",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "temperature": 0.5,
    "seed": 7,
    "stop": ["\n\n"],
    "thinking": None,
    "pin": {"size": 1, "sha256": HEX},
    "stream": True,
    "stream_options": {"include_usage": True},
}
LAST: dict[str, Any] = {
    "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_795_000_000, "model": "course",
    "usage": {
        "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 1},
    },
    "choices": [],
    "shimmy": {
        "request_id": "ab" * 16,
        "receipt": {"request_id": "ab" * 16, "seq": 12, "leaf_hash": HEX},
        "queue_ms": 0.06, "ttft_ms": 12.5, "tokens_per_second": None, "cached_tokens": 3,
        "made_by": {
            "sha256": [HEX, HEX[::-1]], "quantization": "Q4_K_M", "chat_template": HEX, "adapter": None,
            "prompt": HEX, "engine": "0.3.36", "build": HEX, "cpu": "x86_64 Abacus",
            "cpu_features": ["avx2", "fma"], "context_size": 4096, "kv_type": "f16", "threads": 2,
            "gpu_layers": 0,
        },
        "parameters": {
            "temperature": 0.5, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0,
            "repeat_last_n": 64, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 7,
            "min_tokens": 0, "ignore_eos": False, "max_tokens": 1024, "reproducible": False,
        },
    },
}  # fmt: skip


def made(
    text: str = "Because.", body: dict[str, Any] = BODY, last: dict[str, Any] = LAST, **more: Any
) -> Provenance:
    found = of(body, last, text, "stop", **more)
    assert found is not None
    return found


def changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with this in its place; `...` is for nothing."""
    data = copy.deepcopy(data)
    *way, name = path.split(".")
    place = data
    for step in way:
        place = place[step]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return data


class TestOfAnAnswer:
    def test_what_is_taken(self) -> None:
        found = made(reasoning="Hm", variable="why", origin="tutor of shimmy.lock")
        assert found.model == "course"
        assert found.made_by.sha256 == (HEX, HEX[::-1])
        assert found.made_by.cpu_features == ("avx2", "fma")
        assert found.parameters == LAST["shimmy"]["parameters"]
        assert found.request == {"messages": BODY["messages"], "stop": ["\n\n"]}
        assert found.answer_sha256 == digest("Because.")
        assert found.reasoning_sha256 == digest("Hm")
        assert found.usage == Usage(9, 4, 3, 1)
        assert found.timings == Timings(0.06, 12.5, None)
        assert found.receipt == LAST["shimmy"]["receipt"]
        assert (found.created, found.finish_reason) == (1_795_000_000, "stop")
        assert (found.variable, found.origin) == ("why", "tutor of shimmy.lock")
        assert made().reasoning_sha256 is None

    @pytest.mark.parametrize("path", ["shimmy.made_by.gpu", "shimmy.parameters.xtc", "shimmy.x"])
    def test_a_newer_server_may_say_more(self, path: str) -> None:
        assert made(last=changed(LAST, path, 1)) == made()

    @pytest.mark.parametrize(
        "path",
        [
            *("shimmy", "shimmy.made_by", "shimmy.parameters", "usage", "shimmy.made_by.prompt"),
            *("shimmy.parameters.seed.", "shimmy.parameters.top_k"),
        ],
    )
    def test_a_server_that_does_not_say_it(self, path: str) -> None:
        last = changed(LAST, path.rstrip("."), "x" if path.endswith(".") else ...)
        assert of(BODY, last, "", "stop") is None

    def test_what_is_not_known_of_the_model(self) -> None:
        for name in ("sha256", "quantization", "chat_template", "build", "cpu"):
            assert getattr(
                made(last=changed(LAST, f"shimmy.made_by.{name}", None)).made_by, name
            ) is None  # fmt: skip
        assert made(last=changed(LAST, "shimmy.receipt", None)).receipt is None

    def test_chance(self) -> None:
        seedless = changed(LAST, "shimmy.parameters.seed", None)
        assert not made().chance
        assert made(last=seedless).chance
        assert not made(last=changed(seedless, "shimmy.parameters.temperature", 0)).chance


class TestSeeds:
    @pytest.mark.parametrize(
        "body", [{}, {"temperature": 0.8}, {"temperature": None, "seed": None}]
    )
    def test_drawn(self, body: dict[str, Any]) -> None:
        asked: list[int] = []
        before = dict(body)
        found = with_seed(body, lambda below: asked.append(below) or below - 1)
        assert found == {**before, "seed": SEEDS - 1}
        assert asked == [SEEDS]
        assert body == before

    @pytest.mark.parametrize(
        "body", [{"seed": 0}, {"seed": -1, "temperature": 1}, {"temperature": 0}, {"reproducible": True}]
    )  # fmt: skip
    def test_not_drawn(self, body: dict[str, Any]) -> None:
        assert with_seed(body, lambda _: pytest.fail("nothing is left to chance")) == body


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNT = st.integers(0, 2**63 - 1)
NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MADE_BY = st.builds(
    MadeBy,
    sha256=st.none() | st.lists(DIGEST, min_size=1, max_size=3).map(tuple),
    quantization=st.none() | TEXT,
    chat_template=st.none() | DIGEST,
    adapter=st.none() | DIGEST,
    prompt=DIGEST,
    engine=TEXT,
    build=st.none() | DIGEST,
    cpu=st.none() | TEXT,
    cpu_features=st.lists(TEXT, max_size=3).map(tuple),
    context_size=COUNT,
    kv_type=TEXT,
    threads=COUNT,
    gpu_layers=COUNT,
)
SETTINGS = st.fixed_dictionaries(
    {
        name: st.booleans() if name in {"ignore_eos", "reproducible"} else NUMBER
        for name in PARAMETERS
        if name != "seed"
    }
    | {"seed": st.none() | st.integers(-(2**63), 2**63 - 1)}
)
REQUEST = st.fixed_dictionaries(
    {"messages": st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=3)},
    optional={"stop": JSON, "response_format": JSON, "adapter": JSON},
)
OPTIONAL_NUMBER = st.none() | NUMBER


@st.composite
def provenances(draw: st.DrawFn) -> Provenance:
    request = draw(REQUEST)
    found = Provenance(
        model=draw(TEXT.filter(bool)),
        made_by=draw(MADE_BY),
        parameters=draw(SETTINGS),
        request=request,
        request_sha256=digest(provenance._canonical(request)),
        answer_sha256=draw(DIGEST),
        reasoning_sha256=draw(st.none() | DIGEST),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        usage=draw(st.builds(Usage, COUNT, COUNT, COUNT, COUNT)),
        timings=draw(st.builds(Timings, NUMBER, OPTIONAL_NUMBER, OPTIONAL_NUMBER)),
        request_id=draw(TEXT),
        receipt=draw(
            st.none()
            | st.fixed_dictionaries({"request_id": TEXT, "seq": COUNT, "leaf_hash": DIGEST})
        ),
        created=draw(COUNT),
        variable=draw(TEXT),
        origin=draw(TEXT),
    )
    return found if draw(st.booleans()) else replace(found, request=None)


def saved_by_a_browser(data: dict[str, Any]) -> dict[str, Any]:
    """As JavaScript reads JSON and writes it again: every number is a double, in the fewest digits."""

    def number(digits: str) -> int | float:
        read = float(digits)
        return int(Decimal(repr(read))) if read.is_integer() and abs(read) < 1e21 else read

    found: dict[str, Any] = json.loads(json.dumps(data), parse_int=number, parse_float=number)
    return found


class TestThereAndBack:
    @given(provenances())
    def test_through_json(self, before: Provenance) -> None:
        assert from_json(before.to_json()) == before
        assert from_json(json.loads(json.dumps(before.to_json()))) == before

    @given(provenances())
    def test_through_a_notebook_that_a_browser_saves(self, before: Provenance) -> None:
        found = from_json(saved_by_a_browser(before.to_json()))
        assert found.request_sha256 == before.request_sha256
        assert found.parameters["seed"] == before.parameters["seed"]
        assert (found.request is None) == (before.request is None)

    def test_a_schema_with_bounds(self) -> None:
        bounds = {"minimum": 0.0, "maximum": 2**63 - 1, "multipleOf": 0.1}
        found = made(body={**BODY, "response_format": bounds, "seed": 2**63 - 1})
        back = from_json(saved_by_a_browser(found.to_json()))
        assert back.request is not None
        assert back.request["response_format"]["multipleOf"] == 0.1

    def test_the_largest_numbers_there_are(self) -> None:
        bounds = {"minimum": -(2**64), "maximum": 2**64}
        found = made(body={**BODY, "response_format": bounds})
        back = from_json(saved_by_a_browser(found.to_json()))
        assert back.request_sha256 == found.request_sha256

    def test_a_request_that_was_edited_is_another_one_still(self) -> None:
        said = saved_by_a_browser(made(body={**BODY, "logit_bias": {"5": 1.0}}).to_json())
        assert from_json(said).request == {**made().request, "logit_bias": {"5": 1}}
        said["request"]["logit_bias"]["5"] = 1.5
        with pytest.raises(InvalidValue, match="not the request"):
            from_json(said)

    def test_a_seed_is_not_rounded(self) -> None:
        exact = {
            s: changed(LAST, "shimmy.parameters.seed", s) for s in (2**53 - 1, 2**53, -(2**63))
        }
        said = {
            seed: made(last=last).to_json()["parameters"]["seed"] for seed, last in exact.items()
        }
        assert said == {2**53 - 1: 2**53 - 1, 2**53: str(2**53), -(2**63): str(-(2**63))}

    @pytest.mark.parametrize("seed", ["", "x", "1.5", "+1", " 1", "1" * 20, "\u0661", "1\n", "--1"])
    def test_a_text_that_is_no_seed(self, seed: str) -> None:
        with pytest.raises(InvalidValue) as caught:
            from_json(changed(made().to_json(), "parameters.seed", seed))
        assert caught.value.param == "parameters.seed"

    @pytest.mark.parametrize(("most", "kept"), [(0, True), (1, False)])
    def test_as_long_a_request_as_a_notebook_keeps(self, most: int, kept: bool) -> None:
        bare = len(provenance._canonical({"messages": [{"role": "user", "content": ""}]}))
        content = "é" * (LARGEST - bare + most)
        body = {"messages": [{"role": "user", "content": content}]}
        found = made(body=body)
        assert found.request == body  # in memory
        back = from_json(found.to_json())
        assert back == (found if kept else replace(found, request=None))

    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "user", "content": "x" * provenance._MOST_CHARACTERS}],
            [{"role": "user", "content": ""}] * (provenance._MOST_VALUES // 5),
        ],
        ids=["long", "many"],
    )
    def test_a_request_that_nobody_keeps(self, messages: list[dict[str, str]]) -> None:
        found = made(body={"messages": messages})
        assert found.request is None
        assert found.request_sha256 == digest(provenance._canonical({"messages": messages}))


DATA = json.loads(json.dumps(made(reasoning="Hm").to_json()))
PATHS = [
    *DATA,
    *(f"{name}.{inner}" for name in DATA for inner in (DATA[name] if isinstance(DATA[name], dict) else ())),
]  # fmt: skip
VALUES = [None, True, -1, 3, 1.5, "", "x" * 300, [], ["x"], [[]], {}, {"x": 1}]
COUNTS = (
    "created receipt.seq made_by.context_size made_by.threads made_by.gpu_layers usage.prompt_tokens"
    " usage.completion_tokens usage.cached_tokens usage.reasoning_tokens"
)
NUMBERS = (
    "timings.queue_ms parameters.temperature parameters.top_p parameters.min_p"
    " parameters.repeat_penalty parameters.presence_penalty parameters.frequency_penalty"
    " parameters.top_k parameters.repeat_last_n parameters.min_tokens parameters.max_tokens"
)
TEXTS = "request_id receipt.request_id variable origin made_by.engine made_by.kv_type"
OPTIONAL = (
    "request reasoning_sha256 receipt made_by.sha256 made_by.chat_template made_by.adapter"
    " made_by.build"
)
TAKEN: list[tuple[list[Any], str]] = [
    ([3], COUNTS),
    ([-1, 3, 1.5], NUMBERS),
    ([None, -1, 3, 1.5], "timings.ttft_ms timings.tokens_per_second"),
    ([None, -1, 3], "parameters.seed"),
    ([True], "parameters.ignore_eos parameters.reproducible"),
    ([""], TEXTS),
    ([None, ""], "made_by.quantization made_by.cpu"),
    ([None], OPTIONAL),
    ([[], ["x"]], "made_by.cpu_features"),
]
"""Of those values, by the fields that may have them; others may have none."""


class TestFromAStranger:
    def test_as_it_was_written(self) -> None:
        assert from_json(DATA) == made(reasoning="Hm")

    @pytest.mark.parametrize("path", PATHS)
    def test_a_field_that_is_missing(self, path: str) -> None:
        with pytest.raises(InvalidValue) as caught:
            from_json(changed(DATA, path, ...))
        named = {path, "request"} if path.startswith("request.") else {path}
        assert caught.value.param in named

    @pytest.mark.parametrize("path", sorted({*PATHS} - {"request.messages", "request.stop"}))
    def test_a_field_that_is_something_else(self, path: str) -> None:
        taken = [repr(v) for values, paths in TAKEN if path in paths.split() for v in values]
        for value in VALUES:
            try:
                from_json(changed(DATA, path, value))
            except InvalidValue as error:
                assert repr(value) not in taken
                assert str(error.param).startswith(path)
            else:
                assert repr(value) in taken

    @pytest.mark.parametrize("value", [None, True, 1, "x", {}, ["x"], [[]]], ids=repr)
    def test_messages_that_are_none(self, value: Any) -> None:
        with pytest.raises(InvalidValue, match="a list of messages is wanted"):
            from_json(changed(DATA, "request.messages", value))

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("parameters.ignore_eos", 1),
            ("parameters.top_k", True),
            ("parameters.seed", 1.0),
            ("parameters.seed", False),
            ("usage.prompt_tokens", True),
            ("created", 1.0),
            ("made_by.threads", True),
            ("timings.queue_ms", False),
            ("made_by.sha256", []),
            ("made_by.build", HEX.upper()),
            ("answer_sha256", HEX[1:] + "\n"),
            ("finish_reason", "error"),
            ("receipt.extra", 1),
            ("extra", 1),
            ("request.tools", []),
            ("request.model", "other"),
        ],
    )
    def test_what_is_nearly_right(self, path: str, value: Any) -> None:
        with pytest.raises(InvalidValue) as caught:
            from_json(changed(DATA, path, value))
        assert caught.value.param in {path, path.rpartition(".")[0]}

    @pytest.mark.parametrize("version", [2, 10**9])
    def test_a_version_that_is_to_come(self, version: int) -> None:
        data = {"version": version, "something": "else"}
        with pytest.raises(InvalidValue, match=f"newer release .*version {version}.* reads 1"):
            from_json(data)

    @pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
    def test_a_version_that_never_was(self, version: Any) -> None:
        with pytest.raises(InvalidValue) as caught:
            from_json({**DATA, "version": version})
        assert caught.value.param == "version"

    def test_a_request_that_was_edited(self) -> None:
        data = copy.deepcopy(DATA)
        data["request"]["messages"][1]["content"] = "Why not?"
        with pytest.raises(InvalidValue, match="not the request that was answered"):
            from_json(data)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (float("nan"), "no numbers"),
            (float("-inf"), "no numbers"),
            (10**21, "21 digits"),
            (-(10**21), "21 digits"),
            ("\ud800", "surrogate"),
            ({1: 2}, "keys"),
            ({"\udfff": 2}, "surrogate"),
            (b"x", "bytes"),
            ({1, 2}, "set"),
        ],
        ids=repr,
    )
    def test_what_is_no_json(self, value: Any, reason: str) -> None:
        with pytest.raises(InvalidValue, match=reason):
            from_json(changed(DATA, "request.stop", value))

    def test_what_is_too_large(self) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        for value in (deep, [0] * 100_000, "x" * 2_000_000, ["x" * 1000] * 2000):
            with pytest.raises(InvalidValue, match="larger than what an answer leaves behind"):
                from_json(changed(DATA, "request.stop", None) | {"origin": value})
        while deep:  # its own end would recurse
            deep = deep.pop()

    @pytest.mark.parametrize(("levels", "fine"), [(70, True), (90, False), (3000, False)])
    def test_as_deep_as_it_may_be(self, levels: int, fine: bool) -> None:
        schema: dict[str, Any] = {}
        for _ in range(levels):
            schema = {"items": schema}
        body = {**BODY, "response_format": schema}
        if fine:
            found = made(body=body)
            assert found.request is not None
            assert from_json(found.to_json()) == found
        else:
            with pytest.raises(InvalidValue, match="larger than"):
                from_json(changed(DATA, "request.response_format", schema))

    @pytest.mark.parametrize("value", [None, [], "x", 1, {}], ids=repr)
    def test_what_is_none_at_all(self, value: Any) -> None:
        with pytest.raises(InvalidValue):
            from_json(value)

    @given(st.sampled_from(PATHS), JSON)
    def test_anything_anywhere(self, path: str, value: Any) -> None:
        try:
            found = from_json(changed(DATA, path, value))
        except InvalidValue as error:
            assert error.param
        else:
            assert from_json(found.to_json()) == found
