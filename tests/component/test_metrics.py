"""What `/metrics` says after what was done.

Cases: a chat, streamed and not, with choices, with a prompt seen before: each figure moves by the
answer's own, once; vectors; a wrong body; denied and limited, with the reason; acts, allowed and denied;
cancelled amid its answer; with no ledger; no name of a user, model or notebook anywhere, and no label but
the few; gauges while requests run and wait, and after; steps by their size, counted on when the model is
gone; jobs by how they ended; the ledger's size and lag, on a disk that hangs, where it cannot be written;
twice attached, twice detached, two services, a restart in one process; a listener that fails; nobody
without the token.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tornado.httpclient import HTTPClientError

from shimmy_jupyter.administration import Administration
from shimmy_jupyter.audit.ledger import Ledger
from shimmy_jupyter.completion import Completion
from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.core.policy import Policy, Rule
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import AccessDenied, ModelLoadFailed
from shimmy_jupyter.guard.asked import Asked
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.guard.spending import Spending
from shimmy_jupyter.models.jobs import Job
from shimmy_jupyter.models.library import ModelLibrary
from shimmy_jupyter.models.lifecycle import ModelPool
from shimmy_jupyter.server.metrics import Metrics
from shimmy_jupyter.service import CompletionService
from shimmy_jupyter.types import CompletionRequest, EmbeddingFacts, Message, Principal

from ..offered import catalog, found
from .conftest import MODEL, Fakes, chat, no_puller

pytestmark = pytest.mark.parametrize("fakes", ["in process"], indirect=True)

CHAT = ("shimmy", "v1", "chat", "completions")
NAME = "somebody-with-a-name"
LABELS = {"route", "code", "reason", "kind", "outcome", "le"}
Values = Mapping[str, float]


@pytest.fixture
def rules() -> Rules:
    return Rules()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger | None:
    return Ledger(tmp_path / "state" / "ledger.sqlite")


@pytest.fixture
def guard(rules: Rules, ledger: Ledger | None) -> Guard:
    return Guard(rules, Spending(None), ledger)


def service_of(fakes: Fakes, guard: Guard) -> CompletionService:
    pool = ModelPool(catalog(found(MODEL, Path("fake.gguf"))), fakes.load)
    library = ModelLibrary(pool, None, no_puller)
    return CompletionService(pool, library, guard=guard, default_max_tokens=64)


def extension_of(serverapp: Any) -> Any:
    (extension,) = serverapp.extension_manager.extension_apps["shimmy_jupyter"]
    return extension


@pytest.fixture
def service(jp_serverapp: Any, fakes: Fakes, guard: Guard) -> Any:
    """That of the running server, which watches it."""
    service = service_of(fakes, guard)
    extension = extension_of(jp_serverapp)
    extension.service = service
    extension.watch()
    jp_serverapp.web_app.settings["shimmy_service"] = service
    yield service
    fakes.check()


def values_in(text: str) -> dict[str, float]:
    """By name and labels, as they are written."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("shimmy_") and not sample.name.endswith("_created"):
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def moved(before: Values, after: Values, *, times: bool = False) -> dict[str, float]:
    """What is other than before; sums and buckets of times only where they are asked for."""
    names = sorted(before.keys() | after.keys())
    found = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in names}
    return {
        name: value
        for name, value in found.items()
        if value and (times or not ("seconds_sum" in name or "_bucket" in name))
    }


@pytest.fixture
def scrape(jp_fetch: Any) -> Callable[[], Any]:
    async def scrape() -> dict[str, float]:
        return values_in((await jp_fetch("metrics")).body.decode())

    return scrape


def counted(values: Values) -> dict[str, float]:
    """Without gauges and steps."""
    gauges = ("queue", "kv", "models", "ledger", "batch")
    return {n: v for n, v in values.items() if n.split("_")[1] not in gauges}


def request(prompt: str = "one two three", who: str = NAME, **fields: Any) -> CompletionRequest:
    messages = (Message("user", prompt),)
    return CompletionRequest("id-" + prompt[:8], Principal(who), MODEL, messages, **fields)


async def drained(guard: Guard) -> None:
    while guard._tasks:
        await asyncio.wait(guard._tasks)


async def refused(jp_fetch: Any, *path: str, **fetch: Any) -> dict[str, Any]:
    with pytest.raises(HTTPClientError) as caught:
        await jp_fetch(*path, method="POST", **fetch)
    error: dict[str, Any] = json.loads(caught.value.response.body)["error"]
    return error


class TestRequests:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_chat(self, service: Any, jp_fetch: Any, scrape: Any, stream: bool) -> None:
        before = await scrape()
        body = chat(stream=stream, stream_options={"include_usage": True} if stream else None)
        answer = (await jp_fetch(*CHAT, method="POST", body=body)).body.decode()
        if stream:
            lines = [ln[6:] for ln in answer.splitlines() if ln.startswith("data: {")]
            usage = next(u for ln in lines if (u := json.loads(ln).get("usage")))
        else:
            usage = json.loads(answer)["usage"]
        await drained(service.guard)
        assert usage["completion_tokens"] >= 3
        assert counted(moved(before, await scrape())) == {
            "shimmy_requests_total{code=ok,route=chat}": 1,
            "shimmy_tokens_total{kind=prompt}": usage["prompt_tokens"],
            "shimmy_tokens_total{kind=completion}": usage["completion_tokens"],
            "shimmy_request_seconds_count{route=chat}": 1,
            "shimmy_time_to_first_token_seconds_count": 1,
            "shimmy_inter_token_seconds_count": 1,
        }

    async def test_figures_are_those_of_the_record(self, service: Any, scrape: Any) -> None:
        heard: list[Any] = []
        service.guard.watchers.append(lambda *what: heard.append(what))
        before = await scrape()
        async with await service.start(request()) as completion:
            await completion.text()
            await completion.finish()
        entry, route, aside = heard[-1]
        after = moved(before, await scrape(), times=True)
        rate = completion.ended.timings.tokens_per_second
        assert (entry.kind, route) == ("end", "completions")
        assert aside.token_seconds == pytest.approx(1 / rate)
        assert after["shimmy_inter_token_seconds_sum"] == pytest.approx(1 / rate)
        whole = after["shimmy_request_seconds_sum{route=completions}"]
        assert whole == pytest.approx(entry.duration_ms / 1000)
        first = after["shimmy_time_to_first_token_seconds_sum"]
        assert first == pytest.approx(entry.time_to_first_token_ms / 1000)

    async def test_choices_and_a_prompt_seen_before(self, service: Any, scrape: Any) -> None:
        long = "word " * 60
        async with await service.start(request(long)) as completion:
            await completion.text()
            await completion.finish()
        before = await scrape()
        async with await service.start(request(long, n=3)) as completion:
            while await completion.read():
                pass
            await completion.finish()
        usage = completion.usage
        assert usage.cached_tokens > 0
        found = moved(before, await scrape())
        assert found["shimmy_tokens_total{kind=prompt}"] == usage.prompt_tokens
        assert found["shimmy_tokens_total{kind=cached}"] == usage.cached_tokens
        assert found["shimmy_tokens_total{kind=completion}"] == usage.completion_tokens > 150
        assert found["shimmy_inter_token_seconds_count"] == 1

    async def test_vectors(self, service: Any, jp_fetch: Any, scrape: Any, fakes: Fakes) -> None:
        fakes.make = lambda: FakeBackend(embedding=EmbeddingFacts("mean", 4, 64, 64, 4))
        before = await scrape()
        body = json.dumps({"model": MODEL, "input": ["one", "three"]})
        answer = await jp_fetch("shimmy", "v1", "embeddings", method="POST", body=body)
        usage = json.loads(answer.body)["usage"]
        assert counted(moved(before, await scrape())) == {
            "shimmy_requests_total{code=ok,route=embeddings}": 1,
            "shimmy_tokens_total{kind=prompt}": usage["prompt_tokens"],
            "shimmy_request_seconds_count{route=embeddings}": 1,
        }

    async def test_a_wrong_body(self, service: Any, jp_fetch: Any, scrape: Any) -> None:
        before = await scrape()
        error = await refused(jp_fetch, *CHAT, body=chat(temperature="hot"))
        assert counted(moved(before, await scrape())) == {
            f"shimmy_requests_total{{code={error['code']},route=chat}}": 1,
            "shimmy_request_seconds_count{route=chat}": 1,
        }

    async def test_cancelled_amid_its_answer(
        self, service: Any, scrape: Any, fakes: Fakes, guard: Guard
    ) -> None:
        gate = threading.Semaphore(3)
        fakes.make = lambda: FakeBackend(gate=gate)
        before = await scrape()
        async with await service.start(request("a b c d e f g h")) as completion:
            await completion.read()
        await drained(guard)
        found = moved(before, await scrape())
        assert found["shimmy_requests_total{code=cancelled,route=completions}"] == 1
        assert "shimmy_requests_total{code=ok,route=completions}" not in found
        generated = completion.usage.completion_tokens
        assert 0 < generated < 8
        assert found["shimmy_tokens_total{kind=completion}"] == generated
        gate.release(100)

    @pytest.mark.parametrize("ledger", [None])
    async def test_without_a_ledger(self, service: Any, jp_fetch: Any, scrape: Any) -> None:
        before = await scrape()
        await jp_fetch(*CHAT, method="POST", body=chat())
        after = await scrape()
        assert moved(before, after)["shimmy_requests_total{code=ok,route=chat}"] == 1
        assert after["shimmy_ledger_lag"] == 0
        assert "shimmy_ledger_records" not in after


class TestRefusals:
    @pytest.mark.parametrize("rules", [Rules([Policy((Rule(allow=False, models=("fa*",)),))])])
    async def test_denied(self, service: Any, jp_fetch: Any, scrape: Any) -> None:
        before = await scrape()
        error = await refused(jp_fetch, *CHAT, body=chat())
        assert error["code"] == "policy_denied"
        assert counted(moved(before, await scrape())) == {
            "shimmy_requests_total{code=policy_denied,route=chat}": 1,
            "shimmy_denied_total{reason=policy:model}": 1,
            "shimmy_request_seconds_count{route=chat}": 1,
        }

    @pytest.mark.parametrize("rules", [Rules([Policy(ceilings={"max_tokens": 5})])])
    async def test_above_a_ceiling(self, service: Any, jp_fetch: Any, scrape: Any) -> None:
        before = await scrape()
        await refused(jp_fetch, *CHAT, body=chat(max_tokens=6))
        assert moved(before, await scrape())["shimmy_denied_total{reason=policy:max_tokens}"] == 1

    @pytest.mark.parametrize("rules", [Rules(limits=[LimitTable(Limits(requests_per_minute=1))])])
    async def test_limited(self, service: Any, jp_fetch: Any, scrape: Any) -> None:
        await jp_fetch(*CHAT, method="POST", body=chat())
        before = await scrape()
        await refused(jp_fetch, *CHAT, body=chat())
        found = moved(before, await scrape())
        assert found["shimmy_denied_total{reason=limit:max_requests_per_minute}"] == 1
        assert found["shimmy_requests_total{code=rate_limit_exceeded,route=chat}"] == 1

    @pytest.mark.parametrize("rules", [Rules([Policy((Rule(allow=False, actions=("load",)),))])])
    async def test_an_act(self, service: Any, scrape: Any) -> None:
        before, asked = await scrape(), Asked(Principal(NAME), "id", "act")
        work = Administration(service.library, service.guard)
        with pytest.raises(AccessDenied):
            await work.load(MODEL, asked)
        assert counted(moved(before, await scrape())) == {
            "shimmy_denied_total{reason=policy:model}": 1
        }
        await (await work.unload(MODEL, asked)).wait()
        after = counted(moved(before, await scrape()))
        assert after == {"shimmy_denied_total{reason=policy:model}": 1}


async def test_nobody_is_named(service: Any, jp_fetch: Any, guard: Guard) -> None:
    mine = Principal(NAME, groups=("a-group-of-theirs",))
    asked = Asked(mine, "an-id", "chat", "198.51.100.7", "/a/path", "notes.ipynb", "cell-9")
    async with await service.start(request(), visit=service.visit(asked)) as completion:
        await completion.text()
        await completion.finish()
    await guard.act(asked, "unload", MODEL)
    text = (await jp_fetch("metrics")).body.decode()
    ours = [line for line in text.splitlines() if "shimmy_" in line]
    assert any('route="chat"' in line for line in ours)
    for secret in (NAME, "a-group", "an-id", "198.51", "a/path", "notes", "cell-9", f'"{MODEL}"'):
        assert not [line for line in ours if secret in line], secret
    for family in text_string_to_metric_families(text):
        if family.name.startswith("shimmy_"):
            assert {label for s in family.samples for label in s.labels} <= LABELS


class Gate(threading.Semaphore):
    """Knows how many steps have come to it: what is before a step has been done by then."""

    asked = 0

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        self.asked += 1
        return super().acquire(blocking, timeout)

    async def reached(self, step: int) -> None:
        while self.asked < step:
            await asyncio.sleep(0.001)


class TestGauges:
    async def test_while_they_run_and_wait(
        self, service: Any, scrape: Any, fakes: Fakes, guard: Guard
    ) -> None:
        gate = Gate(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        fakes.spec = fakes.spec.__class__(path="", sequences=2)
        before = await scrape()
        async with started(service, 5) as (completions, model):
            await gate.reached(1)
            while (running := model.engine.snapshot().running) < 2:  # the first began alone
                step = gate.asked + 1
                gate.release()
                await gate.reached(step)
            assert 2 <= running < 5
            now = await scrape()
            prompt = completions[0].prompt_tokens
            assert now["shimmy_queue_depth"] == 5 - running
            assert now["shimmy_kv_tokens_used"] == running * (prompt + 7)
            assert now["shimmy_kv_tokens_capacity"] == model.facts.kv_tokens
            assert now["shimmy_models_resident"] == 1
            assert now["shimmy_models_resident_bytes"] == model.memory_bytes > 0
            gate.release(1000)
            for completion in completions:
                await completion.text()
                await completion.finish()
        after = await scrape()
        assert after["shimmy_queue_depth"] == after["shimmy_kv_tokens_used"] == 0
        steps = moved(before, after, times=True)
        assert steps["shimmy_batch_size_count"] == len(fakes.made[0].batches)
        assert steps["shimmy_batch_size_sum"] == sum(fakes.made[0].batches)
        ones = sum(size == 1 for size in fakes.made[0].batches)
        assert steps.get("shimmy_batch_size_bucket{le=1.0}", 0) == ones
        assert steps["shimmy_batch_size_bucket{le=4.0}"] == len(fakes.made[0].batches)

    async def test_a_model_that_is_gone_stays_counted(
        self, service: Any, scrape: Any, fakes: Fakes
    ) -> None:
        """Nobody has looked while it was there."""
        before = await scrape()
        async with await service.start(request()) as completion:
            await completion.text()
            await completion.finish()
        await service.pool.unload(MODEL)
        after = await scrape()
        assert after["shimmy_models_resident"] == after["shimmy_kv_tokens_capacity"] == 0
        steps = moved(before, after)["shimmy_batch_size_count"]
        assert steps == len(fakes.made[0].batches) > 0
        async with await service.start(request()) as completion:
            await completion.text()
            await completion.finish()
        again = moved(after, await scrape())["shimmy_batch_size_count"]
        assert again == len(fakes.made[1].batches)

    @pytest.mark.parametrize("rules", [Rules(limits=[LimitTable(Limits(concurrent=1))])])
    async def test_who_waits_for_their_own_turn(
        self, service: Any, scrape: Any, guard: Guard
    ) -> None:
        async with await service.start(request()) as completion:
            waiting = asyncio.create_task(service.start(request("later")))
            while not guard.turns:
                await asyncio.sleep(0)
            assert (await scrape())["shimmy_queue_depth"] >= 1
            await completion.text()
            await completion.finish()
        async with await waiting as other:
            await other.text()
            await other.finish()
        assert (await scrape())["shimmy_queue_depth"] == 0


@asynccontextmanager
async def started(
    service: CompletionService, count: int
) -> AsyncIterator[tuple[list[Completion], Any]]:
    completions = [
        await service.start(request(f"p{i} " + "q " * 20, who=f"u{i}", max_tokens=7))
        for i in range(count)
    ]
    (model,) = service.pool.loaded()
    try:
        yield completions, model
    finally:
        for completion in completions:
            await completion.finish()


class TestJobs:
    async def test_by_how_they_ended(self, service: Any, scrape: Any, fakes: Fakes) -> None:
        jobs, me = service.library.jobs, Principal(NAME)

        async def found(_report: Any) -> Mapping[str, Any]:
            return {"outcome": "crashed"}

        async def failing(_report: Any) -> None:
            raise ModelLoadFailed("no")

        async def for_ever(_report: Any) -> None:
            await asyncio.Event().wait()

        before = await scrape()
        (endless,) = (jobs.start("pull", "c", me, for_ever),)
        others: list[Job] = [
            jobs.start("probe", "a", me, found),
            jobs.start("probe", "a", me, failing),
            jobs.start("pull", "b", me, failing),
            jobs.start("verify", "b", me, failing),
            await service.library.load(MODEL, me),
        ]
        unbegun = jobs.start("load", "d", me, for_ever)
        jobs.cancel(unbegun.id, me)
        for job in (*others, unbegun):
            await job.wait()
        jobs.cancel(endless.id, me)
        await endless.wait()
        assert counted(moved(before, await scrape())) == {
            "shimmy_probes_total{outcome=crashed}": 1,
            "shimmy_probes_total{outcome=failed}": 1,
            "shimmy_pulls_total{outcome=failed}": 1,
            "shimmy_pulls_total{outcome=cancelled}": 1,
            "shimmy_loads_total{outcome=done}": 1,
            "shimmy_loads_total{outcome=cancelled}": 1,
        }


class TestLedger:
    async def test_size_and_lag(
        self, service: Any, scrape: Any, jp_fetch: Any, ledger: Any
    ) -> None:
        before = await scrape()
        assert not ledger.path.exists()  # asking does not make it
        assert before["shimmy_ledger_records"] == before["shimmy_ledger_bytes"] == 0
        await jp_fetch(*CHAT, method="POST", body=chat())
        await drained(service.guard)
        after = await scrape()
        assert after["shimmy_ledger_records"] == ledger.size == 3  # begin, end, and the policy's
        assert after["shimmy_ledger_bytes"] == ledger.bytes > 0
        assert after["shimmy_ledger_lag"] == 0

    async def test_a_disk_that_hangs(
        self, service: Any, scrape: Any, jp_fetch: Any, monkeypatch: Any
    ) -> None:
        await jp_fetch(*CHAT, method="POST", body=chat())
        await drained(service.guard)
        known = (await scrape())["shimmy_ledger_records"]
        hang, begun = threading.Event(), []
        head = Ledger.head

        def hangs(self: Ledger) -> Any:
            begun.append(1)
            hang.wait()
            return head(self)

        monkeypatch.setattr(Ledger, "head", hangs)
        await jp_fetch(*CHAT, method="POST", body=chat())
        start = time.monotonic()
        for _ in range(3):
            assert (await scrape())["shimmy_ledger_records"] == known
        assert time.monotonic() - start < 5
        assert len(begun) == 1  # asked again only once it has answered
        hang.set()
        monkeypatch.undo()
        while (await scrape())["shimmy_ledger_records"] == known:
            await asyncio.sleep(0)

    async def test_where_it_cannot_be_written(
        self, service: Any, scrape: Any, jp_fetch: Any, ledger: Any
    ) -> None:
        ledger.path.mkdir(parents=True)
        before = await scrape()
        await jp_fetch(*CHAT, method="POST", body=chat())
        await drained(service.guard)
        after = await scrape()
        assert moved(before, after)["shimmy_ledger_failures_total"] == 2  # begin and end
        assert "shimmy_ledger_records" not in after
        assert moved(before, after)["shimmy_requests_total{code=ok,route=chat}"] == 1


class TestRegistry:
    async def test_a_restart_in_the_same_process(
        self, service: Any, jp_serverapp: Any, jp_fetch: Any, scrape: Any, fakes: Fakes
    ) -> None:
        await jp_fetch(*CHAT, method="POST", body=chat())
        before = await scrape()
        extension = extension_of(jp_serverapp)
        await extension.stop_extension()
        assert b"\nshimmy_" not in generate_latest(REGISTRY)
        assert service.guard.watchers == service.library.jobs.watchers == []
        await extension.stop_extension()
        extension.service = other = service_of(fakes, Guard())
        extension.watch()
        jp_serverapp.web_app.settings["shimmy_service"] = other
        assert counted(moved(before, await scrape())) == {}
        await jp_fetch(*CHAT, method="POST", body=chat())
        found = moved(before, await scrape())
        assert found["shimmy_requests_total{code=ok,route=chat}"] == 1
        assert found["shimmy_batch_size_count"] == len(fakes.made[1].batches)

    async def test_several_services_and_twice(self, fakes: Fakes) -> None:
        registry = CollectorRegistry(auto_describe=True)
        metrics = Metrics(registry)
        first, second = service_of(fakes, Guard()), service_of(fakes, Guard())
        stops = [metrics.attach(one) for one in (first, second, first)]
        for service in (first, second):
            async with await service.start(request()) as completion:
                await completion.text()
                await completion.finish()
        values = values_in(generate_latest(registry).decode())
        assert values["shimmy_requests_total{code=ok,route=completions}"] == 2
        assert values["shimmy_models_resident"] == 2
        assert values["shimmy_batch_size_count"] == sum(len(f.batches) for f in fakes.made)
        stops[0]()
        stops[2]()
        left = values_in(generate_latest(registry).decode())
        assert left["shimmy_models_resident"] == 1
        assert left["shimmy_batch_size_count"] == values["shimmy_batch_size_count"]
        stops[1]()
        assert generate_latest(registry) == b""
        again = metrics.attach(first)
        whole = values_in(generate_latest(registry).decode())
        assert whole["shimmy_requests_total{code=ok,route=completions}"] == 2
        assert whole["shimmy_batch_size_count"] == values["shimmy_batch_size_count"]
        again()
        await first.close()
        await second.close()

    async def test_failures_of_a_service_that_is_gone_stay(
        self, fakes: Fakes, tmp_path: Path
    ) -> None:
        path = tmp_path / "ledger.sqlite"
        path.mkdir()
        registry = CollectorRegistry(auto_describe=True)
        metrics = Metrics(registry)
        service = service_of(fakes, Guard(ledger=Ledger(path)))
        stop = metrics.attach(service)
        async with await service.start(request()) as completion:
            await completion.text()
            await completion.finish()
        stop()
        again = metrics.attach(service)
        values = values_in(generate_latest(registry).decode())
        assert values["shimmy_ledger_failures_total"] == 2
        again()
        await service.close()

    async def test_nobody_without_the_token(self, service: Any, http_server_client: Any) -> None:
        with pytest.raises(HTTPClientError) as caught:
            await http_server_client.fetch("/a%40b/metrics", headers={})
        assert caught.value.code == 403


async def test_a_listener_that_fails_ends_nothing(
    service: Any, guard: Guard, ledger: Ledger, caplog: Any
) -> None:
    def failing(*_what: Any) -> None:
        raise ValueError

    guard.watchers.insert(0, failing)
    service.library.jobs.watchers.insert(0, failing)
    async with await service.start(request()) as completion:
        assert await completion.text()
        assert await completion.finish() is not None
    job = await service.library.load(MODEL, Principal(NAME))
    await job.wait()
    assert job.state == "done"
    await drained(guard)
    assert ledger.size == 3
    assert "not heard of by all" in caplog.text
