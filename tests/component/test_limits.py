"""What somebody may use, on a real server: refused where it is over, and settled once however it ends.

Cases: each limit on each kind of request, what waiting helps and what it never does, headers; the tokens
that every way of ending leaves counted, and nothing reserved, nobody in; waiting for one's turn, in order
and said so; too many that wait; choices, embeddings, an answer cut to what is left; several users, groups,
budgets that are shared; token header, cookie and query; a restart, and two servers at once; what users see
and tighten, several times at once, and every way of asking for it wrongly; a file that cannot be written.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import IdentityProvider

from shimmy_jupyter.core.limits import NAMES, Limits, LimitTable, named
from shimmy_jupyter.core.policy import Policy, Rule
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import InvalidValue, RateLimitExceeded
from shimmy_jupyter.guard.asked import Asked
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.guard.spending import Spending
from shimmy_jupyter.guard.visit import Result, Visit
from shimmy_jupyter.server.handlers import base, completions, embeddings
from shimmy_jupyter.types import CompletionRequest, EmbeddingFacts, EmbeddingRequest, Principal

from .conftest import (
    MODEL,
    Ask,
    Clock,
    Fakes,
    People,
    chat,
    new_guard,
    new_service,
    nobody_in,
    records,
    until,
)

PROMPT = len("<user>one two three\n<assistant>")
WHOLE = PROMPT + len(["one ", "two ", "three ", "the end"])
"""Tokens of `chat()`, answered."""
ANN = Principal("ann")
VECTORS = EmbeddingFacts("mean", 4, 64, 64, 4)
RANKS = EmbeddingFacts("rank", 1, 64, 64, 4)
COUNTED = Limits(requests_per_minute=100, tokens_per_minute=10_000, tokens_per_day=100_000)
CHAT = "v1/chat/completions"

of_one_process = pytest.mark.parametrize("fakes", ["in process"], indirect=True)
"""Where it makes no difference in which process the engine is."""


@pytest.fixture
def identity_provider_class() -> type[IdentityProvider] | None:
    return People


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(tmp_path: Path, clock: Clock) -> Guard:
    return new_guard(tmp_path, clock=clock)


@pytest.fixture
def gone(monkeypatch: Any) -> list[str]:
    """Requests of which the server knows that their clients have hung up."""
    known: list[str] = []
    for handler in (completions._GeneratingHandler, embeddings._VectorsHandler):
        original = handler.on_connection_close

        def noticed(self: Any, original: Any = original) -> None:
            original(self)
            known.append(self.request_id)

        monkeypatch.setattr(handler, "on_connection_close", noticed)
    return known


def allow(guard: Guard, **limits: Any) -> None:
    """From now on everybody may have so much."""
    guard.rules = Rules(limits=[LimitTable(Limits(**limits))])


async def used(guard: Guard, who: Principal = ANN) -> dict[str, int]:
    """What counts as used once all is settled, by limit."""
    await until(lambda: not guard._open)
    nobody_in(guard)
    rows = (await guard.limits(who))["limits"]
    return {name: row["used"] for name, row in rows.items() if row["used"] is not None}


async def check_spent(guard: Guard, tokens: int, requests: int = 1) -> None:
    found = await used(guard)
    assert found == {
        "max_requests_per_minute": requests,
        "max_tokens_per_minute": tokens,
        "max_tokens_per_day": tokens,
    }
    ends = await records(guard, kind="end", user="ann")
    spent = [e["prompt_tokens"] + e["tokens_generated"] for e in ends if "prompt_tokens" in e]
    assert sum(spent) == tokens


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": ">one two three", **fields}


class TestEachLimit:
    """Of every kind of request."""

    KINDS = {
        CHAT: (None, json.loads(chat())),
        "v1/completions": (None, completion()),
        "v1/embeddings": (VECTORS, {"model": MODEL, "input": ["one", "two"]}),
        "v1/rerank": (RANKS, {"model": MODEL, "query": "one", "documents": ["two", "three"]}),
    }
    FIELDS = {
        CHAT: "messages",
        "v1/completions": "prompt",
        "v1/embeddings": "input",
        "v1/rerank": "documents",
    }

    @pytest.fixture(params=KINDS, ids=lambda path: path.split("/")[1])
    def kind(self, request: Any, fakes: Fakes) -> tuple[str, dict[str, Any]]:
        shape, body = self.KINDS[request.param]
        fakes.make = lambda: FakeBackend(embedding=shape)
        return request.param, body

    async def test_requests_per_minute(
        self, guard: Guard, ask: Ask, kind: Any, clock: Clock
    ) -> None:
        allow(guard, requests_per_minute=2)
        for left in (1, 0):
            answer = await ask(*kind)
            assert answer.status == 200, answer.body
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert answer.headers["x-ratelimit-reset-requests"] == "61s"
            assert "x-ratelimit-limit-tokens" not in answer.headers
            clock.now += 10
        refused = await ask(*kind)
        assert refused.error == (429, "rate_limit_exceeded", None)
        # A minute after the first of them, which was 20 seconds ago; whole seconds count.
        assert refused.headers["Retry-After"] == "41"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert "max_requests_per_minute is 2: 2 used" in refused.json["error"]["message"]
        clock.now += 41
        assert (await ask(*kind)).status == 200
        assert await used(guard) == {"max_requests_per_minute": 2}

    async def test_tokens(self, guard: Guard, ask: Ask, kind: Any, clock: Clock) -> None:
        path, body = kind
        if path in {CHAT, "v1/completions"}:
            body = body | {"max_tokens": 4}
        allow(guard, tokens_per_minute=10_000, tokens_per_day=20_000)
        first = await ask(path, body)
        assert first.status == 200
        need = (await used(guard))["max_tokens_per_day"]
        assert need > 5
        allow(guard, tokens_per_minute=2 * need - 1, tokens_per_day=20_000)
        refused = await ask(path, body)
        assert refused.error == (429, "rate_limit_exceeded", None)
        assert refused.headers["Retry-After"] == "61"
        assert refused.headers["x-ratelimit-limit-tokens"] == str(2 * need - 1)
        assert refused.headers["x-ratelimit-remaining-tokens"] == str(need - 1)
        clock.now += 61
        assert (await ask(path, body)).status == 200
        allow(guard, tokens_per_day=3 * need - 1)
        refused = await ask(path, body)
        assert refused.error == (429, "rate_limit_exceeded", None)
        midnight = 86400 - clock.now % 86400
        assert refused.headers["Retry-After"] == f"{midnight:.0f}"
        clock.now += midnight
        assert (await ask(path, body)).status == 200
        assert await used(guard) == {"max_tokens_per_day": need}

    async def test_more_than_ever_can_be(self, guard: Guard, ask: Ask, kind: Any) -> None:
        path, body = kind
        allow(guard, tokens_per_day=5)
        refused = await ask(path, body)
        generates = path in {CHAT, "v1/completions"}
        field = "max_tokens" if generates else self.FIELDS[path]
        assert refused.error == (400, "invalid_value", field)
        assert "Retry-After" not in refused.headers
        assert await used(guard) == {"max_tokens_per_day": 0}

    async def test_prompt_tokens(self, guard: Guard, ask: Ask, kind: Any) -> None:
        path, body = kind
        allow(guard, prompt_tokens=5)
        refused = await ask(path, body)
        assert refused.error == (400, "context_length_exceeded", self.FIELDS[path])
        assert "max_prompt_tokens is 5" in refused.json["error"]["message"]
        assert await used(guard) == {}

    async def test_seconds(self, guard: Guard, ask: Ask, kind: Any, fakes: Fakes) -> None:
        path, body = kind
        shape = self.KINDS[path][0]
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(embedding=shape, gate=gate)
        allow(guard, seconds=0.02)
        refused = await ask(path, body)
        assert refused.error == (408, "deadline_exceeded", None)
        assert "max_seconds" in refused.json["error"]["message"]
        gate.release(100)
        assert await used(guard) == {}

    @pytest.mark.parametrize("name", ["requests_per_minute", "concurrent", "queued"])
    async def test_none_at_all(self, guard: Guard, ask: Ask, kind: Any, name: str) -> None:
        allow(guard, **{name: 0})
        refused = await ask(*kind)
        assert refused.error == (429, "rate_limit_exceeded", None)
        assert f"max_{name} is 0" in refused.json["error"]["message"]
        assert "Retry-After" not in refused.headers
        assert set((await used(guard)).values()) == {0}

    async def test_concurrent(self, guard: Guard, ask: Ask, kind: Any, fakes: Fakes) -> None:
        path, body = kind
        shape = self.KINDS[path][0]
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(embedding=shape, gate=gate)
        allow(guard, concurrent=1)
        asked = []
        for count in (1, 2):
            asked.append(asyncio.ensure_future(ask(path, body)))
            await until(lambda: len(guard.crowd._present) == count)  # noqa: B023
        assert len(guard.turns) == 1
        await until(lambda: fakes.models and fakes.models[0].active)
        assert fakes.models[0].active == 1
        gate.release(1000)
        assert [(await one).status for one in asked] == [200, 200]
        assert await used(guard) == {"max_concurrent": 0}

    async def test_queued(self, guard: Guard, ask: Ask, kind: Any, fakes: Fakes) -> None:
        path, body = kind
        shape = self.KINDS[path][0]
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(embedding=shape, gate=gate)
        allow(guard, queued=1)
        first = asyncio.ensure_future(ask(path, body))
        await until(lambda: guard.crowd._present)
        refused = await ask(path, body)
        assert refused.error == (429, "rate_limit_exceeded", None)
        assert "max_queued is 1" in refused.json["error"]["message"]
        assert "Retry-After" not in refused.headers  # nobody knows when
        gate.release(1000)
        assert (await first).status == 200
        assert await used(guard) == {"max_queued": 0}


async def test_who_has_a_first_token_waits_no_longer(
    guard: Guard, ask: Ask, dial: Any, fakes: Fakes
) -> None:
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(gate=gate)
    allow(guard, queued=1)
    stream = await dial(CHAT, chat(stream=True))
    gate.release(2)
    await stream.read_until(b"one ")
    second = asyncio.ensure_future(ask(CHAT, chat()))
    await until(lambda: len(guard.crowd._present) == 2)
    gate.release(100)
    assert (await second).status == 200
    await stream.read_until(b"[DONE]")
    stream.close()


async def test_completion_tokens(guard: Guard, ask: Ask) -> None:
    allow(guard, completion_tokens=5)
    for fields in ({"max_tokens": 6}, {"max_tokens": 3, "n": 2}, {"n": 6}):
        refused = await ask(CHAT, chat(**fields))
        assert refused.error == (400, "invalid_value", "max_tokens"), fields
    assert (await ask(CHAT, chat(max_tokens=5))).status == 200
    answer = (await ask(CHAT, chat(n=2))).json
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day", "completion_tokens"])
async def test_an_answer_is_cut_to_what_is_left(guard: Guard, ask: Ask, limit: str) -> None:
    allow(guard, **{limit: 2 if limit == "completion_tokens" else PROMPT + 2})
    answer = (await ask(CHAT, chat())).json
    assert answer["choices"][0]["message"]["content"] == "one two "
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


@of_one_process
async def test_a_ceiling_cuts_it_too(guard: Guard, ask: Ask) -> None:
    guard.rules = Rules(policies=[Policy(ceilings={"max_tokens": 2, "max_seconds": 1000.0})])
    answer = (await ask(CHAT, chat())).json
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "length"


class TestSettled:
    """After every way of ending: the tokens that were used, nothing reserved, nobody in."""

    @pytest.fixture(autouse=True)
    def counting(self, guard: Guard) -> None:
        guard.rules = Rules(limits=[LimitTable(COUNTED.merged(Limits(concurrent=9, queued=9)))])

    async def check(self, guard: Guard, tokens: int, requests: int = 1) -> None:
        await until(lambda: not guard._open)
        rows = (await guard.limits(ANN))["limits"]
        assert (rows["max_concurrent"]["used"], rows["max_queued"]["used"]) == (0, 0)
        guard.rules = Rules(limits=[LimitTable(COUNTED)])
        await check_spent(guard, tokens, requests)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_ok(self, guard: Guard, ask: Ask, stream: bool) -> None:
        assert (await ask(CHAT, chat(stream=stream))).status == 200
        await self.check(guard, WHOLE)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_nothing_wanted(self, guard: Guard, ask: Ask, stream: bool) -> None:
        assert (await ask(CHAT, chat(stream=stream, max_tokens=0))).status == 200
        await self.check(guard, PROMPT)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_choices(self, guard: Guard, ask: Ask, stream: bool) -> None:
        body = chat(stream=stream, n=3, stream_options={"include_usage": True})
        if not stream:
            body = chat(n=3)
        assert (await ask(CHAT, body)).status == 200
        await self.check(guard, PROMPT + 3 * (WHOLE - PROMPT))

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("step", "generated"), [(1, 0), (3, 2)])
    async def test_the_engine_fails(
        self, guard: Guard, ask: Ask, fakes: Fakes, stream: bool, step: int, generated: int
    ) -> None:
        fakes.make = lambda: FakeBackend(fail_at=step)
        answer = await ask(CHAT, chat(stream=stream))
        assert b"engine_crashed" in answer.body
        await self.check(guard, PROMPT + generated)

    async def test_hung_up_before_the_first_token(
        self, guard: Guard, dial: Any, fakes: Fakes, gone: list[str]
    ) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        for count, stream in ((1, True), (2, False)):
            connection = await dial(CHAT, chat(stream=stream))
            await until(lambda: fakes.models and fakes.models[0].engine._stepping)
            connection.close()
            await until(lambda: len(gone) == count)  # noqa: B023
            gate.release()
            await until(lambda: not guard._open)
        ends = await records(guard, kind="end")
        assert [end["outcome"] for end in ends] == ["cancelled", "cancelled"]
        # The step in progress is not taken back.
        generated = sum(end["tokens_generated"] for end in ends)
        assert generated <= 2
        await self.check(guard, 2 * PROMPT + generated, 2)

    async def test_hung_up_amid_the_answer(
        self, guard: Guard, dial: Any, fakes: Fakes, gone: list[str]
    ) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(lambda _: ["word "] * 50, gate=gate)
        connection = await dial(CHAT, chat(stream=True))
        gate.release(3)
        for _ in range(3):
            await connection.read_until(b"word ")
        connection.close()
        await until(lambda: gone)
        gate.release()
        await until(lambda: not guard._open)
        (end,) = await records(guard, kind="end")
        assert end["outcome"] == "cancelled"
        assert 3 <= end["tokens_generated"] <= 4
        await self.check(guard, PROMPT + end["tokens_generated"])

    async def test_hung_up_after_the_answer(self, guard: Guard, dial: Any) -> None:
        connection = await dial(CHAT, chat(stream=True))
        await connection.read_until(b"[DONE]")
        connection.close()
        await self.check(guard, WHOLE)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_hung_up_while_the_model_is_loaded(
        self, guard: Guard, dial: Any, fakes: Fakes, monkeypatch: Any, gone: list[str], stream: bool
    ) -> None:
        monkeypatch.setattr("shimmy_jupyter.server.answers.PATIENCE", 0.01)
        asked, go = threading.Event(), threading.Event()

        def make() -> FakeBackend:
            asked.set()
            go.wait(15)
            return FakeBackend()

        fakes.make = make
        connection = await dial(CHAT, chat(stream=stream))
        await until(asked.is_set)
        connection.close()
        await until(lambda: gone)
        if stream:
            await until(lambda: not guard._open)
        go.set()
        await until(lambda: not guard._open)
        (end,) = await records(guard, kind="end")
        # Where the engine had the whole answer at once, it has been computed.
        assert end["outcome"] == "cancelled" or (not stream and end["outcome"] == "ok")
        await self.check(guard, end.get("prompt_tokens", 0) + end.get("tokens_generated", 0))

    @pytest.mark.parametrize("stream", [False, True])
    async def test_deadline(self, guard: Guard, ask: Ask, fakes: Fakes, stream: bool) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        answer = await ask(CHAT, chat(stream=stream, max_seconds=0.01))
        assert answer.error == (408, "deadline_exceeded", None)
        gate.release(100)
        (end,) = await records(guard, kind="end")
        # Whether it had been counted and handed on within that time is the machine's affair.
        await self.check(guard, end.get("prompt_tokens", 0) + end.get("tokens_generated", 0))

    async def test_not_allowed_any_more(
        self, guard: Guard, dial: Any, fakes: Fakes, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(base, "LOOK_AGAIN_SECONDS", 0)
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(lambda _: ["word "] * 50, gate=gate)
        connection = await dial(CHAT, chat(stream=True))
        gate.release(2)
        await connection.read_until(b"word ")

        async def nobody(self: People, handler: Any) -> None:
            return None

        monkeypatch.setattr(People, "get_user", nobody)
        gate.release(2)
        await connection.read_until(b'"policy_denied"')
        (end,) = await records(guard, kind="end")
        assert (end["outcome"], end["code"]) == ("denied", "policy_denied")
        connection.close()
        await self.check(guard, PROMPT + end["tokens_generated"])

    async def test_not_allowed_any_more_while_it_waits(
        self, guard: Guard, dial: Any, fakes: Fakes, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(base, "LOOK_AGAIN_SECONDS", 0)
        monkeypatch.setattr("shimmy_jupyter.server.answers.PATIENCE", 0.01)
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        guard.rules = Rules(limits=[LimitTable(COUNTED.merged(Limits(concurrent=1, queued=9)))])
        first = await dial(CHAT, chat(stream=True), who="ann")
        await until(lambda: fakes.models and fakes.models[0].engine._stepping)
        second = await dial(CHAT, chat(stream=True), who="ann")
        await second.read_until(b"your turn")

        async def nobody(self: People, handler: Any) -> None:
            return None

        monkeypatch.setattr(People, "get_user", nobody)
        for stream in (second, first):
            await stream.read_until(b'"policy_denied"')
            stream.close()
        await until(lambda: not guard._open)
        ends = await records(guard, kind="end")
        assert [end["outcome"] for end in ends] == ["denied", "denied"]
        gate.release(10)
        spent = [end.get("prompt_tokens", 0) + end.get("tokens_generated", 0) for end in ends]
        # The step in progress is not taken back; and the second may have had one, once the first was gone.
        begun = PROMPT, PROMPT + 1
        assert max(spent) in begun
        assert min(spent) in (0, *begun)
        await self.check(guard, sum(spent), 2)

    async def test_the_queue_is_full(self, guard: Guard, ask: Ask, dial: Any, fakes: Fakes) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        fakes.spec, fakes.queue_size = LoadSpec(path="", sequences=1), 1
        streams = []
        for count in (1, 2, 3):
            streams.append(await dial(CHAT, chat(stream=True)))
            await until(lambda: len(guard._open) >= count)  # noqa: B023
            await until(lambda: not fakes.models or fakes.models[0].active >= min(count, 2))  # noqa: B023
        refused = await ask(CHAT, chat())
        assert refused.error[:2] == (503, "queue_full")
        gate.release(1000)
        for stream in streams:
            await stream.read_until_close()
        ends = await records(guard, kind="end")
        full = [end for end in ends if end.get("code") == "queue_full"]
        assert full
        assert all("prompt_tokens" not in end for end in full)
        await self.check(guard, WHOLE * (4 - len(full)), 4)

    @pytest.mark.parametrize(
        ("body", "status", "requests"),
        [
            (chat("x" * 5000), 400, 1),
            (chat(max_tokens=4090), 400, 1),
            (chat(model="ghost"), 404, 1),
            (chat(adapter="ghost"), 404, 1),
            (chat(temperature=7), 400, 0),
            ("{", 400, 0),
        ],
    )
    async def test_refused(
        self, guard: Guard, ask: Ask, body: str, status: int, requests: int
    ) -> None:
        assert (await ask(CHAT, body)).status == status
        await self.check(guard, 0, requests)

    async def test_denied(self, guard: Guard, ask: Ask) -> None:
        guard.rules = Rules((Policy((Rule(False),)),), guard.rules.limits)
        assert (await ask(CHAT, chat())).status == 403
        await self.check(guard, 0, 0)

    async def test_limited(self, guard: Guard, ask: Ask) -> None:
        before = guard.rules
        allow(guard, requests_per_minute=100, tokens_per_minute=40, tokens_per_day=100_000)
        assert (await ask(CHAT, chat())).status == 200
        assert (await ask(CHAT, chat())).status == 429
        guard.rules = before
        await self.check(guard, WHOLE, 2)

    async def test_the_server_ends(
        self, server: Any, guard: Guard, dial: Any, ask: Ask, fakes: Fakes, tmp_path: Path
    ) -> None:
        """Those that are answered, that wait for their first token, and for their turn."""
        guard.rules = Rules(limits=[LimitTable(COUNTED.merged(Limits(concurrent=2)))])
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(lambda _: ["word "] * 50, gate=gate)
        answered = await dial(CHAT, chat(stream=True))
        gate.release(2)
        await answered.read_until(b"word ")
        asked = []
        for count in (2, 3):
            asked.append(asyncio.ensure_future(ask(CHAT, chat())))
            await until(lambda: len(guard.crowd._present) == count)  # noqa: B023
        await until(lambda: fakes.models[0].active == 2)
        gate.release(2)
        await server.web_app.settings["shimmy_service"].close()
        assert [(await one).status for one in asked] == [503, 503]
        await answered.read_until_close()
        nobody_in(guard)
        again = new_guard(tmp_path, clock=guard.clock)  # type: ignore[arg-type]
        again.rules = Rules(limits=[LimitTable(COUNTED)])
        ends = await records(again, kind="end")
        assert len(ends) == 3
        assert {end["outcome"] for end in ends} <= {"error", "cancelled"}
        generated = sum(end.get("tokens_generated", 0) for end in ends)
        assert generated < 50
        read = [end.get("prompt_tokens", 0) for end in ends]
        assert sorted(read)[::2] == [0, PROMPT]  # how far the one between had come is not sure
        await check_spent(again, sum(read) + generated, 3)
        await again.close()

    async def test_it_is_cancelled_before_it_waits_for_its_turn_any_longer(
        self, server: Any, guard: Guard, ask: Ask, dial: Any, fakes: Fakes, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("shimmy_jupyter.server.answers.PATIENCE", 0.01)
        guard.rules = Rules(limits=[LimitTable(COUNTED.merged(Limits(concurrent=1)))])
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        first = asyncio.ensure_future(ask(CHAT, chat()))
        await until(lambda: fakes.models and fakes.models[0].active)
        second = await dial(CHAT, chat(stream=True))
        await second.read_until(b"your turn")
        second.close()
        await until(lambda: len(guard._open) == 1)
        third = asyncio.ensure_future(ask(CHAT, chat()))
        await until(lambda: len(guard.crowd._present) == 2)
        gate.release(100)
        assert [(await first).status, (await third).status] == [200, 200]
        guard.rules = Rules(limits=[LimitTable(COUNTED)])
        await check_spent(guard, 2 * WHOLE, 3)


class TestVectors:
    BODY = {"model": MODEL, "input": ["abc", "de"]}

    @pytest.fixture(autouse=True)
    def counting(self, guard: Guard, fakes: Fakes) -> None:
        guard.rules = Rules(limits=[LimitTable(COUNTED)])
        fakes.make = lambda: FakeBackend(embedding=VECTORS)

    async def test_ok(self, guard: Guard, ask: Ask) -> None:
        assert (await ask("v1/embeddings", self.BODY)).status == 200
        await check_spent(guard, 5)

    async def test_ranks(self, guard: Guard, ask: Ask, fakes: Fakes) -> None:
        fakes.make = lambda: FakeBackend(embedding=RANKS)
        body = {"model": MODEL, "query": "ab", "documents": ["cd", "e"]}
        answer = await ask("v1/rerank", body)
        await check_spent(guard, answer.json["usage"]["total_tokens"])

    async def test_hung_up(self, guard: Guard, dial: Any, fakes: Fakes, gone: list[str]) -> None:
        """What was handed to the engine counts."""
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(embedding=VECTORS, gate=gate)
        connection = await dial("v1/embeddings", json.dumps(self.BODY))
        await until(lambda: fakes.models and fakes.models[0].active)
        connection.close()
        await until(lambda: gone)
        gate.release(10)
        await until(lambda: not guard._open)
        assert (await records(guard, kind="end"))[0]["outcome"] == "cancelled"
        await check_spent(guard, 5)

    async def test_hung_up_before_it_began(self, guard: Guard, dial: Any, monkeypatch: Any) -> None:
        """In the moment in which its task has been made and has not run."""
        make = embeddings.EmbeddingsHandler._computed

        def gone(self: Any, *given: Any) -> Any:
            asyncio.get_running_loop().call_soon(self.on_connection_close)
            return make(self, *given)

        # The task's first step comes after what was called for before.
        monkeypatch.setattr(embeddings.EmbeddingsHandler, "_computed", gone)
        connection = await dial("v1/embeddings", json.dumps(self.BODY))
        await until(lambda: guard._announced and not guard._open)
        connection.close()
        (end,) = await records(guard, kind="end")
        assert end["outcome"] == "cancelled"
        await check_spent(guard, 0, 0)

    @pytest.mark.parametrize(
        ("body", "status", "requests"),
        [
            ({"model": MODEL, "input": "x" * 65}, 400, 1),
            ({"model": MODEL, "input": "x", "dimensions": 5}, 400, 1),
            ({"model": "ghost", "input": "x"}, 404, 1),
            ({"model": MODEL, "input": 5}, 400, 0),
        ],
    )
    async def test_refused(
        self, guard: Guard, ask: Ask, body: Any, status: int, requests: int
    ) -> None:
        assert (await ask("v1/embeddings", body)).status == status
        await check_spent(guard, 0, requests)


class TestTurns:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("shimmy_jupyter.server.answers.PATIENCE", 0.01)

    async def test_in_order_and_said_so(
        self, guard: Guard, ask: Ask, dial: Any, fakes: Fakes
    ) -> None:
        gate, seen = threading.Semaphore(0), []

        def script(prompt: str) -> list[str]:
            seen.append(prompt.removeprefix("<user>").partition("\n")[0])
            return ["word "] * 3

        fakes.make = lambda: FakeBackend(script, gate=gate)
        allow(guard, concurrent=1)
        names = ["first", "second", "third", "fourth"]
        streams = []
        for count, name in enumerate(names):
            streams.append(await dial(CHAT, chat(name, stream=True)))
            await until(lambda: len(guard.crowd._present) == count + 1)  # noqa: B023
        for before, stream in enumerate(streams[1:]):
            said = f'"waiting for your turn: {before} of yours before it"'
            await stream.read_until(said.encode())
        assert (await ask("api/limits")).json["queue_position"] == 0
        assert (await ask("api/limits", who="bob")).json["queue_position"] is None
        # Somebody else does not wait for them.
        bob = asyncio.ensure_future(ask(CHAT, chat("bob's"), who="bob"))
        await until(lambda: fakes.models and fakes.models[0].active == 2)
        gate.release(1000)
        assert (await bob).status == 200
        for stream in streams:
            assert b'"error"' not in await stream.read_until(b"[DONE]")
            stream.close()
        assert [name for name in seen if name != "bob's"] == names

    async def test_who_gives_up_lets_others_go(self, guard: Guard, dial: Any, fakes: Fakes) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        allow(guard, concurrent=1)
        streams = []
        for count in (1, 2, 3):
            streams.append(await dial(CHAT, chat(stream=True)))
            await until(lambda: len(guard.crowd._present) == count)  # noqa: B023
        await streams[2].read_until(b"1 of yours")
        streams[1].close()
        await until(lambda: len(guard.crowd._present) == 2)
        gate.release(1000)
        for stream in (streams[0], streams[2]):
            assert b"three " in await stream.read_until(b"[DONE]")
            stream.close()

    async def test_time_limit_includes_it(
        self, guard: Guard, ask: Ask, dial: Any, fakes: Fakes
    ) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        allow(guard, concurrent=1)
        first = await dial(CHAT, chat(stream=True))
        await until(lambda: guard.crowd._present)
        late = await ask(CHAT, chat(max_seconds=0.02))
        assert late.error == (408, "deadline_exceeded", None)
        gate.release(100)
        await first.read_until(b"[DONE]")
        first.close()


class TestSeveral:
    async def test_users_have_their_own(self, guard: Guard, ask: Ask) -> None:
        allow(guard, requests_per_minute=1, tokens_per_day=WHOLE + 1)
        for who in ("ann", "bob"):
            assert (await ask(CHAT, chat(), who=who)).status == 200
            assert (await ask(CHAT, chat(), who=who)).status == 429
            left = (await ask("api/limits", who=who)).json["limits"]["max_tokens_per_day"]
            assert left["remaining"] == 1

    async def test_groups(self, guard: Guard, ask: Ask) -> None:
        few, many = Limits(requests_per_minute=1), Limits(requests_per_minute=2)
        guard.rules = Rules(limits=[LimitTable(few, {"staff": many})])
        assert [(await ask(CHAT, chat(), who="ann")).status for _ in "12"] == [200, 429]
        staff = [(await ask(CHAT, chat(), who="bob:staff")).status for _ in "123"]
        assert staff == [200, 200, 429]

    async def test_a_shared_budget(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        course = Limits(tokens_per_day=2 * WHOLE + 1, requests_per_minute=3)
        guard.rules = Rules(limits=[LimitTable(shared={"course": course})])
        assert (await ask(CHAT, chat(max_tokens=4), who="ann:course")).status == 200
        assert (await ask(CHAT, chat(max_tokens=4), who="bob:course")).status == 200
        refused = await ask(CHAT, chat(max_tokens=4), who="cid:course")
        assert refused.error == (429, "rate_limit_exceeded", None)
        assert "max_tokens_per_day of group course is" in refused.json["error"]["message"]
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        found = (await ask("api/limits", who="dora:course")).json
        assert found["limits"] == {}
        assert found["shared"]["course"]["max_tokens_per_day"]["remaining"] == 1
        assert (await ask("api/limits", who="eve")).json["shared"] == {}
        assert (await ask(CHAT, chat(), who="eve")).status == 200

    async def test_of_several_tables_the_tightest(self, guard: Guard, ask: Ask) -> None:
        tables = [LimitTable(Limits(requests_per_minute=count)) for count in (9, 1, 5)]
        guard.rules = Rules(limits=tables)
        assert [(await ask(CHAT, chat())).status for _ in "12"] == [200, 429]


class TestWays:
    """CVE-2026-45339: the same user, however the credentials come."""

    @pytest.fixture
    def identity_provider_class(self) -> type[IdentityProvider] | None:
        return None

    async def test_header_cookie_and_query(
        self, server: Any, guard: Guard, http_server_client: Any, jp_base_url: str
    ) -> None:
        allow(guard, requests_per_minute=3)
        token = server.identity_provider.token
        response = await http_server_client.fetch(jp_base_url + "api/me?token=" + token)
        cookies = [c.split(";")[0] for c in response.headers.get_list("Set-Cookie")]
        cookie = "; ".join(c for c in cookies if not c.startswith("_xsrf="))
        ways: list[tuple[str, dict[str, str]]] = [
            ("", {"Authorization": f"token {token}"}),
            ("", {"Cookie": f"{cookie}; _xsrf=mine", "X-XSRFToken": "mine"}),
            (f"?token={token}", {}),
        ]

        async def status(way: tuple[str, dict[str, str]]) -> int:
            query, headers = way
            answer = await http_server_client.fetch(
                f"{jp_base_url}shimmy/{CHAT}{query}",
                method="POST",
                body=chat(),
                headers={"Content-Type": "application/json", **headers},
                raise_error=False,
            )
            return int(answer.code)

        assert [await status(way) for way in ways] == [200, 200, 200]
        assert [await status(way) for way in ways] == [429, 429, 429]
        ends = await records(guard, kind="end")
        assert {end["user"] for end in ends} == {"local"}


class TestRestart:
    async def test_what_was_used_and_tightened_is_kept(
        self, server: Any, guard: Guard, ask: Ask, fakes: Fakes, tmp_path: Path, clock: Clock
    ) -> None:
        tables = [LimitTable(Limits(tokens_per_day=2 * WHOLE, requests_per_minute=9))]
        guard.rules = Rules(limits=tables)
        assert (await ask(CHAT, chat(max_tokens=4))).status == 200
        assert (await ask("api/limits", {"max_requests_per_minute": 3}, method="PUT")).status == 200
        before = (await ask("api/limits")).json
        await server.web_app.settings["shimmy_service"].close()
        again = new_guard(tmp_path, clock=clock)
        again.rules = guard.rules
        server.web_app.settings["shimmy_service"] = service = new_service(fakes, again)
        assert (await ask("api/limits")).json == before
        assert (await ask(CHAT, chat(max_tokens=4))).status == 200
        assert (await ask(CHAT, chat(max_tokens=4))).error[0] == 429
        clock.now += 61
        assert (await ask(CHAT, chat(max_tokens=4))).error[0] == 429
        clock.now += 86400
        assert (await ask(CHAT, chat(max_tokens=4))).status == 200
        await service.close()

    async def test_two_servers_have_one_budget(
        self, server: Any, guard: Guard, ask: Ask, fakes: Fakes, tmp_path: Path, clock: Clock
    ) -> None:
        guard.rules = Rules(limits=[LimitTable(Limits(tokens_per_day=2 * WHOLE))])
        other = new_guard(tmp_path, clock=clock)
        other.rules = guard.rules
        first, second = server.web_app.settings["shimmy_service"], new_service(fakes, other)
        found = []
        for service in (first, second, first, second):
            server.web_app.settings["shimmy_service"] = service
            found.append((await ask(CHAT, chat(max_tokens=4))).status)
        assert found == [200, 200, 429, 429]
        await second.close()


@of_one_process
class TestShown:
    async def test_all_of_them(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        every = {name: 10_000 + at for at, name in enumerate(NAMES.values())}
        allow(guard, **every)
        await ask(CHAT, chat())
        found = (await ask("api/limits")).json
        assert set(found) == {"limits", "shared", "own", "locked", "queue_position"}
        assert set(found["limits"]) == set(NAMES)
        for name, row in found["limits"].items():
            assert row["limit"] == every[NAMES[name]]
            if row["used"] is None:
                assert (row["remaining"], row["resets_at"]) == (None, None)
            else:
                assert row["remaining"] == row["limit"] - row["used"]
        assert found["limits"]["max_requests_per_minute"]["used"] == 1
        assert found["limits"]["max_requests_per_minute"]["resets_at"] == clock.now + 61
        assert found["limits"]["max_tokens_per_day"]["used"] == WHOLE
        assert (found["shared"], found["own"], found["queue_position"]) == ({}, {}, None)

    async def test_without_limits(self, guard: Guard, ask: Ask) -> None:
        answer = await ask(CHAT, chat())
        assert not [name for name in answer.headers if name.lower().startswith("x-ratelimit")]
        found = (await ask("api/limits")).json
        assert found["limits"] == {}

    async def test_what_is_locked(self, guard: Guard, ask: Ask) -> None:
        why = {"max_tokens_per_day": "set in the system's configuration"}
        guard.rules = Rules(limits=[LimitTable(Limits(tokens_per_day=5))], locked=why)
        assert (await ask("api/limits")).json["locked"] == why


class TestSeveralAtOnce:
    async def test_none_is_lost(self, guard: Guard, tmp_path: Path) -> None:
        wanted = [{name: 5 + k} for k, name in enumerate(NAMES)]
        loose = {"max_tokens_per_day": -1}
        found = await asyncio.gather(
            *(guard.tighten(Asked(ANN, f"r{k}"), one) for k, one in enumerate([*wanted, loose])),
            return_exceptions=True,
        )
        assert [type(one) for one in found] == [type(None)] * len(wanted) + [InvalidValue]
        whole = {name: value for one in wanted for name, value in one.items()}
        assert (await guard.limits(ANN))["own"] == whole
        assert (await records(guard, action="limits"))[-1]["detail"] == {"own": whole}
        other = Spending(tmp_path / "limits.sqlite")
        assert named(await asyncio.wrap_future(other.own("ann"))) == whole
        other.close()
        await guard.close()

    async def test_nobody_waits_for_another_s(
        self, guard: Guard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record, held = guard.record, asyncio.Event()

        async def slow(asked: Asked, *args: Any, **more: Any) -> None:
            if asked.request_id == "r0":
                await held.wait()
            await record(asked, *args, **more)

        monkeypatch.setattr(guard, "record", slow)
        first, second = (
            asyncio.create_task(guard.tighten(Asked(ANN, f"r{k}"), {name: k}))
            for k, name in enumerate(["max_queued", "max_concurrent"])
        )
        await guard.tighten(Asked(Principal("bob"), "r2"), {"max_queued": 2})
        assert not first.done()
        assert not second.done()
        first.cancel()
        await second
        assert (await guard.limits(ANN))["own"] == {"max_concurrent": 1}
        assert not guard._tightening
        await guard.close()


@of_one_process
class TestTightened:
    async def test_tightened_and_taken_back(self, guard: Guard, ask: Ask) -> None:
        allow(guard, requests_per_minute=5)
        answer = await ask("api/limits", {"max_requests_per_minute": 1}, method="PUT")
        assert answer.json["own"] == {"max_requests_per_minute": 1}
        assert answer.json["limits"]["max_requests_per_minute"]["limit"] == 1
        assert [(await ask(CHAT, chat())).status for _ in "12"] == [200, 429]
        assert (await ask(CHAT, chat(), who="bob")).status == 200
        # One that the administrator has not set.
        answer = await ask("api/limits", {"max_completion_tokens": 2}, method="PUT")
        assert set(answer.json["own"]) == {"max_requests_per_minute", "max_completion_tokens"}
        answer = await ask("api/limits", {"max_requests_per_minute": None}, method="PUT")
        assert answer.json["own"] == {"max_completion_tokens": 2}
        assert answer.json["limits"]["max_requests_per_minute"]["limit"] == 5
        assert (await ask(CHAT, chat())).json["usage"]["completion_tokens"] == 2

    async def test_never_loosened(self, guard: Guard, ask: Ask) -> None:
        every = dict.fromkeys(NAMES.values(), 10)
        allow(guard, **every)
        before = (await ask("api/limits")).json
        for name in NAMES:
            refused = await ask("api/limits", {name: 11}, method="PUT")
            assert refused.error == (400, "invalid_value", name)
            assert "at most 10" in refused.json["error"]["message"]
            # Not by way of one's own, either.
            assert (await ask("api/limits", {name: 3}, method="PUT")).status == 200
            assert (await ask("api/limits", {name: 11}, method="PUT")).status == 400
            assert (await ask("api/limits", {name: 10}, method="PUT")).status == 200
            assert (await ask("api/limits", {name: None}, method="PUT")).status == 200
        assert (await ask("api/limits")).json == before

    async def test_a_group_s_member_up_to_the_group_s(self, guard: Guard, ask: Ask) -> None:
        few, many = Limits(requests_per_minute=1), Limits(requests_per_minute=4)
        guard.rules = Rules(limits=[LimitTable(few, {"staff": many})])
        body = {"max_requests_per_minute": 3}
        assert (await ask("api/limits", body, method="PUT")).status == 400
        assert (await ask("api/limits", body, "bob:staff", method="PUT")).status == 200

    async def test_an_administrator_s_ceiling_that_came_later_holds(
        self, guard: Guard, ask: Ask
    ) -> None:
        assert (await ask("api/limits", {"max_completion_tokens": 50}, method="PUT")).status == 200
        allow(guard, completion_tokens=1)
        assert (await ask(CHAT, chat())).json["usage"]["completion_tokens"] == 1

    @pytest.mark.parametrize(
        ("body", "code", "param"),
        [
            ("{", "invalid_value", None),
            ("[]", "invalid_value", None),
            ("", "invalid_value", None),
            ({"max_tokens_per_day": -1}, "invalid_value", "max_tokens_per_day"),
            ({"max_tokens_per_day": 1.5}, "invalid_value", "max_tokens_per_day"),
            ({"max_tokens_per_day": "9"}, "invalid_value", "max_tokens_per_day"),
            ({"max_tokens_per_day": True}, "invalid_value", "max_tokens_per_day"),
            ({"max_tokens_per_day": 2**54}, "invalid_value", "max_tokens_per_day"),
            ('{"max_seconds": NaN}', "invalid_value", None),
            ('{"max_seconds": 1e999}', "invalid_value", None),
            ({"max_seconds": -0.5}, "invalid_value", "max_seconds"),
            ({"max_everything": 1}, "unknown_parameter", "max_everything"),
            ({"max_request_size": 1}, "unknown_parameter", "max_request_size"),
            ({"max_queued": 1, "groups": {}}, "unknown_parameter", "groups"),
        ],
        ids=str,
    )
    async def test_what_is_no_limit(
        self, guard: Guard, ask: Ask, body: Any, code: str, param: str | None
    ) -> None:
        refused = await ask("api/limits", body, method="PUT")
        status, found, field = refused.error
        assert (status, found) == (400, code)
        assert param is None or field == param
        assert (await ask("api/limits")).json["own"] == {}


@of_one_process
class TestBroken:
    """Where it cannot be kept what is used, nothing is given away."""

    @pytest.fixture
    def guard(self, tmp_path: Path, clock: Clock) -> Guard:
        (tmp_path / "limits.sqlite").mkdir()
        return new_guard(tmp_path, clock=clock)

    async def test_nothing_is_given_away(
        self, server: Any, guard: Guard, ask: Ask, tmp_path: Path, fakes: Fakes
    ) -> None:
        allow(guard, tokens_per_day=1000)
        for path, body, method in (
            (CHAT, chat(), None),
            ("v1/embeddings", {"model": MODEL, "input": "x"}, None),
            ("api/limits", None, None),
            ("api/limits", {"max_queued": 1}, "PUT"),
        ):
            refused = await ask(path, body, method=method)
            assert refused.error == (503, "audit_unavailable", None), path
            assert str(tmp_path) not in refused.body.decode()
        assert fakes.made == []
        (tmp_path / "limits.sqlite").rmdir()


@of_one_process
async def test_the_service_itself_refuses(server: Any, guard: Guard) -> None:
    """Not only its handlers: whoever asks it comes past the guard."""
    allow(guard, requests_per_minute=1)
    service = server.web_app.settings["shimmy_service"]
    request = CompletionRequest("one", ANN, MODEL, ">hello")
    async with await service.start(request) as completion:
        assert await completion.text() == "hello "
        await completion.finish()
    request = CompletionRequest("two", ANN, MODEL, ">hello")
    with pytest.raises(RateLimitExceeded) as caught:
        await service.start(request, visit=service.visit(Asked(ANN, "two")))
    assert caught.value.limit == "max_requests_per_minute"


@of_one_process
@pytest.mark.parametrize("steps", range(8))
async def test_its_turn_comes_when_it_is_cancelled(server: Any, guard: Guard, steps: int) -> None:
    """As long as it can be cancelled it is: else it would go on for nobody, and nobody would settle it."""
    guard.rules = Rules(limits=[LimitTable(COUNTED.merged(Limits(concurrent=1, queued=9)))])
    first, second = (Visit(guard, Asked(ANN, id)) for id in ("one", "two"))
    request = CompletionRequest("one", ANN, MODEL, ">hello")
    await first.check(request)
    await first.arrive(lambda before: None)
    await second.check(request)
    waiting = asyncio.ensure_future(second.arrive(lambda before: None))
    await until(lambda: guard.turns)
    ending = asyncio.ensure_future(first.end(Result("ok")))
    for _ in range(steps):
        await asyncio.sleep(0)
    asked_in_time = waiting.cancel()
    await asyncio.wait([waiting, ending])
    assert waiting.cancelled() == asked_in_time
    await second.end(Result("cancelled", "cancelled"))
    nobody_in(guard)


@of_one_process
class TestTheEnd:
    """Of the service: what is under way is settled before its files are closed."""

    async def test_waits_for_requests(self, server: Any, guard: Guard) -> None:
        visit = server.web_app.settings["shimmy_service"].visit(Asked(ANN, "one"))
        closing = asyncio.ensure_future(guard.close())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not closing.done()
        assert await visit.end(Result("cancelled", "cancelled")) is not None
        await closing

    async def test_waits_for_what_nobody_waits_for(
        self, server: Any, guard: Guard, monkeypatch: Any
    ) -> None:
        done: list[str] = []

        async def work() -> None:
            for _ in range(1000):
                await asyncio.sleep(0)
            done.append("work")

        monkeypatch.setattr(guard.spending, "close", lambda: done.append("closed"))
        guard.later(work())
        await guard.close()
        assert done == ["work", "closed"]
        monkeypatch.undo()

    async def test_vectors_that_nobody_waits_for(
        self, server: Any, guard: Guard, fakes: Fakes
    ) -> None:
        """Whoever asks the service itself and gives up."""
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(embedding=VECTORS, gate=gate)
        guard.rules = Rules(limits=[LimitTable(COUNTED)])
        service = server.web_app.settings["shimmy_service"]
        request = EmbeddingRequest("one", ANN, MODEL, (("abc",),), ("input",))
        asked = asyncio.ensure_future(service.embed(request))
        await until(lambda: fakes.models and fakes.models[0].active)
        asked.cancel()
        gate.release(10)
        with pytest.raises(asyncio.CancelledError):
            await asked
        await check_spent(guard, 3)
