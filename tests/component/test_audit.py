"""The ledger on a real server: every request and every act is on it, and users see their own.

Cases: begin and end of each outcome; begin before the first token and end before the last byte; receipts
in answers, from the route, checked offline; fields; nothing of a prompt in the file, unless it was opted
for; digests of one user and of two; acts, accepted and denied; a ledger that cannot be written, with
fail_closed and without; no ledger; own records and an administrator's; pages, filters and wrong ones;
exports; usage; verify with and without an anchor; retention; looking changes nothing.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import IdentityProvider
from tornado.httpclient import HTTPClientError

from shimmy_jupyter.audit.ledger import Query
from shimmy_jupyter.audit.verify import verify_receipt
from shimmy_jupyter.audit.writer import StoreFailed
from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.core.policy import Policy, Rule
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.guard.asked import Asked
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.types import EmbeddingFacts, Principal

from .conftest import MODEL, Answer, Ask, Clock, Fakes, People, chat, new_guard, records, until

pytestmark = pytest.mark.parametrize("fakes", ["in process"], indirect=True)

CHAT = "v1/chat/completions"
PROMPT = len("<user>one two three\n<assistant>")
DAY = 86400


@pytest.fixture
def identity_provider_class() -> type[IdentityProvider] | None:
    return People


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(tmp_path: Path, clock: Clock) -> Guard:
    return new_guard(tmp_path, clock=clock)


def shimmy(answer: Answer) -> dict[str, Any]:
    """The figures of an answer, whole or streamed."""
    if answer.body.startswith(b"data:"):
        last = answer.body.decode().split("\n\n")[-3]
        return dict(json.loads(last.removeprefix("data: "))["shimmy"])
    return dict(answer.json["shimmy"])


async def pair(guard: Guard, id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two records of a request."""
    await until(lambda: not guard._open)
    begin, end = await records(guard, request_id=id)
    assert (begin["kind"], end["kind"]) == ("begin", "end")
    assert "outcome" not in begin
    return begin, end


class TestOutcomes:
    @pytest.mark.parametrize(
        ("path", "body", "outcome", "code"),
        [
            (CHAT, chat(), "ok", None),
            (CHAT, chat(stream=True), "ok", None),
            (CHAT, chat(max_tokens=0), "ok", None),
            ("v1/completions", {"model": MODEL, "prompt": ">hi"}, "ok", None),
            (CHAT, "{", "error", "invalid_value"),
            (CHAT, chat(temperature=9), "error", "invalid_value"),
            (CHAT, chat("x" * 5000), "error", "context_length_exceeded"),
            (CHAT, chat(model="ghost"), "error", "model_not_found"),
            (CHAT, chat(model="ghost", stream=True), "error", "model_not_found"),
            ("v1/embeddings", {"model": MODEL}, "error", "invalid_value"),
            ("v1/embeddings", {"model": MODEL, "input": "x"}, "error", "unsupported_parameter"),
            ("v1/rerank", {"model": MODEL}, "error", "invalid_value"),
        ],
    )
    async def test_both_records(
        self, guard: Guard, ask: Ask, path: str, body: Any, outcome: str, code: str | None
    ) -> None:
        answer = await ask(path, body)
        begin, end = await pair(guard, answer.id)
        assert (end["outcome"], end.get("code")) == (outcome, code)
        for record in (begin, end):
            assert record["user"] == "ann"
            assert record["request_path"].endswith(f"/shimmy/{path}")

    @pytest.mark.parametrize("stream", [False, True])
    async def test_denied_and_limited(self, guard: Guard, ask: Ask, stream: bool) -> None:
        guard.rules = Rules((Policy((Rule(False, users=("ann",)),)),))
        _, end = await pair(guard, (await ask(CHAT, chat(stream=stream))).id)
        assert (end["outcome"], end["code"]) == ("denied", "policy_denied")
        guard.rules = Rules(limits=[LimitTable(Limits(requests_per_minute=0))])
        _, end = await pair(guard, (await ask(CHAT, chat(stream=stream))).id)
        assert (end["outcome"], end["code"]) == ("limited", "rate_limit_exceeded")

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("step", [1, 3])
    async def test_the_engine_fails(
        self, guard: Guard, ask: Ask, fakes: Fakes, stream: bool, step: int
    ) -> None:
        fakes.make = lambda: FakeBackend(fail_at=step)
        _, end = await pair(guard, (await ask(CHAT, chat(stream=stream))).id)
        assert (end["outcome"], end["code"]) == ("error", "engine_crashed")
        assert end["tokens_generated"] == step - 1

    async def test_deadline(self, guard: Guard, ask: Ask, fakes: Fakes) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        answer = await ask(CHAT, chat(max_seconds=0.01))
        gate.release(10)
        _, end = await pair(guard, answer.id)
        assert (end["outcome"], end["code"]) == ("error", "deadline_exceeded")

    async def test_embedded(self, guard: Guard, ask: Ask, fakes: Fakes) -> None:
        fakes.make = lambda: FakeBackend(embedding=EmbeddingFacts("mean", 4, 64, 64, 4))
        body = {"model": MODEL, "input": ["abc", "de"], "dimensions": 2}
        begin, end = await pair(guard, (await ask("v1/embeddings", body)).id)
        assert begin["parameters"] == {"inputs": 2, "dimensions": 2}
        assert (end["outcome"], end["prompt_tokens"]) == ("ok", 5)


class TestOrder:
    async def test_begin_is_committed_before_the_first_token(
        self, guard: Guard, ask: Ask, fakes: Fakes
    ) -> None:
        assert guard.ledger is not None
        await ask(CHAT, chat())
        await until(lambda: not guard._tasks)  # the rules are on record since the first request
        steps = len(fakes.made[0].batches)
        blocked, go = threading.Event(), threading.Event()

        def block(_connection: Any) -> None:
            blocked.set()
            go.wait(15)

        done = guard.ledger._writer.submit(block)
        await until(blocked.is_set)
        answers = [
            asyncio.ensure_future(ask(CHAT, chat(stream=stream))) for stream in (True, False)
        ]
        await until(lambda: guard.ledger is not None and guard.ledger._writer._inbox.qsize() == 2)
        assert len(fakes.made[0].batches) == steps
        go.set()
        assert [(await one).status for one in answers] == [200, 200]
        assert done.result() is None

    @pytest.mark.parametrize("stream", [False, True])
    async def test_end_is_committed_before_the_last_byte(
        self, guard: Guard, ask: Ask, monkeypatch: Any, stream: bool
    ) -> None:
        assert guard.ledger is not None
        ledger, go, held = guard.ledger, threading.Event(), threading.Event()
        append = ledger.append

        def slow(entries: Any) -> Any:
            if entries[-1].kind == "end":
                ledger._writer.submit(lambda _connection: (held.set(), go.wait(15)))
            return append(entries)

        monkeypatch.setattr(ledger, "append", slow)
        answer = asyncio.ensure_future(ask(CHAT, chat(stream=stream)))
        await until(held.is_set)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not answer.done()
        go.set()
        assert (await answer).status == 200


class TestReceipts:
    @pytest.mark.parametrize(
        "fields",
        [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}],
    )
    async def test_the_answer_s_is_the_ledger_s(self, ask: Ask, fields: dict[str, Any]) -> None:
        answer = await ask(CHAT, chat(**fields))
        receipt = shimmy(answer)["receipt"]
        assert receipt["request_id"] == shimmy(answer)["request_id"] == answer.id
        await ask(CHAT, chat("something else"))
        found = await ask(f"api/audit/receipts/{answer.id}")
        assert found.status == 200
        last = found.json["records"][-1]
        assert (last["seq"], last["leaf_hash"]) == (receipt["seq"], receipt["leaf_hash"])
        verdict = verify_receipt(found.json)
        assert verdict.ok, verdict
        edited = json.loads(found.body)
        edited["records"][-1]["body"] = edited["records"][-1]["body"].replace('"ok"', '"no"')
        assert not verify_receipt(edited).ok

    async def test_others_are_not_there(self, ask: Ask) -> None:
        answer = await ask(CHAT, chat())
        for who, status in (("ann", 200), ("bob", 404), ("bob:staff", 404), ("root!", 200)):
            found = await ask(f"api/audit/receipts/{answer.id}", who=who)
            assert found.status == status, who
        nobody = await ask(f"api/audit/receipts/{'0' * 32}", who="bob")
        hidden = await ask(f"api/audit/receipts/{answer.id}", who="bob")
        assert hidden.json["error"]["message"] == nobody.json["error"]["message"]


class TestFields:
    async def test_of_a_chat(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        answer = await ask(
            CHAT,
            chat(temperature=0, max_tokens=9, n=2),
            "ann:staff,lab",
            x_shimmy_notebook="a/b.ipynb",
            x_shimmy_cell="c-1",
        )
        begin, end = await pair(guard, answer.id)
        for record in (begin, end):
            assert record["timestamp"] == "2027-01-15T08:00:00.000Z"
            assert (record["user"], record["user_kind"]) == ("ann", "gateway")
            assert record["groups"] == ["staff", "lab"]
            assert record["client_ip"] == "127.0.0.1"
            assert (record["notebook"], record["cell"]) == ("a/b.ipynb", "c-1")
            assert record["model"] == MODEL
            assert "model_sha256" not in record  # nobody has read these bytes
            assert record["parameters"]["max_tokens"] == 9
            assert record["parameters"]["n"] == 2
            assert record["prompt_digest"].startswith("hmac-sha256:")
            assert "content" not in record
        assert end["output_digest"].startswith("hmac-sha256:")
        assert (end["prompt_tokens"], end["tokens_generated"]) == (PROMPT, 8)
        assert end["cached_tokens"] == answer.json["shimmy"]["cached_tokens"]
        assert end["duration_ms"] == end["time_to_first_token_ms"] == 0  # by this clock

    async def test_times_are_from_the_arrival(
        self, guard: Guard, ask: Ask, fakes: Fakes, clock: Clock
    ) -> None:
        gate, began = threading.Semaphore(0), clock.now
        fakes.make = lambda: FakeBackend(gate=gate)
        answer = asyncio.ensure_future(ask(CHAT, chat()))
        await until(lambda: fakes.models and fakes.models[0].active)
        clock.now += 3
        gate.release(100)
        _, end = await pair(guard, (await answer).id)
        assert end["time_to_first_token_ms"] == end["duration_ms"] == 3000
        (begin,) = await records(guard, kind="begin")
        assert begin["timestamp"] < end["timestamp"]
        assert clock.now == began + 3

    SECRET = "xyzzy-plugh"

    def secrets(self) -> list[tuple[str, Any]]:
        secret = self.SECRET
        schema = {"type": "json_schema", "json_schema": {"schema": {"const": secret}}}
        return [
            (CHAT, chat(f"tell me of {secret}", stop=[f"{secret}-stop"])),
            (CHAT, chat(f"{secret}", stream=True, response_format=schema)),
            (CHAT, chat("hi", chat_template_kwargs={"k": secret})),
            (CHAT, chat("hi", grammar={"type": "regex", "value": secret})),
            ("v1/completions", {"model": MODEL, "prompt": f">{secret}", "suffix": secret}),
            ("v1/embeddings", {"model": MODEL, "input": secret}),
            ("v1/rerank", {"model": MODEL, "query": secret, "documents": [secret]}),
        ]

    async def written(self, guard: Guard) -> bytes:
        """All bytes of the ledger's files."""
        assert guard.ledger is not None
        await until(lambda: not guard._open)
        folder = guard.ledger.path.parent
        return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))

    async def test_no_content(self, guard: Guard, ask: Ask) -> None:
        digests = []
        for path, body in self.secrets():
            answer = await ask(path, body)
            begin, _ = await pair(guard, answer.id)
            digests.append(begin["prompt_digest"])
            assert begin["model"] == MODEL
        assert self.SECRET.encode() not in await self.written(guard)
        (found,) = [r for r in await records(guard, kind="begin") if "stop" in r["parameters"]]
        assert found["parameters"]["stop"].startswith("hmac-sha256:")
        assert len(set(digests)) == len(digests) - 1  # two say "hi"

    async def test_content_that_was_opted_for(self, guard: Guard, ask: Ask) -> None:
        guard.rules = Rules(record_content=True)
        begin, end = await pair(guard, (await ask(CHAT, chat(self.SECRET))).id)
        assert self.SECRET in begin["content"]["prompt"]
        assert end["content"] == {"output": f"{self.SECRET} "}

    async def test_digests_are_a_user_s_own(self, guard: Guard, ask: Ask) -> None:
        found = {}
        for name, who, prompt in (
            ("first", "ann", "same"),
            ("second", "ann", "same"),
            ("other", "ann", "other"),
            ("bob's", "bob", "same"),
        ):
            _, end = await pair(guard, (await ask(CHAT, chat(prompt), who)).id)
            found[name] = end["prompt_digest"], end["output_digest"]
        assert found["first"] == found["second"]
        assert not set(found["first"]) & {*found["other"], *found["bob's"]}


class TestActs:
    @pytest.mark.parametrize("action", ["load", "unload", "probe", "verify"])
    async def test_on_models(
        self, server: Any, guard: Guard, ask: Ask, fakes: Fakes, action: str
    ) -> None:
        done = await ask(f"api/models/{MODEL}/{action}", "")
        assert done.status in (202, 403)  # nothing is tried out or read where there is no file
        guard.rules = Rules((Policy((Rule(False, (action,)),)),))
        made = len(fakes.made)
        refused = await ask(f"api/models/{MODEL}/{action}", "", "bob")
        assert refused.error == (403, "policy_denied", "model")
        assert len(fakes.made) <= made + 1
        accepted, denied = await records(guard, kind="act")
        assert (accepted["user"], accepted["action"], accepted["model"]) == ("ann", action, MODEL)
        assert (accepted["outcome"], accepted["request_id"]) == ("accepted", done.id)
        assert (denied["user"], denied["outcome"]) == ("bob", "denied")
        assert (denied["code"], denied["request_id"]) == ("policy_denied", refused.id)
        jobs = server.web_app.settings["shimmy_service"].library.jobs
        for job in [*jobs._jobs.values()]:
            await job.wait()
        assert [job.owner for job in jobs._jobs.values() if job.owner == "bob"] == []

    async def test_pull(self, guard: Guard, ask: Ask) -> None:
        digest = "0" * 64
        await ask("api/models/pull", {"model": "org/name", "sha256": digest})
        guard.rules = Rules((Policy((Rule(False, ("pull",), ("*org/name*",)),)),))
        assert (await ask("api/models/pull", {"model": "org/name"})).status == 403
        off, denied = await records(guard, kind="act", action="pull")
        # Nothing can be downloaded here: that is on record, too.
        assert (off["outcome"], off["detail"]) == ("denied", {"sha256": digest})
        assert "org/name" in off["model"]
        assert (denied["outcome"], denied["code"]) == ("denied", "policy_denied")

    async def test_limits(self, guard: Guard, ask: Ask) -> None:
        answer = await ask("api/limits", {"max_queued": 3}, method="PUT")
        (act,) = await records(guard, kind="act")
        assert (act["action"], act["detail"]) == ("limits", {"own": {"max_queued": 3}})
        assert (act["user"], act["request_id"]) == ("ann", answer.id)

    async def test_the_policy(self, server: Any, guard: Guard, ask: Ask, tmp_path: Path) -> None:
        """Once for each that there was, whoever asks first."""
        for _ in "12":
            await ask(CHAT, chat())
        await guard.close()
        for rules in (guard.rules, Rules(limits=[LimitTable(Limits(queued=5))])):
            again = new_guard(tmp_path)
            again.rules = rules
            await again.record(Asked(Principal("ann"), "an-id"), "load", MODEL)
            await again.close()
        ledger = new_guard(tmp_path).ledger
        assert ledger is not None
        acts = ledger.query(Query(action="policy")).records
        assert len(acts) == 2
        assert acts[0]["detail"]["policy"] == acts[1]["detail"]["policy"]
        assert acts[0]["detail"]["limits"] != acts[1]["detail"]["limits"]
        assert {act["user"] for act in acts} == {"server"}


class TestBroken:
    @pytest.fixture
    def guard(self, tmp_path: Path) -> Guard:
        (tmp_path / "audit" / "ledger.sqlite").mkdir(parents=True)
        return new_guard(tmp_path)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_fail_closed(
        self, guard: Guard, ask: Ask, fakes: Fakes, tmp_path: Path, stream: bool
    ) -> None:
        guard.rules = Rules(fail_closed=True)
        for path, body in (
            (CHAT, chat(stream=stream)),
            ("v1/embeddings", {"model": MODEL, "input": "x"}),
            (f"api/models/{MODEL}/load", ""),
        ):
            refused = await ask(path, body)
            assert refused.error == (503, "audit_unavailable", None), path
            assert str(tmp_path) not in refused.body.decode()
        refused = await ask("api/limits", {"max_queued": 1}, method="PUT")
        assert refused.error == (503, "audit_unavailable", None)
        assert all(not made.batches for made in fakes.made)
        guard.rules = Rules()
        assert (await ask("api/limits")).json["own"] == {}

    @pytest.mark.parametrize("stream", [False, True])
    async def test_not_fail_closed(self, guard: Guard, ask: Ask, stream: bool) -> None:
        answer = await ask(CHAT, chat(stream=stream))
        assert answer.status == 200
        assert shimmy(answer)["receipt"] is None
        assert guard.ledger is not None
        assert guard.ledger.failure
        refused = await ask("api/audit")
        assert refused.error == (503, "audit_unavailable", None)


@pytest.mark.parametrize("stream", [False, True])
async def test_fails_amid_the_answer(
    guard: Guard, ask: Ask, fakes: Fakes, tmp_path: Path, stream: bool
) -> None:
    """With fail_closed nobody has a whole answer that is not on record."""
    assert guard.ledger is not None
    guard.rules = Rules(fail_closed=True)
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(gate=gate)
    answer = asyncio.ensure_future(ask(CHAT, chat(stream=stream)))
    await until(lambda: fakes.models and fakes.models[0].active)
    guard.ledger.path.rename(tmp_path / "elsewhere.sqlite")
    guard.ledger.path.mkdir()
    gate.release(100)
    found = await answer
    assert b"audit_unavailable" in found.body
    assert b"[DONE]" not in found.body
    assert found.status == (200 if stream else 503)


class TestOff:
    @pytest.fixture
    def guard(self, tmp_path: Path) -> Guard:
        return new_guard(tmp_path, audit=False)

    async def test_nothing_is_recorded(self, ask: Ask, tmp_path: Path) -> None:
        answer = await ask(CHAT, chat())
        assert shimmy(answer)["receipt"] is None
        for path, body in (
            ("api/audit", None),
            ("api/audit/export", None),
            ("api/audit/usage", None),
            (f"api/audit/receipts/{answer.id}", None),
            ("api/audit/verify", {}),
            ("api/audit/anchor", {}),
        ):
            refused = await ask(path, body, "root!")
            assert refused.error == (404, "not_found", None), path
        assert not (tmp_path / "audit").exists()


class TestShown:
    async def three(self, guard: Guard, ask: Ask, clock: Clock) -> list[str]:
        """Of ann, of bob and of ann again, a minute between them; the last one is wrong."""
        found = []
        for who, body in (("ann:lab", chat()), ("bob", chat("secret")), ("ann:lab", "{")):
            found.append((await ask(CHAT, body, who)).id)
            clock.now += 60
        await until(lambda: not guard._tasks)
        return found

    async def test_own_and_all(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        first, second, third = await self.three(guard, ask, clock)
        mine = (await ask("api/audit")).json["records"]
        assert [one["request_id"] for one in mine] == [third, third, first, first]
        assert {one["user"] for one in mine} == {"ann"}
        bobs = (await ask("api/audit", who="bob")).json["records"]
        assert {one["request_id"] for one in bobs} == {second}
        everyone = (await ask("api/audit?kind=end", who="root!")).json["records"]
        assert [one["request_id"] for one in everyone] == [third, second, first]
        refused = await ask("api/audit?user=bob")
        assert refused.error == (403, "policy_denied", "user")
        assert (await ask(f"api/audit?request_id={second}")).json["records"] == []
        for path in ("export?user=bob", "export?format=csv&user=bob"):
            assert (await ask(f"api/audit/{path}")).status == 403
        assert (await ask("api/audit?user=bob", who="root!")).json["records"]

    async def test_pages(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        await self.three(guard, ask, clock)
        whole = (await ask("api/audit")).json["records"]
        found, cursor = [], ""
        while True:
            page = (await ask(f"api/audit?limit=1{cursor}")).json
            assert len(page["records"]) == 1
            found += page["records"]
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        assert found == whole

    @pytest.mark.parametrize(
        ("query", "places"),
        [
            ("kind=begin", [0, 1, 2]),
            ("kind=end&outcome=ok", [0, 1]),
            ("kind=end&outcome=error", [2]),
            ("user=bob&kind=end", [1]),
            (f"model={MODEL}&kind=begin", [0, 1]),
            ("model=ghost", []),
            ("action=load", []),
            ("kind=begin&since=2027-01-15T08:01:00Z", [1, 2]),
            ("kind=begin&until=2027-01-15T08:01:00", [0]),
            ("kind=begin&since=1800000060&until=1800000061", [1]),
        ],
    )
    async def test_filters(
        self, guard: Guard, ask: Ask, clock: Clock, query: str, places: list[int]
    ) -> None:
        ids = await self.three(guard, ask, clock)
        found = (await ask(f"api/audit?{query}", who="root!")).json["records"]
        assert [one["request_id"] for one in found if one.get("action") != "policy"] == [
            ids[place] for place in places[::-1]
        ]

    @pytest.mark.parametrize(
        ("path", "param"),
        [
            ("api/audit?limit=0", "limit"),
            ("api/audit?limit=1001", "limit"),
            ("api/audit?limit=x", "limit"),
            ("api/audit?cursor=-1", "cursor"),
            ("api/audit?cursor=1&cursor=2", "cursor"),
            ("api/audit?since=yesterday", "since"),
            ("api/audit?until=1e300", "until"),
            ("api/audit?since=nan", "since"),
            ("api/audit/export?format=xml", "format"),
            ("api/audit/usage?by=cell", "by"),
            ("api/audit/usage?since=x", "since"),
        ],
    )
    async def test_wrong_ones(self, ask: Ask, path: str, param: str) -> None:
        assert (await ask(path)).error == (400, "invalid_value", param)

    async def test_exports(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        await self.three(guard, ask, clock)
        lines = await ask("api/audit/export")
        assert lines.headers["Content-Type"] == "application/jsonl"
        bodies = [json.loads(line)["body"] for line in lines.body.splitlines()]
        assert [body["kind"] for body in bodies] == ["begin", "end", "begin", "end"]
        assert {body["user"] for body in bodies} == {"ann"}
        table = await ask("api/audit/export?format=csv&kind=end")
        assert "shimmy-audit.csv" in table.headers["Content-Disposition"]
        rows = list(csv.DictReader(io.StringIO(table.body.decode())))
        assert [row["outcome"] for row in rows] == ["ok", "error"]
        everything = (await ask("api/audit/export", who="root!")).body.splitlines()
        assert len(everything) == 7  # with the policy's

    async def test_usage(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        await self.three(guard, ask, clock)
        found = (await ask("api/audit/usage?by=user", who="root!")).json
        rows = {row["user"]: row for row in found["usage"]}
        assert (rows["ann"]["requests"], rows["ann"]["errors"]) == (2, 1)
        assert rows["ann"]["prompt_tokens"] == PROMPT
        assert rows["bob"]["tokens_generated"] == 2
        assert found["since"] == 1_798_761_600  # 2027-01-01
        mine = (await ask("api/audit/usage?by=group")).json
        assert mine["by"] == ["user", "group"]
        assert {(row["user"], row["group"]) for row in mine["usage"]} == {("ann", "lab")}
        clock.now += 40 * DAY
        assert (await ask("api/audit/usage", who="root!")).json["usage"] == []

    async def test_verify(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        await self.three(guard, ask, clock)
        found = (await ask("api/audit/verify", {})).json
        assert (found["ok"], found["records"], found["open_requests"]) == (True, 7, 0)
        assert not found["anchored"]
        head = found["head"]
        await ask(CHAT, chat())
        found = (await ask("api/audit/verify", {"against": head})).json
        assert (found["ok"], found["anchored"], found["records"]) == (True, True, 9)
        other = {**head, "root": "0" * 64}
        found = (await ask("api/audit/verify", {"against": other})).json
        assert not found["ok"]
        assert found["problem"]
        for body, param in (
            ({"against": {**head, "size": -1}}, "size"),
            ({"against": {}}, "size"),
            ({"against": {**head, "root": "x"}}, "root"),
        ):
            assert (await ask("api/audit/verify", body)).error == (400, "invalid_value", param)
        unknown = await ask("api/audit/verify", {"x": 1})
        assert unknown.error[1] == "unknown_parameter"
        assert unknown.json["error"]["message"].endswith("there are against")

    async def test_anchor(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        await self.three(guard, ask, clock)
        answer = await ask("api/audit/anchor", {}, who="bob")
        head = answer.json["head"]
        assert head["size"] == 7
        (act,) = await records(guard, request_id=answer.id)
        assert (act["kind"], act["action"], act["user"]) == ("act", "anchor", "bob")
        assert (act["outcome"], act["seq"]) == ("accepted", 7)
        assert act["detail"] == {"size": 7, "root": head["root"]}
        found = (await ask("api/audit/verify", {"against": head})).json
        assert (found["ok"], found["anchored"], found["records"]) == (True, True, 8)
        assert (await ask("api/audit/anchor", {"x": 1})).error[1] == "unknown_parameter"

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    async def test_an_export_that_fails_amid_it_does_not_look_whole(
        self, guard: Guard, ask: Ask, clock: Clock, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await self.three(guard, ask, clock)

        def broken(*_: Any) -> Iterator[bytes]:
            yield b"one\n"
            raise StoreFailed("the disk is gone")

        monkeypatch.setattr("shimmy_jupyter.auditing.export", broken)
        with pytest.raises(HTTPClientError) as caught:
            await ask(f"api/audit/export?format={kind}")
        assert caught.value.code == 599

    async def test_looking_changes_nothing(
        self, guard: Guard, ask: Ask, clock: Clock, tmp_path: Path
    ) -> None:
        ids = await self.three(guard, ask, clock)
        assert guard.ledger is not None
        before = guard.ledger.head()
        for path in ("", "/export", "/export?format=csv", "/usage", f"/receipts/{ids[0]}"):
            assert (await ask(f"api/audit{path}")).status == 200
        assert (await ask("api/audit/verify", {})).status == 200
        assert (await ask("api/limits")).status == 200
        assert guard.ledger.head() == before

    async def test_retention(self, guard: Guard, ask: Ask, clock: Clock) -> None:
        guard.rules = Rules(retention=10)
        ids = await self.three(guard, ask, clock)
        clock.now += 11 * DAY
        last = (await ask(CHAT, chat())).id
        await until(lambda: not guard._tasks)
        assert (await ask(f"api/audit/receipts/{ids[0]}")).status == 404
        assert (await ask(f"api/audit/receipts/{last}")).status == 200
        found = (await ask("api/audit/verify", {})).json
        assert found["ok"]
        assert found["erased"] >= 6
