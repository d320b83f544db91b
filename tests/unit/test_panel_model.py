"""The panel's view model, without a widget, a thread or a clock.

Cases: what is fetched at first, in each section, again and how soon, and never twice at once; a source
that answers, refuses, or has another shape; the chosen model kept, replaced and said so; nothing by
itself after five minutes, hidden, paused or closed, whatever comes in; each parameter's edges, zeros
included; a request's body; an answer that waits, grows, ends, fails, is stopped once and twice, and comes
late; several models one after the other; loading, unloading with and without a question, downloading,
stopping; one's own limits; pages there and back, filters, records, usage, verification against the last
head, receipts, files and their names; the words that other rooms know; any sequence of it all.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shimmy_jupyter.audit import export as audit_export
from shimmy_jupyter.core.limits import NAMES
from shimmy_jupyter.notebook.panel import asking, auditing, managing, shapes, text
from shimmy_jupyter.notebook.panel import export as panel_export
from shimmy_jupyter.notebook.panel import messages as m
from shimmy_jupyter.notebook.panel import model as view
from shimmy_jupyter.notebook.panel.fetched import Failed, Pending, Problem, Ready, ready
from shimmy_jupyter.notebook.panel.model import check_invariants, handle, next_look
from shimmy_jupyter.notebook.panel.state import SECTIONS, Figures, State, to_json
from shimmy_jupyter.notebook.panel.turn import IDLE_SECONDS, awake

ROOT = Path(__file__).parents[2]
PANEL = Path(view.__file__).parent
DENIED = Problem("policy_denied", "you may not use 'a' here", "model", "0" * 32)
FIGURES = Figures(10, 4, 3, 20.5, 100.0, 1.0, 7)


def model(id: str = "a", state: str = "available", **more: Any) -> dict[str, Any]:
    return {
        "id": id, "state": state, "kind": "model", "architecture": None, "quantization": "Q4_K_M",
        "parameters": 1, "context": 4096, "usable_context": 4096, "embedding": False, "chat_template": None,
        "size_bytes": 5, "files": 1, "sha256": None, "source": "root", "origin": None,
        "fit": {"needed": 6, "available": 4, "ok": False, "max_context": 0}, "error": None, **more,
    }  # fmt: skip


def models(*ids: str, default: str | None = "a", **more: Any) -> dict[str, Any]:
    listed = [model(id, **more) for id in ids or ("a", "b")]
    return {"models": listed, "default": default, "engine": "x"}


def limits(own: Any = None, locked: Any = None, **rows: Any) -> dict[str, Any]:
    return {
        "limits": rows, "shared": {}, "own": own or {}, "locked": locked or {},
        "queue_position": None,
    }  # fmt: skip


def limit(most: float, used: float | None = None) -> dict[str, Any]:
    left = None if used is None else most - used
    return {"limit": most, "used": used, "remaining": left, "resets_at": 1_800_000_000.0}


def job(state: str = "running", id: str = "j", **more: Any) -> dict[str, Any]:
    return {
        "id": id, "kind": "load", "model": "a", "state": state, "message": "reading", "done": 1,
        "total": 2, "unit": "bytes", "error": None, "result": None, **more,
    }  # fmt: skip


def record(seq: int, **more: Any) -> dict[str, Any]:
    return {"seq": seq, "v": 1, "user": "ann", "request_id": "r", "leaf_hash": "0" * 64, **more}


HEAD = {"size": 3, "root": "f" * 64, "timestamp": "t"}
VERDICT = {
    "ok": True, "records": 3, "head": HEAD, "first_bad": None, "problem": None, "erased": 0,
    "open_requests": 0, "anchored": False,
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "models": models(),
    "jobs": {"jobs": [job()]},
    "limits": limits(max_tokens_per_day=limit(5, 2)),
    "live": {"status": "ok", "active": 0, "dependencies": []},
    "page": {"records": [record(2), {"seq": 1, "erased": True}], "next_cursor": 1},
    "record": {"records": [record(2)], "next_cursor": None},
    "usage": {"since": 0.0, "until": None, "by": ["user"], "usage": []},
    "verdict": VERDICT,
    "receipt": {"version": 1, "request_id": "r", "records": [{}], "head": HEAD},
    "tighten": limits(),
    "act": {"job": "j"},
}


class Desk:
    """A front end whose server says what the test says."""

    def __init__(self) -> None:
        self.state, self.now = State(), 1000.0
        self.sent: list[m.Request] = []
        """Requests that nobody has answered."""
        self.do(m.Opened())

    def do(self, event: m.Event, after: float = 0.0) -> list[m.Request]:
        """What is to be asked for because of it."""
        self.now += after
        self.state, requests = handle(self.state, event, self.now)
        check_invariants(self.state)
        self.sent += requests
        return list(requests)

    def number(self, purpose: str) -> int:
        (found,) = [n for n, what in self.state.asked.items() if what.split(":")[0] == purpose]
        return found

    def answer(self, purpose: str, body: dict[str, Any] | None = None) -> list[m.Request]:
        given = BODIES[purpose] if body is None else body
        return self.do(m.Answered(self.number(purpose), given))

    def refuse(self, purpose: str, problem: Problem = DENIED) -> list[m.Request]:
        return self.do(m.Refused(self.number(purpose), problem))

    def settled(self, section: str = "ask") -> Desk:
        """In a section, everything answered once."""
        self.do(m.SectionChosen(section))
        for purpose in list(self.state.asked.values()):
            self.answer(purpose)
        return self

    @property
    def said(self) -> str:
        notice = self.state.notice
        return "" if notice is None else notice.problem.code if notice.problem else notice.text


def paths(requests: list[m.Request]) -> list[str]:
    return [f"{one.method} {one.path}" for one in requests if isinstance(one, m.Call)]


class TestFetching:
    def test_at_first_what_is_in_view(self) -> None:
        desk = Desk()
        assert paths(desk.sent) == ["GET shimmy/api/models", "GET shimmy/api/limits"]
        assert isinstance(desk.state.models, Pending)

    @pytest.mark.parametrize("section", SECTIONS)
    def test_each_section_fetches_its_own(self, section: str) -> None:
        desk = Desk().settled()
        asked = {one.partition("?")[0] for one in paths(desk.do(m.SectionChosen(section)))}
        wanted = {
            "ask": set(),
            "models": {"GET shimmy/api/jobs"},
            "compare": set(),
            "limits": set(),
            "audit": {"GET shimmy/api/audit"},
            "live": {"GET shimmy/health"},
        }
        assert asked == wanted[section]

    def test_another_section_is_refused(self) -> None:
        desk = Desk()
        desk.do(m.SectionChosen("elsewhere"))
        assert (desk.said, desk.state.section) == ("invalid_value", "ask")

    @pytest.mark.parametrize("source", ["models", "jobs", "limits", "live"])
    def test_answered_refused_and_misshapen(self, source: str) -> None:
        section = {"models": "models", "jobs": "models", "limits": "limits", "live": "live"}[source]
        desk = Desk().settled(section)
        assert isinstance(getattr(desk.state, source), Ready)
        desk.do(m.Refreshed())
        # While it is fetched again what there was is still to be seen.
        assert isinstance(getattr(desk.state, source), Ready)
        desk.refuse(source)
        assert getattr(desk.state, source) == Failed(DENIED)
        for bad in ({}, {"models": 3, "jobs": [{}], "limits": [], "status": None}):
            desk.do(m.Refreshed())
            desk.answer(source, bad)
            found = getattr(desk.state, source)
            assert isinstance(found, Failed)
            assert found.problem.code == "internal_error"

    def test_again_when_it_is_old_and_never_twice_at_once(self) -> None:
        desk = Desk().settled()
        when = next_look(desk.state)
        assert when == desk.now + 15
        assert desk.do(m.Tick(), 14.9) == []
        assert paths(desk.do(m.Tick(), 0.2)) == ["GET shimmy/api/models", "GET shimmy/api/limits"]
        assert desk.do(m.Tick(), 60) == []
        assert desk.do(m.Refreshed()) == []

    @pytest.mark.parametrize(
        ("source", "body"),
        [
            ("models", models(default=None)),
            ("models", models(state="loading")),
            ("jobs", {"jobs": [job()]}),
        ],
    )
    def test_soon_again_what_is_moving(self, source: str, body: dict[str, Any]) -> None:
        desk = Desk().settled("models")
        desk.do(m.Refreshed())
        desk.answer("jobs", {"jobs": []}) if source == "models" else desk.answer("models")
        desk.answer(source, body)
        assert next_look(desk.state) == desk.now + 1
        assert len(desk.do(m.Tick(), 1)) == 1

    def test_what_fails_is_asked_less_often(self) -> None:
        desk = Desk().settled("live")
        assert next_look(desk.state) == desk.now + 2
        desk.do(m.Tick(), 2)
        desk.refuse("live")
        assert next_look(desk.state) == desk.now + 13  # the limits, by now 2 s old
        assert paths(desk.do(m.Tick(), 14.9)) == ["GET shimmy/api/limits"]
        assert paths(desk.do(m.Tick(), 0.1)) == ["GET shimmy/health"]

    def test_what_nobody_waits_for_changes_nothing(self) -> None:
        desk = Desk().settled()
        before = desk.state
        for event in (m.Answered(1, models("z")), m.Refused(99, DENIED), m.Grew(3, "x", "")):
            assert desk.do(event) == []
        assert desk.state == before


class TestNobodyThere:
    def quiet(self, desk: Desk) -> None:
        """Nothing more is fetched, and nobody is woken for it."""
        assert desk.state.asleep
        assert next_look(desk.state) is None
        assert desk.do(m.Tick(), 3600) == []

    def test_five_minutes_after_a_person(self) -> None:
        desk = Desk().settled()
        last = desk.now
        asked = 0
        while (when := next_look(desk.state)) is not None:
            assert not desk.state.asleep
            desk.now = when
            asked += len(desk.do(m.Tick()))
            for purpose in list(desk.state.asked.values()):
                desk.answer(purpose)
        assert IDLE_SECONDS == 5 * 60
        assert asked == 2 * (IDLE_SECONDS / 15 - 1)
        assert desk.now == last + IDLE_SECONDS
        self.quiet(desk)

    def test_what_comes_in_then_asks_for_nothing(self) -> None:
        desk = Desk().settled("models")
        desk.do(m.LoadWanted("a"))
        desk.do(m.Tick(), IDLE_SECONDS + 1)
        for purpose in list(desk.state.asked.values()):
            assert desk.answer(purpose.split(":")[0]) == []
        self.quiet(desk)
        # Whoever comes back sees what there is now.
        assert paths(desk.do(m.Shown())) == ["GET shimmy/api/models", "GET shimmy/api/jobs"]
        assert not desk.state.asleep

    def test_an_answer_goes_on_and_its_end_asks_for_nothing(self) -> None:
        desk = Desk().settled()
        desk.do(m.Asked("hi"))
        number = desk.number("ask")
        desk.do(m.Tick(), IDLE_SECONDS)
        assert desk.do(m.Grew(number, "x", "")) == []
        assert desk.do(m.Ended(number, "xy", "", "stop", "r", FIGURES)) == []
        assert desk.state.answer.status == "done"

    def test_hidden(self) -> None:
        desk = Desk().settled()
        assert desk.do(m.Hidden()) == []
        self.quiet(desk)
        assert len(desk.do(m.Shown())) == 2

    def test_whoever_does_something_sees_it(self) -> None:
        desk = Desk().settled()
        desk.do(m.Hidden())
        desk.do(m.SectionChosen("live"), 100)
        assert desk.state.visible
        assert "live" in desk.state.asked.values()

    def test_paused(self) -> None:
        desk = Desk().settled()
        desk.do(m.Paused())
        self.quiet(desk)
        assert desk.do(m.SectionChosen("live")) == []
        # What a person asks for is asked, and what they want to be fetched is fetched.
        assert len(desk.do(m.Asked("hi"))) == 1
        assert paths(desk.do(m.Refreshed())) == ["GET shimmy/health", "GET shimmy/api/limits"]
        desk.do(m.Resumed())
        assert not desk.state.asleep
        assert next_look(desk.state) is not None

    def test_closed(self) -> None:
        desk = Desk().settled()
        desk.do(m.Asked("hi"))
        assert desk.do(m.Closed()) == []
        closed = desk.state
        self.quiet(desk)
        for event in (m.Asked("x"), m.Refreshed(), m.Closed(), m.Answered(1, models())):
            assert desk.do(event) == []
        assert desk.state == closed

    def test_the_whole_list_of_events_is_known(self) -> None:
        acts = {one for one in vars(m).values() if isinstance(one, type) and issubclass(one, m.Act)}
        assert acts - {m.Act} == {*managing.HANDLERS, *asking.HANDLERS, *auditing.HANDLERS}


class TestChoosing:
    def test_the_default_at_first(self) -> None:
        desk = Desk()
        desk.answer("models", models(default=None))
        assert (desk.state.chosen, desk.said) == (None, "")
        desk.do(m.Refreshed())
        desk.answer("models", models("b", "a"))
        assert (desk.state.chosen, desk.said) == ("a", "")

    def test_where_there_is_no_default_on_the_list_the_first_that_answers(self) -> None:
        desk = Desk()
        listed = [model("v", embedding=True), model("l", kind="lora"), model("c")]
        desk.answer("models", {"models": listed, "default": "gone", "engine": "x"})
        assert desk.state.chosen == "c"

    def test_a_choice_is_kept_while_it_is_offered(self) -> None:
        desk = Desk().settled()
        desk.do(m.ModelChosen("b"))
        desk.do(m.Refreshed())
        desk.answer("models")
        assert (desk.state.chosen, desk.said) == ("b", "")

    @pytest.mark.parametrize(
        ("left", "chosen", "said"),
        [
            (models("a"), "a", "b is not offered any more: a is chosen instead"),
            ({"models": [], "default": None, "engine": "x"}, None, "b is not offered any more: there is no other"),
        ],
    )  # fmt: skip
    def test_a_choice_that_is_gone_is_said(
        self, left: dict[str, Any], chosen: str | None, said: str
    ) -> None:
        desk = Desk().settled()
        desk.do(m.ModelChosen("b"))
        desk.do(m.Refreshed())
        desk.answer("models", left)
        assert (desk.state.chosen, desk.said) == (chosen, said)

    def test_what_is_not_offered_is_refused(self) -> None:
        desk = Desk().settled()
        desk.do(m.ModelChosen("z"))
        assert (desk.state.chosen, desk.said) == ("a", "model_not_found")


class TestParameters:
    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("temperature", "0", 0.0),
            ("temperature", " 2 ", 2.0),
            ("temperature", "0.7", 0.7),
            ("max_tokens", "0", 0),
            ("max_tokens", "2147483647", 2147483647),
            ("seed", "0", 0),
            ("seed", "-9223372036854775808", -(2**63)),
            ("seed", "9223372036854775807", 2**63 - 1),
        ],
    )
    def test_edges(self, name: str, text: str, value: float) -> None:
        desk = Desk().settled()
        desk.do(m.ParameterSet(name, text))
        assert desk.state.parameters.problems == {}
        (sent,) = desk.do(m.Asked("hi"))
        assert isinstance(sent, m.Generate)
        assert sent.body[name] == value
        assert type(sent.body[name]) is type(value)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("temperature", "2.1"), ("temperature", "-0.1"), ("temperature", "hot"),
            ("temperature", "nan"), ("temperature", "inf"), ("max_tokens", "-1"),
            ("max_tokens", "1.5"), ("max_tokens", "2147483648"), ("seed", "1e3"),
            ("seed", "9223372036854775808"), ("seed", "-9223372036854775809"),
        ],
    )  # fmt: skip
    def test_beyond_them(self, name: str, text: str) -> None:
        desk = Desk().settled()
        desk.do(m.ParameterSet(name, text))
        found = desk.state.parameters.problems[name]
        assert (found.code, found.param) == ("invalid_value", name)
        assert desk.do(m.Asked("hi")) == []
        assert desk.said == "invalid_value"
        # Corrected, it is forgotten.
        desk.do(m.ParameterSet(name, ""))
        assert desk.state.parameters.problems == {}
        (sent,) = desk.do(m.Asked("hi"))
        assert isinstance(sent, m.Generate)
        assert name not in sent.body

    @pytest.mark.parametrize(
        ("name", "value", "code"),
        [
            ("nonsense", "1", "unknown_parameter"),
            ("reproducible", "yes", "invalid_value"),
            ("seed", True, "invalid_value"),
        ],
    )
    def test_of_another_kind(self, name: str, value: Any, code: str) -> None:
        desk = Desk().settled()
        before = desk.state.parameters
        desk.do(m.ParameterSet(name, value))
        assert (desk.said, desk.state.parameters) == (code, before)

    def test_a_limit_of_answers_bounds_them(self) -> None:
        desk = Desk().settled()
        why = "set in the system's configuration"
        desk.do(m.Refreshed())
        body = limits(locked={"max_completion_tokens": why}, max_completion_tokens=limit(8))
        desk.answer("limits", body)
        range_ = managing.ranges(desk.state)["max_tokens"]
        assert (range_.most, range_.reason) == (8, why)
        desk.do(m.ParameterSet("max_tokens", "9"))
        assert why in desk.state.parameters.problems["max_tokens"].message
        desk.do(m.ParameterSet("max_tokens", "8"))
        assert desk.state.parameters.problems == {}

    def test_they_are_those_of_the_api(self) -> None:
        document = json.loads((ROOT / "docs" / "openapi.json").read_text())
        chat = document["components"]["schemas"]["Chat"]["properties"]
        for name, one in managing.ranges(State()).items():
            schema = chat[name]["anyOf"][0]
            most = schema.get("maximum", schema.get("exclusiveMaximum", 0) - 1)
            assert (one.least, one.most) == (schema["minimum"], most), name
            assert one.whole == (schema["type"] == "integer")


class TestAsking:
    def test_the_whole_body(self) -> None:
        desk = Desk().settled()
        desk.do(m.ParameterSet("system", "Be brief."))
        desk.do(m.ParameterSet("reproducible", value=True))
        desk.do(m.ParameterSet("temperature", "0"))
        (sent,) = desk.do(m.Asked(" hi {x}\n"))
        assert sent == m.Generate(
            desk.number("ask"),
            {
                "model": "a",
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": " hi {x}\n"},
                ],
                "temperature": 0.0,
                "reproducible": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            "ask",
        )
        assert desk.state.answer.status == "running"

    @pytest.mark.parametrize("prompt", ["", " \n"])
    def test_nothing_to_ask(self, prompt: str) -> None:
        desk = Desk().settled()
        assert desk.do(m.Asked(prompt)) == []
        assert desk.said == "invalid_value"

    def test_no_model(self) -> None:
        desk = Desk()
        assert desk.do(m.Asked("hi")) == []
        assert desk.state.notice is not None
        assert desk.state.notice.problem == Problem(
            "invalid_value", "choose a model first", "model"
        )

    def test_one_at_a_time(self) -> None:
        desk = Desk().settled()
        desk.do(m.Asked("hi"))
        assert desk.do(m.Asked("ho")) == []
        assert desk.state.answer.prompt == "hi"

    def test_from_waiting_to_its_end(self) -> None:
        desk = Desk().settled()
        desk.do(m.Asked("hi"))
        number = desk.number("ask")
        desk.do(m.Waited(number, "loading the model: 3%"))
        assert desk.state.answer.waiting == "loading the model: 3%"
        desk.do(m.Grew(number, "one", "hm"))
        assert desk.state.answer.waiting == ""
        fetched = desk.do(m.Ended(number, "one two", "hm", "length", "r", FIGURES))
        answer = desk.state.answer
        assert (answer.status, answer.text, answer.reasoning) == ("done", "one two", "hm")
        assert (answer.reason, answer.figures, answer.request_id) == ("length", FIGURES, "r")
        assert "cut off" in desk.said
        assert desk.state.rates[0].figures == FIGURES
        # What is left of the limits has changed.
        assert "GET shimmy/api/limits" in paths(fetched)

    def test_a_refusal_keeps_what_there_was(self) -> None:
        desk = Desk().settled()
        desk.do(m.Asked("hi"))
        desk.do(m.Grew(desk.number("ask"), "one", ""))
        desk.refuse("ask")
        answer = desk.state.answer
        assert (answer.status, answer.text, answer.problem) == ("failed", "one", DENIED)
        assert answer.request_id == DENIED.request_id
        assert desk.said == "policy_denied"
        assert len(desk.do(m.Asked("again"))) == 1
        assert desk.state.answer.problem is None

    def test_stopping_once(self) -> None:
        desk = Desk().settled()
        desk.do(m.AskStopped())
        assert "no answer to stop" in desk.said
        desk.do(m.Asked("hi"))
        number = desk.number("ask")
        desk.do(m.Grew(number, "one", ""))
        assert desk.do(m.AskStopped()) == [m.Cancel(number)]
        assert desk.do(m.AskStopped()) == []
        # What is on its way still comes.
        desk.do(m.Grew(number, "one two", ""))
        desk.do(m.Waited(number, "x"))
        assert (desk.state.answer.status, desk.state.answer.text) == ("stopping", "one two")
        desk.do(m.Stopped(number, "one two three"))
        assert (desk.state.answer.status, desk.state.answer.text) == ("stopped", "one two three")

    def test_it_may_end_before_it_is_stopped(self) -> None:
        desk = Desk().settled()
        desk.do(m.Asked("hi"))
        number = desk.number("ask")
        desk.do(m.AskStopped())
        desk.do(m.Ended(number, "one", "", "stop", "r", FIGURES))
        assert desk.state.answer.status == "done"
        desk.do(m.Stopped(number))
        assert desk.state.answer.status == "done"

    def test_the_last_figures_are_kept(self) -> None:
        desk = Desk().settled()
        for _ in range(25):
            desk.do(m.Asked("hi"))
            desk.do(m.Ended(desk.number("ask"), "one", "", "stop", "r", FIGURES))
        assert len(desk.state.rates) == 20


class TestComparing:
    def begun(self, *ids: str) -> Desk:
        desk = Desk().settled("compare")
        desk.do(m.Compared("hi", ids or ("a", "b", "c")))
        return desk

    def test_in_one_lane(self) -> None:
        desk = self.begun("a", "b", "a")
        sent = [one for one in desk.sent if isinstance(one, m.Generate)]
        assert [one.body["model"] for one in sent] == ["a", "b"]
        assert {one.lane for one in sent} == {"compare"}
        assert [one.status for one in desk.state.comparison.answers] == ["running", "queued"]

    @pytest.mark.parametrize("ids", [(), ("a",), ("a", "a"), tuple("abcdefghi")])
    def test_too_few_and_too_many(self, ids: tuple[str, ...]) -> None:
        desk = Desk().settled("compare")
        assert desk.do(m.Compared("hi", ids)) == []
        assert desk.said == "invalid_value"

    def test_nothing_to_ask(self) -> None:
        desk = Desk().settled("compare")
        assert desk.do(m.Compared(" ", ("a", "b"))) == []
        assert desk.state.comparison.answers == ()
        assert set(desk.state.asked.values()) == set()

    def test_one_that_is_refused_does_not_keep_the_others(self) -> None:
        desk = self.begun()
        first, second, third = sorted(desk.state.asked)
        desk.do(m.Refused(first, DENIED))
        assert [a.status for a in desk.state.comparison.answers] == ["failed", "running", "queued"]
        desk.do(m.Ended(second, "b!", "", "stop", "r", FIGURES))
        assert desk.do(m.Compared("x", ("a", "b"))) == []
        desk.do(m.Ended(third, "c!", "", "stop", "r", FIGURES))
        assert [a.text for a in desk.state.comparison.answers] == ["", "b!", "c!"]
        assert desk.said == "The comparison has ended: 1 failed, 2 done"

    def test_stopping_all(self) -> None:
        desk = self.begun()
        numbers = sorted(desk.state.asked)
        assert desk.do(m.CompareStopped()) == [m.Cancel(number) for number in numbers]
        assert desk.do(m.CompareStopped()) == []
        for number in numbers:
            desk.do(m.Stopped(number))
        assert {one.status for one in desk.state.comparison.answers} == {"stopped"}
        desk.do(m.CompareStopped())
        assert "no comparison to stop" in desk.said

    def test_beside_an_answer(self) -> None:
        desk = self.begun()
        (sent,) = desk.do(m.Asked("hi"))
        assert isinstance(sent, m.Generate)
        assert sent.lane == "ask"


@pytest.mark.parametrize(
    ("trained", "usable", "said"),
    [(4096, 4096, "4,096"), (131_072, 8192, "8,192 of 131,072"), (4096, None, "4,096"),
     (None, 128, "128"), (None, None, "")],
)  # fmt: skip
def test_the_context_is_what_a_request_has_of_it(
    trained: int | None, usable: int | None, said: str
) -> None:
    found = shapes.model(model(context=trained, usable_context=usable))
    assert text.context(found) == said
    assert (f" · {said} tokens of context" in text.model_line(found)) is bool(said)
    assert f">{said}</td>" in text.models(
        shapes.models(models(context=trained, usable_context=usable))
    )


class TestModels:
    def test_loading(self) -> None:
        desk = Desk().settled("models")
        assert paths(desk.do(m.LoadWanted("a b/c?"))) == [
            "POST shimmy/api/models/a%20b%2Fc%3F/load"
        ]
        asked = desk.answer("act")
        assert sorted(paths(asked)) == ["GET shimmy/api/jobs", "GET shimmy/api/models"]
        assert desk.said == "load a b/c?: accepted"

    @pytest.mark.parametrize("state", ["loaded", "loading", "probing"])
    def test_unloading_what_is_in_use_asks_first(self, state: str) -> None:
        desk = Desk()
        desk.answer("models", models(state=state))
        assert desk.do(m.UnloadWanted("a")) == []
        assert desk.state.confirm is not None
        assert state in desk.state.confirm.question
        assert desk.do(m.Declined()) == []
        assert desk.state.confirm is None
        assert desk.do(m.Confirmed()) == []
        desk.do(m.UnloadWanted("a"))
        assert paths(desk.do(m.Confirmed())) == ["POST shimmy/api/models/a/unload"]
        assert desk.state.confirm is None

    def test_unloading_what_is_not(self) -> None:
        desk = Desk().settled("models")
        assert paths(desk.do(m.UnloadWanted("a"))) == ["POST shimmy/api/models/a/unload"]
        desk.refuse("act")
        assert desk.said == "policy_denied"

    @pytest.mark.parametrize("event", [m.LoadWanted(""), m.UnloadWanted(""), m.PullWanted(" ")])
    def test_of_nothing(self, event: m.Act) -> None:
        desk = Desk().settled("models")
        assert desk.do(event) == []
        assert desk.said == "invalid_value"

    @pytest.mark.parametrize(
        ("digest", "more"), [("", {}), (" AB" + "0" * 62, {"sha256": "ab" + "0" * 62})]
    )
    def test_downloading(self, digest: str, more: dict[str, str]) -> None:
        desk = Desk().settled("models")
        (sent,) = desk.do(m.PullWanted(" owner/name ", digest))
        assert isinstance(sent, m.Call)
        assert (sent.method, sent.path) == ("POST", "shimmy/api/models/pull")
        assert sent.body == {"model": "owner/name"} | more

    def test_stopping_a_job(self) -> None:
        desk = Desk().settled("models")
        assert paths(desk.do(m.JobStopped("j/1"))) == ["DELETE shimmy/api/jobs/j%2F1"]

    def test_a_job_s_end_is_said_and_shows_in_the_models(self) -> None:
        desk = Desk().settled("models")
        desk.do(m.Tick(), 1)
        asked = desk.answer("jobs", {"jobs": [job("done")]})
        assert paths(asked) == ["GET shimmy/api/models"]
        assert desk.said == "load a: done"

    def test_a_job_that_failed_says_why(self) -> None:
        desk = Desk().settled("models")
        desk.do(m.Tick(), 1)
        error = {"code": "disk_full", "message": "no room", "param": None, "request_id": "j"}
        desk.answer("jobs", {"jobs": [job("failed", error=error | {"type": "server_error"})]})
        assert desk.said == "disk_full"


class TestLimits:
    def test_all_are_shown_whether_set_or_not(self) -> None:
        desk = Desk().settled("limits")
        desk.do(m.Refreshed())
        body = limits(
            own={"max_queued": 3},
            locked={"max_tokens_per_day": "why"},
            max_tokens_per_day=limit(5, 2),
            max_queued=limit(3, 0),
        )
        desk.answer("limits", body | {"shared": {"team": {"max_concurrent": limit(1, 1)}}})
        found = ready(desk.state.limits)
        assert found is not None
        rows = {one.name: one for one in found.limits}
        assert list(rows) == list(NAMES)
        assert rows["max_tokens_per_day"].locked == "why"
        assert (rows["max_queued"].own, rows["max_seconds"].limit) == (3, None)
        assert [one.name for one in found.shared["team"]] == ["max_concurrent"]

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("max_tokens_per_day", "0", 0),
            ("max_tokens_per_day", "", None),
            ("max_seconds", "0.5", 0.5),
        ],
    )
    def test_one_s_own(self, name: str, text: str, value: float | None) -> None:
        desk = Desk().settled("limits")
        (sent,) = desk.do(m.LimitSet(name, text))
        assert isinstance(sent, m.Call)
        assert (sent.method, sent.path, sent.body) == ("PUT", "shimmy/api/limits", {name: value})

    @pytest.mark.parametrize(
        ("name", "text", "code"),
        [
            ("max_tokens_per_day", "1.5", "invalid_value"),
            ("max_tokens_per_day", "-1", "invalid_value"),
            ("max_seconds", "nan", "invalid_value"),
            ("max_speed", "1", "unknown_parameter"),
        ],
    )
    def test_that_cannot_be(self, name: str, text: str, code: str) -> None:
        desk = Desk().settled("limits")
        assert desk.do(m.LimitSet(name, text)) == []
        assert desk.said == code

    def test_the_answer_is_what_holds_now(self) -> None:
        desk = Desk().settled("limits")
        desk.do(m.LimitSet("max_queued", "1"))
        desk.do(m.Refreshed())
        before = desk.number("limits")
        desk.answer("tighten", limits(own={"max_queued": 1}, max_queued=limit(1, 0)))
        assert desk.said == "Your own limits are changed."
        # What was asked before it says less.
        desk.do(m.Answered(before, limits()))
        found = ready(desk.state.limits)
        assert found is not None
        assert {one.name for one in found.limits if one.own is not None} == {"max_queued"}

    def test_refused(self) -> None:
        desk = Desk().settled("limits")
        desk.do(m.LimitSet("max_queued", "1"))
        desk.refuse(
            "tighten", Problem("invalid_value", "max_queued can be at most 0", "max_queued")
        )
        assert desk.said == "invalid_value"
        assert isinstance(desk.state.limits, Ready)

    def test_they_are_those_of_the_server(self) -> None:
        assert list(shapes.LIMITS) == list(NAMES)


class TestAudit:
    @pytest.fixture
    def desk(self) -> Desk:
        return Desk().settled("audit")

    def test_fetched_when_a_person_turns_to_it_and_not_by_itself(self, desk: Desk) -> None:
        assert isinstance(desk.state.audit.page, Ready)
        assert desk.do(m.SectionChosen("audit")) == []
        assert next_look(desk.state) == desk.now + IDLE_SECONDS
        assert paths(desk.do(m.Refreshed())) == ["GET shimmy/api/audit?limit=25"]

    def test_filters(self, desk: Desk) -> None:
        given = {"user": " ann&b ", "since": "2026-11-01", "model": "", "kind": "end"}
        assert paths(desk.do(m.Filtered(given))) == [
            "GET shimmy/api/audit?user=ann%26b&since=2026-11-01&kind=end&limit=25"
        ]
        assert desk.state.audit.filters == {"user": "ann&b", "since": "2026-11-01", "kind": "end"}
        desk.do(m.Filtered({"colour": "red"}))
        assert desk.said == "unknown_parameter"
        assert "colour" not in desk.state.audit.filters

    def test_pages_there_and_back(self, desk: Desk) -> None:
        desk.do(m.PreviousPage())
        assert desk.said == "This is the first page."
        assert paths(desk.do(m.NextPage())) == ["GET shimmy/api/audit?cursor=1&limit=25"]
        desk.do(m.NextPage())
        assert desk.said == "A page is on its way."
        desk.answer("page", {"records": [record(0)], "next_cursor": 0})
        assert paths(desk.do(m.NextPage())) == ["GET shimmy/api/audit?cursor=0&limit=25"]
        desk.answer("page", {"records": [], "next_cursor": None})
        desk.do(m.NextPage())
        assert desk.said == "There is no further page."
        assert paths(desk.do(m.PreviousPage())) == ["GET shimmy/api/audit?cursor=1&limit=25"]
        assert paths(desk.do(m.PreviousPage())) == ["GET shimmy/api/audit?limit=25"]
        assert desk.state.audit.cursors == ()
        # A filter begins again at the first page.
        desk.answer("page")
        desk.do(m.NextPage())
        desk.do(m.Filtered({"kind": "end"}))
        assert (desk.state.audit.cursor, desk.state.audit.cursors) == (None, ())

    def test_the_answer_to_an_earlier_question_is_passed_over(self, desk: Desk) -> None:
        desk.do(m.Filtered({"kind": "act"}))
        before = desk.number("page")
        desk.do(m.Filtered({"kind": "end"}))
        desk.do(m.Answered(before, {"records": [record(9)], "next_cursor": None}))
        page = ready(desk.state.audit.page)
        assert page is not None
        assert [one.seq for one in page.records] == [2, 1]

    def test_erased_records_have_a_number_only(self, desk: Desk) -> None:
        page = ready(desk.state.audit.page)
        assert page is not None
        assert [(one.seq, one.erased) for one in page.records] == [(2, False), (1, True)]

    def test_refused(self, desk: Desk) -> None:
        desk.do(m.Filtered({"user": "bob"}))
        desk.refuse("page")
        assert desk.state.audit.page == Failed(DENIED)
        assert desk.said == "policy_denied"

    def test_only_mine(self, desk: Desk) -> None:
        desk.do(m.RecordWanted())
        assert "nothing has been answered" in desk.said
        assert desk.do(m.OwnOnly()) == []
        desk.do(m.Asked("hi"))
        desk.do(m.Ended(desk.number("ask"), "x", "", "stop", "r1", FIGURES))
        assert paths(desk.do(m.RecordWanted())) == ["GET shimmy/api/audit?request_id=r1"]
        desk.answer("record")
        assert paths(desk.do(m.OwnOnly())) == ["GET shimmy/api/audit?user=ann&limit=25"]

    def test_usage(self, desk: Desk) -> None:
        assert paths(desk.do(m.UsageWanted("user,model"))) == [
            "GET shimmy/api/audit/usage?by=user%2Cmodel"
        ]
        row = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_tokens", "tokens_generated", "denied", "limited",
             "errors"), 1,
        )  # fmt: skip
        desk.answer(
            "usage", {"by": ["user", "group"], "usage": [{"user": "ann", "group": None} | row]}
        )
        found = ready(desk.state.audit.usage)
        assert found is not None
        assert found.rows[0].by == ("ann", "")
        desk.do(m.UsageWanted("colour"))
        assert desk.said == "invalid_value"

    def test_verifying_against_what_was_verified_before(self, desk: Desk) -> None:
        (first,) = desk.do(m.VerifyWanted())
        assert isinstance(first, m.Call)
        assert first.body == {}
        desk.answer("verdict")
        assert desk.said == "Records verified, 3: the records are as they were written."
        (second,) = desk.do(m.VerifyWanted())
        assert isinstance(second, m.Call)
        assert second.body == {"against": HEAD}
        bad = VERDICT | {
            "ok": False,
            "head": None,
            "problem": "record 2 is missing",
            "first_bad": 2,
        }
        desk.answer("verdict", bad)
        assert "record 2 is missing" in desk.said
        assert desk.state.audit.head is not None

    def test_receipts(self, desk: Desk) -> None:
        assert desk.do(m.ReceiptWanted("")) == []
        assert desk.said == "invalid_value"
        assert desk.do(m.ReceiptSaved("a.json")) == []
        assert paths(desk.do(m.ReceiptWanted("r/1"))) == ["GET shimmy/api/audit/receipts/r%2F1"]
        desk.answer("receipt")
        (sent,) = desk.do(m.ReceiptSaved(" a.json "))
        assert isinstance(sent, m.Save)
        assert sent.name == "a.json"
        assert json.loads(sent.text) == BODIES["receipt"]
        desk.do(m.Wrote(sent.number, "a.json", 1, whole=True))
        assert desk.said == "a.json is written, in the folder that the kernel works in."

    @pytest.mark.parametrize(
        "name",
        ["", " ", ".hidden", "..", "../a", "/a", "a/b", "a\\b", "c:a", "a\nb", "a\0", "x" * 201],
    )
    def test_names_that_leave_the_folder(self, desk: Desk, name: str) -> None:
        assert desk.do(m.ExportWanted(name, "csv")) == []
        assert desk.said == "invalid_value"
        desk.do(m.ReceiptWanted("r"))
        desk.answer("receipt")
        assert desk.do(m.ReceiptSaved(name)) == []

    def test_exporting(self, desk: Desk) -> None:
        assert desk.do(m.ExportWanted("a.csv", "xml")) == []
        desk.do(m.Filtered({"kind": "end"}))
        (sent,) = desk.do(m.ExportWanted(" a.csv ", "csv"))
        assert sent == m.Export(desk.number("export"), {"kind": "end"}, "a.csv", "csv")
        assert desk.do(m.ExportWanted("b.csv", "csv")) == []
        desk.do(m.Wrote(desk.number("export"), "a.csv", 1000, whole=False))
        assert to_json(desk.state.audit.export)["value"]["records"] == 1000
        desk.do(m.Wrote(desk.number("export"), "a.csv", 1200, whole=True))
        assert "(records: 1200)" in desk.said
        assert "export" not in desk.state.asked.values()
        desk.do(m.ExportWanted("b.csv", "csv"))
        desk.refuse("export", Problem("file_exists", "there is a file b.csv already"))
        assert desk.said == "file_exists"

    def test_columns_are_the_server_s(self) -> None:
        assert panel_export.COLUMNS == audit_export.COLUMNS


class TestHouse:
    PURE = (
        "asking", "auditing", "export", "fetched", "managing", "messages", "model", "records",
        "shapes", "state", "turn",
    )  # fmt: skip

    @pytest.mark.parametrize("name", PURE)
    def test_no_clock_thread_file_or_widget(self, name: str) -> None:
        found = set()
        for node in ast.walk(ast.parse((PANEL / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                known = {f"{one}.py" for one in self.PURE}
                here = str(node.module or "").split(".")[0]
                assert not here or f"{here}.py" in known, here
        allowed = {"__future__", "collections", "csv", "dataclasses", "io", "json", "math", "types",
                   "typing", "urllib"}  # fmt: skip
        assert found <= allowed

    def test_states_are_json_with_their_tags(self) -> None:
        desk = Desk()
        shown = json.loads(json.dumps(to_json(desk.state), allow_nan=False))
        assert shown["models"] == {"state": "pending"}
        assert shown["asked"] == {"1": "models", "2": "limits"}
        desk.answer("models")
        desk.refuse("limits")
        shown = to_json(desk.state)
        assert shown["models"]["state"] == "ready"
        assert shown["models"]["value"]["models"][0]["id"] == "a"
        assert shown["limits"] == {
            "state": "failed",
            "problem": {"code": "policy_denied", "message": DENIED.message, "param": "model",
                        "request_id": "0" * 32},
        }  # fmt: skip

    def test_a_defect_is_seen(self) -> None:
        desk = Desk()
        desk.do(m.Defect(Problem("internal_error", "KeyError: 'x'")))
        assert desk.said == "internal_error"


TEXTS = st.sampled_from(["", "a", "b", "z", "0", "-1", "2.5", "x/y"])
PROBLEMS = st.sampled_from([DENIED, Problem("internal_error", "x")])
ACTS = st.one_of(
    st.sampled_from(
        [m.Opened(), m.Shown(), m.Paused(), m.Resumed(), m.Refreshed(), m.Confirmed(), m.Declined(),
         m.AskStopped(), m.CompareStopped(), m.OwnOnly(), m.NextPage(), m.PreviousPage(),
         m.RecordWanted(), m.VerifyWanted()]
    ),
    st.builds(m.SectionChosen, st.sampled_from([*SECTIONS, "x"])),
    st.builds(m.ModelChosen, TEXTS),
    st.builds(m.ParameterSet, st.sampled_from(["temperature", "max_tokens", "seed", "x"]), TEXTS),
    st.builds(m.LoadWanted, TEXTS),
    st.builds(m.UnloadWanted, TEXTS),
    st.builds(m.PullWanted, TEXTS),
    st.builds(m.JobStopped, TEXTS),
    st.builds(m.LimitSet, st.sampled_from([*NAMES, "x"]), TEXTS),
    st.builds(m.Asked, TEXTS),
    st.builds(m.Compared, TEXTS, st.lists(TEXTS, max_size=4).map(tuple)),
    st.builds(m.Filtered, st.dictionaries(st.sampled_from(["user", "kind", "x"]), TEXTS)),
    st.builds(m.UsageWanted, st.sampled_from(["user", "x"])),
    st.builds(m.ReceiptWanted, TEXTS),
    st.builds(m.ReceiptSaved, TEXTS),
    st.builds(m.ExportWanted, TEXTS, st.sampled_from(["csv", "x"])),
)  # fmt: skip


class Anything(RuleBasedStateMachine):
    """Whatever people do, and whatever the server says, in any order."""

    @initialize()
    def open(self) -> None:
        self.state, self.now = State(), 1000.0

    def handle(self, event: m.Event) -> None:
        before = self.state
        idle = not awake(before, self.now)
        self.state, requests = handle(before, event, self.now)
        if idle and not isinstance(event, m.Act):
            assert requests == (), "something was asked for that nobody wanted"
        for one in requests:
            if not isinstance(one, m.Cancel):
                assert before.numbers < one.number <= self.state.numbers
                assert one.number in self.state.asked
            json.dumps(to_json(one), allow_nan=False)

    @rule(event=ACTS)
    def act(self, event: m.Act) -> None:
        self.handle(event)

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 20.0, 299.0, 301.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        """As `next_look` wants it: a tick that is due does not call for another at once."""
        when = next_look(self.state)
        if when is not None:
            self.now = max(self.now, when)
            self.handle(m.Tick())
            later = next_look(self.state)
            assert later is None or later > self.now

    @rule(event=st.sampled_from([m.Tick(), m.Hidden()]))
    def otherwise(self, event: m.Event) -> None:
        self.handle(event)

    @rule(data=st.data(), good=st.booleans())
    def answer(self, data: st.DataObject, good: bool) -> None:
        if not self.state.asked:
            return
        number = data.draw(st.sampled_from(sorted(self.state.asked)))
        name = self.state.asked[number].partition(":")[0]
        if name == "compare":  # of a lane the first goes on
            number = min(n for n, what in self.state.asked.items() if what.startswith(name))
        if name in {"ask", "compare"}:
            event: m.Event = data.draw(
                st.sampled_from(
                    [m.Waited(number, "w"), m.Grew(number, "t", "r"), m.Stopped(number),
                     m.Ended(number, "t", "", "stop", "r", FIGURES), m.Refused(number, DENIED)]
                )
            )  # fmt: skip
        elif name in {"export", "save"}:
            event = m.Wrote(number, "f", 1, whole=good)
        else:
            event = m.Answered(number, BODIES[name] if good else {})
        self.handle(event)

    @rule(number=st.integers(0, 5), problem=PROBLEMS)
    def stray(self, number: int, problem: Problem) -> None:
        self.handle(m.Refused(number, problem))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "state"):
            check_invariants(self.state)
            json.dumps(to_json(self.state), allow_nan=False)


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
