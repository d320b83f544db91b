"""A lock's names in a notebook, wherever a model can be named, over a transport that answers from a script.

Cases: as an option with `--context`, as the setting, by a dry run; every command that takes a model; an alias of
a name, and one that would hide it; what is remembered by `use`; the same bytes under two names; a name that
nothing here can answer to; a lock that cannot be read, where a name of it could be meant and where none is;
completion. From Python: tokens and vectors, whose requests have no pin: bytes that are known, that are read
first, that may not be, that are others; a template; an adapter; models that are not named.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shimmy_jupyter import framing, kernel
from shimmy_jupyter.config import kernel_environment
from shimmy_jupyter.errors import (
    AccessDenied,
    InvalidValue,
    ModelDrifted,
    ModelLoadFailed,
    ModelNotFound,
    ShimmyError,
    UnsupportedParameter,
)
from shimmy_jupyter.models.lockfile import NAME, Lock, Override, dump
from shimmy_jupyter.models.pinning import Locks
from shimmy_jupyter.notebook.asking import Asker
from shimmy_jupyter.notebook.completer import matches
from shimmy_jupyter.notebook.extension import unload
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.notebook.session import Tools

from ..notebooks import magics
from .test_asking import Scripted, vectors
from .test_magics import Talking, ask, prompt
from .test_pinning import FULL, PIN, SPLIT, A, B, C, adapter, model

SELF_TEST = replace(PIN, sha256=C, file="self-test.gguf")
LOCK = Lock(
    {"tutor": FULL, "small": replace(PIN, sha256=B), "bundled": SELF_TEST},
    {"laptop": {"tutor": Override("small")}},
)
ROWS = [
    {**one, "state": "loaded", "quantization": "Q4", "error": None}
    for one in (model(), model("small-Q4", B), model("self-test", C), adapter())
]
BROKEN = "<<<<<<< HEAD\n"


class Server(Talking):
    """Has the pinned models, and does whatever it is told to do with them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = copy.deepcopy(ROWS)

    def get(self, path: str) -> dict[str, Any]:
        if path == "shimmy/api/models":
            return {"models": self.rows, "default": "small-Q4", "engine": "0.3.36"}
        if path == "shimmy/api/jobs/j":
            return {"state": "done", "error": None, "result": {}}
        if match := re.fullmatch(r"shimmy/api/models/([^/]+)", path):
            for row in self.rows:
                if row["id"] == match[1]:
                    return row
            raise ModelNotFound(f"there is no model {match[1]!r}", param="model")
        return super().get(path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        found = super().post(path, {"model": "", **body})
        figures = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        return {**found, **figures, "job": "j"} if "count" not in found else found

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Whole answers."""
        return [body for path, body in self.posted if path.endswith("completions")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a notebook is that has a lock."""
    (tmp_path / NAME).write_text(dump(LOCK))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel, "home", lambda: tmp_path)
    monkeypatch.setattr(kernel, "kernel_environment", lambda: kernel_environment({}))
    return tmp_path


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def ours(server: Server, folder: Path) -> Iterator[ShimmyMagics]:
    found = magics(server, Tools(kernel._resolve, names=kernel._names))
    ip = found.session.shell
    before, config = dict(ip.user_ns), copy.deepcopy(ip.config)
    yield found
    unload(ip)
    ip.user_ns.clear()
    ip.user_ns.update(before)
    ip.config = config


@pytest.fixture
def ip(ours: ShimmyMagics) -> Any:
    return ours.session.shell


def pinned(body: dict[str, Any]) -> tuple[str, str]:
    return body["model"], body["pin"]["sha256"]


class TestPrompts:
    def test_with_context(self, ip: Any, server: Server, capsys: Any) -> None:
        ask(ip, "y = 7", "%%shimmy tutor --context 1\nwhy?")
        counted = [body["model"] for path, body in server.posted if path.endswith("tokenize")]
        assert counted == ["course-Q4"]
        assert pinned(server.bodies[-1]) == ("course-Q4", A)
        assert "y = 7" in prompt(server)
        assert "tutor of shimmy.lock" in capsys.readouterr().out

    def test_with_context_by_the_setting(self, ip: Any, server: Server) -> None:
        ask(
            ip,
            "y = 7",
            "%config ShimmyMagics.model = 'tutor'",
            "%config ShimmyMagics.profile = 'laptop'",
            "%%shimmy --context 1\nwhy?",
        )
        assert pinned(server.bodies[-1]) == ("small-Q4", B)

    def test_a_dry_run_says_what_would_be_sent(self, ip: Any, server: Server, capsys: Any) -> None:
        ask(ip, "%shimmy --model tutor --dry-run hi")
        out = capsys.readouterr().out
        assert "model: course-Q4 (tutor of shimmy.lock)" in out
        assert "adapter: french" in out
        assert (
            "0 of them computed already" in out
        )  # the pinned seed is for the same bytes each time
        assert not server.bodies

    def test_the_bundled_one_by_another_name_is_not_told_what_was_said(
        self, ip: Any, server: Server
    ) -> None:
        ask(ip, "%shimmy a", "%shimmy --model bundled b")
        assert [one["content"] for one in server.bodies[-1]["messages"]] == ["b"]


class TestCommands:
    @pytest.mark.parametrize("verb", ["load", "unload", "probe", "verify"])
    def test_on_a_model(self, ip: Any, server: Server, verb: str) -> None:
        ask(ip, f"%shimmy {verb} tutor")
        assert [path for path, _ in server.posted] == [f"shimmy/api/models/course-Q4/{verb}"]

    def test_in_the_notebook_s_profile(self, ip: Any, server: Server) -> None:
        ask(ip, "%config ShimmyMagics.profile = 'laptop'", "%shimmy load tutor")
        assert server.posted[-1][0] == "shimmy/api/models/small-Q4/load"

    def test_use_remembers_the_name(self, ip: Any, server: Server, capsys: Any) -> None:
        ask(ip, "%shimmy use tutor", "%shimmy hi")
        assert "this notebook asks tutor\n" in capsys.readouterr().out
        body = server.bodies[-1]
        assert pinned(body) == ("course-Q4", A)
        assert (body["adapter"], body["seed"], body["reproducible"]) == ("french", 0, True)

    def test_what_cannot_be_used(self, ip: Any, ours: ShimmyMagics, server: Server) -> None:
        server.rows = [row for row in server.rows if row["sha256"] != A]
        with pytest.raises(ModelNotFound, match=r"shimmy\.lock pins 'tutor'"):
            ask(ip, "%shimmy use tutor")
        assert ours.model == ""

    @pytest.mark.parametrize(
        "cells", [("%shimmy bench tutor",), ("%shimmy use tutor", "%shimmy bench")]
    )
    def test_bench_is_of_the_pinned_bytes(
        self, ip: Any, server: Server, cells: tuple[str, ...]
    ) -> None:
        ask(ip, *cells)
        assert {pinned(body) for body in server.asked} == {("course-Q4", A)}
        assert not {"seed", "reproducible"} & server.asked[0].keys()

    def test_compare(self, ip: Any, server: Server, capsys: Any) -> None:
        ask(ip, "%shimmy compare tutor course-Q4 -- Why?")
        assert [body["model"] for body in server.asked] == ["course-Q4", "course-Q4"]
        assert ["pin" in body for body in server.asked] == [True, False]
        out = capsys.readouterr().out
        assert "── course-Q4 (tutor of shimmy.lock) (" in out
        assert "── course-Q4 (course-Q4" in out

    def test_fix(self, ip: Any, server: Server) -> None:
        ip.run_cell("1 / 0", store_history=True)
        ask(ip, "%shimmy fix tutor")
        assert pinned(server.bodies[-1]) == ("course-Q4", A)

    def test_an_alias_of_a_name(self, ip: Any, server: Server) -> None:
        ask(ip, "%shimmy alias mine tutor", "%%shimmy mine\nhi")
        assert pinned(server.bodies[-1]) == ("course-Q4", A)

    def test_no_alias_hides_a_name(self, ip: Any, server: Server) -> None:
        with pytest.raises(InvalidValue, match=r"shimmy\.lock has the name tutor already"):
            ask(ip, "%shimmy alias tutor small-Q4")

    def test_nearly_a_name(self, ip: Any, server: Server) -> None:
        with pytest.raises(InvalidValue, match="did you mean tutor"):
            ask(ip, "%shimmy load tutro")

    def test_completion(self, ours: ShimmyMagics, folder: Path) -> None:
        def offered() -> list[str]:
            return matches("%shimmy use ", ours.session.names_at_hand, list)

        assert {"tutor", "small", "bundled"} <= {*offered()}
        (folder / NAME).write_text(BROKEN)
        assert offered() == []
        ours.session.connection.transport()  # a model may answer in this kernel from now on
        assert offered() == ["course-Q4", "small-Q4", "self-test", "french"]


class TestALockThatCannotBeRead:
    @pytest.fixture(autouse=True)
    def _broken(self, folder: Path) -> None:
        (folder / NAME).write_text(BROKEN)

    @pytest.mark.parametrize("line", ["hi", "load the dishwasher", "benches in the park", "models"])
    def test_is_nothing_to_what_needs_no_name(self, ip: Any, server: Server, line: str) -> None:
        ask(ip, f"%shimmy {line}")

    @pytest.mark.parametrize(
        "cell",
        ["%%shimmy tutor\nhi", "%%shimmy tutor --context 1\nhi", "%shimmy use tutor", "%shimmy bench tutor",
         "%shimmy load small-Q4", "%shimmy compare tutor small -- Why?", "%shimmy fix tutor"],
    )  # fmt: skip
    def test_is_said_where_a_name_can_be_meant(self, ip: Any, server: Server, cell: str) -> None:
        with pytest.raises(InvalidValue, match=r"shimmy\.lock is not TOML"):
            ask(ip, cell)
        assert not server.bodies
        assert not server.posted

    def test_a_prompt_in_doubt_says_how_it_is_one(self, ip: Any, server: Server) -> None:
        with pytest.raises(InvalidValue, match="with -- in front, the line is a prompt"):
            ask(ip, "%shimmy load balancing")
        ask(ip, "%shimmy -- load balancing")
        assert prompt(server) == "load balancing"


class Python:
    """An asker that has the lock's word, over a scripted server, with what that was asked."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], *answers: Any) -> None:
        self.sent = Scripted(
            answers=[*answers, {"tokens": [1], "count": 1}],
            listed=[{"default": "small-Q4", "models": rows}],
        )
        self.asker = Asker(lambda: self.sent, prepare=self._prepare)
        self._locks = Locks(lambda: folder, folder, None)

    async def _prepare(self, body: dict[str, Any]) -> dict[str, Any]:
        listing = {"models": self.sent.listed[0]["models"], "engine": None}
        fields = self._locks.fields(body["model"], lambda: listing)
        return body if fields is None else {**fields, **body, "model": fields["model"]}

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.sent.asked]


def read(*digests: str, error: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The answers to a request to read bytes."""
    done = {"state": "done", "error": error, "result": {"sha256": [*digests]}}
    return [{"job": "j"}, {"state": "running"}, done]


class TestPython:
    @pytest.fixture(autouse=True)
    def _at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shimmy_jupyter.notebook.held._POLL", 0)

    async def test_tokens(self, folder: Path) -> None:
        python = Python(folder, ROWS)
        assert await python.asker.tokenize("hi", "tutor") == [1]
        assert python.sent.asked == [
            ("POST", "shimmy/api/tokenize", {"model": "course-Q4", "prompt": "hi"})
        ]

    async def test_vectors(self, folder: Path) -> None:
        python = Python(folder, ROWS, vectors)
        await python.asker.embed(["1"], model="small")
        assert python.sent.body["model"] == "small-Q4"
        python = Python(folder, ROWS, vectors)
        await python.asker.embed(["1"], model="course-Q4")  # no name of the lock
        assert python.sent.body["model"] == "course-Q4"

    async def test_vectors_of_a_frame(self, folder: Path) -> None:
        python = Python(folder, ROWS)
        assert await framing._resolved(python.asker, "small", "embed") == "small-Q4"
        assert await framing._resolved(python.asker, "small", "chat") == "small"  # pinned later on

    async def test_an_adapter_makes_no_vectors(self, folder: Path) -> None:
        python = Python(folder, ROWS)
        with pytest.raises(UnsupportedParameter, match="tutor is pinned with an adapter"):
            await python.asker.embed(["1"], model="tutor")
        assert python.sent.asked == []

    async def test_bytes_that_nobody_has_read_are_read_first(self, folder: Path) -> None:
        unread = [model("small-Q4", None)]
        python = Python(folder, unread, *read(B), vectors)
        await python.asker.embed(["1"], model="small")
        verify, *_, embedded = python.paths
        assert (verify, embedded) == ("shimmy/api/models/small-Q4/verify", "shimmy/v1/embeddings")

    async def test_other_bytes_make_neither(self, folder: Path) -> None:
        unread = [model("small-Q4", None)]
        for work in ("tokenize", "embed"):
            python = Python(folder, unread, *read(C))
            with pytest.raises(ModelDrifted, match=f"sha256: {B} is pinned, {C} was found"):
                await getattr(python.asker, work)("1", model="small")
            assert python.paths[-1] == "shimmy/api/jobs/j"

    async def test_all_files_of_a_model_count(self, folder: Path) -> None:
        (folder / NAME).write_text(dump(Lock({"big": SPLIT})))
        rows = [model("big", A, size_bytes=300, files=3)]
        python = Python(folder, rows, *read(A, B, C), {"tokens": [2], "count": 1})
        assert await python.asker.tokenize("hi", "big") == [2]
        python = Python(folder, rows, *read(A, B, B))
        with pytest.raises(ModelDrifted):
            await python.asker.tokenize("hi", "big")

    async def test_another_template(self, folder: Path) -> None:
        rows = [model(chat_template=B), adapter()]
        python = Python(folder, rows)
        with pytest.raises(ModelDrifted, match=f"chat_template: {C} is pinned, {B} was found"):
            await python.asker.tokenize([{"role": "user", "content": "hi"}], "tutor")

    @pytest.mark.parametrize(
        ("answers", "error"),
        [
            ([AccessDenied("verify is denied")], AccessDenied),
            (read(error={"code": "model_load_failed", "message": "gone", "param": None}), ModelLoadFailed),
        ],
    )  # fmt: skip
    async def test_bytes_that_cannot_be_read(
        self, folder: Path, answers: list[Any], error: type[ShimmyError]
    ) -> None:
        python = Python(folder, [model("small-Q4", None)], *answers)
        with pytest.raises(error):
            await python.asker.tokenize("hi", "small")

    async def test_what_is_not_named_needs_no_lock(self, folder: Path) -> None:
        (folder / NAME).write_text(BROKEN)
        python = Python(folder, ROWS)
        assert await python.asker.tokenize("hi") == [1]
        assert python.sent.body["model"] == "small-Q4"
        with pytest.raises(InvalidValue, match="not TOML"):
            await python.asker.tokenize("hi", "tutor")


def test_names_are_those_of_the_lock_above(folder: Path, tmp_path: Path) -> None:
    below = tmp_path / "week 1"
    below.mkdir()
    assert Locks(lambda: below, tmp_path, None).names() == ["bundled", "small", "tutor"]
    (folder / NAME).unlink()
    assert Locks(lambda: below, tmp_path, None).names() == []
