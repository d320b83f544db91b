"""What users of other notebook assistants are used to, tried as they type it: the whole way from a cell to the
request and to the screen, over a transport that answers from a script.

Cases: each format by each of its names, asked for, shown and put into a variable; braces by name, in a line and in
a cell, where what is in them has values; In, Out and Err; expressions, and that it is said where they run; commands
by the other names; a model that is named in the cell, in a setting, in neither; every option, honoured here or by a
test that is named; one that is not there; streamed, and not; several models; tokens in colours; a model that does
not fit.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from shimmy_jupyter import __version__, kernel
from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.notebook.arguments import FLAGS, FORMATS
from shimmy_jupyter.notebook.extension import unload
from shimmy_jupyter.notebook.session import Resolved, Session, Tools

from ..notebooks import magics, run, session
from ..tables import ROOT, missing
from .test_likely import entry
from .test_magics import ROW, Talking, ask, prompt


@pytest.fixture
def server() -> Talking:
    return Talking()


@pytest.fixture
def ip(server: Talking) -> Iterator[InteractiveShell]:
    """A shell with the magics on it, as it was before afterwards."""
    ip = magics(server).session.shell
    before = dict(ip.user_ns)
    yield ip
    unload(ip)
    ip.config.pop("ShimmyMagics", None)
    ip.rl_next_input = None
    ip.user_ns.clear()
    ip.user_ns.update(before)


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is one that shows more than text."""
    monkeypatch.setattr(Session, "rich", True)


def shown(ip: InteractiveShell, cell: str) -> list[dict[str, Any]]:
    """All that a cell displays, in order."""
    with capture_output() as captured:
        ask(ip, cell)
    return [dict(one.data) for one in captured.outputs]


SVG = '<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
# What is answered, what of it the variable gets, and what of it a front end shows, by its type.
ANSWERS: dict[str, tuple[str, Any, str, Any]] = {
    "code": ("Sure:\n```python\nran = 1\n```", "ran = 1", "text/html", '<code class="language-python">'),
    "html": ("<p>Hi</p><script>x</script>", "<p>Hi</p><script>x</script>", "text/html", '<iframe sandbox=""'),
    "image": (SVG, SVG, "text/html", '<img src="data:image/svg+xml;base64,'),
    "json": ('{"a": [1]}', {"a": [1]}, "application/json", {"a": [1]}),
    "markdown": ("**Hi**", "**Hi**", "text/html", "<strong>Hi</strong>"),
    "md": ("**Hi**", "**Hi**", "text/html", "<strong>Hi</strong>"),
    "math": ("$$x^2$$", "x^2", "text/latex", "$$\nx^2\n$$"),
    "text": ("**Hi**", "**Hi**", "text/plain", "**Hi**"),
}  # fmt: skip


@pytest.mark.usefixtures("front_end")
class TestFormats:
    def test_each_is_tried(self) -> None:
        assert ANSWERS.keys() == FORMATS.keys()

    @pytest.mark.parametrize("flag", ["-f", "--format"])
    @pytest.mark.parametrize("format", ANSWERS)
    def test_shown_and_kept(self, ip: Any, server: Talking, format: str, flag: str) -> None:
        server.text, kept, kind, page = ANSWERS[format]
        data = shown(ip, f"%%shimmy {flag} {format} -o found\nhi")[-1]
        assert data[kind] == page if kind == "application/json" else page in data[kind]
        if format == "text":
            assert set(data) == {"text/plain"}
        found = ip.user_ns["found"]
        assert (found if isinstance(found, dict) else str(found)) == kept
        assert "ran" not in ip.user_ns
        assert ip.rl_next_input is None

    @pytest.mark.parametrize(
        ("format", "says"),
        [("code", "code"), ("html", "HTML"), ("image", "SVG"), ("json", "JSON"), ("math", "LaTeX"), ("text", "plain")],
    )  # fmt: skip
    def test_the_model_is_told(self, ip: Any, server: Talking, format: str, says: str) -> None:
        ask(ip, f"%shimmy -f {format} --system Brief. hi")
        first, _ = server.bodies[-1]["messages"]
        assert first["role"] == "system"
        assert first["content"].startswith("Brief.\n\n")
        assert says in first["content"]
        assert ("response_format" in server.bodies[-1]) == (format == "json")


NAMES = {"a": 1, "b": 2, "x": 3, "i": 4, "w": 9, "name": "Ada", "d": {"it's": "quoted", "k": 7}}
KEPT = {
    "an object": '{"a": 1}',
    "an object of names": '{"a": a, "b": {"x": x}, "w": [{}]}',
    "nothing": "{}",
    "an empty pair in code": 'println!("{}", x); dict = {}; {{}}',
    "LaTeX": r"\frac{a}{b} + x_{i}^{b} = \sqrt[3]{x} \text{name}",
    "an f-string": "print(f\"{x!r:>{w}} {name} {d['k']}\")",
    "format": '"{a} {b}".format(a=a, b=b)',
    "quotes in quotes": r"""{"say": "it's \"so\"", 'b': '"{}"'} and "it's {'a': "b"}" """.strip(),
    "JavaScript": "const { a, b } = x; `${name} ${d}`; if (x) { return {x: 1}; }",
}
PUT_IN = {
    """{d["it's"]} "{name}", it's '{x}'""": """quoted "Ada", it's '3'""",
    """{", ".join(f"{k!r}" for k in 'ab')}""": "'a', 'b'",
    '{"say": "{name}", "n": {x}}': '{"say": "Ada", "n": 3}',
}


class TestBraces:
    @pytest.mark.parametrize("form", ["%shimmy {}", "%%shimmy\n{}", "%%shimmy small -f json\n{}"])
    @pytest.mark.parametrize("what", KEPT)
    def test_survive(self, ip: Any, server: Talking, what: str, form: str) -> None:
        ip.user_ns.update(NAMES)
        ask(ip, form.replace("{}", KEPT[what], 1))
        assert prompt(server) == KEPT[what]

    @pytest.mark.parametrize("form", ["%shimmy {}", "%%shimmy\n{}"])
    @pytest.mark.parametrize("text", PUT_IN)
    def test_quotes_around_and_inside_of_what_is_put_in(
        self, ip: Any, server: Talking, text: str, form: str
    ) -> None:
        ip.user_ns.update(NAMES)
        ask(ip, form.replace("{}", text, 1))
        assert prompt(server) == PUT_IN[text]

    def test_cells_before(self, ip: Any, server: Talking, capsys: Any) -> None:
        first = ip.execution_count
        ask(ip, "y = 41", "y + 1")
        ip.run_cell("y / 0", store_history=True)
        capsys.readouterr()
        ask(ip, f"%shimmy {{In[{first}]}}: {{Out[{first + 1}]}}. {{Err[{first + 2}]}}")
        assert prompt(server).startswith("y = 41: 42. Traceback (most recent call last):")
        assert prompt(server).endswith("ZeroDivisionError: division by zero")
        assert "not put in" not in capsys.readouterr().out

    def test_they_run_in_the_users_kernel(self, ip: Any, server: Talking) -> None:
        ask(ip, "seen = []", "%shimmy {seen.append(1) or len(seen)}")
        assert prompt(server) == "1"
        assert ip.user_ns["seen"] == [1]
        ask(ip, "%shimmy --no-interp {seen.append(1) or len(seen)}")
        assert prompt(server) == "{seen.append(1) or len(seen)}"
        assert ip.user_ns["seen"] == [1]

    def test_where_they_run_is_said(self, ip: Any, capsys: Any) -> None:
        ask(ip, "%config ShimmyMagics")
        assert re.search(r"expressions\} into prompts;\s+they run\s+in this kernel", capsys.readouterr().out)  # fmt: skip
        page = (ROOT / "docs" / "notebook.md").read_text()
        assert "Expressions run in your kernel, with all that they can do" in page


class TestOtherNames:
    def test_list(self, server: Talking) -> None:
        ((text, _),) = table = run("list", server)
        assert table == run("models", server)
        assert {"small", "other", "self-test"} < set(text.split())

    def test_register_and_delete(self, ip: Any, server: Talking) -> None:
        ask(ip, "%shimmy register tutor other", "%shimmy --model tutor hi")
        assert server.bodies[-1]["model"] == "other"
        ask(ip, "%shimmy delete tutor", "%shimmy --model tutor hi")
        assert server.bodies[-1]["model"] == "tutor"
        assert len(server.bodies) == 2, "none of these is a prompt"

    def test_error(self, ip: Any, server: Talking) -> None:
        server.text = "It divides by zero.\n```python\nran = True\n```"
        ip.run_cell("1 / 0", store_history=True)
        ask(ip, "%shimmy error")
        assert "ZeroDivisionError: division by zero" in prompt(server)
        assert ip.rl_next_input == "ran = True"
        assert "ran" not in ip.user_ns

    def test_version(self, capsys: Any) -> None:
        made = session(Talking(), Tools(versions=kernel._versions))
        ask(made.shell, "%shimmy version")
        unload(made.shell)
        out = capsys.readouterr().out
        assert f"shimmy-jupyter {__version__}\n" in out
        assert re.search(r"^llama-cpp-python .* in this kernel$", out, re.MULTILINE)


class TestWhichModel:
    @pytest.mark.parametrize("cell", ["%shimmy hi", "%%shimmy\nhi", "%shimmy -- hi"])
    def test_none_is_needed(self, ip: Any, server: Talking, cell: str) -> None:
        ask(ip, cell)
        assert (server.bodies[-1]["model"], prompt(server)) == ("small", "hi")

    def test_a_setting(self, ip: Any, server: Talking) -> None:
        ask(ip, "%config ShimmyMagics.model = 'other'", "%shimmy hi", "%%shimmy small\nhi")
        assert [body["model"] for body in server.bodies] == ["other", "small"]


def system(body: dict[str, Any]) -> Any:
    return [one["content"] for one in body["messages"] if one["role"] == "system"]


SENT: dict[str, tuple[str, Callable[[dict[str, Any]], Any], Any]] = {
    "--model": ("--model other", lambda body: body["model"], "other"),
    "--format": ("-f json", lambda body: body["response_format"], {"type": "json_object"}),
    "--system": ("--system 'Be brief.'", system, ["Be brief."]),
    "--seed": ("--seed 0", lambda body: (body["seed"], body["reproducible"]), (0, True)),
    "--temperature": ("--temperature 0", lambda body: body["temperature"], 0),
    "--max-tokens": ("--max-tokens 0", lambda body: body["max_tokens"], 0),
    "--stop": ("--stop X --stop '\\n'", lambda body: body["stop"], ["X", "\n"]),
    "--model-parameters": ("""-m '{"top_k": 0}'""", lambda body: body["top_k"], 0),
    "--reproducible": ("--reproducible", lambda body: body["reproducible"], True),
}  # fmt: skip
MAGICS = "tests/unit/test_magics.py"
HERE = "tests/unit/test_habits_kept.py"
ELSEWHERE = {
    "--output": f"{MAGICS}::TestVariables::test_an_answer",
    "--schema": f"{MAGICS}::TestVariables::test_a_schema",
    "--context": f"{MAGICS}::TestContext::test_cells_that_ran",
    "--leave-out": f"{MAGICS}::TestContext::test_too_much_says_what_to_leave_out",
    "--no-interp": f"{MAGICS}::TestBraces::test_in_and_out",
    "--dry-run": f"{MAGICS}::test_a_dry_run_asks_nothing",
    "--no-stream": f"{HERE}::TestStreaming::test_in_a_terminal",
    "--logprobs": f"{HERE}::test_tokens_have_colours_and_what_else_was_likely",
    "--profile": f"{HERE}::TestOptions::test_a_profile",
}


class TestOptions:
    def test_every_one_is_tried(self) -> None:
        assert not SENT.keys() & ELSEWHERE.keys()
        assert SENT.keys() | ELSEWHERE.keys() == {flag.names[0] for flag in FLAGS}
        assert {test: why for test in ELSEWHERE.values() if (why := missing(test))} == {}

    @pytest.mark.parametrize("form", ["%shimmy {} hi", "%%shimmy {}\nhi", "%%shimmy {} small\nhi"])
    @pytest.mark.parametrize("option", SENT)
    def test_is_sent(self, ip: Any, server: Talking, option: str, form: str) -> None:
        if option == "--model" and "small" in form:
            form = form.replace(" small", "")
        said, what, value = SENT[option]
        ask(ip, form.replace("{}", said))
        assert what(server.bodies[-1]) == value
        assert prompt(server) == "hi"

    def test_a_profile(self, server: Talking, capsys: Any) -> None:
        asked: list[tuple[Any, str]] = []

        def resolve(body: dict[str, Any], profile: str, _listed: Any) -> Resolved:
            asked.append((body["model"], profile))
            return Resolved({**body, "model": "pinned"}, "tutor of shimmy.lock")

        made = session(server, Tools(resolve=resolve))
        ask(made.shell, "%shimmy --model tutor --profile laptop hi")
        unload(made.shell)
        assert asked == [("tutor", "laptop")]
        assert server.bodies[-1]["model"] == "pinned"
        assert "tutor of shimmy.lock" in capsys.readouterr().out

    @pytest.mark.parametrize("option", ["--image cat.png", "--image=cat.png", "-n 3", "--region x"])
    @pytest.mark.parametrize("form", ["%shimmy {} hi", "%%shimmy {}\nhi"])
    def test_what_there_is_not_is_refused(
        self, ip: Any, server: Talking, form: str, option: str
    ) -> None:
        with pytest.raises(InvalidValue, match="no such option") as caught:
            ask(ip, form.replace("{}", option))
        assert caught.value.param == re.split("[ =]", option)[0]
        assert not server.bodies


class Slowly(Talking):
    """Notes what can be seen before each of the pieces of its answer."""

    def __init__(self, see: Callable[[], str]) -> None:
        super().__init__()
        self.see = see
        self.seen: list[str] = []

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            for text in ("one ", "two ", "three"):
                choice = {"delta": {"content": text}, "finish_reason": None}
                self.seen.append(self.see())
                yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
            self.seen.append(self.see())
            end = {"choices": [{"delta": {}, "finish_reason": "stop"}], "model": "small"}
            yield b"data: " + json.dumps(end).encode() + b"\n\ndata: [DONE]\n\n"

        yield pieces()


class TestStreaming:
    @pytest.mark.parametrize(
        ("cell", "seen"),
        [
            ("%shimmy hi", ["", "one ", "two ", "three"]),
            ("%%shimmy --temperature 0\nhi", ["", "one ", "two ", "three"]),
            ("%shimmy --no-stream hi", ["", "", "", ""]),
        ],
    )
    def test_in_a_terminal(self, capsys: Any, cell: str, seen: list[str]) -> None:
        server = Slowly(lambda: str(capsys.readouterr().out))
        ip = magics(server).session.shell
        ask(ip, cell)
        unload(ip)
        first, *later = server.seen
        assert [first.rpartition("it.\n")[2], *later] == seen
        assert ("one two three" in capsys.readouterr().out) == ("--no-stream" in cell)

    @pytest.mark.usefixtures("front_end")
    @pytest.mark.parametrize("flag", ["", "--no-stream "])
    def test_in_a_front_end(self, flag: str) -> None:
        with capture_output() as captured:
            server = Slowly(lambda: str([one.data["text/plain"] for one in captured.outputs]))
            ip = magics(server).session.shell
            ask(ip, f"%shimmy {flag}hi")
        unload(ip)
        before, first, *_ = server.seen
        assert before == "[]"
        assert ("one" in first) == (not flag)
        assert captured.outputs[-1].data["text/plain"].startswith("one two three\n[small")
        assert (len(captured.outputs) == 1) == bool(flag)

    def test_interrupted(self, capsys: Any) -> None:
        left: list[bool] = []

        class Interrupted(Talking):
            @contextlib.contextmanager
            def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[bytes]]:
                def pieces() -> Iterator[bytes]:
                    yield b'data: {"choices": [{"delta": {"content": "one "}}]}\n\n'
                    raise KeyboardInterrupt

                try:
                    yield pieces()
                finally:
                    left.append(True)

        ip = magics(Interrupted()).session.shell
        with pytest.raises(KeyboardInterrupt):
            ask(ip, "%shimmy -o found hi")
        unload(ip)
        assert left == [True]
        assert "one \n[stopped]\n" in capsys.readouterr().out
        assert "found" not in ip.user_ns


def test_several_models_stand_side_by_side(server: Talking) -> None:
    *_, (text, page) = run("compare small other -- Why?", server)
    assert text.count("an answer") == 2
    head, answers, figures = re.findall("(?s)<tr>(.*?)</tr>", page)
    assert re.findall("<th[^>]*>(.*?)</th>", head) == ["small", "other"]
    assert answers.count("<td") == answers.count("an answer") == figures.count("<td") == 2


class Scored(Talking):
    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[bytes]]:
        self.bodies.append(body)
        scores = [entry(" cat", -0.7, (" cat", -0.7), (" dog", -1.6))]
        choice = {"delta": {"content": " cat"}, "finish_reason": "stop", "logprobs": {"content": scores}}  # fmt: skip
        data = json.dumps({"choices": [choice], "model": "small"}).encode()
        yield iter([b"data: " + data + b"\n\ndata: [DONE]\n\n"])


@pytest.mark.usefixtures("front_end")
def test_tokens_have_colours_and_what_else_was_likely() -> None:
    server = Scored()
    ip = magics(server).session.shell
    *_, page = [data["text/html"] for data in shown(ip, "%shimmy --logprobs 2 hi")]
    unload(ip)
    assert (server.bodies[-1]["logprobs"], server.bodies[-1]["top_logprobs"]) == (True, 2)
    (span,) = re.findall(r'<span style="background-color:[^"]+" title="([^"]+)">', page)
    assert "49.7% “␣cat”" in span
    assert "20.2% “␣dog”" in span


def test_a_model_that_does_not_fit_says_so_before_it_is_loaded() -> None:
    class Small(Talking):
        def get(self, path: str) -> dict[str, Any]:
            fit = {"needed": 6_100_000_000, "available": 4_800_000_000, "ok": False, "max_context": 0}  # fmt: skip
            large = ROW | {"id": "large", "state": "available", "fit": fit}
            return {"models": [ROW, large], "default": "small", "engine": ""}

    ((text, page),) = run("models", Small())
    assert [said.count("needs 6.1 GB, 4.8 GB available") for said in (text, page)] == [1, 1]
