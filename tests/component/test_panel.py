"""The panel against a real server, over HTTP, from its own thread.

Cases: pick a model, ask, see the record, verify, receipt and usage; stop, and the server stops too; a
limit that is reached, with its code and until when; a model that the policy denies, refused with the same
code, and off the list; several compared, one of them denied; loading and unloading; one's own limits, and
locked ones; records of one's own, everybody's for an administrator; an export like the server's; a server
without a ledger; one that is gone; closing amid an answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import IdentityProvider

from shimmy_jupyter.audit.export import export
from shimmy_jupyter.audit.ledger import Query
from shimmy_jupyter.audit.verify import verify_receipt
from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.core.policy import Policy, Rule
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.models.sources import Found
from shimmy_jupyter.notebook.client import HttpTransport, Server
from shimmy_jupyter.notebook.panel.state import SECTIONS
from shimmy_jupyter.notebook.panel.widgets import Panel

from ..offered import found
from .conftest import MODEL, Ask, Clock, Fakes, People, new_guard, records, until

pytestmark = pytest.mark.parametrize("fakes", ["in process"], indirect=True)


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
def offered() -> list[Found]:
    return [found(name, Path(f"{name}.gguf")) for name in ("other-70b", MODEL)]


class Transport(HttpTransport):
    """As somebody."""

    def __init__(self, url: str, who: str) -> None:
        super().__init__(Server(url, ""))
        self._client.headers["X-Test-User"] = who

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._asked("PUT", path, body)

    def close(self) -> None:
        self._client.close()


class Desk:
    """A person at a panel. What they do happens in a thread, as the server has this one."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel

    async def press(self, button: Any) -> None:
        await asyncio.to_thread(button.click)

    async def turn(self, section: str) -> None:
        await self.press(self.panel.sections[SECTIONS.index(section)])

    async def ask(self, prompt: str) -> None:
        await asyncio.to_thread(setattr, self.panel.ask.prompt, "value", prompt)
        await self.press(self.panel.ask.ask)

    async def ended(self) -> str:
        """How the answer has."""
        await until(lambda: not self.panel.state.answer.open)
        return self.panel.state.answer.status

    async def settled(self) -> None:
        await until(lambda: not self.panel.state.asked)

    @property
    def code(self) -> str | None:
        notice = self.panel.state.notice
        return notice.problem.code if notice is not None and notice.problem is not None else None


Open = Callable[..., Any]


@pytest.fixture
def sit(
    server: Any,
    http_server_client: Any,
    jp_base_url: str,
    jp_http_port: int,
    clock: Clock,
    jp_asyncio_loop: Any,
) -> Iterator[Open]:
    opened: list[tuple[Panel, Transport]] = []

    async def sit(who: str = "ann") -> Desk:
        transport = Transport(f"http://127.0.0.1:{jp_http_port}{jp_base_url}", who)
        panel = await asyncio.to_thread(lambda: Panel(lambda: transport, wall=clock))
        opened.append((panel, transport))
        desk = Desk(panel)
        await desk.settled()
        return desk

    async def leave() -> None:
        for panel, transport in opened:
            await asyncio.to_thread(panel.close)
            assert panel.work.thread is not None
            await asyncio.to_thread(panel.work.thread.join, 10)
            assert not panel.work.thread.is_alive()
            transport.close()

    yield sit
    jp_asyncio_loop.run_until_complete(leave())


def deny(*actions: str, model: str = MODEL) -> Rules:
    return Rules((Policy((Rule(False, actions or ("use",), (model,)),)),))


async def test_pick_ask_and_see_the_record(
    sit: Open, guard: Guard, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    desk = await sit()
    panel = desk.panel
    assert [id for _, id in panel.model.options] == ["other-70b", MODEL]
    panel.model.value = "other-70b"
    await asyncio.to_thread(setattr, panel.ask.lines["seed"], "value", "0")
    await desk.ask("one **two** three")
    assert await desk.ended() == "done"
    assert "<strong>two</strong>" in panel.ask.answer.value
    figures = panel.state.answer.figures
    assert figures is not None
    assert figures.completion_tokens == 4
    begin, end = await records(guard)
    assert (end["model"], end["parameters"]["seed"], end["user"]) == ("other-70b", 0, "ann")
    assert end["seq"] == figures.receipt
    await desk.press(panel.ask.record_wanted)
    await desk.settled()
    assert end["request_id"] in panel.ask.record.value
    assert panel.ask.record.value.count("<tr>") == 3

    await desk.turn("audit")
    await desk.settled()
    assert panel.audit.page.value.count("<tr>") == 3
    for button, place in (
        (panel.audit.verify, panel.audit.verdict),
        (panel.audit.sum, panel.audit.usage),
        (panel.audit.fetch, panel.audit.receipt),
    ):
        await desk.press(button)
        await desk.settled()
        assert place.value, button.description
    assert "all are as they were written" in panel.audit.verdict.value
    assert "<svg" in panel.audit.usage.value
    panel.audit.receipt_name.value = "receipt.json"
    await desk.press(panel.audit.save)
    await desk.settled()
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    proven = verify_receipt(receipt)
    assert proven.ok
    assert [one["seq"] for one in receipt["records"]] == [begin["seq"], end["seq"]]
    # A second look compares with the first.
    await desk.press(panel.audit.verify)
    await desk.settled()
    assert "goes on from" in panel.audit.verdict.value


async def test_stop_stops_the_server_too(sit: Open, guard: Guard, fakes: Fakes) -> None:
    gate = threading.Semaphore(4)
    fakes.make = lambda: FakeBackend(lambda _: ["word "] * 500, gate=gate)
    desk = await sit()
    await desk.ask("go on")
    await until(lambda: "word" in desk.panel.state.answer.text)
    await desk.press(desk.panel.ask.stop)
    for _ in range(8):
        gate.release()
    assert await desk.ended() == "stopped"
    assert "word" in desk.panel.ask.answer.value
    await until(lambda: fakes.models[0].active == 0)
    await until(lambda: not guard._open)
    *_, end = await records(guard)
    assert (end["kind"], end["outcome"]) == ("end", "cancelled")
    gate.release(1000)
    await desk.ask("again")
    assert await desk.ended() == "done"


async def test_a_limit_says_its_code_and_until_when(sit: Open, guard: Guard, clock: Clock) -> None:
    guard.rules = Rules(limits=[LimitTable(Limits(requests_per_minute=1))])
    desk = await sit()
    assert "1 of 1 requests per minute" in desk.panel.ask.left.value
    await desk.ask("one")
    assert await desk.ended() == "done"
    await desk.settled()
    await desk.ask("two")
    assert await desk.ended() == "failed"
    await desk.settled()
    assert desk.code == "rate_limit_exceeded"
    assert "max_requests_per_minute is 1" in desk.panel.status.value
    left = desk.panel.ask.left.value
    assert "0 of 1 requests per minute (until " in left
    limits = desk.panel.state.limits.value  # type: ignore[union-attr]
    (row,) = [one for one in limits.limits if one.limit is not None]
    assert row.resets_at == clock.now + 61
    clock.now += 62
    await desk.ask("three")
    assert await desk.ended() == "done"


async def test_what_the_policy_denies(sit: Open, guard: Guard, fakes: Fakes) -> None:
    desk = await sit()
    desk.panel.model.value = MODEL
    guard.rules = deny()
    await desk.ask("hello")
    assert await desk.ended() == "failed"
    problem = desk.panel.state.answer.problem
    assert problem is not None
    assert (problem.code, problem.param) == ("policy_denied", "model")
    assert "[policy_denied]" in desk.panel.ask.answer.value
    assert fakes.made == []
    await desk.settled()
    # What one may not use is not offered, which is said.
    assert [id for _, id in desk.panel.model.options] == ["other-70b"]
    assert "other-70b is chosen instead" in desk.panel.status.value


@pytest.mark.parametrize(("action", "button"), [("load", "load"), ("unload", "unload")])
async def test_acts_that_the_policy_denies(
    sit: Open, guard: Guard, action: str, button: str
) -> None:
    guard.rules = deny(action)
    desk = await sit()
    await desk.turn("models")
    await desk.settled()
    desk.panel.models.model.value = MODEL
    await desk.press(getattr(desk.panel.models, button))
    await desk.settled()
    assert desk.code == "policy_denied"


async def test_downloads_that_are_denied(sit: Open) -> None:
    desk = await sit()
    await desk.turn("models")
    desk.panel.models.pull.value = "owner/name"
    await desk.press(desk.panel.models.start_pull)
    await desk.settled()
    assert desk.code == "policy_denied"
    assert "nothing is downloaded here" in desk.panel.status.value


async def test_comparing_where_one_is_denied(sit: Open, guard: Guard) -> None:
    desk = await sit()
    await desk.turn("compare")
    tab = desk.panel.compare
    tab.models[0].value, tab.models[1].value = MODEL, "other-70b"
    tab.prompt.value = "one two"
    guard.rules = deny()
    await desk.press(tab.compare)
    await desk.settled()
    denied, answered = desk.panel.state.comparison.answers
    assert denied.problem is not None
    assert denied.problem.code == "policy_denied"
    assert (answered.status, answered.text) == ("done", "one two ")
    assert "[policy_denied]" in tab.figures.value
    assert "one two" in tab.answers[1].value


async def test_loading_and_unloading(sit: Open, fakes: Fakes) -> None:
    desk = await sit()
    await desk.turn("models")
    await desk.settled()
    tab = desk.panel.models
    tab.model.value = MODEL
    await desk.press(tab.load)
    await until(lambda: f"{MODEL} (loaded)" in [label for label, _ in tab.model.options])
    assert "load fake" in tab.jobs.value
    await desk.press(tab.unload)
    assert desk.panel.state.confirm is not None
    await desk.press(desk.panel.yes)
    await until(lambda: f"{MODEL} (available)" in [label for label, _ in tab.model.options])
    assert not fakes.made[0].loaded


async def test_one_s_own_limits(sit: Open, guard: Guard) -> None:
    why = "set in the system's configuration: a user's can only be stricter"
    table = LimitTable(Limits(tokens_per_day=1000))
    guard.rules = Rules(limits=[table], locked={"max_tokens_per_day": why})
    desk = await sit()
    await desk.turn("limits")
    await desk.settled()
    tab = desk.panel.limits
    assert "locked by the administrator: set in the system" in tab.limits.value
    tab.name.value, tab.value.value = "max_tokens_per_day", "2000"
    await desk.press(tab.set)
    await desk.settled()
    assert desk.code == "invalid_value"
    assert "can be at most 1000, as configured" in desk.panel.status.value
    tab.value.value = "500"
    await desk.press(tab.set)
    await desk.settled()
    assert "500" in tab.limits.value
    await desk.press(tab.unset)
    await desk.settled()
    assert "1,000" in tab.limits.value
    acts = await records(guard, kind="act", user="ann")
    assert [one["detail"] for one in acts] == [
        {"own": {"max_tokens_per_day": 500}},
        {"own": {}},
    ]


class TestRecords:
    async def write(self, ask: Ask) -> None:
        for who in ("ann", "bob", "bob"):
            for _ in range(7):
                assert (await ask("v1/completions", {"model": MODEL, "prompt": ">hi"}, who)).status == 200  # fmt: skip

    async def test_one_s_own_page_by_page(self, ask: Ask, sit: Open) -> None:
        await self.write(ask)
        desk = await sit("bob")
        await desk.turn("audit")
        await desk.settled()
        tab = desk.panel.audit
        assert "page 1" in tab.page.value
        assert "ann" not in tab.page.value
        await desk.press(tab.older)
        await desk.settled()
        assert "page 2, the newest first (the last page)" in tab.page.value
        assert tab.page.value.count("<tr>") == 1 + 3
        tab.filters["user"].value = "ann"
        await desk.press(tab.apply)
        await desk.settled()
        assert desk.code == "policy_denied"
        assert "you may see your own records only" in tab.page.value
        await desk.press(tab.clear)
        await desk.settled()
        assert "page 1" in tab.page.value

    async def test_everybody_s_for_an_administrator(self, ask: Ask, sit: Open) -> None:
        await self.write(ask)
        desk = await sit("root!")
        await desk.turn("audit")
        tab = desk.panel.audit
        tab.by.value = "user"
        await desk.press(tab.sum)
        await desk.settled()
        assert "ann" in tab.usage.value
        assert "bob" in tab.usage.value
        tab.filters["user"].value, tab.filters["kind"].value = "ann", "end"
        await desk.press(tab.apply)
        await desk.settled()
        page = desk.panel.state.audit.page.value  # type: ignore[union-attr]
        assert len(page.records) == 7
        assert {one.text("user") for one in page.records} == {"ann"}

    async def test_exported_as_by_the_server(
        self, ask: Ask, sit: Open, guard: Guard, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        await self.write(ask)
        desk = await sit("ann")
        await desk.turn("audit")
        tab = desk.panel.audit
        tab.name.value, tab.format.value = "mine.jsonl", "jsonl"
        await desk.press(tab.write)
        await desk.settled()
        assert "(records: 14)" in desk.panel.status.value
        ledger = guard.ledger
        assert ledger is not None
        theirs = await asyncio.to_thread(
            lambda: b"".join(export(ledger, Query(user="ann"), "jsonl"))
        )
        mine = (tmp_path / "mine.jsonl").read_bytes()
        assert mine.splitlines() == theirs.splitlines()[::-1]
        await desk.press(tab.write)
        await desk.settled()
        assert desk.code == "file_exists"
        assert (tmp_path / "mine.jsonl").read_bytes() == mine

    async def test_only_mine(self, ask: Ask, sit: Open) -> None:
        await self.write(ask)
        desk = await sit("root!")
        await desk.ask("hello")
        assert await desk.ended() == "done"
        await desk.press(desk.panel.ask.record_wanted)
        await desk.settled()
        await desk.turn("audit")
        await desk.press(desk.panel.audit.mine)
        await desk.settled()
        assert desk.panel.audit.filters["user"].value == "root"
        page = desk.panel.state.audit.page.value  # type: ignore[union-attr]
        assert len(page.records) == 2


class TestWithout:
    @pytest.fixture
    def guard(self, tmp_path: Path, clock: Clock) -> Guard:
        return new_guard(tmp_path, clock=clock, audit=False)

    async def test_a_ledger(self, sit: Open) -> None:
        desk = await sit()
        await desk.ask("hello")
        assert await desk.ended() == "done"
        assert desk.panel.state.answer.figures.receipt is None  # type: ignore[union-attr]
        await desk.turn("audit")
        await desk.settled()
        assert "nothing is recorded here" in desk.panel.audit.page.value
        assert "[not_found]" in desk.panel.audit.page.value


async def test_health(sit: Open) -> None:
    desk = await sit()
    await desk.turn("live")
    await until(lambda: "<table" in desk.panel.live.health.value)
    for name in ("engine", "models", "ledger", "limits", "disk", "memory", "gpu"):
        assert f">{name}<" in desk.panel.live.health.value


async def test_a_server_that_is_gone(sit: Open, jp_http_port: int) -> None:
    desk = await sit()
    transport = Transport("http://127.0.0.1:1/", "ann")
    desk.panel.work._transport = lambda: transport
    await desk.ask("hello")
    assert await desk.ended() == "failed"
    assert desk.code == "server_unreachable"
    transport.close()


async def test_closing_amid_an_answer(sit: Open, guard: Guard, fakes: Fakes) -> None:
    gate = threading.Semaphore(4)
    fakes.make = lambda: FakeBackend(lambda _: ["word "] * 500, gate=gate)
    desk = await sit()
    await desk.ask("go on")
    await until(lambda: "word" in desk.panel.state.answer.text)
    await asyncio.to_thread(desk.panel.close)
    for _ in range(8):
        gate.release()
    thread = desk.panel.work.thread
    assert thread is not None
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
    await until(lambda: fakes.models[0].active == 0)
    gate.release(1000)
