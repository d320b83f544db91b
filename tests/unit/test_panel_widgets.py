"""The panel's widgets without a front end: driven by their traits, as a front end would.

Cases: without ipywidgets, and with an old one; nothing heavy is imported for it; each control and what it
asks for; what each section shows, from pending to failed; labels, tooltips, captions, headings and one
live region; names, messages, records and answers that are markup or move the cursor; what is shown is
nobody's doing; views that come and go, pausing, five minutes; a question before unloading; callbacks and
sections that fail; two panels; on an event loop, and from other threads; closing, collecting, the
interpreter's end; words: times, limits, figures, verdicts, bars.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import ipywidgets
import pytest
from ipywidgets.widgets import widget as ipywidgets_widget

from shimmy_jupyter.errors import AccessDenied, Misconfigured, RateLimitExceeded, ShimmyError
from shimmy_jupyter.notebook.panel import messages as m
from shimmy_jupyter.notebook.panel import panel, text
from shimmy_jupyter.notebook.panel.chart import bars
from shimmy_jupyter.notebook.panel.fetched import Failed, Idle, Pending, Problem, Ready
from shimmy_jupyter.notebook.panel.records import Head, Usage, UsageRow, Verdict
from shimmy_jupyter.notebook.panel.state import SECTIONS, Answer, Figures, Limit, Rate
from shimmy_jupyter.notebook.panel.turn import IDLE_SECONDS
from shimmy_jupyter.notebook.panel.widgets import Panel

from .test_panel_model import BODIES, job, limit, limits, model, record
from .test_panel_work import Scripted, chunk, end, thought

HOSTILE = '<img src=x onerror="alert(1)">\u202e\x1b[2J&'
NOON = 1_800_000_000.0
"""2027-01-15 08:00 UTC."""


class Server(Scripted):
    """Answers every path that the panel asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: dict[str, Any] = {
            "shimmy/api/models": {
                "models": [model("a", "loaded"), model("b"), model("e", embedding=True)],
                "default": "a",
                "engine": "x",
            },
            "shimmy/api/limits": limits(max_requests_per_minute=limit(2, 1)),
            "shimmy/api/jobs": {"jobs": []},
            "shimmy/health": BODIES["live"],
            "shimmy/api/audit": BODIES["page"],
            "shimmy/api/audit/usage": BODIES["usage"],
            "shimmy/api/audit/verify": BODIES["verdict"],
            "shimmy/api/audit/receipts/r": BODIES["receipt"],
        }
        self.answers = self.answer

    def answer(self, path: str) -> Any:
        found = self.bodies.get(path.partition("?")[0], {"job": "j"})
        if isinstance(found, ShimmyError):
            raise found
        return found


class Desk:
    """A panel whose worker takes the test's steps."""

    def __init__(self) -> None:
        self.server, self.now = Server(), 1000.0
        self.panel = Panel(
            lambda: self.server, clock=lambda: self.now, wall=lambda: NOON, start=False
        )
        self.work()

    def work(self) -> None:
        """Until nothing is left to do."""
        work = self.panel.work
        work.step(wait=False)
        while work._new or work._running or work._waiting:
            work.step(wait=False)

    def press(self, button: Any) -> list[tuple[str, str, Any]]:
        """What it has the server asked."""
        before = len(self.server.asked)
        button.click()
        self.work()
        return self.server.asked[before:]

    def turn(self, section: str) -> None:
        self.panel.sections[SECTIONS.index(section)].click()
        self.work()

    def stream(self, *chunks: bytes) -> None:
        self.server.streams.append(chunks)

    @property
    def said(self) -> str:
        value: str = self.panel.status.value
        return value

    @property
    def seen(self) -> str:
        """All HTML there is."""
        found = [one.value for one in below(self.panel) if isinstance(one, ipywidgets.HTML)]
        return "\n".join(found)


def below(widget: Any) -> Iterator[Any]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from below(child)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.panel.close()
    assert not desk.panel.work.step(wait=False)


class TestMissing:
    def test_no_ipywidgets(self, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        with pytest.raises(Misconfigured, match=r"pip install 'ipywidgets>=8'"):
            panel(Server)  # type: ignore[arg-type]

    @pytest.mark.parametrize("version", ["7.8.1", "x"])
    def test_an_old_one(self, monkeypatch: Any, version: str) -> None:
        monkeypatch.setattr(ipywidgets, "__version__", version)
        with pytest.raises(Misconfigured, match=f"there is {version}"):
            panel(Server)  # type: ignore[arg-type]

    def test_nothing_heavy_for_the_import(self) -> None:
        code = "import shimmy_jupyter.notebook.panel, sys\nprint([m for m in ('ipywidgets', 'httpx') if m in sys.modules])"  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.strip() == "[]"


class TestControls:
    def test_asking(self, desk: Desk) -> None:
        ask = desk.panel.ask
        ask.lines["temperature"].value = "0"
        ask.system.value = "Be brief."
        ask.reproducible.value = True
        ask.prompt.value = "hi"
        desk.stream(chunk("**one**"), *end())
        ((_, path, body), *rest) = desk.press(ask.ask)
        assert path == "shimmy/v1/chat/completions"
        assert body["model"] == "a"
        assert [one["content"] for one in body["messages"]] == ["Be brief.", "hi"]
        assert (body["temperature"], body["reproducible"]) == (0.0, True)
        assert "<strong>one</strong>" in ask.answer.value
        assert "2 tokens written" in ask.answer.value
        assert "record 7" in ask.answer.value
        assert ("GET", "shimmy/api/limits", None) in rest
        (asked,) = desk.press(ask.record_wanted)
        assert asked[1] == "shimmy/api/audit?request_id=r1"
        assert "Records of the last answer" in ask.record.value

    def test_stopping(self, desk: Desk) -> None:
        desk.stream(*(chunk(f"{n} ") for n in range(50)))
        desk.panel.ask.prompt.value = "hi"
        desk.panel.ask.ask.click()
        for _ in range(4):
            desk.panel.work.step(wait=False)
        assert desk.server.open == 1
        desk.panel.ask.stop.click()
        assert "stopping" in desk.panel.ask.answer.value
        desk.work()
        assert desk.server.open == 0
        assert "stopped" in desk.panel.ask.answer.value
        assert "0 1 2" in desk.panel.ask.answer.value

    def test_wrong_parameters_are_said_beside_them(self, desk: Desk) -> None:
        assert "Temperature: 0 to 2" in desk.panel.ask.allowed.value
        desk.panel.ask.lines["max_tokens"].value = "many"
        assert "max_tokens" in desk.panel.ask.allowed.value
        assert "invalid_value" in desk.panel.ask.allowed.value
        desk.panel.ask.prompt.value = "hi"
        assert desk.press(desk.panel.ask.ask) == []

    def test_choosing(self, desk: Desk) -> None:
        assert [label for label, _ in desk.panel.model.options] == ["a", "b"]
        assert "takes about" in desk.panel.about.value
        desk.panel.model.value = "b"
        assert desk.panel.state.chosen == "b"
        assert "does not fit: needs" in desk.panel.about.value

    def test_models(self, desk: Desk) -> None:
        desk.turn("models")
        tab = desk.panel.models
        assert "Models (3)" in tab.models.value
        tab.model.value = "b"
        assert desk.press(tab.load)[0] == ("POST", "shimmy/api/models/b/load", {})
        tab.pull.value, tab.sha256.value = "owner/name", "AB" * 32
        assert desk.press(tab.start_pull)[0] == (
            "POST",
            "shimmy/api/models/pull",
            {"model": "owner/name", "sha256": "ab" * 32},
        )

    def test_jobs(self, desk: Desk) -> None:
        running = job(id="j1", total=4, unit="bytes")
        desk.server.bodies["shimmy/api/jobs"] = {"jobs": [running, job("done", "j2", total=None)]}
        desk.turn("models")
        shown = desk.panel.models.jobs.value
        assert '<progress max="100" value="25" aria-label="load a"></progress>' in shown
        assert "25%, 1 bytes of 4 bytes" in shown
        assert [id for _, id in desk.panel.models.job.options] == ["j1"]
        assert desk.press(desk.panel.models.stop_job)[0][:2] == ("DELETE", "shimmy/api/jobs/j1")

    def test_unloading_asks_first(self, desk: Desk, monkeypatch: Any) -> None:
        desk.turn("models")
        focused: list[dict[str, Any]] = []
        monkeypatch.setattr(desk.panel.no, "send", focused.append)
        assert desk.panel.confirm.layout.display == "none"
        assert desk.press(desk.panel.models.unload) == []
        assert desk.panel.confirm.layout.display is None
        assert "Unload a? It is loaded." in desk.panel.question.value
        # Whoever has no mouse is taken there, and Enter does no harm.
        assert focused == [{"do": "focus"}]
        assert desk.press(desk.panel.no) == []
        assert desk.panel.confirm.layout.display == "none"
        desk.press(desk.panel.models.unload)
        assert desk.press(desk.panel.yes)[0][1] == "shimmy/api/models/a/unload"

    def test_comparing(self, desk: Desk) -> None:
        desk.turn("compare")
        tab = desk.panel.compare
        tab.models[0].value, tab.models[2].value = "a", "b"
        tab.prompt.value = "hi"
        desk.stream(chunk("from a"), *end())
        desk.stream(chunk("from b"), *end())
        asked = [body["model"] for kind, _, body in desk.press(tab.compare) if kind == "STREAM"]
        assert asked == ["a", "b"]
        assert [one.layout.display for one in tab.answers] == [None, None, "none", "none"]
        assert "from a" in tab.answers[0].value
        assert "from b" in tab.answers[1].value
        assert tab.figures.value.count("30.0") == 2
        assert desk.press(tab.stop) == []

    def test_limits(self, desk: Desk) -> None:
        desk.turn("limits")
        tab = desk.panel.limits
        tab.name.value, tab.value.value = "max_queued", "3"
        asked = desk.press(tab.set)
        assert asked[0] == ("PUT", "shimmy/api/limits", {"max_queued": 3})
        tab.value.value = ""
        assert desk.press(tab.set) == []
        assert "invalid_value" in desk.said
        assert desk.press(tab.unset)[0][2] == {"max_queued": None}

    def test_locked_limits_say_why(self, desk: Desk) -> None:
        desk.server.bodies["shimmy/api/limits"] = limits(
            locked={"max_tokens_per_day": "set <b>above</b> you"},
            max_tokens_per_day=limit(5000, 2),
        )
        desk.turn("limits")
        desk.press(desk.panel.refresh)
        tab = desk.panel.limits
        assert "locked by the administrator: set &lt;b&gt;above" in tab.limits.value
        assert tab.note.value == ""
        tab.name.value = "max_tokens_per_day"
        assert "Locked by the administrator" in tab.note.value
        assert "3 of 5,000" not in tab.limits.value  # a table, and the line is beside the answer
        desk.turn("ask")
        assert "4,998 of 5,000 tokens per day" in desk.panel.ask.left.value

    def test_live(self, desk: Desk) -> None:
        desk.server.bodies["shimmy/health"] = {
            "status": "degraded", "active": 2,
            "dependencies": [{"name": "memory", "status": "ok", "detail": "5 GB", "action": "unload"}],
        }  # fmt: skip
        desk.turn("live")
        assert "The server is degraded; 2 requests and jobs are in progress" in desk.seen
        assert ">5 GB</td>" in desk.panel.live.health.value
        assert ">unload</td>" in desk.panel.live.health.value
        assert "None of your requests waits." in desk.panel.live.queue.value
        failed = replace(desk.panel.state, limits=Failed(Problem("server_unreachable", "gone")))
        desk.panel.live.show(failed)
        assert desk.panel.live.queue.value == text.failed(Problem("server_unreachable", "gone"))
        waiting = Ready(replace(desk.panel.state.limits.value, queue_position=1))
        desk.panel.live.show(replace(desk.panel.state, limits=waiting))
        assert "1 request before the first of yours" in desk.panel.live.queue.value
        desk.stream(chunk("x"), *end())
        desk.panel.ask.prompt.value = "hi"
        desk.press(desk.panel.ask.ask)
        assert "30%" in desk.panel.live.rates.value

    def test_audit(self, desk: Desk) -> None:
        desk.turn("audit")
        tab = desk.panel.audit
        assert [id for _, id in tab.record.options] == ["r"]  # what is erased has no receipt
        tab.filters["kind"].value = "end"
        tab.filters["since"].value = "2026-11-01"
        assert desk.press(tab.apply)[0][1] == (
            "shimmy/api/audit?kind=end&since=2026-11-01&limit=25"
        )
        assert "cursor=1" in desk.press(tab.older)[0][1]
        assert "page 2" in tab.page.value
        assert "cursor" not in desk.press(tab.newer)[0][1]
        assert desk.press(tab.clear)[0][1] == "shimmy/api/audit?limit=25"
        assert tab.filters["kind"].value == ""
        assert desk.press(tab.verify)[0][:2] == ("POST", "shimmy/api/audit/verify")
        assert "all are as they were written" in tab.verdict.value
        tab.by.value = "user"
        assert desk.press(tab.sum)[0][1] == "shimmy/api/audit/usage?by=user"
        assert desk.press(tab.fetch)[0][1] == "shimmy/api/audit/receipts/r"
        assert "verify-receipt" in tab.receipt.value
        assert desk.press(tab.mine) == []
        assert "not known yet" in desk.said

    def test_files(self, desk: Desk, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        desk.server.bodies["shimmy/api/audit"] = {"records": [record(2)], "next_cursor": None}
        desk.turn("audit")
        tab = desk.panel.audit
        tab.name.value = "audit.csv"
        desk.press(tab.write)
        assert "1 record written" in tab.export.value
        desk.press(tab.write)
        assert "file_exists" in desk.said
        desk.press(tab.fetch)
        tab.receipt_name.value = "receipt.json"
        desk.press(tab.save)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["audit.csv", "receipt.json"]


class TestShown:
    def test_each_section_from_pending_to_failed(self, desk: Desk) -> None:
        where = {
            "models": ("shimmy/api/models", lambda: desk.panel.models.models),
            "limits": ("shimmy/api/limits", lambda: desk.panel.limits.limits),
            "live": ("shimmy/health", lambda: desk.panel.live.health),
            "audit": ("shimmy/api/audit", lambda: desk.panel.audit.page),
        }
        for section, (path, place) in where.items():
            desk.server.bodies[path] = AccessDenied("not for you", param="x")
            desk.turn(section)
            desk.press(desk.panel.refresh)
            assert "not for you (field &#x27;x&#x27;) [policy_denied]" in place().value, section

    def test_pending(self) -> None:
        desk = Panel(Server, start=False)  # type: ignore[arg-type]
        assert "being fetched" in desk.about.value
        assert "being fetched" in desk.ask.left.value
        desk.close()

    def test_a_limit_that_is_reached_says_until_when(self, desk: Desk) -> None:
        desk.server.bodies["shimmy/api/limits"] = limits(
            max_requests_per_minute=limit(2, 2) | {"resets_at": NOON + 41}
        )
        error = RateLimitExceeded("max_requests_per_minute is 2: 2 used; there is room in 41 s")
        desk.server.bodies["shimmy/v1/chat/completions"] = error
        desk.panel.ask.prompt.value = "hi"
        desk.press(desk.panel.ask.ask)
        assert "[rate_limit_exceeded]" in desk.said
        assert "[rate_limit_exceeded]" in desk.panel.ask.answer.value
        left = desk.panel.ask.left.value
        assert "0 of 2 requests per minute (until " in left
        assert ":41 " in left

    def test_names_and_messages_are_inert(self, desk: Desk) -> None:
        bodies = desk.server.bodies
        bodies["shimmy/api/models"] = {
            "models": [model(HOSTILE, "failed", error=HOSTILE, quantization=HOSTILE)],
            "default": HOSTILE,
            "engine": "x",
        }
        error = {"code": "x", "message": HOSTILE, "param": HOSTILE, "request_id": "r"}
        bodies["shimmy/api/jobs"] = {
            "jobs": [job(model=HOSTILE, message=HOSTILE), job("failed", "k", error=error)]
        }
        one = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_tokens", "tokens_generated", "denied", "limited",
             "errors"), 3,
        )  # fmt: skip
        bodies["shimmy/api/audit/usage"] = {"by": ["user"], "usage": [{"user": HOSTILE} | one]}
        bodies["shimmy/api/audit"] = {
            "records": [record(1, user=HOSTILE, model=HOSTILE, outcome=HOSTILE)],
            "next_cursor": None,
        }
        bodies["shimmy/api/audit/verify"] = AccessDenied(HOSTILE)
        bodies["shimmy/api/limits"] = limits() | {"shared": {HOSTILE: {"max_queued": limit(1, 0)}}}
        bodies["shimmy/health"] = {
            "status": HOSTILE, "active": 0,
            "dependencies": [dict.fromkeys(("name", "status", "detail", "action"), HOSTILE)],
        }  # fmt: skip
        for section in SECTIONS:
            desk.turn(section)
            desk.press(desk.panel.refresh)
        desk.press(desk.panel.audit.sum)
        desk.press(desk.panel.audit.verify)
        desk.stream(thought(HOSTILE), chunk(HOSTILE + "\n![x](http://evil/x.png)"), *end())
        desk.panel.ask.prompt.value = HOSTILE
        desk.press(desk.panel.ask.ask)
        seen = desk.seen + "".join(
            label for one in below(desk.panel) for label, _ in getattr(one, "options", ())
        )
        assert "onerror" in seen
        assert "<img" not in desk.seen
        assert "evil/x.png" not in desk.seen
        for character in "\u202e\x1b":
            assert character not in seen
        assert len(desk.panel.audit.usage.value.split("<svg")) == 2

    def test_long_names_do_not_take_the_page(self, desk: Desk) -> None:
        desk.server.bodies["shimmy/api/models"] = AccessDenied("x" * 10_000)
        desk.press(desk.panel.refresh)
        assert len(desk.panel.about.value) < 400


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.feed(page)
        assert self.stack == [], page[:200]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in {"rect", "br", "hr"}:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def count(self, tag: str) -> int:
        return sum(one == tag for one, _ in self.found)


class TestForEverybody:
    @pytest.fixture
    def whole(self, desk: Desk) -> Desk:
        """With something in every place."""
        desk.server.bodies["shimmy/api/jobs"] = {"jobs": [job()]}
        for section in SECTIONS:
            desk.turn(section)
        for button in (desk.panel.audit.sum, desk.panel.audit.verify, desk.panel.audit.fetch):
            desk.press(button)
        desk.stream(chunk("| a |\n| - |\n| b |\n"), *end())
        desk.panel.ask.prompt.value = "hi"
        desk.press(desk.panel.ask.ask)
        desk.press(desk.panel.ask.record_wanted)
        return desk

    def test_every_control_has_a_label_and_a_tooltip(self, whole: Desk) -> None:
        kinds = (ipywidgets.Button, ipywidgets.Dropdown, ipywidgets.Text, ipywidgets.Textarea,
                 ipywidgets.Checkbox)  # fmt: skip
        controls = [one for one in below(whole.panel) if isinstance(one, kinds)]
        assert len(controls) > 40
        for one in controls:
            assert one.description, one
            assert one.tooltip, one.description
            assert not one.disabled  # a control that goes away under the keyboard loses its place

    def test_only_native_controls(self, whole: Desk) -> None:
        known = {"Panel", "VBox", "HBox", "HTML", "Button", "Dropdown", "Text", "Textarea",
                 "Checkbox"}  # fmt: skip
        assert {type(one).__name__ for one in below(whole.panel)} == known

    def test_tables_have_captions_and_headings(self, whole: Desk) -> None:
        tables = 0
        for one in below(whole.panel):
            if not isinstance(one, ipywidgets.HTML) or one is whole.panel.ask.answer:
                continue
            tags = Tags(one.value)
            assert tags.count("table") == tags.count("caption")
            scopes = [attrs.get("scope") for tag, attrs in tags.found if tag == "th"]
            assert set(scopes) <= {"col", "row"}
            tables += tags.count("table")
        assert tables >= 8

    def test_one_live_region_that_says_errors_aloud(self, whole: Desk) -> None:
        assert whole.seen.count("aria-live") == 1
        assert 'role="status" aria-live="polite"' in whole.said
        whole.panel.ask.prompt.value = ""
        whole.press(whole.panel.ask.ask)
        assert 'role="alert" aria-live="assertive"' in whole.said
        assert "<strong>Error:</strong> there is no prompt" in whole.said
        assert "[invalid_value]" in whole.said

    def test_the_section_in_view_is_marked_by_more_than_a_colour(self, desk: Desk) -> None:
        desk.turn("limits")
        labels = [one.description for one in desk.panel.sections]
        assert labels == ["Ask", "Models", "Compare", "✓ Limits", "Audit", "Live"]
        assert desk.panel.sections[3].tooltip == "Limits: in view"
        pages = desk.panel._pages.children
        assert [one.layout.display for one in pages].count(None) == 1
        assert pages[3].layout.display is None
        assert ">Limits</h3>" in pages[3].children[0].value

    def test_the_keyboard_s_order_is_the_eye_s(self, whole: Desk) -> None:
        order = [one for one in below(whole.panel) if hasattr(one, "description")]
        labels = [one.description for one in order if one.description]
        assert labels[:5] == ["Yes, do it", "No, leave it", "Model", "Refresh", "Pause updates"]
        assert labels.index("Prompt") < labels.index("Ask the model") < labels.index("Stop")


class TestNobodyThere:
    def test_what_is_shown_is_nobody_s_doing(self, desk: Desk) -> None:
        desk.now += 100
        desk.panel.work.tick_at(desk.now)
        desk.server.bodies["shimmy/api/models"] = {
            "models": [model("c")], "default": "c", "engine": "x",
        }  # fmt: skip
        desk.work()
        assert desk.panel.model.value == "c"
        assert desk.panel.state.chosen == "c"
        assert desk.panel.state.last_activity == desk.now - 100

    def test_views_that_come_and_go(self, desk: Desk) -> None:
        desk.panel._view_count = 1
        assert desk.panel.state.visible
        desk.panel._view_count = 2
        desk.panel._view_count = 1
        assert desk.panel.state.visible
        desk.panel._view_count = 0
        assert not desk.panel.state.visible
        assert "nobody sees it" in desk.said
        asked = len(desk.server.asked)
        desk.now += 60
        desk.work()
        assert len(desk.server.asked) == asked
        desk.panel._view_count = 1
        desk.work()
        assert len(desk.server.asked) == asked + 2

    def test_five_minutes(self, desk: Desk) -> None:
        when = desk.now + IDLE_SECONDS
        while desk.now < when + 100:
            desk.now += 1
            desk.work()
            if desk.now == when - 1:
                asked = len(desk.server.asked)
                assert "Nothing is fetched" not in desk.said
        assert len(desk.server.asked) == asked
        assert "nobody has used this panel for five minutes" in desk.said
        assert desk.panel.pause.description == "Resume updates"
        assert len(desk.press(desk.panel.pause)) == 2
        assert desk.panel.pause.description == "Pause updates"

    def test_pausing(self, desk: Desk) -> None:
        desk.press(desk.panel.pause)
        assert "you have paused it" in desk.said
        desk.now += 60
        assert desk.press(desk.panel.pause) != []
        assert not desk.panel.state.paused


class TestFailing:
    def test_a_callback(self, desk: Desk) -> None:
        def fails() -> m.Act:
            raise KeyError("x<y")

        desk.panel.act(fails)
        assert "KeyError: &#x27;x&lt;y&#x27; [internal_error]" in desk.said
        assert 'role="alert"' in desk.said
        assert desk.press(desk.panel.refresh) != []

    def test_the_model(self, desk: Desk, monkeypatch: Any) -> None:
        from shimmy_jupyter.notebook.panel import widgets

        original = widgets.handle

        def fails(state: Any, event: m.Event, now: float) -> Any:
            if isinstance(event, m.VerifyWanted):
                raise ZeroDivisionError
            return original(state, event, now)

        monkeypatch.setattr(widgets, "handle", fails)
        desk.panel.audit.verify.click()
        assert "ZeroDivisionError [internal_error]" in desk.said

    def test_a_section(self, desk: Desk, monkeypatch: Any) -> None:
        def fails(_state: Any) -> None:
            raise ValueError("cannot be shown")

        monkeypatch.setattr(desk.panel.limits, "show", fails)
        desk.turn("audit")
        assert "ValueError: cannot be shown [internal_error]" in desk.said
        assert "Records, page 1" in desk.panel.audit.page.value  # of those after it
        assert not desk.panel._rendering

    def test_a_typed_error_keeps_its_code(self, desk: Desk) -> None:
        def fails() -> m.Act:
            raise AccessDenied("no", param="model")

        desk.panel.act(fails)
        assert "no (field &#x27;model&#x27;) [policy_denied]" in desk.said


class TestThreads:
    def test_another_thread_waits_its_turn(self, desk: Desk, monkeypatch: Any) -> None:
        """A front end's word on a subshell, while the main thread is showing something."""
        rendering, go = threading.Event(), threading.Event()

        def slow(_state: Any) -> None:
            rendering.set()
            assert go.wait(10)

        monkeypatch.setattr(desk.panel.live, "show", slow)
        first = threading.Thread(target=lambda: desk.panel.act(m.Paused))
        first.start()
        assert rendering.wait(10)
        second = threading.Thread(target=lambda: desk.panel.act(m.Resumed))
        second.start()
        go.set()
        first.join(10)
        second.join(10)
        assert not desk.panel.state.paused

    async def test_on_a_kernel_s_loop(self) -> None:
        """What the thread hears is shown where widgets are changed."""
        server, shown = Server(), asyncio.Event()
        loop, names = asyncio.get_running_loop(), set()
        one = Panel(lambda: server)

        def seen(_change: Any) -> None:
            names.add(threading.current_thread().name)
            loop.call_soon_threadsafe(shown.set)

        one.about.observe(seen, "value")
        await asyncio.wait_for(shown.wait(), 10)
        assert names == {threading.current_thread().name}
        assert server.threads == {"shimmy-panel"}
        thread = one.work.thread
        one.close()
        assert thread is not None
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "shimmy-panel"]


class TestEnd:
    def test_two_panels(self) -> None:
        first, second = Desk(), Desk()
        first.panel.model.value = "b"
        assert second.panel.model.value == "a"
        first.panel.close()
        assert second.press(second.panel.refresh) != []
        second.panel.close()

    def test_nothing_is_left(self) -> None:
        before = set(ipywidgets_widget._instances)
        for _ in range(3):
            one = panel(Server)  # type: ignore[arg-type]
            thread = one.work.thread
            assert thread is not None
            one.close()
            one.close()
            thread.join(10)
            assert not thread.is_alive()
        assert set(ipywidgets_widget._instances) == before
        assert repr(one) == "<shimmy panel, closed>"

    def test_closing_amid_an_answer_cancels_it(self) -> None:
        desk = Desk()
        desk.stream(*(chunk("x") for _ in range(50)))
        desk.panel.ask.prompt.value = "hi"
        desk.panel.ask.ask.click()
        desk.panel.work.step(wait=False)
        assert desk.server.open == 1
        desk.panel.close()
        assert not desk.panel.work.step(wait=False)
        assert desk.server.open == 0

    def test_with_all_widgets(self) -> None:
        one = panel(Server)  # type: ignore[arg-type]
        thread = one.work.thread
        ipywidgets.Widget.close_all()
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()
        assert one.state.closed

    def test_collected(self) -> None:
        """ipywidgets keeps what is open; where it does not, the thread ends too."""
        one = panel(Server)  # type: ignore[arg-type]
        thread = one.work.thread
        assert thread is not None
        for widget in list(ipywidgets_widget._instances.values()):
            widget.comm.on_msg(None)
        ipywidgets_widget._instances.clear()
        del widget
        del one
        gc.collect()
        thread.join(10)
        assert not thread.is_alive()

    def test_the_interpreter_s_end(self) -> None:
        code = (
            "import threading\n"
            "from shimmy_jupyter.notebook.panel import panel\n"
            "class Slow:\n"
            "    def get(self, path):\n"
            "        asked.set(); threading.Event().wait()\n"
            "asked = threading.Event()\n"
            "kept = panel(Slow)\n"
            "assert asked.wait(10)\n"
            "print('end')\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")

    def test_one_that_was_never_whole(self, monkeypatch: Any) -> None:
        def fails(*_: Any) -> None:
            raise RuntimeError("no comm")

        monkeypatch.setattr(Panel, "_make", fails)
        with pytest.raises(RuntimeError, match="no comm"):
            Panel(Server, start=False)  # type: ignore[arg-type]
        gc.collect()  # what is raised while it goes would fail this test
        assert threads() == []

    def test_what_is_seen_without_a_front_end(self, desk: Desk) -> None:
        bundle = desk.panel._repr_mimebundle_()
        assert bundle["text/plain"] == "<shimmy panel, open>"
        assert "application/vnd.jupyter.widget-view+json" in bundle


class TestWords:
    @pytest.mark.parametrize(
        ("after", "zone", "words"),
        [
            (41, UTC, "until 08:00:41 UTC"),
            (599, UTC, "until 08:09:59 UTC"),
            (57_600, UTC, "until 00:00 UTC"),
            (57_600, ZoneInfo("Europe/Berlin"), "until 01:00 CET"),
            (90_000, UTC, "until 2027-01-16 09:00 UTC"),
        ],
    )
    def test_until(self, after: float, zone: Any, words: str) -> None:
        assert text.until(NOON + after, NOON, zone) == words

    def test_what_is_left(self) -> None:
        rows = [
            Limit("max_tokens_per_day", 5000, 1200, 3800, NOON + 57_600),
            Limit("max_concurrent", 2, 0, 2),
            Limit("max_prompt_tokens", 100),
            Limit("max_queued"),
        ]
        assert text.left(rows, NOON, UTC) == (
            "Left: 3,800 of 5,000 tokens per day (until 00:00 UTC); 2 of 2 requests at once"
        )
        assert text.left(rows[2:], NOON) == "Nothing is limited over time."

    def test_figures(self) -> None:
        one = Figures(10, 4, 3, 20.4, 99.6, 1.0, None)
        assert text.figures(one, "length") == (
            "10 tokens read, 3 of them from the cache · 4 tokens written · 20 tokens/s · "
            "first token after 100 ms · cut off at max_tokens"
        )
        assert "tokens/s" not in text.figures(Figures(1, 0, 0, None, None, None, None))
        assert "30%" in text.rates([Rate("a", one)])
        assert text.rates([Rate("a", Figures(0, 0, 0, None, None, None, None))])

    def test_verdicts(self) -> None:
        good = Verdict(True, 3, None, None, 1, 2, True, Head(3, "f" * 64, "t"))
        said = text.verdict(good)
        for words in (
            "3 records",
            "goes on from",
            "on record: 1",
            "not ended: 2 requests",
            "f" * 64,
        ):
            assert words in said
        bad = Verdict(False, 3, "record 2 is missing", 2, 0, 0, False, None)
        assert "NOT as they were written from record 2 on: record 2 is missing" in text.verdict(bad)

    @pytest.mark.parametrize("status", ["idle", "queued", "running", "stopping", "stopped"])
    def test_an_answer_without_figures(self, status: str) -> None:
        said = text.answer(Answer(status, "a", "hi", "one"))
        assert ("<small>" in said) == (status != "idle")

    def test_what_is_not_there(self) -> None:
        assert "being fetched" in text.unready(Pending(), "It")
        assert "not fetched yet" in text.unready(Idle(), "It")
        assert "[x]" in text.unready(Failed(Problem("x", "y")), "It")

    def test_bars(self) -> None:
        def row(name: str, tokens: int) -> UsageRow:
            return UsageRow((name, "a"), 1, tokens, 0, tokens, 0, 0, 0)

        usage = Usage(
            ("user", "model"), (row("ann", 50), row("bob", 10), row("ann", 50), row("", 0))
        )
        drawn = bars(usage)
        assert drawn.index("ann") < drawn.index("bob")
        assert ">200<" in drawn
        assert 'width="300"' in drawn
        assert 'width="30"' in drawn
        assert 'role="img" aria-label="Tokens by user this month' in drawn
        assert bars(Usage(("user",), ())) == ""
        many = Usage((), tuple(row("x", 1) for _ in range(40)))
        assert bars(many).count("<rect") == 1
