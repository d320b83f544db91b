"""The kernel's side without a kernel: finding the server, reading a stream.

Cases: questions that IPython would take for help: as a statement, a value, behind another magic, of any text,
in strings, comments and commands;
a named server, the parent's record, somebody else's, a damaged one, one that listens everywhere;
events cut anywhere; an error in a stream; a stream that just ends; proxies; tokens in texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from IPython.testing.globalipapp import start_ipython

import shimmy_jupyter
from shimmy_jupyter.config import kernel_environment
from shimmy_jupyter.errors import InternalError, InvalidValue, QueueFull, ServerUnreachable
from shimmy_jupyter.notebook.client import (
    Connection,
    HttpTransport,
    Server,
    check,
    events,
    find_server,
)
from shimmy_jupyter.notebook.extension import load, unload
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.notebook.questions import nor_are_those_of_compat, questions_are_not_help

CALL = "get_ipython().run_line_magic('shimmy', 'What does len do?')"


class TestQuestions:
    @pytest.fixture
    def read(self) -> Callable[[str], str]:
        manager = TransformerManager()  # type: ignore[no-untyped-call]
        manager.token_transformers.append(questions_are_not_help)
        return manager.transform_cell

    @pytest.mark.parametrize(
        "place",
        [
            "{}", "  {}  ", "a = {}", "d['a'] = {}", "d[x == (1, 2)]['='] = {}", "a, b = {}", "a, *b = {}",
            "x: object = {}", "a.b = {}", "a = b = {}", "if x: {}", "if x: a = {}", "x = 1; {}",
            "def f(x):\n    return {}", "if x:\n    {}\nelse:\n    a = {}", "x = [\n{}\n]",
            '# say """\n{}', "x = '\"\"\"'\n{}", "x = 'it is'  # it's\n{}", 'x = """\n\'\'\'"""\n{}',
        ],
    )  # fmt: skip
    def test_become_calls(self, read: Callable[[str], str], place: str) -> None:
        found = read(place.replace("{}", "%shimmy What does len do?"))
        assert [line.rstrip() for line in found.splitlines()] == [
            line.rstrip() for line in place.replace("{}", CALL).strip().splitlines()
        ]

    @pytest.mark.parametrize(
        "line", ["time {}", "timeit -n 1 {}", "time x = {}", "prun -q d['a'] = {}"]
    )
    def test_behind_another_magic(self, read: Callable[[str], str], line: str) -> None:
        name, _, rest = line.replace("{}", "%shimmy What does len do?").partition(" ")
        assert read(f"%{name} {rest}") == f"get_ipython().run_line_magic({name!r}, {rest!r})\n"
        assert read(f"x = %{name} {rest}").startswith(f"x = get_ipython().run_line_magic({name!r}")

    @pytest.mark.parametrize(
        "text", ['a """ b?', "don't do?", "list (a", "a [ b {c?", "a \\\n b?", "0x1g 1__2 $é?"]
    )
    def test_whatever_they_say(self, read: Callable[[str], str], text: str) -> None:
        found = read(f"%shimmy {text}\nx = %shimmy {text}\n%shimmy What does len do?\nx = 1")
        first, second, *rest = found.splitlines()
        assert second == f"x = {first}"
        assert first.startswith("get_ipython().run_line_magic('shimmy', ")
        assert rest == [CALL, "x = 1"]

    @pytest.mark.parametrize(
        "cell",
        [
            "%shimmy?", "%shimmy??", "x = %shimmy?", "%time %shimmy?", "%shimmy What is this", "len?",
            "x = 1", 'x = """\n%shimmy what?\n"""', 'x = """\n%shimmy what?', "x = '%shimmy what?'",
            "# %shimmy what?", "%%shimmy\n%shimmy what?", "%%time\n%shimmy what?", "!echo %shimmy what?",
            "x = !echo = %shimmy what?", "x = 5 %shimmy\ny = (x\n%shimmy )", "%shimmy", "%shimmyx what?",
            "%ai what?", "",
        ],
    )  # fmt: skip
    def test_all_else_stays(self, read: Callable[[str], str], cell: str) -> None:
        assert read(cell) == TransformerManager().transform_cell(cell)  # type: ignore[no-untyped-call]

    def test_those_of_compat_too(self) -> None:
        manager = TransformerManager()  # type: ignore[no-untyped-call]
        manager.token_transformers.append(nor_are_those_of_compat)
        found = manager.transform_cell("d['a'] = %ai b?\n%time %ai b?\n%shimmy b?")
        assert found.splitlines() == [
            "d['a'] = get_ipython().run_line_magic('ai', 'b?')",
            "get_ipython().run_line_magic('time', '%ai b?')",
            "get_ipython().run_line_magic('pinfo', 'b')",
        ]


class TestFindingTheServer:
    RECORD = {
        "url": "http://localhost:8888/lab-base/", "token": "secret", "hostname": "localhost",
        "port": 8888, "base_url": "/lab-base/", "secure": False, "sock": "", "pid": 42,
    }  # fmt: skip

    def record(self, folder: Path, pid: int = 42, **changes: Any) -> None:
        (folder / f"jpserver-{pid}.json").write_text(json.dumps({**self.RECORD, **changes}))

    def test_the_one_that_is_named(self, tmp_path: Path) -> None:
        self.record(tmp_path)
        found = find_server("http://hub/user/ada", "t", 42, tmp_path)
        assert found == Server("http://hub/user/ada/", "t")

    def test_the_one_that_started_the_kernel(self, tmp_path: Path) -> None:
        self.record(tmp_path, 41, token="somebody else's")
        self.record(tmp_path, 42)
        found = find_server(None, "kernel secret", 42, tmp_path)
        assert found == Server("http://localhost:8888/lab-base/", "secret")

    def test_never_another(self, tmp_path: Path) -> None:
        self.record(tmp_path, 41)
        assert find_server(None, None, 42, tmp_path) is None
        assert find_server(None, None, None, tmp_path) is None

    def test_password_only(self, tmp_path: Path) -> None:
        self.record(tmp_path, token="")
        found = find_server(None, "kernel secret", 42, tmp_path)
        assert found is not None
        assert found.token == "kernel secret"

    @pytest.mark.parametrize(
        ("hostname", "here"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("", "127.0.0.1")]
    )
    def test_one_that_listens_everywhere_is_asked_here(
        self, tmp_path: Path, hostname: str, here: str
    ) -> None:
        self.record(tmp_path, hostname=hostname, url="http://machine.example:8888/lab-base/")
        found = find_server(None, None, 42, tmp_path)
        assert found is not None
        assert found.url == f"http://{here}:8888/lab-base/"

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", "3", '{"url": "http://x/", "hostname": "", "port": "1@evil"}']
    )
    def test_damaged_record(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "jpserver-42.json").write_text(text)
        with pytest.raises(ServerUnreachable):
            find_server(None, None, 42, tmp_path)

    def test_the_token_is_never_shown(self) -> None:
        assert "secret" not in repr(Server("http://x/", "secret"))

    def test_environment(self) -> None:
        env = {"JPY_PARENT_PID": "42", "SHIMMY_SERVER_URL": "u", "SHIMMY_KERNEL_TOKEN": "t"}
        known = kernel_environment(env)
        assert (known.server_pid, known.server_url, known.token) == (42, "u", "t")
        assert kernel_environment({"JPY_PARENT_PID": "x"}).server_pid is None

    def test_a_server_that_does_not_answer_is_an_error_and_nothing_else(self) -> None:
        def local() -> Any:
            raise AssertionError("went in-kernel")

        connection = Connection(lambda: Server("http://127.0.0.1:9/", "t"), local)
        with pytest.raises(ServerUnreachable, match="did not answer") as caught:
            connection.transport().get("shimmy/v1/models")
        assert "127.0.0.1" not in caught.value.message

    def test_proxies_do_not_get_the_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        assert HttpTransport(Server("http://127.0.0.1:1/", "t"))._client._mounts == {}


CHUNKS = [{"n": i, "text": "é漢" * i} for i in range(5)]
STREAM = b"".join(b"data: " + json.dumps(c, ensure_ascii=False).encode() + b"\n\n" for c in CHUNKS)


class TestEvents:
    @given(st.lists(st.integers(0, len(STREAM)), max_size=8).map(sorted))
    def test_cut_anywhere(self, cuts: list[int]) -> None:
        edges = [0, *cuts, len(STREAM)]
        pieces = [STREAM[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        assert list(events([*pieces, b"data: [DO", b"NE]\n\n"])) == CHUNKS

    def test_an_error_is_raised(self) -> None:
        error = QueueFull("busy").to_json("r1")
        stream = events([STREAM, b"data: " + json.dumps(error).encode() + b"\n\n"])
        with pytest.raises(QueueFull) as caught:
            list(stream)
        assert caught.value.request_id == "r1"

    def test_a_stream_that_just_ends_was_cut_off(self) -> None:
        with pytest.raises(InternalError, match="cut off"):
            list(events([STREAM]))


@pytest.fixture(scope="module")
def shell() -> InteractiveShell:
    start_ipython()
    from IPython import get_ipython

    shell = get_ipython()
    # It is the process's, and what a test has set is not for the next.
    shell.config.pop("ShimmyMagics", None)
    return shell  # type: ignore[no-any-return]


class Scripted:
    """A transport that answers from a list and remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.bodies = texts, []  # type: ignore[var-annotated]

    def get(self, path: str) -> dict[str, Any]:
        assert path == "shimmy/api/models"
        return {"models": [], "default": "first", "engine": ""}

    def stream(self, path: str, body: dict[str, Any]) -> Any:
        import contextlib

        self.bodies.append(body)
        chunks: list[dict[str, Any]] = [
            {"choices": [{"delta": {"content": text}, "finish_reason": None}]}
            for text in self.texts
        ]
        usage = {"completion_tokens": len(self.texts)}
        figures = {"tokens_per_second": 5.0, "ttft_ms": 12.3}
        chunks[-1]["choices"][0]["finish_reason"] = "stop"
        chunks.append({"choices": [], "model": "first", "usage": usage, "shimmy": figures})
        data = [b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks]
        return contextlib.nullcontext([*data, b"data: [DONE]\n\n"])


class TestMagics:
    def load(self, shell: InteractiveShell, transport: Any) -> None:
        load(shell, lambda: None, lambda: transport)

    def test_answer_in_a_terminal(self, shell: InteractiveShell, capsys: Any) -> None:
        transport = Scripted("one ", "two\x1b[31m")
        self.load(shell, transport)
        shell.run_cell("%shimmy --seed 0 --temperature 0 What?")
        out = capsys.readouterr().out
        assert "one two[31m" in out
        assert "[first · 2 tokens · 5 tokens/s · first token after 12 ms]" in out
        assert out.startswith("shimmy: no Jupyter server started this kernel")
        (body,) = transport.bodies
        assert body["messages"] == [{"role": "user", "content": "What?"}]
        assert (body["model"], body["seed"], body["temperature"]) == ("first", 0, 0)

    def test_settings_of_the_notebook(self, shell: InteractiveShell) -> None:
        transport = Scripted("x")
        self.load(shell, transport)
        shell.run_cell("%config ShimmyMagics.temperature = 0")
        shell.run_cell("%config ShimmyMagics.system = 'Be brief.'")
        shell.run_cell("%config ShimmyMagics.max_tokens = 0")
        shell.run_cell("%%shimmy second\nline 1\nline 2")
        (body,) = transport.bodies
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 0, "second")
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert body["messages"][1]["content"] == "line 1\nline 2"

    def test_whole_if_wanted(self, shell: InteractiveShell, capsys: Any) -> None:
        self.load(shell, Scripted("one ", "two"))
        shell.run_cell("%config ShimmyMagics.stream = False")
        shell.run_cell("%shimmy What?")
        assert capsys.readouterr().out.endswith(
            "one two\n[first · 2 tokens · 5 tokens/s · first token after 12 ms]\n"
        )

    def test_mistakes_raise(self, shell: InteractiveShell, capsys: Any) -> None:
        self.load(shell, Scripted("x"))
        for cell in ("%shimmy", "%%shimmy\n\n", "%%shimmy one two\nhi", "%shimmy --bad 3 x"):
            result = shell.run_cell(cell)
            assert isinstance(result.error_in_exec, InvalidValue), cell

    def test_a_refused_setting_does_not_keep_them_from_loading(
        self, shell: InteractiveShell, capsys: Any
    ) -> None:
        self.load(shell, Scripted("x"))
        shell.run_cell("%config ShimmyMagics.temperature = 'hot'")
        shell.run_cell("%config ShimmyMagics.max_tokens = 7")
        shell.run_cell("%config ShimmyMagics.stream = None")
        capsys.readouterr()
        transport = Scripted("x")
        self.load(shell, transport)
        said = capsys.readouterr().out.splitlines()
        assert said == [
            "shimmy: ShimmyMagics.stream = None is not taken: stream cannot have this value",
            "shimmy: ShimmyMagics.temperature = 'hot' is not taken: temperature cannot have this value",
        ]
        shell.run_cell("%shimmy What?")
        assert transport.bodies[0]["max_tokens"] == 7
        assert "temperature" not in transport.bodies[0]

    def test_what_is_mistyped_is_told_of(self, shell: InteractiveShell, capsys: Any) -> None:
        transport = Scripted("x")
        self.load(shell, transport)
        shell.run_cell("%shimmy modles")
        said = "shimmy: this is asked as a prompt; %shimmy models is the command"
        assert said in capsys.readouterr().out.splitlines()
        assert transport.bodies[0]["messages"][-1]["content"] == "modles"

    def test_questions_of_compat(self, shell: InteractiveShell) -> None:
        transport = Scripted("x")
        self.load(shell, transport)
        shell.run_cell("%shimmy compat ai")
        shell.run_cell("%shimmy compat ai")
        shell.run_cell("%ai What does len do?")
        assert transport.bodies[0]["messages"][-1]["content"] == "What does len do?"
        unload(shell)
        assert nor_are_those_of_compat not in shell.input_transformer_manager.token_transformers

    def test_loading_again_leaves_one(self, shell: InteractiveShell) -> None:
        for _ in range(3):
            self.load(shell, Scripted("x"))
        ours = [c for c in shell.configurables if isinstance(c, ShimmyMagics)]
        assert len(ours) == 1
        transformers = shell.input_transformer_manager.token_transformers
        assert transformers.count(questions_are_not_help) == 1
        unload(shell)
        assert not [c for c in shell.configurables if isinstance(c, ShimmyMagics)]
        assert "shimmy" not in shell.magics_manager.magics["line"]
        assert "shimmy" not in shell.magics_manager.magics["cell"]
        assert questions_are_not_help not in transformers


def test_health_that_is_down_is_an_answer() -> None:
    """Which part is down is what was asked for; any other 503 is an error."""
    check(httpx.Response(503, json={"status": "down", "dependencies": [], "active": 0}))
    error = {"message": "full", "code": "queue_full", "param": None, "request_id": "r"}
    with pytest.raises(QueueFull):
        check(httpx.Response(503, json={"error": error}))
    with pytest.raises(ServerUnreachable):
        check(httpx.Response(503, text="gone"))


def test_what_is_there_by_name() -> None:
    import shimmy
    from shimmy_jupyter import api, errors, frames

    assert (
        set(shimmy_jupyter.API) == set(api.__all__) <= set(dir(shimmy)) & set(dir(shimmy_jupyter))
    )
    for name in shimmy_jupyter.API:
        assert getattr(shimmy, name) is getattr(api, name)
        assert name == "models" or getattr(shimmy_jupyter, name) is getattr(api, name)
    assert (shimmy.errors, shimmy.frames) == (errors, frames)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = shimmy.nothing_such
