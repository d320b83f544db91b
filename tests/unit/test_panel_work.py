"""The panel's one thread, its errands, and how what it hears gets to where widgets are changed.

Cases: each kind of call; errors of ours and others, of the transport and of making one; answers that
wait, reason, grow at most ten times a second, end, are cut off, lack their figures; lanes; a short
question between two chunks; cancelled before, amid and after; a tick at its time, once; closing amid a
step, twice, with nothing heard after it; no thread left; files: whole, never over another, gone again
where they cannot be whole; the same lines as the server's export; the loop of whoever was heard last, one
that has stopped, none.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shimmy_jupyter.audit import export as server_export
from shimmy_jupyter.audit.ledger import Ledger, Query
from shimmy_jupyter.audit.records import Entry
from shimmy_jupyter.errors import AccessDenied, QueueFull, ServerUnreachable
from shimmy_jupyter.notebook.panel import messages as m
from shimmy_jupyter.notebook.panel.errands import waiting
from shimmy_jupyter.notebook.panel.fetched import Problem
from shimmy_jupyter.notebook.panel.post import Post
from shimmy_jupyter.notebook.panel.work import Work

USAGE = {
    "prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
}  # fmt: skip
SHIMMY = {
    "request_id": "r1", "receipt": {"request_id": "r1", "seq": 7, "leaf_hash": "0" * 64},
    "queue_ms": 1.0, "ttft_ms": 2.0, "tokens_per_second": 30.0, "cached_tokens": 3,
}  # fmt: skip


def chunk(text: str | None = None, reason: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    item = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}
    return b"data: " + json.dumps(item).encode() + b"\n\n"


def thought(text: str) -> bytes:
    delta = {"reasoning_content": text}
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}).encode() + b"\n\n"  # fmt: skip


def end(**more: Any) -> list[bytes]:
    last = {"choices": [], "model": "a", "usage": USAGE, "shimmy": SHIMMY, **more}
    return [
        chunk(reason="stop"),
        b"data: " + json.dumps(last).encode() + b"\n\n",
        b"data: [DONE]\n\n",
    ]


class Scripted:
    """A transport that says what it is told to, and remembers what it was asked."""

    def __init__(self, *streams: Iterable[bytes]) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.streams = list(streams)
        self.open = 0
        self.left = 0
        self.threads: set[str] = set()
        self.answers: Callable[[str], dict[str, Any]] = lambda path: {"path": path}

    def _asked(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        self.threads.add(threading.current_thread().name)
        self.asked.append((method, path, body))
        return self.answers(path)

    def get(self, path: str) -> dict[str, Any]:
        return self._asked("GET", path)

    def delete(self, path: str) -> dict[str, Any]:
        return self._asked("DELETE", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._asked("POST", path, body)

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._asked("PUT", path, body)

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterable[bytes]]:
        self._asked("STREAM", path, body)
        self.open += 1
        try:
            yield self.streams.pop(0)
        finally:
            self.open -= 1
            self.left += 1


class Desk:
    """A worker without a thread of its own: the test takes its steps."""

    def __init__(self, *streams: Iterable[bytes]) -> None:
        self.transport = Scripted(*streams)
        self.heard: list[m.Event] = []
        self.now = 100.0
        self.work = Work(lambda: self.transport, self.heard.append, lambda: self.now, start=False)

    def step(self, times: int = 1) -> list[m.Event]:
        before = len(self.heard)
        for _ in range(times):
            self.work.step(wait=False)
        return self.heard[before:]

    def ask(self, *requests: m.Request) -> list[m.Event]:
        """Until nothing is left to do."""
        before = len(self.heard)
        self.work.ask(requests)
        self.step()
        while self.work._running or self.work._waiting:
            self.step()
        return self.heard[before:]


def generate(number: int = 1, lane: str = "ask") -> m.Generate:
    return m.Generate(number, {"model": "a"}, lane)


class TestCalls:
    def test_each_method(self) -> None:
        desk = Desk()
        calls = [
            m.Call(1, "GET", "a"),
            m.Call(2, "POST", "b", {"x": 1}),
            m.Call(3, "POST", "c"),
            m.Call(4, "PUT", "d", {"y": None}),
            m.Call(5, "DELETE", "e"),
        ]
        heard = desk.ask(*calls)
        assert heard == [m.Answered(n, {"path": p}) for n, p in enumerate("abcde", 1)]
        assert desk.transport.asked == [
            ("GET", "a", None),
            ("POST", "b", {"x": 1}),
            ("POST", "c", {}),
            ("PUT", "d", {"y": None}),
            ("DELETE", "e", None),
        ]

    @pytest.mark.parametrize(
        ("error", "problem"),
        [
            (
                AccessDenied("no", param="model", request_id="r"),
                Problem("policy_denied", "no", "model", "r"),
            ),
            (ServerUnreachable("gone"), Problem("server_unreachable", "gone")),
            (KeyError("x"), Problem("internal_error", "KeyError: 'x'")),
            (ValueError(), Problem("internal_error", "ValueError")),
        ],
    )
    def test_errors_are_said_and_work_goes_on(self, error: Exception, problem: Problem) -> None:
        desk = Desk()

        def fails(path: str) -> dict[str, Any]:
            if path == "bad":
                raise error
            return {}

        desk.transport.answers = fails
        heard = desk.ask(m.Call(1, "GET", "bad"), m.Call(2, "GET", "good"))
        assert heard == [m.Refused(1, problem), m.Answered(2, {})]

    def test_a_transport_that_cannot_be_made(self) -> None:
        heard: list[m.Event] = []

        def none() -> Any:
            raise ServerUnreachable("there is no server")

        work = Work(none, heard.append, lambda: 0.0, start=False)
        work.ask([m.Call(1, "GET", "a"), generate(2)])
        for _ in range(2):
            work.step(wait=False)
        gone = Problem("server_unreachable", "there is no server")
        assert heard == [m.Refused(1, gone), m.Refused(2, gone)]


class TestAnswers:
    def test_whole(self) -> None:
        desk = Desk([b": waiting\n\n", thought("hm"), chunk("one "), chunk("two"), *end()])
        *_, last = desk.ask(generate())
        assert isinstance(last, m.Ended)
        assert (last.text, last.reasoning, last.reason) == ("one two", "hm", "stop")
        assert (last.request_id, last.figures.receipt) == ("r1", 7)
        assert (last.figures.prompt_tokens, last.figures.cached_tokens) == (10, 3)
        assert desk.transport.asked == [("STREAM", "shimmy/v1/chat/completions", {"model": "a"})]
        assert desk.transport.left == 1

    def test_what_it_waits_for(self) -> None:
        said = {"state": "loading", "message": "reading", "done": 1, "total": 4, "unit": "bytes"}
        desk = Desk([b": " + json.dumps(said).encode() + b"\n\n", *end()])
        assert desk.ask(generate())[0] == m.Waited(1, "loading the model: reading, 25%")

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ({"state": "loading", "message": "x", "done": 0, "total": None}, "loading the model: x"),
            ({"state": "prefill", "prompt_done": 3, "prompt_tokens": 9}, "reading the prompt: 3 of 9 tokens"),
            ({"state": "queued", "position": 0, "reason": "no room"}, "waiting: no room"),
            ({"state": "queued", "position": 1, "reason": "r"}, "waiting: 1 request before this one; r"),
            ({"state": "queued", "position": 2, "reason": "r"}, "waiting: 2 requests before this one; r"),
            ({"state": "new"}, "waiting: for its turn"),
        ],
    )  # fmt: skip
    def test_in_words(self, said: dict[str, Any], words: str) -> None:
        assert waiting(said) == words

    def test_shown_at_most_ten_times_a_second(self) -> None:
        desk = Desk([*(chunk(f"{n} ") for n in range(100)), *end()])
        desk.work.ask([generate()])
        shown = []
        while not any(isinstance(one, m.Ended) for one in desk.heard):
            shown += [one for one in desk.step() if isinstance(one, m.Grew)]
            desk.now += 0.01
        assert 9 <= len(shown) <= 11
        assert shown[-1].text.startswith("0 1 2 ")
        assert desk.heard[-1].text == "".join(f"{n} " for n in range(100))  # type: ignore[union-attr]

    def test_less_often_once_it_is_long(self) -> None:
        """So that showing it whole does not take all that a kernel may send."""
        desk = Desk([chunk("x" * 500_000), *(chunk("y") for _ in range(50)), *end()])
        desk.work.ask([generate()])
        shown = []
        for _ in range(53):
            shown += [one for one in desk.step() if isinstance(one, m.Grew)]
            desk.now += 0.1
        assert len(shown) == 1

    def test_cut_off(self) -> None:
        desk = Desk([chunk("one "), chunk("two")])
        *_, grown, refused = desk.ask(generate())
        assert grown == m.Grew(1, "one two", "")
        assert isinstance(refused, m.Refused)
        assert refused.problem.code == "internal_error"
        assert desk.transport.open == 0

    def test_an_error_amid(self) -> None:
        error = QueueFull("full").to_json("r9")
        desk = Desk([chunk("one"), b"data: " + json.dumps(error).encode() + b"\n\n"])
        *_, refused = desk.ask(generate())
        assert refused == m.Refused(1, Problem("queue_full", "full", None, "r9"))

    @pytest.mark.parametrize("last", [{"usage": None}, {"shimmy": {}}])
    def test_without_figures(self, last: dict[str, Any]) -> None:
        desk = Desk([chunk("one"), *end(**last)])
        *_, refused = desk.ask(generate())
        assert isinstance(refused, m.Refused)
        assert refused.problem.code == "internal_error"


class TestTurns:
    def test_of_a_lane_one_at_a_time(self) -> None:
        desk = Desk([chunk("a"), *end()], [chunk("b"), *end()])
        seen = []
        desk.work.ask([generate(1, "x"), generate(2, "x")])
        for _ in range(12):
            desk.step()
            seen.append(desk.transport.open)
        assert max(seen) == 1
        ended = [one.number for one in desk.heard if isinstance(one, m.Ended)]
        assert ended == [1, 2]

    def test_lanes_and_questions_by_turns(self) -> None:
        desk = Desk([chunk("a") for _ in range(20)], [chunk("b") for _ in range(20)])
        desk.work.ask([generate(1, "x"), generate(2, "y")])
        desk.step(2)
        assert desk.transport.open == 2
        desk.work.ask([m.Call(3, "GET", "quick")])
        heard = desk.step(3)
        assert m.Answered(3, {"path": "quick"}) in heard

    def test_cancelled_before_it_began(self) -> None:
        desk = Desk([chunk("a"), *end()])
        desk.work.ask([generate(1, "x"), generate(2, "x")])
        desk.step()
        desk.work.ask([m.Cancel(2)])
        assert m.Stopped(2) in desk.step()
        desk.step(10)
        assert len(desk.transport.asked) == 1

    def test_cancelled_amid(self) -> None:
        desk = Desk([chunk("one "), chunk("two "), chunk("three")])
        desk.work.ask([generate()])
        desk.step(2)
        assert desk.transport.open == 1
        desk.work.ask([m.Cancel(1)])
        # Also what has not been shown yet is kept.
        assert desk.step() == [m.Stopped(1, "one two ")]
        assert (desk.transport.open, desk.transport.left) == (0, 1)
        assert desk.step(3) == []

    def test_cancelled_after_its_end(self) -> None:
        desk = Desk(end())
        desk.ask(generate())
        assert desk.ask(m.Cancel(1), m.Cancel(99)) == []

    def test_a_call_that_is_cancelled_is_answered_too(self) -> None:
        desk = Desk()
        assert desk.ask(m.Call(1, "GET", "a"), m.Cancel(1)) == [m.Stopped(1)]
        assert desk.transport.asked == []

    def test_leaving_that_fails_is_said(self) -> None:
        desk = Desk([chunk("one "), chunk("two ")])
        original = desk.transport.stream

        @contextmanager
        def broken(path: str, body: dict[str, Any]) -> Iterator[Iterable[bytes]]:
            with original(path, body) as chunks:
                try:
                    yield chunks
                finally:
                    raise OSError("it does not close")

        desk.transport.stream = broken  # type: ignore[method-assign]
        desk.work.ask([generate()])
        desk.step()
        desk.work.ask([m.Cancel(1)])
        defect, stopped = desk.step()
        assert defect == m.Defect(Problem("internal_error", "OSError: it does not close"))
        assert stopped == m.Stopped(1, "one ")


class TestTicks:
    def test_once_at_its_time(self) -> None:
        desk = Desk()
        desk.work.tick_at(105.0)
        assert desk.step() == []
        desk.now = 105.0
        assert desk.step() == [m.Tick()]
        assert desk.step() == []

    def test_another_time_or_none(self) -> None:
        desk = Desk()
        desk.work.tick_at(101.0)
        desk.work.tick_at(110.0)
        desk.now = 102.0
        assert desk.step() == []
        desk.work.tick_at(None)
        desk.now = 120.0
        assert desk.step() == []

    def test_the_thread_wakes_for_it(self) -> None:
        heard = threading.Event()
        now = [0.0]

        def hear(event: m.Event) -> None:
            assert event == m.Tick()
            heard.set()

        work = Work(Scripted, hear, lambda: now[0])  # type: ignore[arg-type]
        work.tick_at(1e-9)
        now[0] = 1.0
        assert heard.wait(10)
        work.close()
        assert work.thread is not None
        work.thread.join(10)


class TestEnd:
    def test_streams_are_left_and_nothing_is_heard(self) -> None:
        desk = Desk([chunk("one"), chunk("two")])
        desk.work.ask([generate(), generate(2)])
        desk.step()
        before = list(desk.heard)
        desk.work.close()
        desk.work.ask([m.Call(3, "GET", "late")])
        assert not desk.work.step()
        assert not desk.work.step()
        desk.work.close()
        assert desk.heard == before
        assert desk.transport.open == 0
        assert [one[0] for one in desk.transport.asked] == ["STREAM"]

    def test_the_thread_ends_where_it_waits(self) -> None:
        work = Work(Scripted, lambda _: None)  # type: ignore[arg-type]
        assert work.thread is not None
        assert work.thread.daemon
        work.close()
        work.thread.join(10)
        assert not work.thread.is_alive()

    def test_closing_does_not_wait_for_a_server(self) -> None:
        asked, answer = threading.Event(), threading.Event()
        transport = Scripted()

        def slow(_path: str) -> dict[str, Any]:
            asked.set()
            assert answer.wait(10)
            return {}

        transport.answers = slow
        heard: list[m.Event] = []
        work = Work(lambda: transport, heard.append)
        work.ask([m.Call(1, "GET", "a"), m.Call(2, "GET", "b")])
        assert asked.wait(10)
        work.close()  # returns at once: nobody has let the answer go yet
        assert work.thread is not None
        assert work.thread.is_alive()
        answer.set()
        work.thread.join(10)
        assert not work.thread.is_alive()
        assert [path for _, path, _ in transport.asked] == ["a"]
        assert transport.threads == {"shimmy-panel"}

    def test_the_thread_keeps_nobody_alive(self) -> None:
        class Owner:
            def __init__(self) -> None:
                self.post = Post(lambda _: None)
                self.work = Work(Scripted, self.post.put)  # type: ignore[arg-type]
                weakref.finalize(self, self.work.close)

        owner = Owner()
        thread = owner.work.thread
        assert thread is not None
        del owner
        gc.collect()
        thread.join(10)
        assert not thread.is_alive()


class Pages(Scripted):
    """A ledger, as `GET shimmy/api/audit` shows it."""

    def __init__(self, ledger: Ledger, size: int = 2) -> None:
        super().__init__()
        self.ledger, self.size, self.fail_at = ledger, size, 0
        self.answers = self.page

    def page(self, path: str) -> dict[str, Any]:
        if len(self.asked) == self.fail_at:
            raise ServerUnreachable("gone")
        _, _, query = path.partition("?")
        given = dict(one.split("=") for one in query.split("&"))
        assert given["limit"] == "1000"
        cursor = int(given["cursor"]) if "cursor" in given else None
        found = self.ledger.query(Query(kind=given.get("kind")), cursor, self.size)
        return {"records": found.records, "next_cursor": found.next_cursor}


class TestFiles:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: Any) -> Path:
        work = tmp_path / "work"
        work.mkdir()
        monkeypatch.chdir(work)
        return work

    @pytest.fixture
    def ledger(self, tmp_path: Path) -> Iterator[Ledger]:
        ledger = Ledger(tmp_path / "ledger.sqlite")
        entries = [
            Entry("begin", f"r{n}", 1.5 + n, "=ann", groups=("x", "\u00e9"), model="a",
                  parameters={"temperature": 0.1, "seed": 0})
            for n in range(5)
        ]  # fmt: skip
        ledger.append([*entries, Entry("act", "x", 9.0, "bob", action="load")]).result()
        yield ledger
        ledger.close()

    def exported(self, ledger: Ledger, format: str, **query: str) -> list[m.Event]:
        desk = Desk()
        desk.transport = Pages(ledger)
        return desk.ask(m.Export(1, query, "out.txt", format))

    def test_jsonl_as_the_server_writes_it(self, ledger: Ledger, folder: Path) -> None:
        heard = self.exported(ledger, "jsonl")
        assert heard == [
            m.Wrote(1, "out.txt", 2, whole=False),
            m.Wrote(1, "out.txt", 4, whole=False),
            m.Wrote(1, "out.txt", 6, whole=True),
        ]
        theirs = b"".join(server_export.export(ledger, Query(), "jsonl")).splitlines()
        assert (folder / "out.txt").read_bytes().splitlines() == theirs[::-1]

    def test_csv_as_the_server_writes_it(self, ledger: Ledger, folder: Path) -> None:
        self.exported(ledger, "csv", kind="begin")
        whole = b"".join(server_export.export(ledger, Query(kind="begin"), "csv"))
        head, *theirs = whole.split(b"\r\n")[:-1]
        assert (folder / "out.txt").read_bytes().split(b"\r\n")[:-1] == [head, *theirs[::-1]]
        assert b"'=ann" in whole

    def test_erased_records(self, ledger: Ledger, folder: Path) -> None:
        ledger.prune(3.0).result()
        self.exported(ledger, "jsonl")
        last = json.loads((folder / "out.txt").read_text().splitlines()[-1])
        assert last == {"seq": 0, "leaf_hash": None, "body": None}

    @pytest.mark.parametrize("kind", ["export", "save"])
    def test_never_over_another_file(self, ledger: Ledger, folder: Path, kind: str) -> None:
        (folder / "out.txt").write_text("mine")
        if kind == "export":
            (refused,) = self.exported(ledger, "csv")
        else:
            (refused,) = Desk().ask(m.Save(1, "out.txt", "theirs"))
        assert isinstance(refused, m.Refused)
        assert refused.problem.code == "file_exists"
        assert "out.txt" in refused.problem.message
        assert str(folder) not in refused.problem.message
        assert (folder / "out.txt").read_text() == "mine"

    def test_a_link_is_another_file_too(self, folder: Path, tmp_path: Path) -> None:
        (folder / "out.txt").symlink_to(tmp_path / "elsewhere")
        (refused,) = Desk().ask(m.Save(1, "out.txt", "x"))
        assert isinstance(refused, m.Refused)
        assert not (tmp_path / "elsewhere").exists()

    def test_half_a_file_is_not_kept(self, ledger: Ledger, folder: Path) -> None:
        desk = Desk()
        desk.transport = Pages(ledger)
        desk.transport.fail_at = 2
        *_, refused = desk.ask(m.Export(1, {}, "out.txt", "csv"))
        assert refused == m.Refused(1, Problem("server_unreachable", "gone"))
        assert list(folder.iterdir()) == []

    def test_cancelled(self, ledger: Ledger, folder: Path) -> None:
        desk = Desk()
        desk.transport = Pages(ledger)
        desk.work.ask([m.Export(1, {}, "out.txt", "csv")])
        desk.step()
        assert (folder / "out.txt").exists()
        desk.work.ask([m.Cancel(1)])
        (refused,) = desk.step()
        assert isinstance(refused, m.Refused)
        assert refused.problem.code == "cancelled"
        assert list(folder.iterdir()) == []

    def test_saving(self, folder: Path) -> None:
        assert Desk().ask(m.Save(1, "r.json", "{\u00e9}\n")) == [
            m.Wrote(1, "r.json", 1, whole=True)
        ]
        assert (folder / "r.json").read_bytes() == "{\u00e9}\n".encode()

    def test_a_folder_that_is_gone(self, folder: Path) -> None:
        folder.rmdir()
        (refused,) = Desk().ask(m.Save(1, "r.json", "x"))
        assert isinstance(refused, m.Refused)
        assert refused.problem.code == "invalid_value"

    def test_a_full_disk(self, folder: Path, monkeypatch: Any) -> None:
        class Full:
            def write(self, _text: str) -> None:
                raise OSError(errno.ENOSPC, "full")

            def close(self) -> None:
                raise OSError(errno.ENOSPC, "full")

        def opened(path: Path, *_: Any, **__: Any) -> Full:
            path.touch()
            return Full()

        monkeypatch.setattr(Path, "open", opened)
        (refused,) = Desk().ask(m.Save(1, "r.json", "x"))
        assert isinstance(refused, m.Refused)
        assert refused.problem.code == "disk_full"
        assert not (folder / "r.json").exists()


class TestPost:
    def test_without_a_loop_where_it_is_put(self) -> None:
        got: list[list[m.Event]] = []
        post = Post(got.append)
        post.here()
        post.put(m.Tick())
        assert got == [[m.Tick()]]

    async def test_on_the_loop_that_was_heard_last(self) -> None:
        got: list[tuple[int, str]] = []
        here = threading.current_thread().name
        done = asyncio.Event()

        def take(events: list[m.Event]) -> None:
            got.append((len(events), threading.current_thread().name))
            done.set()

        post = Post(take)
        post.here()

        def put() -> None:
            for _ in range(3):
                post.put(m.Tick())

        thread = threading.Thread(target=put)
        thread.start()
        thread.join()
        assert got == []  # this loop has not turned yet
        await asyncio.wait_for(done.wait(), 10)
        assert got == [(3, here)]

    def test_a_loop_that_has_stopped_is_not_waited_for(self) -> None:
        got: list[m.Event] = []
        post = Post(got.extend)

        async def heard() -> None:
            post.here()

        asyncio.run(heard())
        post.put(m.Tick())
        assert got == [m.Tick()]

    def test_what_a_loop_left_undelivered_is_delivered(self) -> None:
        got: list[m.Event] = []
        post = Post(got.extend)
        loop = asyncio.new_event_loop()

        def last() -> None:
            post.here()
            loop.stop()
            post.put(m.Tick())  # the loop does not turn again

        loop.call_soon(last)
        loop.run_forever()
        assert got == []
        post.put(m.Hidden())
        assert got == [m.Tick(), m.Hidden()]
        loop.close()

    def test_what_a_busy_loop_holds_up_goes_to_the_one_heard_since(self) -> None:
        """A person who acts by way of a subshell does not wait for the cell that is running."""
        got: list[str] = []
        post = Post(lambda _: got.append(threading.current_thread().name))
        delivered = threading.Event()

        async def main() -> None:
            post.here()
            post.put(m.Tick())
            thread = threading.Thread(target=other, name="subshell")
            thread.start()
            assert delivered.wait(10)
            thread.join()

        def other() -> None:
            async def act() -> None:
                post.here()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                delivered.set()

            asyncio.run(act())

        asyncio.run(main())
        assert got == ["subshell"]

    def test_in_order_from_several_threads(self) -> None:
        got: list[int] = []
        post = Post(lambda events: got.extend(one.number for one in events))  # type: ignore[union-attr]

        def put(first: int) -> None:
            for n in range(first, first + 200):
                post.put(m.Stopped(n))

        threads = [threading.Thread(target=put, args=(k * 1000,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k in range(3):
            mine = [n for n in got if n // 1000 == k]
            assert mine == list(range(k * 1000, k * 1000 + 200))
