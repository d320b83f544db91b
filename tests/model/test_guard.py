"""Limits and the ledger on the real engine: servers that are started again, and servers that are killed.

Cases: minute's and day's budgets over a restart, by token header, query and cookie; a server killed amid
its load: acknowledged requests are on record, the log verifies, what was reserved is charged; a client's and
an administrator's deadline; a stream that is left; the model's SHA-256; cached tokens; a receipt without the
server; a day's budget until midnight, over a restart. In both isolation modes where an engine is involved.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import psutil
import pytest
import random_gguf
from kernel_session import RunningServer, running_server
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse

from shimmy_jupyter.audit.ledger import Head, Ledger, Query
from shimmy_jupyter.audit.verify import verify, verify_receipt
from shimmy_jupyter.compose import build_service
from shimmy_jupyter.config import AuditSettings, GuardSettings, Settings
from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.errors import DeadlineExceeded, RateLimitExceeded
from shimmy_jupyter.models.sources import BUNDLED, Places
from shimmy_jupyter.service import CompletionService
from shimmy_jupyter.types import CompletionRequest, Principal, Sampling

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))

from guard import Connection

MODES = ("none", "process")
SHAPE = random_gguf.Shape(layers=8, width=256, heads=8, head_width=32, hidden=1024, vocabulary=2048)
LONG = 1900
"""Tokens of an answer that no test waits for."""
STOPPED = 2.0
"""Seconds: a third of what it takes, and enough for a first token on a machine with much to do."""
ANN = Principal("ann")
ASK = {"model": "self-test", "messages": [{"role": "user", "content": "What does len do?"}]}
ANSWER = 26
"""Tokens of that question, 15, and of its answer."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    random_gguf.write(folder / "words.gguf", SHAPE, words=True)
    return folder


def serving(folder: Path, models: Path, *options: str) -> Any:
    """A server whose files stay in `folder`."""
    environment = {"JUPYTER_DATA_DIR": str(folder), "SHIMMY_MODEL_PATHS": str(models)}
    return running_server(*options, environment=environment)


def ledger_of(folder: Path) -> Path:
    return folder / "shimmy_jupyter" / "audit" / "ledger.sqlite"


def records_of(path: Path) -> list[dict[str, Any]]:
    with contextlib.closing(Ledger(path)) as ledger:
        return [json.loads(one.body or "") for one in ledger.stored(Query(), limit=100_000)]


def ends_in(path: Path) -> dict[str, dict[str, Any]]:
    """By request."""
    return {r["request_id"]: r for r in records_of(path) if r["kind"] == "end"}


def words(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "words", "prompt": prompt, "max_tokens": max_tokens, **more}


async def post(
    server: RunningServer, body: Any, path: str = "shimmy/v1/chat/completions", **options: Any
) -> HTTPResponse:
    headers = options.pop("headers", {"Authorization": f"token {server.token}"})
    request = HTTPRequest(
        server.url + path + options.pop("query", ""),
        method="POST",
        headers={"Content-Type": "application/json", **headers},
        body=json.dumps(body),
    )
    return await AsyncHTTPClient().fetch(request, raise_error=False)


async def browser(server: RunningServer) -> dict[str, str]:
    """What a browser that came in by the token's address sends afterwards."""
    client, jar = AsyncHTTPClient(), SimpleCookie()
    for path in ("login", f"login?token={server.token}"):
        page = await client.fetch(
            server.url + path,
            headers={"Cookie": "; ".join(f"{name}={m.coded_value}" for name, m in jar.items())},
            follow_redirects=False,
            raise_error=False,
        )
        for line in page.headers.get_list("Set-Cookie"):
            jar.load(line)
    cookies = "; ".join(f"{name}={morsel.coded_value}" for name, morsel in jar.items())
    return {"Cookie": cookies, "X-XSRFToken": jar["_xsrf"].value}


@pytest.mark.parametrize("isolation", MODES)
async def test_budgets_hold_over_a_restart_whichever_way_one_comes_in(
    isolation: str, tmp_path: Path, models: Path
) -> None:
    options = (
        f"--ShimmyEngine.isolation={isolation}",
        f"--ShimmyLimits.max_tokens_per_minute={3 * ANSWER + 10}",
        f"--ShimmyLimits.max_tokens_per_day={3 * ANSWER + 10}",
    )
    question = {**ASK, "max_tokens": 11, "temperature": 0}
    for again in (False, True):
        with serving(tmp_path, models, *options) as server:
            cookies = await browser(server)
            ways: list[dict[str, Any]] = [
                {},
                {"headers": cookies},
                {"headers": {}, "query": f"?token={server.token}"},
            ]
            # Three answers fit, one of each way; after the restart, and a fourth, none does.
            for way in [*ways, {}] if not again else ways:
                told = await post(server, question, **way)
                left = (await server.request("GET", "shimmy/api/limits"))["limits"]
                used = left["max_tokens_per_minute"]["used"]
                if told.code == 200:
                    assert json.loads(told.body)["usage"]["total_tokens"] == ANSWER
                    assert told.headers["x-ratelimit-remaining-tokens"] == str(
                        3 * ANSWER + 10 - used
                    )
                else:
                    assert told.code == 429, told.body
                    assert json.loads(told.body)["error"]["code"] == "rate_limit_exceeded"
                    assert 0 < int(told.headers["Retry-After"]) <= 86_400
                    assert used == 3 * ANSWER
                    assert left["max_tokens_per_day"]["limit"] == 3 * ANSWER + 10
    outcomes = [end["outcome"] for end in ends_in(ledger_of(tmp_path)).values()]
    assert outcomes == ["ok"] * 3 + ["limited"] * 4
    assert verify(ledger_of(tmp_path)).ok


# Killed


@dataclass
class Load:
    """What clients of a server have been told until it was gone."""

    receipts: list[dict[str, Any]] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)
    """Ids of requests whose first token has come."""
    long: set[str] = field(default_factory=set)
    """Those of them that cannot have ended."""
    full: asyncio.Event = field(default_factory=asyncio.Event)

    async def client(self, server: RunningServer, *, long: bool) -> None:
        connection = Connection(server.url, f"token {server.token}")
        try:
            while True:
                most = LONG if long else 4
                await connection.send("shimmy/v1/completions", words("tell me", most, stream=True))
                status, headers = await connection.head()
                assert status == 200
                await self._read(connection, headers, long=long)
        except (OSError, EOFError):
            return
        finally:
            connection.close()

    async def _read(self, connection: Connection, headers: dict[str, str], *, long: bool) -> None:
        id, text = headers["x-shimmy-request-id"], b""
        async for piece in connection.pieces(headers):
            if b'"text":"' in piece and b'"text":""' not in piece:
                self.begun.add(id)
                if long:
                    self.long.add(id)
            text += piece
            if len(self.long) == 12 and len(self.receipts) >= 60:
                self.full.set()
        for event in text.split(b"\n\n"):
            if b'"shimmy"' in event:
                self.receipts.append(json.loads(event.partition(b"data: ")[2])["shimmy"]["receipt"])


async def kill_amid_load(folder: Path, models: Path, *options: str) -> Load:
    load = Load()
    with serving(folder, models, *options) as server:
        assert (await post(server, words("x", 1), "shimmy/v1/completions")).code == 200
        clients = [
            asyncio.create_task(load.client(server, long=number < 12)) for number in range(24)
        ]
        try:
            async with asyncio.timeout(60):
                full = asyncio.create_task(load.full.wait())
                await asyncio.wait([full, *clients], return_when=asyncio.FIRST_COMPLETED)
                assert full.done(), [client for client in clients if client.done()]
            process = psutil.Process(server.pid)
            everyone = [process, *process.children(recursive=True)]
            for one in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()
    return load


def reserved(folder: Path) -> tuple[dict[str, int], int]:
    """Tokens of what is open, by request, and tokens that have been settled."""
    path = folder / "shimmy_jupyter" / "limits.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT id, tokens FROM reservations").fetchall()
        rows = {id.partition(":")[0]: tokens for id, tokens in found}
        ((settled,),) = connection.execute("SELECT sum(tokens) FROM days").fetchall()
    return rows, settled


@pytest.mark.parametrize("isolation", MODES)
async def test_a_killed_server_has_lost_no_acknowledged_request(
    isolation: str, tmp_path: Path, models: Path
) -> None:
    options = (f"--ShimmyEngine.isolation={isolation}", "--ShimmyLimits.max_tokens_per_day=1000000")
    load = await kill_amid_load(tmp_path, models, *options)
    assert len(load.receipts) >= 60
    rows, settled = reserved(tmp_path)
    count = 7  # "tell me" is a token each of its bytes
    assert {rows.get(id) for id in load.long} == {count + LONG}
    with serving(tmp_path, models, *options) as server:
        verdict = json.loads((await post(server, {}, "shimmy/api/audit/verify")).body)
        assert verdict["ok"], verdict
        assert verdict["open_requests"] >= len(load.long)
        used = (await server.request("GET", "shimmy/api/limits"))["limits"]["max_tokens_per_day"]
        assert used["used"] == settled + sum(rows.values())
        assert reserved(tmp_path)[0] == {}
        after = await post(server, words("x", 1), "shimmy/v1/completions")
        assert after.code == 200
        seq = json.loads(after.body)["shimmy"]["receipt"]["seq"]
        assert seq > verdict["head"]["size"]
        body = {"against": verdict["head"]}
        later = json.loads((await post(server, body, "shimmy/api/audit/verify")).body)
        assert (later["ok"], later["anchored"]) == (True, True)
    path = ledger_of(tmp_path)
    with contextlib.closing(Ledger(path)) as ledger:
        leaves = {one.seq: one.leaf_hash for one in ledger.stored(Query(), limit=100_000)}
    found = records_of(path)
    begins = [r["request_id"] for r in found if r["kind"] == "begin"]
    ends = ends_in(path)
    assert len(begins) == len(set(begins))
    assert load.begun <= set(begins)
    for receipt in load.receipts:
        assert leaves[receipt["seq"]] == receipt["leaf_hash"]
        assert ends[receipt["request_id"]]["outcome"] == "ok"
    assert not load.long & ends.keys()
    # Nothing that has ended, and nothing that had begun to be answered, is free.
    spent = sum(end["prompt_tokens"] + end["tokens_generated"] for end in ends.values())
    assert settled + sum(rows.values()) >= spent - 2 + len(load.long) * (count + LONG)


# One server


@pytest.fixture(scope="module", params=MODES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp(f"data-{request.param}")
    return made


@pytest.fixture(scope="module")
def server(folder: Path, models: Path) -> Iterator[RunningServer]:
    isolation = folder.name.split("-")[1].rstrip("0123456789")
    limited = "--ShimmyLimits.max_tokens_per_day=1000000"
    with serving(folder, models, f"--ShimmyEngine.isolation={isolation}", limited) as running:
        yield running


async def used_today(server: RunningServer) -> int:
    limits = (await server.request("GET", "shimmy/api/limits"))["limits"]
    return int(limits["max_tokens_per_day"]["used"])


async def end_of(server: RunningServer, id: str) -> dict[str, Any]:
    """The end's record, once it is there."""
    async with asyncio.timeout(30):
        while True:
            found = await server.request("GET", f"shimmy/api/audit?request_id={id}&kind=end")
            if found["records"]:
                (record,) = found["records"]
                return dict(record)


async def idle(server: RunningServer) -> None:
    """The engine has let go of everything."""
    async with asyncio.timeout(30):
        while (await server.request("GET", "shimmy/health"))["active"]:
            pass


class TestOneServer:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_deadline_stops_the_work_and_settles(
        self, stream: bool, server: RunningServer
    ) -> None:
        await post(server, words("x", 1), "shimmy/v1/completions")
        before = await used_today(server)
        body = words("go on", LONG, max_seconds=STOPPED, stream=stream)
        told = await post(server, body, "shimmy/v1/completions")
        assert b"deadline_exceeded" in told.body
        end = await end_of(server, told.headers["x-shimmy-request-id"])
        assert (end["outcome"], end["code"]) == ("error", "deadline_exceeded")
        assert 0 < end["tokens_generated"] < LONG
        assert 1e3 * STOPPED <= end["duration_ms"] < 1e4
        await idle(server)
        assert await used_today(server) - before == end["prompt_tokens"] + end["tokens_generated"]

    async def test_a_stream_that_is_left_is_settled_with_what_it_has_had(
        self, server: RunningServer
    ) -> None:
        before = await used_today(server)
        connection = Connection(server.url, f"token {server.token}")
        await connection.send("shimmy/v1/completions", words("go on", LONG, stream=True))
        _, headers = await connection.head()
        text = b""
        async for piece in connection.pieces(headers):
            text += piece
            if text.count(b"data:") >= 10:
                break
        connection.close()
        end = await end_of(server, headers["x-shimmy-request-id"])
        assert (end["outcome"], end["code"]) == ("cancelled", "cancelled")
        # A token of this model is a letter and a number.
        whole = [event for event in text.split(b"\n\n")[:-1] if event.startswith(b"data:")]
        had = sum(
            sum(map(str.isalpha, json.loads(event[5:])["choices"][0]["text"])) for event in whole
        )
        assert had > 0
        assert had <= end["tokens_generated"] < LONG
        await idle(server)
        assert await used_today(server) - before == end["prompt_tokens"] + end["tokens_generated"]

    @pytest.mark.parametrize("name", ["self-test", "words"])
    async def test_records_have_the_model_s_digest(
        self, name: str, server: RunningServer, models: Path
    ) -> None:
        path = BUNDLED if name == "self-test" else models / "words.gguf"
        body = {"model": name, "prompt": "x", "max_tokens": 2}
        told = await post(server, body, "shimmy/v1/completions")
        end = await end_of(server, told.headers["x-shimmy-request-id"])
        assert end["model_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    async def test_records_have_what_came_from_the_cache(self, server: RunningServer) -> None:
        cached = []
        for _ in range(2):
            body = words("All of this is asked for twice. " * 8, 2)
            told = await post(server, body, "shimmy/v1/completions")
            usage = json.loads(told.body)["usage"]
            end = await end_of(server, told.headers["x-shimmy-request-id"])
            assert end["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
            assert end["prompt_tokens"] == usage["prompt_tokens"]
            cached.append((end["cached_tokens"], end["prompt_tokens"]))
        (first, _), (second, prompt) = cached
        assert first == 0
        assert prompt // 2 < second < prompt

    async def test_a_receipt_proves_itself(self, server: RunningServer) -> None:
        told = json.loads((await post(server, {**ASK, "max_tokens": 2})).body)
        receipt = told["shimmy"]["receipt"]
        path = f"shimmy/api/audit/receipts/{receipt['request_id']}"
        document = await server.request("GET", path)
        verdict = json.loads((await post(server, {}, "shimmy/api/audit/verify")).body)
        head = Head.from_json(verdict["head"])
        proven = verify_receipt(document, head)
        assert (proven.ok, proven.records, proven.anchored) == (True, 2, True)
        _, end = document["records"]
        assert (end["seq"], end["leaf_hash"]) == (receipt["seq"], receipt["leaf_hash"])
        assert json.loads(end["body"])["tokens_generated"] == told["usage"]["completion_tokens"]
        end["body"] = end["body"].replace('"tokens_generated":2', '"tokens_generated":1')
        changed = verify_receipt(document, head)
        assert (changed.ok, changed.first_bad) == (False, receipt["seq"])


# The service, with a clock of its own


@contextlib.asynccontextmanager
async def service(
    folder: Path, models: Path, limits: Limits, isolation: str = "none", now: float | None = None
) -> AsyncIterator[CompletionService]:
    guard = GuardSettings(
        limits=(LimitTable(limits),),
        spending=folder / "limits.sqlite",
        audit=AuditSettings(folder / "ledger.sqlite"),
    )
    settings = Settings(
        isolation=isolation, places=Places(roots=(models,)), prompt_lookup=False, guard=guard
    )
    made = build_service(settings)
    if now is not None:
        made.guard.clock = lambda: now
    try:
        yield made
    finally:
        await made.close()


def request(id: str, max_tokens: int, **more: Any) -> CompletionRequest:
    return CompletionRequest(id, ANN, "words", "go on", max_tokens, Sampling(seed=1), **more)


MIDNIGHT = 20_778 * 86_400.0


async def test_a_day_s_budget_is_there_again_at_midnight(tmp_path: Path, models: Path) -> None:
    limits = Limits(tokens_per_day=30)
    async with service(tmp_path, models, limits, now=MIDNIGHT - 7200) as one:
        async with await one.start(request("first", 20)) as completion:
            await completion.text()
            await completion.finish()
        with pytest.raises(RateLimitExceeded) as caught:
            await one.start(request("second", 20))
        assert caught.value.retry_after == 7200
    async with service(tmp_path, models, limits, now=MIDNIGHT - 1) as one:
        with pytest.raises(RateLimitExceeded) as caught:
            await one.start(request("third", 20))
        assert (caught.value.retry_after, caught.value.limit) == (1, "max_tokens_per_day")
    async with (
        service(tmp_path, models, limits, now=MIDNIGHT) as one,
        await one.start(request("fourth", 20)) as completion,
    ):
        await completion.text()
        await completion.finish()
    ends = ends_in(tmp_path / "ledger.sqlite")
    assert {id: end["outcome"] for id, end in ends.items()} == {
        "first": "ok",
        "second": "limited",
        "third": "limited",
        "fourth": "ok",
    }


@pytest.mark.parametrize("isolation", MODES)
async def test_an_administrator_s_deadline_stops_the_engine(
    isolation: str, tmp_path: Path, models: Path
) -> None:
    async with service(
        tmp_path, models, Limits(seconds=STOPPED, tokens_per_day=10_000), isolation
    ) as one:
        # Loading counts, too: so that there is something to stop.
        await one.pool.resident("words")
        with pytest.raises(DeadlineExceeded):
            async with await one.start(request("long", LONG, max_seconds=100.0)) as completion:
                await completion.text()
        (ended,) = completion.endings
        (model,) = one.pool.loaded()
        assert not model.engine.scheduler.sequences
        left = await one.guard.limits(ANN)
        settled = left["limits"]["max_tokens_per_day"]["used"]
    ends = ends_in(tmp_path / "ledger.sqlite")
    end = ends["long"]
    assert (end["outcome"], end["code"]) == ("error", "deadline_exceeded")
    assert end["tokens_generated"] == ended.usage.completion_tokens > 0
    assert settled == sum(
        e.get("prompt_tokens", 0) + e.get("tokens_generated", 0) for e in ends.values()
    )


@pytest.mark.parametrize("isolation", MODES)
async def test_what_is_left_has_cost_what_the_engine_has_made(
    isolation: str, tmp_path: Path, models: Path
) -> None:
    async with service(tmp_path, models, Limits(tokens_per_day=10_000), isolation) as one:
        async with await one.start(request("left", LONG)) as completion:
            read = 0
            while read < 20:
                read += sum(len(delta.text) > 0 for delta in await completion.read())
        await completion.finish()
        (model,) = one.pool.loaded()
        made = model.engine.statistics.tokens
        left = await one.guard.limits(ANN)
    end = ends_in(tmp_path / "ledger.sqlite")["left"]
    assert (end["outcome"], end["tokens_generated"]) == ("cancelled", made)
    assert 20 <= made < LONG
    assert left["limits"]["max_tokens_per_day"]["used"] == end["prompt_tokens"] + made
