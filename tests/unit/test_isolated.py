"""The engine's process, on scripted backends: `scripts/child_backends.py`.

Cases: a call's results and errors are those of the backend; changes travel with the step, and by
themselves when many wait; each way to end amid a load, a step and a prompt says how in words, loses
the engine for every later call, and leaves no process; a hang; garbage, lies, and too much; what the
process inherits; aborts reach the step they are meant for; unloading at any time, twice, after half
a load; the parent's end.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import child_backends
import pytest

from shimmy_jupyter.core.messages import CloseSlot, OpenSlot, Row, Step
from shimmy_jupyter.engine import calls, isolated, wire
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.channel import Channel
from shimmy_jupyter.engine.child import serve
from shimmy_jupyter.engine.isolated import IsolatedBackend, child_environment
from shimmy_jupyter.errors import (
    EngineCrashed,
    EngineLost,
    InternalError,
    Misconfigured,
    ModelLoadFailed,
)
from shimmy_jupyter.types import Sampling

SCRIPTS = Path(child_backends.__file__).parent
STEP = Step((Row(0, 0, (1,), True), Row(1, 0, (1, 2), False), Row(2, 5, (3,), True)))


def opened(slot: int, recent: tuple[int, ...] = ()) -> OpenSlot:
    return OpenSlot(slot, Sampling(), recent)


@pytest.fixture(autouse=True)
def importable(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))


@pytest.fixture
def make() -> Iterator[Callable[..., IsolatedBackend]]:
    made: list[IsolatedBackend] = []

    def one(name: str, **options: Any) -> IsolatedBackend:
        made.append(IsolatedBackend(f"child_backends:{name}", **options))
        return made[-1]

    yield one
    for backend in made:
        backend.unload()


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


class Fifo:
    """Where a child says that it is amid a call."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.spec = LoadSpec(str(path))
        self._descriptor = os.open(path, os.O_RDWR)

    def wait(self) -> None:
        assert ready(self._descriptor)
        os.read(self._descriptor, len("here\n"))

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def fifo(tmp_path) -> Iterator[Fifo]:
    found = Fifo(tmp_path / "fifo")
    yield found
    found.close()


def ready(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(20_000))


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def gone(pid: int) -> bool:
    """Also not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def lost(backend: IsolatedBackend, words: str) -> None:
    """It is lost for every call, with the same words, and no process is left."""
    assert backend.pid is None
    calls: list[Callable[[], object]] = [
        lambda: backend.step(STEP, 1),
        lambda: backend.apply(CloseSlot(1)),
        lambda: backend.tokenize("x"),
        lambda: backend.load(LoadSpec("")),
    ]
    for call in calls:
        with pytest.raises(EngineLost, match=words):
            call()
    backend.abort()


class TestUse:
    def test_calls_are_the_backends(self, make) -> None:
        backend = make("Good")
        assert backend.load(LoadSpec("path")) == child_backends.FACTS
        backend.apply(opened(0))
        backend.apply(CloseSlot(0))
        result = backend.step(STEP, 2, 0.5)
        assert [(one.slot, one.token, one.piece) for one in result.sampled] == [
            (0, 2, b"\xff\x00"),
            (2, 0, b"\xff\x02"),
        ]
        assert result.seconds == 2.0
        text = "naïve \0 \U0001f600" * 10_000
        assert backend.tokenize(text) == tuple(text.encode())
        pid = backend.pid
        backend.unload()
        assert gone(pid)
        backend.unload()
        with pytest.raises(EngineLost, match="unloaded"):
            backend.tokenize("x")

    def test_it_can_be_loaded_again(self, make) -> None:
        backend = make("Good")
        backend.load(LoadSpec(""))
        with pytest.raises(ModelLoadFailed, match="already"):
            backend.load(LoadSpec(""))
        backend.apply(opened(0))
        backend.unload()
        backend.load(LoadSpec(""))
        assert backend.step(STEP, 1).sampled[0].token == 0

    def test_many_changes_do_not_wait_for_a_step(self, make) -> None:
        backend = make("Good")
        backend.load(LoadSpec(""))
        for _ in range(700):
            backend.apply(opened(0))
        assert len(backend._changes) < 256
        assert backend.step(STEP, 1).sampled[0].token == 700

    def test_changes_do_not_wait_while_nothing_is_done(self, make) -> None:
        backend = make("Good")
        backend.load(LoadSpec(""))
        assert backend.flush() == ()
        backend.apply(opened(0))
        assert backend.flush() == (1,)
        assert backend.flush() == ()
        for _ in range(300):
            backend.apply(opened(0))
        # What was said of the first 256 of them is told with the next step.
        assert backend.step(STEP, 1).unsaved == (257,)
        assert backend.flush() == ()

    def test_a_change_that_fails_fails_the_step_and_no_other_change(self, make) -> None:
        backend = make("Good")
        backend.load(LoadSpec(""))
        for change in (opened(0), opened(1, (13,)), opened(0)):
            backend.apply(change)
        with pytest.raises(EngineCrashed, match="thirteen") as caught:
            backend.step(STEP, 1)
        assert not isinstance(caught.value, EngineLost)
        assert backend.step(STEP, 1).sampled[0].token == 2

    def test_a_step_that_fails_is_not_the_end(self, make) -> None:
        backend = make("Fails")
        backend.load(LoadSpec(""))
        for _ in range(2):
            with pytest.raises(EngineCrashed, match="no room") as caught:
                backend.step(STEP, 1)
            assert type(caught.value) is EngineCrashed
            with pytest.raises(EngineCrashed, match="no words"):
                backend.tokenize("x")
        assert backend.pid

    def test_a_backend_that_says_it_is_lost_is(self, make) -> None:
        backend = make("loses")
        backend.load(LoadSpec(""))
        pid = backend.pid
        with pytest.raises(EngineLost, match="no room"):
            backend.step(STEP, 1)
        assert gone(pid)
        lost(backend, "no room")

    def test_a_defect_is_in_the_log_only(self, make, caplog) -> None:
        backend = make("Defective")
        backend.load(LoadSpec(""))
        with pytest.raises(InternalError, match="log says how"):
            backend.step(STEP, 1)
        backend.unload()
        assert "ValueError: a defect with a secret in it" in caplog.text

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("Refuses", "no tensors"),
            ("Surprises", "server's log"),
            ("cannot_be_made", "does not load here: no such library"),
        ],
    )
    def test_a_load_that_fails(self, make, name, words) -> None:
        backend = make(name)
        for _ in range(2):
            with pytest.raises(ModelLoadFailed, match=words):
                backend.load(LoadSpec(""))
            assert backend.pid is None
        backend.unload()

    def test_nothing_was_ever_loaded(self, make) -> None:
        backend = make("Good")
        backend.abort()
        backend.unload()
        with pytest.raises(EngineLost):
            backend.step(STEP, 1)

    def test_it_is_a_setting_for_posix(self, make, monkeypatch) -> None:
        monkeypatch.setattr(isolated, "_POSIX", False)
        with pytest.raises(Misconfigured, match="isolation"):
            make("Good").load(LoadSpec(""))

    def test_a_process_that_cannot_be_started(self, make, monkeypatch) -> None:
        before = descriptors()
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(ModelLoadFailed, match="does not start: No such file"):
            make("Good").load(LoadSpec(""))
        assert descriptors() == before


ENDS = [
    ("SIGKILL", r"killed \(SIGKILL\), possibly because memory ran out"),
    ("assert", r"gave up \(SIGABRT\): ggml.c:1: GGML_ASSERT\(a/b\) failed$"),
    ("SIGABRT", r"gave up \(SIGABRT\)$"),
    ("SIGILL", "instruction that this processor lacks"),
    ("SIGSEGV", r"crashed \(SIGSEGV\)"),
    ("SIGUSR1", "ended by SIGUSR1"),
    ("exit", "ended with exit code 3"),
]


class TestEnds:
    @pytest.mark.parametrize(("how", "words"), ENDS)
    def test_amid_a_step(self, make, tmp_path, how, words) -> None:
        backend = make("Ends")
        backend.load(LoadSpec(str(tmp_path / how)))
        pid = backend.pid
        with pytest.raises(EngineLost, match=words) as caught:
            backend.step(STEP, 1)
        assert str(tmp_path) not in caught.value.message
        assert gone(pid)
        lost(backend, words)

    def test_amid_a_load_and_then_a_prompt(self, make, tmp_path) -> None:
        backend = make("Ends")
        with pytest.raises(EngineLost, match="SIGILL"):
            backend.load(LoadSpec(str(tmp_path / "load-SIGILL")))
        lost(backend, "SIGILL")
        backend.unload()
        backend.load(LoadSpec(str(tmp_path / "x")))
        with pytest.raises(EngineLost, match="SIGSEGV"):
            backend.tokenize("SIGSEGV")
        lost(backend, "SIGSEGV")

    def test_killed_from_outside_amid_a_step_and_a_prompt(self, make, fifo, aside) -> None:
        backend = make("Waits")
        backend.load(fifo.spec)
        step = aside.submit(backend.step, STEP, 1)
        fifo.wait()
        prompt = aside.submit(backend.tokenize, "wait")
        fifo.wait()
        os.kill(backend.pid, signal.SIGKILL)
        for call in (step, prompt):
            assert "SIGKILL" in str(call.exception(20))
            assert type(call.exception()) is EngineLost
        lost(backend, "SIGKILL")

    def test_killed_between_calls(self, make) -> None:
        backend = make("Good")
        backend.load(LoadSpec(""))
        end = os.pidfd_open(backend.pid)
        os.kill(backend.pid, signal.SIGKILL)
        assert ready(end)
        os.close(end)
        with pytest.raises(EngineLost, match="SIGKILL"):
            backend.step(STEP, 1)

    def test_who_hears_of_it_when_it_is_unloaded_already_hears_the_same(self, make) -> None:
        backend = make("Good")
        backend.load(LoadSpec(""))
        os.kill(backend.pid, signal.SIGKILL)
        with pytest.raises(EngineLost, match="SIGKILL"):
            backend.step(STEP, 1)
        backend.unload()
        backend.unload()
        with pytest.raises(EngineLost, match="SIGKILL"):
            backend.tokenize("x")
        backend.load(LoadSpec(""))
        backend.unload()
        with pytest.raises(EngineLost, match="unloaded"):
            backend.tokenize("x")

    @pytest.mark.parametrize("prompt", [False, True])
    def test_a_hang(self, make, fifo, prompt) -> None:
        backend = make("Waits", hang_seconds=0.05)
        backend.load(fifo.spec)
        pid = backend.pid
        words = "did not answer for 0.05 seconds and was stopped"
        with pytest.raises(EngineLost, match=words):
            backend.tokenize("wait") if prompt else backend.step(STEP, 1)
        assert gone(pid)
        lost(backend, words)

    def test_a_load_that_takes_too_long(self, make) -> None:
        backend = make("Good", load_seconds=0.001)
        with pytest.raises(EngineLost, match=r"0\.001 seconds"):
            backend.load(LoadSpec(""))
        lost(backend, "stopped")

    @pytest.mark.parametrize(
        "garbage",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            (1 << 30).to_bytes(4),
            b"\0\0\0\1x",
            wire.encode(calls.Done()),
            wire.encode(child_backends.FACTS),
        ],
    )
    def test_garbage(self, make, tmp_path, garbage) -> None:
        path = tmp_path / "garbage"
        path.write_bytes(garbage)
        backend = make("Babbles")
        backend.load(LoadSpec(str(path)))
        with pytest.raises(EngineLost, match="cannot be understood"):
            backend.step(STEP, 1)
        lost(backend, "cannot be understood")

    def test_answers_for_others(self, make) -> None:
        backend = make("Lies")
        backend.load(LoadSpec(""))
        with pytest.raises(EngineLost, match="other sequences"):
            backend.step(STEP, 1)
        lost(backend, "other sequences")


class TestInheritance:
    def test_no_secrets(self, make, monkeypatch) -> None:
        for name in ("JUPYTER_TOKEN", "SHIMMY_KERNEL_TOKEN", "AWS_SECRET_ACCESS_KEY", "GGML_KEY"):
            monkeypatch.setenv(name, "secret")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        backend = make("Tells")
        told = json.loads(backend.load(LoadSpec("")).description)
        assert not {
            name
            for name in told["environment"]
            if name.startswith(("JUPYTER", "SHIMMY", "JPY", "AWS")) or name == "GGML_KEY"
        }
        assert {"OMP_NUM_THREADS", "PYTHONPATH"} <= set(told["environment"])
        assert told["core"][0] in {0, 1}
        assert told["session"]
        assert told["interrupt"]
        assert told["safe_path"]
        # Its standard streams, two sockets, the event loop's three, the listing's own.
        assert len(told["descriptors"]) <= 9

    def test_the_environment(self) -> None:
        passed = {
            "PATH": "",
            "LC_ALL": "",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": "",
            "HOME": "",
        }
        kept = {
            "NVIDIA_API_KEY": "",
            "CUDA_TOKEN": "",
            "LLAMA_ARG_API_KEY": "",
            "JPY_PARENT_PID": "",
        }
        assert child_environment(passed | kept) == passed


class TestLog:
    def test_levels_and_lines(self, make, tmp_path, caplog) -> None:
        caplog.set_level(logging.INFO, "shimmy_jupyter")
        backend = make("Ends")
        backend.load(LoadSpec(str(tmp_path / "assert")))
        with pytest.raises(EngineLost):
            backend.step(STEP, 1)
        said = {(r.levelname, r.message) for r in caplog.records if r.name.endswith("engine.child")}
        assert ("INFO", "ending with SIGABRT") in said
        assert ("WARNING", f"{tmp_path}/ggml.c:1: GGML_ASSERT(a/b) failed") in said


class TestAbort:
    def test_it_reaches_the_step(self, make, fifo, aside) -> None:
        backend = make("Waits")
        backend.load(fifo.spec)
        for _ in range(3):
            step = aside.submit(backend.step, STEP, 1)
            fifo.wait()
            backend.abort()
            assert step.result(20).aborted

    def test_also_while_a_prompt_is_read(self, make, fifo, aside) -> None:
        backend = make("Waits")
        backend.load(fifo.spec)
        prompt = aside.submit(backend.tokenize, "wait")
        fifo.wait()
        step = aside.submit(backend.step, STEP, 1)
        fifo.wait()
        backend.abort()
        assert step.result(20).aborted
        backend.unload()
        assert "unloaded" in str(prompt.exception(20))

    def test_until_the_step_has_ended(self, make, fifo, aside) -> None:
        backend = make("Forgets")
        backend.load(fifo.spec)
        step = aside.submit(backend.step, STEP, 1)
        fifo.wait()
        backend.abort()
        assert step.result(20).aborted

    def test_between_steps_it_is_nothing(self, make) -> None:
        backend = make("Good")
        backend.load(LoadSpec(""))
        backend.abort()
        assert not backend.step(STEP, 1, math.inf).aborted


class TestServe:
    """The child's loop in a thread of this process."""

    @pytest.fixture
    def ends(self) -> Iterator[Callable[[Any], tuple[Channel, Channel, Future[None]]]]:
        with ThreadPoolExecutor() as threads:
            ours: list[Channel] = []

            def start(backend: Any, leave: Any = lambda: None) -> Any:
                pairs = socket.socketpair(), socket.socketpair()
                ours.extend(Channel(mine) for mine, _ in pairs)
                theirs = [end for _, end in pairs]
                done = threads.submit(serve, lambda: backend, *theirs, leave)
                done.add_done_callback(lambda _: [end.close() for end in theirs])
                return ours[-2], ours[-1], done

            yield start
            for end in ours:
                end.close()

    def ask(self, channel: Channel, message: Any, kind: Any) -> Any:
        channel.send(wire.encode(message))
        return wire.reply(channel.receive(wire.MAX_REPLY), kind)

    def test_unload_ends_it(self, ends) -> None:
        backend = child_backends.Good()
        work, side, done = ends(backend)
        load = calls.Load(LoadSpec(""))
        assert self.ask(work, load, child_backends.ModelFacts) == child_backends.FACTS
        assert self.ask(side, calls.Tokenize("a"), calls.Tokens) == calls.Tokens((97,))
        assert self.ask(work, calls.Unload(), calls.Done) == calls.Done()
        done.result(20)
        assert backend.unloads

    def test_an_abort_that_comes_before_its_step(self, ends) -> None:
        work, side, done = ends(child_backends.Good())
        self.ask(work, calls.Load(LoadSpec("")), child_backends.ModelFacts)
        side.send_now(wire.encode(calls.Abort(5)))
        self.ask(side, calls.Tokenize("so it was heard"), calls.Tokens)
        for number, aborted in ((5, True), (6, False)):
            found = self.ask(work, calls.Work(number, (), STEP), child_backends.StepResult)
            assert found.aborted == aborted
        work.shut()
        done.result(20)

    @pytest.mark.parametrize("end", [0, 1])
    def test_either_end_of_file_ends_it(self, ends, end) -> None:
        backend = child_backends.Good()
        *channels, done = ends(backend)
        self.ask(channels[0], calls.Load(LoadSpec("")), child_backends.ModelFacts)
        channels[end].shut()
        done.result(20)
        assert backend.unloads == 1

    def test_a_step_that_hears_nothing_is_left(self, ends, monkeypatch) -> None:
        monkeypatch.setattr("shimmy_jupyter.engine.child._GRACE", 0.01)
        backend, left = child_backends.Deaf(), threading.Event()
        work, side, done = ends(backend, left.set)
        self.ask(work, calls.Load(LoadSpec("")), child_backends.ModelFacts)
        work.send(wire.encode(calls.Work(1, (), STEP)))
        side.shut()
        assert left.wait(20)
        backend.released.set()
        done.result(20)

    @pytest.mark.parametrize("which", [0, 1])
    def test_what_is_no_request_ends_it(self, ends, which, caplog) -> None:
        *channels, done = ends(child_backends.Good())
        channels[which].send(b"\0\0\0\1x")
        done.result(20)
        assert "WireError" in caplog.text


class TestUnload:
    def test_while_a_step_hangs(self, make, fifo, aside) -> None:
        backend = make("Waits")
        backend.load(fifo.spec)
        pid = backend.pid
        step = aside.submit(backend.step, STEP, 1)
        fifo.wait()
        backend.unload()
        assert gone(pid)
        assert "unloaded" in str(step.exception(20))

    def test_nothing_is_left_behind(self, make) -> None:
        backend = make("Good")
        counts = set()
        for cycle in range(20):
            backend.load(LoadSpec(""))
            pid = backend.pid
            if cycle % 2:
                os.kill(pid, signal.SIGKILL)
            backend.unload()
            assert gone(pid)
            counts.add(descriptors())
        assert len(counts) == 1
        assert not [t for t in threading.enumerate() if t.name == "shimmy-stderr"]
        gc.collect()  # what was forgotten would warn

    def test_the_child_ends_with_its_parent(self, fifo) -> None:
        code = (
            "import sys, os, threading\n"
            "from shimmy_jupyter.engine.backend import LoadSpec\n"
            "from shimmy_jupyter.engine.isolated import IsolatedBackend\n"
            "from shimmy_jupyter.core.messages import Row, Step\n"
            "backend = IsolatedBackend('child_backends:Waits')\n"
            "backend.load(LoadSpec(sys.argv[1]))\n"
            "print(backend.pid, flush=True)\n"
            "backend.step(Step(()), 1)\n"
        )
        command = [sys.executable, "-c", code, fifo.spec.path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            end = os.pidfd_open(int(parent.stdout.readline()))
            fifo.wait()
            parent.kill()
        assert ready(end)
        os.close(end)
