"""The probe's parent, on children that are scripts of one line; and the filter, on an interpreter.

Cases. What a child is given: its request, also in parts and with an adapter; exactly its environment;
no descriptors but its own. What it says: all well; refused, in words with folders, line breaks and
bells; garbage, lies and too much of each kind, before and after it reads the file. How it ends: each
signal; exit codes, with and without words; by itself, by us; somebody that it left behind. While it
runs: stages; a hang; cancelled; a listener that fails. That nothing is left: processes, descriptors.
What is remembered, and what not: across builds and processes; damaged, foreign, unreadable files; modes;
a folder that cannot be written to; forgetting. Files that are missing, no files, or change.
The build: stable; libraries, processor, version; without importing. Texts and facts of any kind at all.
The filter: both machines; each call denied, absent or checked; numbers against the system's headers.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.engine import confine
from shimmy_jupyter.errors import Cancelled
from shimmy_jupyter.models import probe_child
from shimmy_jupyter.models.probe import ALLOWANCE_BYTES, STAGES, Prober, Verdict, engine_build
from shimmy_jupyter.models.probe_verdict import ABOUT_THE_BYTES, Garbled, facts, plain

KEY, OTHER = "a" * 64, "b" * 64
FACTS = {
    "load_seconds": 1.5, "decode_seconds": 0.25, "memory_bytes": 1 << 30, "architecture": "llama",
    "description": "llama 1B", "parameters": 10**9, "context_size": 4096, "vocabulary": 32000,
    "can_generate": True, "chat_template_sha256": "c" * 64,
}  # fmt: skip
PRELUDE = f"""
import json, os, signal, sys
FACTS = json.loads({json.dumps(FACTS)!r})
fd = int(sys.argv[-1])
def write(data):
    while data:
        data = data[os.write(fd, data):]
def say(**message):
    write(json.dumps(message).encode() + b"\\n")
def come(count=4):
    for one in {list(STAGES)}[:count]:
        say(stage=one, **({{"by": ["limits", "landlock 4"]}} if one == "confined" else {{}}))
def complain(text):
    os.write(2, text.encode())
"""
OK = 'come(); say(outcome="ok", facts=FACTS)'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "some models" / "m.gguf"
    path.parent.mkdir()
    path.write_bytes(b"a model")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "verdicts"


def prober(script: str, folder: Path | None = None, **options: Any) -> Prober:
    command = (sys.executable, "-I", "-S", "-c", PRELUDE + script)
    options = {"build": "this", "environment": {}, "clock": lambda: 1234.5} | options
    return Prober(folder, command=command, **options)


def tried(script: str, model: Path, **options: Any) -> Verdict:
    return prober(script).probe(KEY, [model], 0, **options)


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def gone(pid: int) -> bool:
    """Also not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


class TestWhatAChildIsGiven:
    def read(self, expression: str, model: Path, environment: dict[str, str], **options) -> Any:
        out = model.with_name("out")
        script = f'told = {expression}; open({str(out)!r}, "w").write(json.dumps(told)); {OK}'
        probing = prober(script, environment=environment)
        assert probing.probe(KEY, options.pop("files", [model]), 1000, **options).ok
        return json.loads(out.read_text())

    def test_its_request(self, model: Path) -> None:
        found = self.read("json.loads(sys.stdin.read())", model, {})
        assert found == {
            "model": str(model), "parts": [], "adapter": None, "context_tokens": 512, "threads": 2,
            "memory_bytes": 1000 + ALLOWANCE_BYTES, "cpu_seconds": 301, "parent": os.getpid(),
        }  # fmt: skip

    def test_parts_and_an_adapter(self, model: Path, monkeypatch) -> None:
        paths = [model.with_name(name) for name in ("1.gguf", "2.gguf", "3.gguf", "a.gguf")]
        for path in paths:
            path.write_bytes(b"x")
        monkeypatch.chdir(model.parent)
        files = [Path("1.gguf"), *paths[1:3]]
        found = self.read(
            "json.loads(sys.stdin.read())", model, {}, files=files, adapter=Path("a.gguf")
        )
        assert [found["model"], *found["parts"], found["adapter"]] == [*map(str, paths)]

    def test_more_time_for_larger_files(self, model: Path) -> None:
        with model.open("r+b") as file:
            file.truncate(320 << 20)
        assert self.read("json.loads(sys.stdin.read())", model, {})["cpu_seconds"] == 310

    def test_exactly_its_environment(self, model: Path, monkeypatch) -> None:
        monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "secret")
        found = self.read("dict(os.environ)", model, {"TZ": "UTC", "odd": "näme"})
        assert {k: v for k, v in found.items() if k != "LC_CTYPE"} == {"TZ": "UTC", "odd": "näme"}

    def test_no_descriptors_but_its_own(self, model: Path) -> None:
        with model.open("rb") as file:
            os.set_inheritable(file.fileno(), True)
            *listed, own = self.read("[*os.listdir('/proc/self/fd'), str(fd)]", model, {})
        assert len(listed) == 5  # one is the listing's
        assert {"0", "1", "2", own} < {*listed}

    def test_a_group_and_session_of_its_own(self, model: Path) -> None:
        pid, group, session = self.read("[os.getpid(), os.getpgid(0), os.getsid(0)]", model, {})
        assert pid == group == session


class TestWhatItSays:
    def test_all_is_well(self, model: Path) -> None:
        stages: list[str] = []
        found = tried(OK, model, stage=stages.append)
        assert found == Verdict("ok", "", ("limits", "landlock 4"), 1234, **FACTS)
        assert found.ok
        assert stages == [*STAGES]

    def test_in_pieces(self, model: Path) -> None:
        script = """
data = b"".join(json.dumps(one).encode() + b"\\n" for one in (
    {"stage": "confined", "by": []}, {"stage": "loading"}, {"stage": "loaded"},
    {"stage": "decoding"}, {"outcome": "ok", "facts": FACTS},
))
for at in range(len(data)):
    write(data[at:at + 1])
"""
        assert tried(script, model).ok

    def test_a_model_without_a_template(self, model: Path) -> None:
        script = 'come(); say(outcome="ok", facts=FACTS | {"chat_template_sha256": None})'
        assert tried(script, model).chat_template_sha256 is None

    @pytest.mark.parametrize("outcome", ["refused", "failed"])
    def test_refused(self, outcome: str, model: Path) -> None:
        found = tried(f'come(2); say(outcome="{outcome}", reason="no such architecture")', model)
        assert (found.outcome, found.reason) == (outcome, "no such architecture")
        assert not found.ok
        assert found.confined == ("limits", "landlock 4")
        assert found.load_seconds is None

    def test_without_a_word(self, model: Path) -> None:
        found = tried(r'come(2); say(outcome="refused", reason=" \n\x07")', model)
        assert found.reason == "it gave no reason"

    def test_out_of_memory_says_how_much_there_was(self, model: Path) -> None:
        script = 'come(2); say(outcome="out_of_memory", reason="std::bad_alloc")'
        found = prober(script, allowance_bytes=10**9).probe(KEY, [model], 10**9)
        assert found.outcome == "out_of_memory"
        assert found.reason == "2.0 GB of memory were not enough: std::bad_alloc"

    def test_no_folders_and_no_control_characters(self, model: Path) -> None:
        said = f"{model}: bad\r\n\x1b[31m\u202e at /home/me/x.cpp:5, C:\\srv\\y \ud800" + "x" * 5000
        found = tried(f'come(2); say(outcome="refused", reason={said!r})', model)
        assert found.reason.startswith("m.gguf: bad [31m at x.cpp:5, y xxx")
        assert len(found.reason) == 300

    def test_words_of_the_model_too(self, model: Path) -> None:
        script = 'come(); say(outcome="ok", facts=FACTS | {"description": "a\\0b /srv/a/b" * 99})'
        description = tried(script, model).description
        assert description is not None
        assert description.isprintable()
        assert len(description) <= 256
        assert "/srv" not in description

    @pytest.mark.parametrize(
        "script",
        [
            'come(2); write(b"hello\\n")',
            'come(2); write(b"[1]\\n")',
            'come(2); write(b"\\n")',
            'come(2); write(b"\\xff\\n")',
            'come(2); write(b"[" * 8000 + b"\\n")',
            'come(2); write(b"1" * 8000 + b"\\n")',
            'come(2); write(b"{}\\n")',
            'come(2); say(stage="decoding")',
            'come(2); say(stage="loading")',
            'come(4); say(stage="decoding")',
            'come(2); say(stage=["loaded"])',
            "come(2); say(stage=None)",
            'come(3); say(outcome="ok", facts=FACTS)',
            'come(); say(outcome="ok")',
            'come(); say(outcome="ok", facts=FACTS | {"more": 1})',
            'come(); say(outcome="ok", facts=FACTS | {"load_seconds": float("nan")})',
            'come(); say(outcome="crashed", reason="")',
            'come(); say(outcome=[], reason="")',
            'come(); say(outcome="refused")',
            'come(); say(outcome="refused", reason=5)',
            'come(); say(outcome="ok", facts=FACTS); say(outcome="ok", facts=FACTS)',
            'come(2); say(outcome="refused", reason="a" * 20000)',
            'come(2); write(b"x" * 20000); signal.pause()',
            'come(2); complain("x" * 5_000_000); signal.pause()',
        ],
    )  # fmt: skip
    def test_nonsense(self, script: str, model: Path, folder: Path) -> None:
        """Said of what it has read it is a verdict: it does so of itself never."""
        before = descriptors()
        probing = prober(script, folder)
        found = probing.probe(KEY, [model], 0)
        assert found.outcome == "crashed"
        assert found.reason.startswith("its process was stopped, as it sent ")
        assert probing.known(KEY) == found
        assert descriptors() == before

    @pytest.mark.parametrize(
        "script",
        [
            'write(b"hello\\n")',
            'say(stage="loading")',
            'say(stage="confined")',
            'say(stage="confined", by="limits")',
            'say(stage="confined", by=[1])',
            'say(stage="confined", by=["/srv/secret"])',
            'say(stage="confined", by=["limits"] * 9)',
            'say(stage="confined", by=["a" * 99])',
            'say(outcome="refused", reason="")',
            'come(1); say(outcome="out_of_memory", reason="")',
            "come(1); sys.exit(1)",
            "come(1); os.kill(os.getpid(), signal.SIGILL)",
            "",
        ],
    )  # fmt: skip
    def test_before_it_reads_the_file_nothing_is_a_verdict(
        self, script: str, model: Path, folder: Path
    ) -> None:
        found = prober(script, folder).probe(KEY, [model], 0)
        assert found.outcome == "failed"
        assert found.reason.startswith("before it read the file ")
        assert not folder.exists()


class TestHowItEnds:
    @pytest.mark.parametrize(
        ("name", "outcome"),
        [
            ("SIGILL", "illegal_instruction"),
            ("SIGABRT", "crashed"),
            ("SIGSEGV", "crashed"),
            ("SIGBUS", "crashed"),
            ("SIGFPE", "crashed"),
            ("SIGTRAP", "crashed"),
            ("SIGSYS", "crashed"),
            ("SIGXCPU", "hung"),
            ("SIGKILL", "out_of_memory"),
            ("SIGTERM", "failed"),
            ("SIGHUP", "failed"),
        ],
    )
    def test_signals(self, name: str, outcome: str, model: Path, folder: Path) -> None:
        # Whoever started the tests may have had some ignored, which is inherited.
        usual = f"signal.signal(signal.{name}, signal.SIG_DFL)"
        script = f"come(2); {'pass' if name == 'SIGKILL' else usual}; os.kill(os.getpid(), signal.{name})"
        probing = prober(f"import resource; resource.setrlimit(4, (0, 0)); {script}", folder)
        found = probing.probe(KEY, [model], 0)
        assert found.outcome == outcome
        assert "SIG" in found.reason or outcome == "hung"
        assert found.reason.startswith("its process ") or outcome == "out_of_memory"
        assert probing.known(KEY) == (found if outcome in ABOUT_THE_BYTES else None)

    def test_killed_for_its_processor_time(self, model: Path, monkeypatch) -> None:
        """By the limit that cannot be ignored."""
        script = """
import resource
come(2)
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CPU, (1, 2))
while True:
    pass
"""
        clock = Clock(monkeypatch, "never")
        found = prober(script, wall_seconds=0.5).probe(KEY, [model], 0, stage=clock.stage)
        assert found.outcome == "hung"
        assert found.reason == "its process was stopped after 1 seconds of computing"

    def test_last_words(self, model: Path) -> None:
        script = """
come(2)
complain("a warning\\nC:\\\\x\\\\a b/c.c:5: GGML_ASSERT(n > 0) failed\\n\\n")
os.write(1, b" \\x07 \\n")
os.abort()
"""
        found = tried(script, model)
        assert found.outcome == "crashed"
        assert found.reason == "its process gave up (SIGABRT): c.c:5: GGML_ASSERT(n > 0) failed"

    def test_words_before_a_crash_need_not_be_about_it(self, model: Path) -> None:
        found = tried('come(2); complain("a warning\\n"); os.kill(os.getpid(), 11)', model)
        assert found.reason == "its process crashed (SIGSEGV)"

    @pytest.mark.parametrize(
        "words",
        [
            "what():  std::bad_alloc",
            "libgomp: Thread creation failed: Resource temporarily unavailable",
            "ggml.c:1644: GGML_ASSERT(ctx->mem_buffer != NULL) failed",
        ],
    )
    @pytest.mark.parametrize("end", ["os.abort()", "os._exit(1)"])
    def test_it_gives_up_for_want_of_memory(self, words: str, end: str, model: Path) -> None:
        assert tried(f"come(2); complain({words!r}); {end}", model).outcome == "out_of_memory"

    @pytest.mark.parametrize("script", ["come(2)", OK + "; os._exit(3)", "come(2); os._exit(3)"])
    def test_exit_codes(self, script: str, model: Path) -> None:
        found = tried(script, model)
        assert found.outcome == "crashed"
        assert f"exit code {3 * ('3' in script)}" in found.reason

    def test_a_crash_after_all_was_well(self, model: Path) -> None:
        assert tried(OK + "; os.kill(os.getpid(), signal.SIGSEGV)", model).outcome == "crashed"

    def test_what_cannot_be_started(self, model: Path, tmp_path: Path) -> None:
        before = descriptors()
        probing = Prober(None, build="", environment={}, command=[str(tmp_path / "none")])
        found = probing.probe(KEY, [model], 0)
        assert (found.outcome, found.reason) == (
            "failed",
            "it cannot be tried: No such file or directory",
        )
        assert descriptors() == before

    def test_somebody_else_has_waited_for_it(self, model: Path, monkeypatch) -> None:
        pids: list[int] = []

        def none(pid: int, _: int) -> None:
            pids.append(pid)
            raise ChildProcessError

        monkeypatch.setattr(probe_child.os, "wait4", none)
        found = tried("come(2)", model)
        os.waitpid(pids[0], 0)
        assert found.outcome == "failed"


class Fifo:
    """Its other end is open as long as who opened it lives."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def closed(self, seconds: float = 20) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, 0)
        return bool(poll.poll(seconds * 1000))

    def read(self) -> str:
        return os.read(self._descriptor, 100).decode()

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    found = Fifo(tmp_path / "fifo")
    yield found
    found.close()


class TestWhoeverItLeavesBehind:
    def script(self, fifo: Fifo, grandchild: str) -> str:
        return f"""
come()
end = os.open({str(fifo.path)!r}, os.O_WRONLY)
if os.fork() == 0:
    {grandchild}
    os.write(end, str(os.getpid()).encode())
    signal.pause()
say(outcome="ok", facts=FACTS)
"""

    def test_ends_with_it(self, model: Path, fifo: Fifo) -> None:
        assert tried(self.script(fifo, "pass"), model).ok
        assert fifo.closed()

    def test_does_not_hold_us_up(self, model: Path, fifo: Fifo) -> None:
        began = time.monotonic()
        # So that it is in a group of its own by the time that it is to be killed.
        script = self.script(fifo, "os.setsid(); os.write(ready[1], b'x')")
        script = "ready = os.pipe()\n" + script.replace("say(out", "os.read(ready[0], 1); say(out")
        before = descriptors()
        assert tried(script, model).ok
        assert descriptors() == before
        assert time.monotonic() - began < 60
        assert not fifo.closed(0)
        poll = select.poll()
        poll.register(fifo._descriptor, select.POLLIN)
        assert poll.poll(20_000)
        os.kill(int(fifo.read()), signal.SIGKILL)
        assert fifo.closed()


class Clock:
    """Of the child's deadline. It goes on when a stage is reached."""

    def __init__(self, monkeypatch: Any, at: str) -> None:
        self.now, self._at = 0.0, at
        monkeypatch.setattr(probe_child.time, "monotonic", lambda: self.now)

    def stage(self, stage: str) -> None:
        self.now += 301.0 * (stage == self._at)


class TestWhileItRuns:
    @pytest.mark.parametrize("say", ["", "os.close(fd); os.close(1); os.close(2)"])
    def test_a_hang(self, say: str, model: Path, monkeypatch, tmp_path: Path) -> None:
        clock = Clock(monkeypatch, "loading")
        pid = tmp_path / "pid"
        script = f'open({str(pid)!r}, "w").write(str(os.getpid())); come(2); {say}\nsignal.pause()'
        probing = prober(script)
        found = probing.probe(KEY, [model], 0, stage=clock.stage)
        assert found.outcome == "hung"
        assert found.reason == "its process was stopped after 300 seconds"
        assert probing.known(KEY) == found
        assert gone(int(pid.read_text()))

    def test_a_hang_before_it_reads_the_file(self, model: Path, monkeypatch) -> None:
        clock = Clock(monkeypatch, "confined")
        found = tried("come(1); signal.pause()", model, stage=clock.stage)
        assert found.outcome == "failed"

    def test_a_time_that_is_real(self, model: Path) -> None:
        found = prober("signal.pause()", wall_seconds=0.05).probe(KEY, [model], 0)
        assert (found.outcome, found.reason) == (
            "failed",
            "before it read the file its process was stopped after 0 seconds",
        )

    @pytest.mark.parametrize("at", [None, "loading"])
    def test_cancelled(self, at: str | None, model: Path, tmp_path: Path) -> None:
        stages: list[str | None] = [None]
        pid, before = tmp_path / "pid", descriptors()
        script = f'open({str(pid)!r}, "w").write(str(os.getpid())); come(2); signal.pause()'
        probing = prober(script)
        with pytest.raises(Cancelled, match="the probe was cancelled"):
            probing.probe(KEY, [model], 0, stage=stages.append, cancelled=lambda: at in stages)
        assert probing.known(KEY) is None
        assert descriptors() == before
        if at is not None:
            assert gone(int(pid.read_text()))

    def test_a_listener_that_fails(self, model: Path, tmp_path: Path) -> None:
        def fail(stage: str) -> None:
            raise RuntimeError(stage)

        pid, before = tmp_path / "pid", descriptors()
        script = f'open({str(pid)!r}, "w").write(str(os.getpid())); come(2); signal.pause()'
        with pytest.raises(RuntimeError, match="confined"):
            tried(script, model, stage=fail)
        assert gone(int(pid.read_text()))
        assert descriptors() == before

    def test_it_ignores_what_it_can(self, model: Path, monkeypatch) -> None:
        clock = Clock(monkeypatch, "loading")
        script = "[signal.signal(one, signal.SIG_IGN) for one in (1, 2, 15, 24)]; come(2)\n"
        found = tried(script + "while True: signal.pause()", model, stage=clock.stage)
        assert found.outcome == "hung"

    def test_nobody_reads_its_request(self, model: Path, tmp_path: Path) -> None:
        parts = [model, *(tmp_path / f"{i:0200}.gguf" for i in range(999))]
        for part in parts[1:]:
            part.write_bytes(b"")
        assert prober(OK).probe(KEY, parts, 0).ok


class TestFiles:
    def test_none(self, model: Path) -> None:
        found = tried(OK, model.with_name("none.gguf"))
        assert (found.outcome, found.reason) == (
            "failed",
            "it cannot be tried: No such file or directory",
        )

    @pytest.mark.parametrize("kind", ["folder", "fifo"])
    def test_no_file(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.mkdir() if kind == "folder" else os.mkfifo(path)
        found = tried(OK, path)
        assert (found.outcome, found.reason) == (
            "failed",
            "it cannot be tried: it is no regular file",
        )

    @pytest.mark.parametrize("end", ["", "os.abort()", "os.kill(os.getpid(), signal.SIGBUS)"])
    def test_one_that_changes(self, end: str, model: Path, folder: Path) -> None:
        probing = prober(f'open({str(model)!r}, "a").write("more"); {OK}; {end}', folder)
        found = probing.probe(KEY, [model], 0)
        assert (found.outcome, found.reason) == ("failed", "its file changed meanwhile")
        assert probing.known(KEY) is None

    def test_one_that_goes(self, model: Path) -> None:
        assert tried(f"os.unlink({str(model)!r}); {OK}", model).outcome == "failed"

    def test_an_adapter_that_changes(self, model: Path) -> None:
        adapter = model.with_name("a.gguf")
        adapter.write_bytes(b"")
        script = f'open({str(adapter)!r}, "a").write("more"); {OK}'
        assert tried(script, model, adapter=adapter).outcome == "failed"

    @pytest.mark.parametrize(
        "key", ["", "a" * 63, "A" * 64, "g" * 64, "../" + "a" * 61, KEY + "\n"]
    )
    def test_keys(self, key: str, model: Path) -> None:
        probing = prober(OK)
        for call in (probing.known, probing.forget, lambda key: probing.probe(key, [model], 0)):
            with pytest.raises(ValueError, match="64 hexadecimal digits"):
                call(key)

    def test_what_makes_no_sense(self, model: Path) -> None:
        for files, size in (([], 0), ([model], -1)):
            with pytest.raises(ValueError, match="files must begin"):
                prober(OK).probe(KEY, files, size)


REFUSED = 'come(2); say(outcome="refused", reason="no")'


class TestMemory:
    @pytest.mark.parametrize("script", [OK, REFUSED])
    def test_across_processes(self, script: str, model: Path, folder: Path) -> None:
        found = prober(script, folder).probe(KEY, [model], 0)
        assert prober("", folder).known(KEY) == found

    def test_by_bytes_and_build(self, model: Path, folder: Path) -> None:
        prober(OK, folder).probe(KEY, [model], 0)
        assert prober(OK, folder).known(OTHER) is None
        other = prober(REFUSED, folder, build="another/one")
        assert other.known(KEY) is None
        other.probe(KEY, [model], 0)
        assert other.known(KEY).outcome == "refused"
        assert prober(OK, folder).known(KEY).ok

    def test_in_this_process_only(self, model: Path) -> None:
        probing = prober(OK)
        assert probing.known(KEY) is None
        found = probing.probe(KEY, [model], 0)
        assert probing.known(KEY) == found
        assert prober(OK).known(KEY) is None
        probing.forget(KEY)
        assert probing.known(KEY) is None

    def test_forgetting(self, model: Path, folder: Path) -> None:
        probing = prober(OK, folder)
        probing.forget(KEY)
        for key in (KEY, OTHER):
            probing.probe(key, [model], 0)
        probing.forget(KEY)
        assert probing.known(KEY) is None
        assert probing.known(OTHER).ok
        assert len([*folder.iterdir()]) == 1

    def test_it_always_probes_and_the_last_verdict_counts(self, model: Path, folder: Path) -> None:
        prober(REFUSED, folder).probe(KEY, [model], 0)
        assert prober(OK, folder).probe(KEY, [model], 0).ok
        assert prober("", folder).known(KEY).ok

    @pytest.mark.parametrize("script", ["sys.exit(0)", "come(2); os.kill(os.getpid(), 9)"])
    def test_what_is_no_verdict_leaves_the_one_before(
        self, script: str, model: Path, folder: Path
    ) -> None:
        before = prober(OK, folder).probe(KEY, [model], 0)
        prober(script, folder).probe(KEY, [model], 0)
        assert prober("", folder).known(KEY) == before

    def test_modes(self, model: Path, folder: Path) -> None:
        old = os.umask(0)
        try:
            prober(OK, folder).probe(KEY, [model], 0)
        finally:
            os.umask(old)
        (file,) = folder.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.name.startswith(KEY)

    def test_a_folder_that_is_open_to_others_is_closed(self, model: Path, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        prober(OK, folder).probe(KEY, [model], 0)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_where_it_cannot_be_written(self, model: Path, folder: Path, caplog) -> None:
        folder.write_text("a file")
        probing = prober(OK, folder)
        found = probing.probe(KEY, [model], 0)
        assert "not kept beyond this process" in caplog.text
        assert probing.known(KEY) == found
        assert prober(OK, folder).known(KEY) is None

    def test_a_disk_that_is_full(self, model: Path, folder: Path, monkeypatch) -> None:
        before = prober(REFUSED, folder).probe(KEY, [model], 0)
        probing = prober(OK, folder)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "fsync", full)
        found = probing.probe(KEY, [model], 0)
        assert probing.known(KEY) == found
        assert prober("", folder).known(KEY) == before
        assert len([*folder.iterdir()]) == 1

    def test_a_link_in_its_place_is_replaced(self, model: Path, folder: Path) -> None:
        prober(OK, folder).probe(KEY, [model], 0)
        (file,) = folder.iterdir()
        target = folder.with_name("target")
        target.write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(target)
        probing = prober(REFUSED, folder)
        assert probing.known(KEY) is None
        target.write_text("")
        probing.probe(KEY, [model], 0)
        assert target.read_text() == ""
        assert probing.known(KEY).outcome == "refused"


def _text(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        text = change(file.read_text())
        assert text != file.read_text()
        file.write_text(text)

    return damage


def _fields(**changed: object) -> Callable[[Path], None]:
    return _text(lambda text: json.dumps(json.loads(text) | changed))


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": _text(lambda _: ""),
    "cut": _text(lambda text: text[:-1]),
    "no JSON": _text(lambda text: text.replace('"', "'")),
    "pickle": lambda file: file.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.") and None,
    "deep": _text(lambda _: "[" * 16000),
    "large": _text(lambda text: text + " " * 20000),
    "other format": _fields(format=2),
    "true for 1": _fields(format=True, at=True),
    "other key": _fields(key=OTHER),
    "other build": _fields(build="other"),
    "other outcome": _fields(outcome="fine"),
    "no outcome": _fields(outcome=["ok"]),
    "not remembered": _fields(outcome="failed", facts=None),
    "no facts": _fields(facts=None),
    "facts of a refusal": _fields(outcome="refused"),
    "a fact too many": _fields(facts=FACTS | {"more": 1}),
    "a fact of another kind": _fields(facts=FACTS | {"parameters": 1.5}),
    "a fact with folders": _fields(facts=FACTS | {"description": "/srv/a/b"}),
    "infinity": _fields(facts=FACTS | {"load_seconds": math.inf}),
    "a reason of two lines": _fields(outcome="refused", facts=None, reason="a\nb"),
    "a long reason": _fields(outcome="refused", facts=None, reason="a" * 301),
    "no reason": _fields(reason=None),
    "confined by no list": _fields(confined="limits"),
    "another field": _fields(more=1),
    "before 1970": _fields(at=-1),
    "readable, writable": lambda file: file.chmod(0o622),
    "a folder": _instead(lambda file: file.mkdir()),
    "a pipe": _instead(os.mkfifo),
    "a link": lambda file: file.symlink_to(file.rename(file.with_name("x"))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_memory(name: str, model: Path, folder: Path, caplog) -> None:
    probing = prober(OK, folder)
    probing.probe(KEY, [model], 0)
    (file,) = folder.iterdir()
    DAMAGE[name](file)
    assert probing.known(KEY) is None
    assert "counts for nothing" in caplog.text
    assert str(folder) not in caplog.text


def test_nothing_is_said_of_what_is_not_there(folder: Path, caplog) -> None:
    assert prober(OK, folder).known(KEY) is None
    folder.mkdir()
    assert prober(OK, folder).known(KEY) is None
    assert not caplog.records


def test_the_log_has_no_paths(model: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    odd = model.rename(model.with_name("m\n\x1b.gguf"))
    tried(OK, odd)
    (line,) = caplog.messages
    assert line.strip() == "the probe of m .gguf: ok"


# Any text, any facts


@given(st.text(), st.text(), st.integers(1, 400))
def test_plain(text: str, folder: str, most: int) -> None:
    found = plain(f"{text}/{folder}/{text}", [f"/{folder}"], most)
    assert found.isprintable()
    assert len(found) <= most
    assert found == found.strip()
    assert plain(found, [], most) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/srv/models/a b/m.gguf is bad", "m.gguf is bad"),
        ("at /a/b/c.cpp:12: GGML_ASSERT(x/2 == y) failed", "at c.cpp:12: GGML_ASSERT(x/2 == y) failed"),
        ("a / b", "a / b"),
        ("n/2/3", "n/2/3"),
        ("in '/a/b c/d' and \"C:\\e f\\g\"", "in 'd' and \"g\""),
        ("the folder /home/me", "the folder me"),
    ],
)  # fmt: skip
def test_plain_examples(text: str, found: str) -> None:
    assert plain(text) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*FACTS]), JSON)
def test_facts_of_any_kind(name: str, value: object) -> None:
    """They are as they should be, or refused."""
    try:
        found = facts(FACTS | {name: value})
    except Garbled:
        return
    assert found.keys() == FACTS.keys()
    kinds = {"load_seconds": float, "decode_seconds": float, "can_generate": bool}
    kinds |= {"architecture": str, "description": str}
    wanted = kinds.get(name, type(None) if name.startswith("chat") else int)
    assert type(found[name]) is wanted
    if wanted in {int, float}:
        assert 0 <= found[name] < 1 << 61
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [None, [], FACTS | {"x": 1}, {**FACTS} | {"parameters": True}])
def test_facts_refused(value: object) -> None:
    with pytest.raises(Garbled):
        facts(value)


# The build


class TestEngineBuild:
    @pytest.fixture
    def machine(self, tmp_path: Path, monkeypatch) -> Path:
        package = tmp_path / "some_binding"
        (package / "lib").mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        (package / "lib" / "libllama.so.0.1").write_bytes(b"x")
        (tmp_path / "cpuinfo").write_text(
            "".join(
                f"processor\t: {i}\ncpu MHz\t\t: {3000 + i}\nflags\t\t: fpu avx\n" for i in (0, 1)
            )
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    def build(self, machine: Path, **options: Any) -> str:
        options = {"package": "some_binding", "cpuinfo": machine / "cpuinfo"} | options
        return engine_build(**options)

    def test_the_same(self, machine: Path) -> None:
        build = self.build(machine)
        assert re.fullmatch(r"[0-9a-f]{64}", build)
        assert self.build(machine) == build
        text = (machine / "cpuinfo").read_text()
        (machine / "cpuinfo").write_text(text.replace("3001", "800") + text)
        (machine / "some_binding" / "more.py").write_text("")
        assert self.build(machine) == build

    def test_another(self, machine: Path) -> None:
        builds = [self.build(machine)]
        library = machine / "some_binding" / "lib" / "libllama.so.0.1"
        os.utime(library, (1, 1))
        builds.append(self.build(machine))
        library.write_bytes(b"xy")
        os.utime(library, (1, 1))
        builds.append(self.build(machine))
        (machine / "some_binding" / "_native.so").write_bytes(b"")
        builds.append(self.build(machine))
        text = (machine / "cpuinfo").read_text()
        (machine / "cpuinfo").write_text(text.replace("avx", "avx avx2"))
        builds.append(self.build(machine))
        (machine / "cpuinfo").unlink()
        builds.append(self.build(machine))
        builds += [self.build(machine, package="not_there_at_all")]
        builds += [self.build(machine, distribution="pytest")]
        assert len({*builds}) == len(builds)

    def test_the_real_one_is_not_imported(self) -> None:
        check = (
            "import sys; from shimmy_jupyter.models.probe import engine_build; print(engine_build())"
            "; print('llama_cpp' in sys.modules, 'numpy' in sys.modules)"
        )
        command = [sys.executable, "-c", check]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        build, rest = done.stdout.split("\n", 1)
        assert build == engine_build()
        assert rest.strip() == "False False"


# The filter

ALLOW, KILL = 0x7FFF0000, 0x80000000
DENIED, ABSENT = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
PID = 4711
NUMBERS = {
    call.split(":")[0]: call.split(":")[1:]
    for call in [*confine._DENIED.split(), *confine._ABSENT.split(), *confine._CHECKED]
}


def answer(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter says to a call."""
    architecture = confine._MACHINES[machine][1] if arch is None else arch
    filled = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *filled)
    code, at, held = confine.program(machine, PID), 0, 0
    while True:
        kind, yes, no, operand = code[at]
        at += 1
        match kind:
            case 0x20:
                (held,) = struct.unpack_from("<I", data, operand)
            case 0x54:
                held &= operand
            case 0x15:
                at += yes if held == operand else no
            case 0x25:
                at += yes if held > operand else no
            case 0x06:
                return operand
            case _:
                raise AssertionError(kind)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
class TestFilter:
    def call(self, machine: str, name: str, *arguments: int) -> int:
        return answer(machine, int(NUMBERS[name][confine._MACHINES[machine][0]]), *arguments)

    def test_it_fits(self, machine: str) -> None:
        code = confine.program(machine, PID)
        assert len(code) < 4096
        for at, (kind, yes, no, operand) in enumerate(code):
            assert 0 <= max(yes, no) < 256
            assert at + 1 + max(yes, no) < len(code) or kind == 0x06
            assert 0 <= operand < 1 << 32

    def test_another_machines_calls(self, machine: str) -> None:
        assert answer(machine, 0, arch=0x40000003) == KILL

    def test_calls(self, machine: str) -> None:
        for call in confine._DENIED.split():
            number = call.split(":")[1 + confine._MACHINES[machine][0]]
            if number != "-":
                assert answer(machine, int(number)) == DENIED, call
        for call in ("clone3", "openat2"):
            assert self.call(machine, call) == ABSENT
        for number in (463, 500, 0x40000000, 0x40000029, 0xFFFFFFFF):
            assert answer(machine, number) == ABSENT

    def test_every_number_is_decided_once(self, machine: str) -> None:
        column = confine._MACHINES[machine][0]
        numbers = [n[column] for n in NUMBERS.values() if n[column] != "-"]
        assert len({*numbers}) == len(numbers)
        assert max(map(int, numbers)) <= 462

    def test_threads(self, machine: str) -> None:
        thread = 0x3D0F00
        assert self.call(machine, "clone", thread) == ALLOW
        for flags in (0x11, 0x1200011, thread & ~0x10000, 0x4111):
            assert self.call(machine, "clone", flags) == DENIED
        for namespace in (0x20000, *(1 << i for i in range(25, 31))):
            assert self.call(machine, "clone", thread | namespace) == DENIED

    def test_opening(self, machine: str) -> None:
        def opened(flags: int) -> int:
            return self.call(machine, "openat", 0, 0, flags)

        for flags in (0, os.O_CLOEXEC, os.O_DIRECTORY, os.O_PATH, os.O_NOFOLLOW | os.O_NONBLOCK):
            assert opened(flags) == ALLOW
        for flags in (os.O_WRONLY, os.O_RDWR, 3, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE | 2):
            assert opened(flags) == DENIED
            assert opened(flags | os.O_CLOEXEC) == DENIED
        if machine == "x86_64":
            assert self.call(machine, "open", 0, os.O_RDONLY) == ALLOW
            assert self.call(machine, "open", 0, os.O_WRONLY | os.O_CREAT) == DENIED

    def test_signals(self, machine: str) -> None:
        for name in ("kill", "tkill", "tgkill"):
            assert self.call(machine, name, PID) == ALLOW
            for other in (0, 1, PID + 1, (1 << 32) - 1, (1 << 32) - PID):
                assert self.call(machine, name, other) == DENIED

    def test_the_rest(self, machine: str) -> None:
        assert self.call(machine, "prlimit64", 0) == ALLOW
        assert self.call(machine, "prlimit64", PID) == DENIED
        assert self.call(machine, "sched_setaffinity", 1) == DENIED
        # Shared with a file; private without; but not shared without, nor growing.
        for flags, found in (
            (0x01, ALLOW), (0x02, ALLOW), (0x22, ALLOW), (0x20022, ALLOW), (0x21, DENIED),
            (0x23, DENIED), (0x122, DENIED), (0x102, DENIED),
        ):  # fmt: skip
            assert self.call(machine, "mmap", 0, 4096, 3, flags) == found
        assert self.call(machine, "fcntl", 1, 1030) == ALLOW
        for command in (8, 10, 6, 7, 1024, 1031, 15):  # owner, signal, locks, lease, pipe size
            assert self.call(machine, "fcntl", 1, command) == DENIED
        for command in (0x5412, 0x541C, 0x40086602, 0x8901):
            assert self.call(machine, "ioctl", 0, command) == DENIED
        assert self.call(machine, "ioctl", 0, 0x5401) == ALLOW
        for option in (1, 4, 22, 35, 0x59616D61):
            assert self.call(machine, "prctl", option) == DENIED
        assert self.call(machine, "prctl", 15) == ALLOW

    def test_the_systems_own_numbers(self, machine: str) -> None:
        """As far as its headers go."""
        folder = Path("/usr/include")
        found = [*folder.glob("*/asm/unistd_64.h"), *folder.glob("asm/unistd_64.h")]
        path = found[0] if machine == "x86_64" and found else folder / "asm-generic/unistd.h"
        if not path.exists() or (machine == "x86_64" and os.uname().machine != "x86_64"):
            pytest.skip("no headers of this machine's system calls are installed")
        text = path.read_text()
        column, known = confine._MACHINES[machine][0], 0
        for name, numbers in NUMBERS.items():
            if said := re.search(rf"#define __NR(?:3264)?_{name}\s+(\d+)", text):
                known += 1
                assert said[1] == numbers[column], name
        assert known > 100
