"""The magics from line to screen, over a transport that answers from a script.

Cases: braces in and out, and what was not put in; what was said before, a cell of its own, none for the
bundled model, reset; context with what can be left out; options against settings, each honoured; `-m` known
and unknown; formats and schemas into variables; a dry run that asks nothing; aliases; use; commands' tables;
variables that must stay; replay of what is in a variable, is no longer, never was;
limits; records and their export; fix that offers and never runs; compare; compat; errors raise and say so.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
from IPython.core.interactiveshell import InteractiveShell

from shimmy_jupyter.errors import (
    AnswerInvalid,
    ContextLengthExceeded,
    InvalidValue,
    ModelNotFound,
    ServerUnreachable,
    ShimmyError,
)
from shimmy_jupyter.notebook.extension import unload
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.notebook.origin import Origin
from shimmy_jupyter.notebook.result import Completion

from ..notebooks import magics, run, shell
from .test_provenance import LAST

ROW = {"id": "small", "state": "loaded", "kind": "model", "context": 1000, "usable_context": 100, "size_bytes": 5,
       "quantization": "Q4", "fit": None, "error": None}  # fmt: skip


class Talking:
    """Answers every prompt with `text`, or with what `answers` has left; counts a token a word."""

    def __init__(self, text: str = "an answer", *answers: str) -> None:
        self.text, self.answers = text, list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.error: ShimmyError | None = None
        self.last: dict[str, Any] = {}

    def get(self, path: str) -> dict[str, Any]:
        place = path.partition("?")[0].removeprefix("shimmy/api/")
        rows = [ROW, ROW | {"id": "other"}, ROW | {"id": "self-test"}]
        limit = {"limit": 10, "used": 4, "remaining": 6, "resets_at": None}
        record = {"seq": 7, "timestamp": "2026-11-21T10:00:00.000Z", "kind": "end", "user": "ann",
                  "model": "small", "outcome": "limited", "code": "rate_limit_exceeded",
                  "prompt_tokens": 3, "request_id": "ab" * 16}  # fmt: skip
        found: dict[str, Any] = {
            "models": {"models": rows, "default": "small", "engine": ""},
            "models/small": ROW,
            "limits": {"limits": {"max_queued": limit}, "own": {"max_queued": 10}, "shared": {},
                       "locked": {"max_queued": "the administrator's"}, "queue_position": 2},
            "audit": {"records": [record, {"seq": 6, "erased": True}], "next_cursor": 6},
        }  # fmt: skip
        return dict(found[place])

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.posted.append((path, body))
        return self.get(path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.posted.append((path, body))
        said = json.dumps(body.get("messages", ""))
        if path.endswith("tokenize"):
            return {"tokens": [], "count": len(said.split())}
        if path.endswith("apply-template"):
            return {"prompt": "<user>hi\x1b[2J", "count": 7, "cached_tokens": 5}
        return {"model": body["model"], "choices": [{"message": {"content": self.text},
                "finish_reason": "stop"}], "usage": {"completion_tokens": 2},
                "shimmy": {"tokens_per_second": 5.0, "ttft_ms": 1.0}}  # fmt: skip

    def fetch(self, path: str) -> Iterator[bytes]:
        yield b"one\n"
        if self.error is not None:
            raise self.error
        yield b"two\n"

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[bytes]]:
        self.bodies.append(body)
        if self.error is not None:
            raise self.error
        text = self.answers.pop(0) if self.answers else self.text
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {}}
        chunks: list[dict[str, Any]] = [
            {"choices": [{"delta": {"content": text}, "finish_reason": None}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "model": body["model"], "usage": usage,
             "shimmy": {"request_id": "r", "receipt": None, "tokens_per_second": 5.0}, **self.last},
        ]  # fmt: skip
        data = [b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks]
        yield iter([*data, b"data: [DONE]\n\n"])


@pytest.fixture
def server() -> Talking:
    return Talking()


@pytest.fixture
def ip(server: Talking) -> Iterator[InteractiveShell]:
    """A shell with the magics on it, as it was before afterwards."""
    found = magics(server)
    ip = found.session.shell
    before = dict(ip.user_ns)
    yield ip
    unload(ip)
    ip.config.pop("ShimmyMagics", None)
    ip.user_ns.clear()
    ip.user_ns.update(before)


def ask(ip: InteractiveShell, *cells: str) -> Any:
    """Raises what the last cell does."""
    for cell in cells:
        result = ip.run_cell(cell, store_history=True)
    result.raise_error()
    return result


def prompt(server: Talking) -> str:
    return str(server.bodies[-1]["messages"][-1]["content"])


class TestBraces:
    @pytest.mark.parametrize(
        ("cell", "sent"),
        [
            ("%shimmy say {x}", "say 42"),
            ("%shimmy --no-interp say {x}", "say {x}"),
            ('%%shimmy\n{"a": 1} {} $x^{2}$ {x:.1f}', '{"a": 1} {} $x^{2}$ 42.0'),
            ("%%shimmy\n{In[-1]}", "x = 42"),
            ("%%shimmy\n$HOME {d['k']}", "$HOME v"),
        ],
    )
    def test_in_and_out(self, ip: Any, server: Talking, cell: str, sent: str) -> None:
        ask(ip, "d = {'k': 'v'}", "x = 42", cell)
        assert prompt(server) == sent

    def test_what_was_not_put_in_is_said(self, ip: Any, server: Talking, capsys: Any) -> None:
        ask(ip, "%shimmy say {nothing_such}")
        assert prompt(server) == "say {nothing_such}"
        assert "not put in: {nothing_such}" in capsys.readouterr().out

    def test_a_setting(self, ip: Any, server: Talking) -> None:
        ask(ip, "x = 1", "%config ShimmyMagics.interpolate = False", "%shimmy {x}")
        assert prompt(server) == "{x}"


class TestHistory:
    def said(self, server: Talking) -> list[str]:
        return [str(one["content"]) for one in server.bodies[-1]["messages"]]

    def test_the_last_two(self, ip: Any, server: Talking) -> None:
        server.answers = ["1", "2", "3"]
        ask(ip, "%shimmy a", "%shimmy b", "%shimmy c", "%shimmy d")
        assert self.said(server) == ["b", "2", "c", "3", "d"]

    def test_lines_of_one_cell_and_the_cell_again(
        self, ip: Any, server: Talking, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cell = "%shimmy a\nfor one in 'bc':\n    %shimmy {one}"
        monkeypatch.setattr(Origin, "cell", "the cell")
        for number in ("first", "second"):
            monkeypatch.setattr(Origin, "run", number, raising=False)
            server.answers, server.bodies[:] = ["1", "2", "3"], []
            ask(ip, cell)
            sent = [[one["content"] for one in body["messages"]] for body in server.bodies]
            assert sent == [["a"], ["a", "1", "b"], ["a", "1", "b", "2", "c"]]
        monkeypatch.setattr(Origin, "cell", "another")
        ask(ip, "%shimmy d")
        assert self.said(server) == ["b", "2", "c", "3", "d"]

    def test_as_many_as_wanted(self, ip: Any, server: Talking) -> None:
        ask(ip, "%config ShimmyMagics.max_history = 0", "%shimmy a", "%shimmy b")
        assert self.said(server) == ["b"]

    def test_not_for_single_questions(self, ip: Any, server: Talking) -> None:
        ask(ip, "%shimmy a", "%shimmy --model self-test b")
        assert self.said(server) == ["b"]

    def test_reset(self, ip: Any, server: Talking, capsys: Any) -> None:
        ask(ip, "%shimmy a", "%shimmy history", "%shimmy reset", "%shimmy b", "%shimmy history")
        assert self.said(server) == ["b"]
        out = capsys.readouterr().out
        assert "1 turn forgotten" in out
        assert "an answer" in out

    def test_forgetting_is_offered_only_where_it_would_help(self, ip: Any, server: Talking) -> None:
        server.error = ContextLengthExceeded("3 too many", param="messages")
        with pytest.raises(ContextLengthExceeded) as caught:
            ask(ip, "%shimmy a")
        assert "reset" not in caught.value.message
        server.error = None
        ask(ip, "%shimmy a")
        server.error = ContextLengthExceeded("3 too many", param="messages")
        with pytest.raises(ContextLengthExceeded, match="%shimmy reset"):
            ask(ip, "%shimmy b")
        with pytest.raises(ContextLengthExceeded) as caught:
            ask(ip, "%shimmy --model self-test b")
        assert "reset" not in caught.value.message

    def test_what_failed_was_not_said(self, ip: Any, server: Talking) -> None:
        server.error = ServerUnreachable("gone")
        with pytest.raises(ServerUnreachable):
            ask(ip, "%shimmy a")
        server.error = None
        ask(ip, "%shimmy b")
        assert self.said(server) == ["b"]


class TestContext:
    def test_cells_that_ran(self, ip: Any, server: Talking, capsys: Any) -> None:
        ask(ip, "y = 7", "y + 1", "%shimmy --context 2 why?")
        assert "y = 7" in prompt(server)
        assert "8" in prompt(server)
        assert prompt(server).endswith("why?")
        assert "tokens" in capsys.readouterr().out

    def test_what_is_shortened_is_said(self, ip: Any, server: Talking, capsys: Any) -> None:
        ask(ip, "'a' * 5000", "'b' * 3000", "%shimmy --context 2 why?")
        said = capsys.readouterr().out
        assert re.search(r"; of Out\[\d+\] only the beginning and the end\n", said)
        assert "characters left out" in prompt(server)

    def test_too_much_says_what_to_leave_out(self, ip: Any, server: Talking) -> None:
        long = "z = '" + "word " * 200 + "'"
        with pytest.raises(ContextLengthExceeded, match=r"--leave-out In\[\d+\]") as caught:
            ask(ip, long, "y = 7", "%shimmy --context 2 why?")
        assert not server.bodies
        names = str(caught.value.message).partition("--leave-out ")[2].split(";")[0]
        ask(ip, f"%shimmy --context 3 --leave-out {names} why?")
        assert "word word" not in prompt(server)
        assert "y = 7" in prompt(server)

    def test_what_the_answer_is_to_have_is_no_room(self, ip: Any, server: Talking) -> None:
        ask(ip, "y = 'word " + "word " * 40 + "'", "%shimmy --context 1 why?")
        with pytest.raises(ContextLengthExceeded, match=r"--leave-out In\[\d+\]"):
            ask(ip, "%shimmy --context 1 --max-tokens 50 why?")
        with pytest.raises(ContextLengthExceeded, match=r"--leave-out In\[\d+\]"):
            ask(ip, """%shimmy --context 1 -m '{"max_completion_tokens": 50}' why?""")
        assert len(server.bodies) == 1

    def test_where_nobody_knows_the_room_the_server_decides(
        self, ip: Any, server: Talking, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(ROW, "usable_context", None)
        ask(ip, "z = '" + "word " * 2000 + "'", "%shimmy --context 1 why?")
        assert "word word" in prompt(server)

    def test_leaving_out_of_nothing(self, ip: Any) -> None:
        with pytest.raises(InvalidValue) as caught:
            ask(ip, "%shimmy --leave-out 3 why?")
        assert caught.value.param == "--leave-out"


class TestOptions:
    def test_against_settings(self, ip: Any, server: Talking) -> None:
        ask(
            ip,
            "%config ShimmyMagics.temperature = 0.5",
            "%config ShimmyMagics.max_tokens = 5",
            "%config ShimmyMagics.system = 'Be brief.'",
            '%shimmy --temperature 0 --max-tokens 0 --system "" --stop "\\n" --stop X hi',
        )
        body = server.bodies[-1]
        assert (body["temperature"], body["max_tokens"], body["stop"]) == (0, 0, ["\n", "X"])
        assert [one["role"] for one in body["messages"]] == ["user"]

    def test_a_seed_is_reproducible(self, ip: Any, server: Talking) -> None:
        ask(ip, "%shimmy --seed 0 hi", "%shimmy hi")
        first, second = server.bodies
        assert (first["seed"], first["reproducible"]) == (0, True)
        assert "reproducible" not in second  # and the seed that was drawn is only for the record

    def test_parameters(self, ip: Any, server: Talking) -> None:
        ask(ip, """%shimmy -m '{"top_k": 20}' -m '{"min_p": 0.1}' hi""")
        assert (server.bodies[-1]["top_k"], server.bodies[-1]["min_p"]) == (20, 0.1)

    @pytest.mark.parametrize("name", ["topk", "messages", "stream", "nonsense"])
    def test_parameters_that_there_are_not(self, ip: Any, server: Talking, name: str) -> None:
        with pytest.raises(InvalidValue) as caught:
            ask(ip, f"""%shimmy -m '{{"{name}": 1}}' hi""")
        assert caught.value.param == "--model-parameters"
        assert not server.bodies

    @pytest.mark.parametrize("cell", ["%shimmy", "%%shimmy\n\n", "%shimmy --", "%shimmy -f x y"])
    def test_mistakes_raise(self, ip: Any, cell: str) -> None:
        with pytest.raises(InvalidValue):
            ask(ip, cell)


class Person(pydantic.BaseModel):
    name: str
    born: int


class TestVariables:
    def test_an_answer(self, ip: Any, server: Talking) -> None:
        ask(ip, "%shimmy -o x hi")
        assert str(ip.user_ns["x"]) == "an answer"
        assert ip.user_ns["x"].usage.completion_tokens == 2

    def test_by_assignment_and_by_number(self, ip: Any, server: Talking) -> None:
        ask(ip, "x = %shimmy hi")
        assert str(ip.user_ns["x"]) == "an answer"

    @pytest.mark.parametrize(
        "copied",
        [
            copy.copy,
            copy.deepcopy,
            dataclasses.replace,
            lambda one: pickle.loads(pickle.dumps(one)),
        ],
    )
    def test_a_copy_is_shown(self, ip: Any, server: Talking, capsys: Any, copied: Any) -> None:
        ask(ip, "x = %shimmy hi")
        answer = ip.user_ns["x"]
        again = copied(answer)
        capsys.readouterr()
        again._ipython_display_()
        assert "an answer" in capsys.readouterr().out
        assert (again, str(again)) == (answer, "an answer")

    @pytest.mark.parametrize(
        "name", ["get_ipython", "_oh", "_ih", "_dh", "In", "Out", "exit", "quit"]
    )
    def test_ipython_s_own_stay(self, ip: Any, server: Talking, name: str) -> None:
        before = ip.user_ns[name]
        with pytest.raises(InvalidValue, match=r"before the first cell.*another name") as caught:
            ask(ip, "ran = []", f"%shimmy -o {name} hi {{ran.append(1)}}")
        assert caught.value.param == "--output"
        assert not server.bodies
        assert not ip.user_ns["ran"]  # nor was anything in braces run for it
        assert ip.user_ns[name] is before

    def test_json(self, ip: Any, server: Talking) -> None:
        server.text = '{"a": [1]}'
        ask(ip, "%shimmy -f json -o x hi")
        assert ip.user_ns["x"] == {"a": [1]}
        assert server.bodies[-1]["response_format"] == {"type": "json_object"}

    def test_a_schema(self, ip: Any, server: Talking) -> None:
        ip.user_ns["Person"] = Person
        server.text = '{"name": "Ada", "born": 1815}'
        ask(ip, "%%shimmy -o x --schema Person\nAda was born in 1815")
        assert ip.user_ns["x"] == Person(name="Ada", born=1815)
        form = server.bodies[-1]["response_format"]
        assert (form["type"], form["json_schema"]["name"]) == ("json_schema", "Person")

    def test_an_answer_that_does_not_fit(self, ip: Any, server: Talking) -> None:
        ip.user_ns.update(Person=Person, x="before")
        server.text = '{"name": "Ada", "born": "?"}'
        with pytest.raises(AnswerInvalid) as caught:
            ask(ip, "%%shimmy -o x --schema Person\nAda")
        assert (caught.value.param, caught.value.text) == ("born", server.text)
        assert ip.user_ns["x"] == "before"

    def test_what_is_no_schema(self, ip: Any, server: Talking) -> None:
        with pytest.raises(InvalidValue, match=r"^five: 5 is no type") as caught:
            ask(ip, "five = 5", "%shimmy --schema five hi")
        assert caught.value.param == "--schema"

    @pytest.mark.parametrize("name", ["Nobody", "ip.nothing", "x"])
    def test_no_such_schema(self, ip: Any, server: Talking, name: str) -> None:
        ip.user_ns["x"] = 3
        with pytest.raises(ShimmyError):
            ask(ip, f"%shimmy --schema {name} hi")
        assert not server.bodies

    def test_two_shapes(self, ip: Any) -> None:
        ip.user_ns["Person"] = Person
        with pytest.raises(InvalidValue):
            ask(ip, """%shimmy --schema Person -m '{"grammar": {}}' hi""")


def test_a_dry_run_asks_nothing(ip: Any, server: Talking, capsys: Any) -> None:
    ask(ip, "%shimmy --dry-run --max-tokens 200 hi")
    out = capsys.readouterr().out
    assert "7 tokens, 5 of them computed already" in out
    assert "107 more than the context of 100 has room for" in out
    assert "max_queued: 6 of 10 left" in out
    assert "\x1b" not in out.replace("\x1b[2J", "?") or "\x1b[2J" not in out
    assert not server.bodies
    assert [path for path, _ in server.posted] == ["shimmy/api/apply-template"]
    ask(ip, "%shimmy --dry-run --reproducible hi")
    assert "7 tokens, 0 of them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("room", "line", "said"),
    [
        (7, "", "none: the prompt is 1 tokens too long for a context of 7"),
        (8, "", "as many as the server gives; the context of 8 has room for 1"),
        (7, "--max-tokens 0", "at most 0 tokens; the context of 7 has room for 0"),
        (6, "--max-tokens 0", "none: the prompt is 1 tokens too long for a context of 6"),
        (10, """-m '{"max_completion_tokens": 5}'""", "2 more than the context of 10 has room for"),
        (None, "", "as many as the server gives"),
    ],
)
def test_a_dry_run_reckons_as_the_server_does(
    ip: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, room: int | None, line: str, said: str
) -> None:
    monkeypatch.setitem(ROW, "usable_context", room)
    ask(ip, f"%shimmy --dry-run {line} hi")
    out = capsys.readouterr().out
    assert re.search(f"^answer: .*{re.escape(said)}$", out, re.MULTILINE), out


class TestReplay:
    """Of the answer that is in a variable; what a replay itself says, `test_replay.py` has."""

    @pytest.fixture
    def asked(self, server: Talking, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
        """The texts that are compared."""
        server.last = LAST
        found: list[str | None] = []

        def replayed(_transport: Any, _made: Any, text: str | None) -> Any:
            found.append(text)
            return SimpleNamespace(lines=list)

        monkeypatch.setattr("shimmy_jupyter.notebook.magics.replay", replayed)
        return found

    def test_what_the_option_put_there(self, ip: Any, server: Talking, asked: list[str]) -> None:
        server.answers = ["first", "[2]", "third"]
        ask(ip, "%shimmy -o x a", "%shimmy -f json -o y b", "z = %shimmy c", "w = y; y.append(3)")
        ask(ip, "%shimmy replay x", "%shimmy replay y", "%shimmy replay z", "%shimmy replay")
        assert asked == ["first", "[2]", "third", "third"]

    @pytest.mark.parametrize("value", ["5", "None", "[1]", "Completion('other')"])
    def test_another_value_has_no_record(
        self, ip: Any, server: Talking, asked: list[str], value: str
    ) -> None:
        ip.user_ns["Completion"] = Completion
        ask(ip, "%shimmy -o x a", f"x = {value}")
        with pytest.raises(InvalidValue, match=r"what x is now has no record") as caught:
            ask(ip, "%shimmy replay x")
        assert caught.value.param == "variable"
        assert not asked

    def test_the_last_value_that_fitted(self, ip: Any, server: Talking, asked: list[str]) -> None:
        ip.user_ns["Person"] = Person
        server.answers = ['{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": "?"}']
        cell = "%%shimmy -o x --schema Person\nAda"
        ask(ip, cell)
        with pytest.raises(AnswerInvalid):
            ask(ip, cell)
        ask(ip, "%shimmy replay x")
        assert asked == ['{"name": "Ada", "born": 1815}']

    def test_by_name_where_it_is_gone(self, ip: Any, server: Talking, asked: list[str]) -> None:
        ask(ip, "%shimmy -o x a", "del x", "%shimmy replay x")
        assert asked == ["an answer"]


class TestNames:
    def test_an_alias(self, ip: Any, server: Talking) -> None:
        ask(ip, "%shimmy alias tutor other", "%shimmy --model tutor hi")
        assert server.bodies[-1]["model"] == "other"
        ask(ip, "%shimmy update tutor small", "%%shimmy tutor\nhi")
        assert server.bodies[-1]["model"] == "small"
        ask(ip, "%shimmy dealias tutor", "%shimmy --model tutor hi")
        assert server.bodies[-1]["model"] == "tutor"

    @pytest.mark.parametrize(
        ("cell", "error"),
        [
            ("%shimmy alias other small", InvalidValue),
            ("%shimmy update nobody small", InvalidValue),
            ("%shimmy dealias nobody", InvalidValue),
            ("%shimmy alias x1 smal", (InvalidValue, ModelNotFound)),
        ],
    )
    def test_wrong_ones(self, ip: Any, cell: str, error: Any) -> None:
        with pytest.raises(error):
            ask(ip, cell)

    def test_use(self, ip: Any, server: Talking, capsys: Any) -> None:
        ask(ip, "%shimmy use", "%shimmy use other", "%shimmy hi")
        assert server.bodies[-1]["model"] == "other"
        assert "this notebook asks small" in capsys.readouterr().out


class TestAccounts:
    def test_limits(self, server: Talking) -> None:
        ((text, page),) = run("limits", server)
        assert "2 before your request" in text
        assert "locked: the administrator's" in text
        assert "<th" in page
        run("limits max_queued=3", server)
        assert server.posted == [("shimmy/api/limits", {"max_queued": 3})]

    def test_records(self, server: Talking) -> None:
        ((text, _),) = run("audit show --limit 2", server)
        assert "limited rate_limit_exceeded" in text
        assert "erased" in text
        assert "there are more" in text

    def test_an_export(self, server: Talking, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        run("audit export mine.csv", server)
        assert Path("mine.csv").read_text() == "one\ntwo\n"
        with pytest.raises(InvalidValue, match="there already"):
            run("audit export mine.csv", server)
        with pytest.raises(InvalidValue, match="ends in"):
            run("audit export mine.txt", server)
        with pytest.raises(InvalidValue, match="cannot be written"):
            run("audit export nowhere/mine.csv", server)
        server.error = ServerUnreachable("gone")
        with pytest.raises(ServerUnreachable):
            run("audit export half.jsonl", server)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.csv"]


class TestFix:
    FIXED = "It divides by zero.\n```python\n1 / 1\n```"

    def test_a_cell_is_offered_and_not_run(self, ip: Any, server: Talking, capsys: Any) -> None:
        server.text = self.FIXED.replace("1 / 1", "ran = True")
        ip.run_cell("1 / 0", store_history=True)
        ask(ip, "%shimmy fix")
        assert "1 / 0" in prompt(server)
        assert "ZeroDivisionError" in prompt(server)
        assert ip.rl_next_input == "ran = True"
        assert "ran" not in ip.user_ns
        assert "+ran = True" in capsys.readouterr().out

    def test_by_another_model(self, ip: Any, server: Talking) -> None:
        ip.run_cell("1 / 0", store_history=True)
        ask(ip, "%shimmy fix small")
        assert server.bodies[-1]["model"] == "small"

    def test_nothing_has_failed(self, ip: Any, server: Talking) -> None:
        with pytest.raises(InvalidValue, match="no cell"):
            ask(ip, "%shimmy fix")

    def test_no_cell_in_the_answer(self, ip: Any, server: Talking, capsys: Any) -> None:
        ip.run_cell("1 / 0", store_history=True)
        ip.rl_next_input = None
        ask(ip, "%shimmy fix")
        assert ip.rl_next_input is None
        assert "no corrected cell" in capsys.readouterr().out


def test_compare(ip: Any, server: Talking, capsys: Any) -> None:
    ask(ip, "%shimmy compare small other -- Why {1 + 1}?")
    asked = [body for path, body in server.posted if path.endswith("completions")]
    assert [body["model"] for body in asked] == ["small", "other"]
    assert asked[0]["messages"] == asked[1]["messages"]
    assert capsys.readouterr().out.count("an answer") == 2


def test_compat(ip: Any, server: Talking) -> None:
    assert "ai" not in ip.magics_manager.magics["cell"]
    ask(ip, "%shimmy compat", "%shimmy compat ai", "%%ai small -f text\nhi")
    assert server.bodies[-1]["model"] == "small"
    unload(ip)
    assert "ai" not in ip.magics_manager.magics["cell"]
    assert "ai" not in ip.magics_manager.magics["line"]


def test_compat_gives_back_what_was_another_s(ip: Any, server: Talking) -> None:
    def theirs(line: str, cell: str | None = None) -> None:
        """Another extension's."""

    table = ip.magics_manager.magics
    ip.register_magic_function(theirs, "line_cell", "ai")
    try:
        ask(ip, "%shimmy compat ai", "%shimmy compat ai", "%ai hi")
        assert len(server.bodies) == 1
        unload(ip)
        assert table["line"]["ai"] is table["cell"]["ai"] is theirs
    finally:
        for kind in ("line", "cell"):
            table[kind].pop("ai", None)


def test_loading_again_leaves_one_of_each() -> None:
    for _ in range(3):
        magics(Talking())
    ours = [c for c in shell().configurables if isinstance(c, ShimmyMagics)]
    assert len(ours) == 1
    callbacks = shell().events.callbacks
    assert sum("remembered" in str(c) for c in callbacks["post_run_cell"]) <= 1
    unload(shell())


def test_help(ip: Any, capsys: Any) -> None:
    ask(ip, "%shimmy help", "%shimmy help audit")
    out = capsys.readouterr().out
    assert "--leave-out" in out
    assert str(ShimmyMagics.shimmy.__doc__) in out
