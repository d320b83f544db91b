"""The probe on the real engine, and what its confinement takes away.

Cases, of models: the bundled one; quantized, split, with links and odd names; encoders; adapters, of
this model and of another, and files that are none; NaN weights; a large vocabulary with an ordinary
estimate; too little memory, in several amounts; cut short; each edit that llama.cpp is known to die of;
mutants of all kinds. An engine that does not start. The parent's end.

Of the confinement, all of it and each mechanism alone: what is still needed works (the file, libraries,
threads, signals to itself); reading and writing elsewhere, sockets, programs, processes, signals,
memory, limits and what could undo it, each tried where its mechanism is said to be in force. That
nothing is said to be in force that is not: another thread was there before, the system lacks it, or takes a limit and does not keep it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import minilm_gguf
import mutated_gguf
import pytest
import random_gguf

import shimmy_jupyter
from shimmy_jupyter.engine import confine as confining
from shimmy_jupyter.models.gguf import memory_needed, validate
from shimmy_jupyter.models.probe import ALLOWANCE_BYTES, STAGES, Prober, Verdict, engine_build

from .conftest import self_test_path
from .test_embedding import tiny_bert
from .test_gguf_engine import ENDING

SEED = int(os.environ.get("GGUF_SEED", "0"))
MUTANTS = int(os.environ.get("GGUF_MUTANTS", "12"))
KEY = "a" * 64
ENVIRONMENT = {"PYTHONPATH": str(Path(shimmy_jupyter.__file__).parent.parent)}
MEMORY = 64 << 20

Probe = Callable[..., Verdict]


def prober(folder: Path | None = None, **options: Any) -> Prober:
    return Prober(folder, build=engine_build(), **{"environment": ENVIRONMENT} | options)


@pytest.fixture
def probe() -> Probe:
    probing = prober()

    def one(*files: Path, memory: int = MEMORY, **options: Any) -> Verdict:
        found = probing.probe(KEY, files, memory, **options)
        assert found.reason == "" if found.ok else found.reason
        for path in files:
            assert str(path.parent) not in found.reason
        return found

    return one


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


class TestModels:
    def test_the_bundled_one(self, probe: Probe) -> None:
        path, stages = self_test_path(), []
        found = probe(path, stage=stages.append)
        assert found.ok, found
        facts = validate(path)
        assert found.architecture == facts.architecture
        assert found.parameters == facts.parameters
        assert found.vocabulary == facts.vocabulary
        assert found.context_size == facts.context_size == 1024
        assert found.chat_template_sha256 == facts.chat_template_sha256
        assert found.can_generate
        assert found.description == "llama ?B Q8_0"
        assert stages == [*STAGES]
        assert found.load_seconds is not None
        assert found.load_seconds > 0
        assert found.decode_seconds is not None
        assert found.decode_seconds > 0
        assert found.memory_bytes is not None
        assert path.stat().st_size < found.memory_bytes < 1 << 30

    @pytest.mark.parametrize(
        "options", [{"quantized": "Q4_0"}, {"template": None}, {"causal": False}, {"add_bos": True}]
    )
    def test_others(self, options: dict[str, Any], probe: Probe, tmp_path: Path) -> None:
        found = probe(random_gguf.write(tmp_path / "m.gguf", **options))
        assert found.ok, found
        assert found.can_generate == options.get("causal", True)
        assert (found.chat_template_sha256 is None) == (
            "template" in options or "causal" in options
        )

    def test_an_encoder(self, probe: Probe, tmp_path: Path) -> None:
        path = tmp_path / "bert.gguf"
        minilm_gguf.convert(tiny_bert(tmp_path, head=False), path)
        found = probe(path)
        assert found.ok, found
        assert not found.can_generate
        assert found.architecture == "bert"
        assert found.context_size == 64

    def test_a_small_context(self, probe: Probe, tmp_path: Path) -> None:
        shape = random_gguf.Shape(context=8)
        found = probe(random_gguf.write(tmp_path / "m.gguf", shape))
        assert found.ok, found
        assert found.context_size == 8

    def test_parts(self, probe: Probe, tmp_path: Path) -> None:
        first = random_gguf.write(tmp_path / "m.gguf", split=8)
        parts = sorted(tmp_path.glob("*.gguf"))
        assert len(parts) > 2
        assert parts[0] == first
        assert probe(*parts).ok
        found = probe(*parts[:-1])
        if "landlock" in " ".join(found.confined):
            assert found.outcome == "refused"
            assert "splits" in found.reason

    def test_links(self, probe: Probe, tiny: Path, tmp_path: Path) -> None:
        link = tmp_path / "snapshots" / "m.gguf"
        link.parent.mkdir()
        link.symlink_to(tiny)
        assert probe(link).ok

    @pytest.mark.parametrize("name", ["a b\n\x1b'\"ü.gguf", os.fsdecode(b"\xff.gguf"), "-x"])
    def test_odd_names(self, name: str, probe: Probe, tiny: Path, tmp_path: Path) -> None:
        path = tmp_path / name
        path.write_bytes(tiny.read_bytes())
        assert probe(path).ok
        path.write_bytes(b"GGUF")
        found = probe(path)
        assert found.outcome == "refused"
        assert found.reason.isprintable()

    def test_adapters(self, probe: Probe, tiny: Path, tmp_path: Path) -> None:
        adapter = random_gguf.write_adapter(tmp_path / "a.gguf")
        assert probe(tiny, adapter=adapter).ok
        other = random_gguf.write_adapter(tmp_path / "b.gguf", random_gguf.Shape(width=96))
        for wrong in (other, tiny):
            found = probe(tiny, adapter=wrong)
            assert found.outcome == "refused"
            assert "adapter" in found.reason

    def test_weights_that_are_no_numbers(self, probe: Probe, tmp_path: Path) -> None:
        found = probe(random_gguf.write(tmp_path / "m.gguf", nan=True))
        assert found.outcome == "refused"
        assert "finite" in found.reason

    @pytest.mark.parametrize("size", [0, 3, 24, 1000, 20_000, -1, -100_000])
    def test_cut_short(self, size: int, probe: Probe, tiny: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(tiny.read_bytes()[:size])
        found = probe(path)
        assert found.outcome == "refused"
        assert found.reason.startswith("llama.cpp refused the file: ")

    def test_a_folder_of_verdicts(self, tiny: Path, tmp_path: Path) -> None:
        found = prober(tmp_path / "verdicts").probe(KEY, [tiny], MEMORY)
        assert found.ok
        assert prober(tmp_path / "verdicts").known(KEY) == found


class TestFilesThatEndIt:
    @pytest.mark.parametrize("name", ENDING)
    def test_known_ones(self, name: str, tiny: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        file, _ = mutated_gguf.parsed(tiny.read_bytes())
        mutated_gguf.NAMED[name][1](file)
        path.write_bytes(file.pack())
        probing = prober()
        found = probing.probe(KEY, [path], MEMORY)
        assert found.outcome == "crashed"
        assert "SIG" in found.reason
        assert "pip-" not in found.reason
        assert probing.known(KEY) == found

    def test_an_abort_has_last_words(self, probe: Probe, tiny: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        file, _ = mutated_gguf.parsed(tiny.read_bytes())
        mutated_gguf.NAMED["epsilon nan"][1](file)
        path.write_bytes(file.pack())
        found = probe(path)
        assert "(SIGABRT): ops.cpp:" in found.reason
        assert "GGML_ASSERT" in found.reason

    def test_mutants(self, probe: Probe, tiny: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        for name, data in islice(mutated_gguf.mutations(tiny.read_bytes(), SEED, 10_000), MUTANTS):
            path.write_bytes(data)
            found = probe(path)
            print(f"{name}: {found.outcome} {found.reason}")
            assert found.outcome in {"ok", "refused", "crashed", "out_of_memory"}, name


class TestMemory:
    def test_a_large_vocabulary(self, probe: Probe, tmp_path: Path) -> None:
        path = random_gguf.write(tmp_path / "m.gguf", random_gguf.Shape(vocabulary=300_000))
        found = probe(path, memory=memory_needed(validate(path), 512))
        assert found.ok, found
        # The allowance is enough without any estimate, and by far.
        probing = prober(allowance_bytes=ALLOWANCE_BYTES // 4)
        assert probing.probe(KEY, [path], 0).ok

    @pytest.mark.parametrize("mib", [0, 8, 24, 40, 64])
    def test_too_little(self, mib: int, tmp_path: Path) -> None:
        """It ends in many ways, and none is the bytes' fault."""
        path = random_gguf.write(tmp_path / "m.gguf", random_gguf.Shape(vocabulary=150_000))
        probing = prober(allowance_bytes=0)
        found = probing.probe(KEY, [path], mib << 20)
        if "limits" not in found.confined:
            pytest.skip("this system does not limit memory")
        assert found.outcome == "out_of_memory", found
        assert "GB of memory were not enough" in found.reason
        assert probing.known(KEY) is None


def test_an_engine_that_does_not_start(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(
        "raise OSError('/srv/lib/libggml.so: cannot open shared object file')"
    )
    path = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    probing = prober(environment={"PYTHONPATH": path})
    found = probing.probe(KEY, [tiny], MEMORY)
    assert (found.outcome, found.reason) == (
        "failed",
        "the engine does not start here: libggml.so: cannot open shared object file",
    )
    assert found.confined == ()
    assert probing.known(KEY) is None


def hung_up(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(20_000))


def test_the_child_ends_with_its_parent(tiny: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    child = f"""
import json, os, signal, sys
from shimmy_jupyter.engine.confine import die_with_parent
die_with_parent(json.loads(sys.stdin.read())["parent"])
held = os.open({str(fifo)!r}, os.O_WRONLY)
os.write(int(sys.argv[1]), b'{{"stage": "confined", "by": []}}\\n')
signal.pause()
"""
    parent = f"""
import os, sys
from pathlib import Path
from shimmy_jupyter.models.probe import Prober
command = (sys.executable, "-P", "-c", {child!r})
probing = Prober(None, build="", environment={ENVIRONMENT!r}, command=command)
probing.probe({KEY!r}, [Path({str(tiny)!r})], 0, stage=lambda _: os.kill(os.getpid(), 9))
"""
    done = subprocess.run([sys.executable, "-P", "-c", parent], env=ENVIRONMENT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert hung_up(end)
    os.close(end)


def test_a_parent_that_has_ended_already() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("nothing but Linux tells")
    script = "from shimmy_jupyter.engine.confine import die_with_parent; die_with_parent({})"
    for parent, code in ((os.getpid(), 0), (os.getpid() + 1, -signal.SIGKILL)):
        command = [sys.executable, "-P", "-c", script.format(parent)]
        assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == code


# The confinement


ATTEMPTS = """
import ctypes, errno, fcntl, json, mmap, os, resource, signal, socket, subprocess, sys, threading
from pathlib import Path
from shimmy_jupyter.engine import confine as c
inside, outside, folder, mode, memory = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
libc = ctypes.CDLL(None, use_errno=True)
before = os.open(folder / "before", os.O_RDWR | os.O_CREAT)
mine = os.open(folder / "mine", os.O_RDWR | os.O_CREAT)
pipe = os.pipe()
program = os.open(sys.executable, os.O_RDONLY)
go, said = threading.Event(), []
def reach():
    go.wait()
    try:
        said.append(socket.socket())
    except OSError as error:
        said.append(error)
earlier, later = threading.Thread(target=reach), threading.Thread(target=reach)
if mode == "thread":
    earlier.start()
if mode == "landlock":
    c._MACHINES = {}
if mode == "seccomp":
    c._landlock = lambda files: ""
def call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")
def in_thread(thread):
    go.set()
    if thread is later or mode != "thread":
        thread.start()
    thread.join()
    answer = said.pop()
    if isinstance(answer, OSError):
        raise answer
def hold(size):
    return len(bytearray(size))
tries = {
    # What is needed.
    "its file": lambda: inside.read_bytes(),
    "a library": lambda: __import__("wave"),
    "processors": lambda: Path("/sys/devices/system/cpu/online").read_text(),
    "memory free": lambda: Path("/proc/meminfo").read_text(),
    "itself": lambda: Path("/proc/self/status").read_text(),
    "a thread": lambda: threading.Thread(target=lambda: None).start(),
    "itself signalled": lambda: os.kill(os.getpid(), 0),
    "some memory": lambda: hold(memory // 4),
    "a pipe": lambda: os.write(pipe[1], b"x"),
    # Reading.
    "read a file": lambda: outside.read_bytes(),
    "list a folder": lambda: os.listdir(outside.parent),
    "list its folder": lambda: os.listdir(inside.parent),
    "list the root": lambda: os.listdir("/"),
    "read accounts": lambda: Path("/etc/passwd").read_text(),
    "a parent's environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "by descriptors": lambda: os.open(f"/proc/self/fd/{os.open(outside, os.O_PATH)}", os.O_RDONLY),
    "by the root": lambda: Path("/proc/self/root" + str(outside)).read_bytes(),
    # Writing.
    "make a file": lambda: (folder / "new").write_text(""),
    "write to its file": lambda: inside.open("r+b").close(),
    "append": lambda: outside.open("ab").close(),
    "cut by opening": lambda: os.open(outside, os.O_RDONLY | os.O_TRUNC),
    "cut": lambda: os.truncate(outside, 0),
    "make a folder": lambda: (folder / "new").mkdir(),
    "make a pipe": lambda: os.mkfifo(folder / "new"),
    "link": lambda: os.link(outside, folder / "new"),
    "symlink": lambda: os.symlink(outside, folder / "new"),
    "rename": lambda: os.rename(outside, folder / "new"),
    "remove": lambda: os.unlink(outside),
    "remove a folder": lambda: os.rmdir(folder / "empty"),
    "a file without a name": lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
    "its memory as a file": lambda: open("/proc/self/mem", "r+b").close(),
}
# What only the filter keeps from happening, and what must not happen without it.
filtered = {
    # Writing of other kinds.
    "modes": lambda: os.chmod(outside, 0o777),
    "modes of what is open": lambda: os.fchmod(mine, 0o777),
    "owners": lambda: os.chown(outside, os.getuid(), -1),
    "times": lambda: os.utime(outside, (1, 1)),
    "attributes": lambda: os.setxattr(outside, "user.x", b""),
    "memory files": lambda: os.memfd_create("x"),
    "locks": lambda: fcntl.flock(mine, fcntl.LOCK_EX),
    "cut what is open": lambda: os.ftruncate(before, 0),
    # The network.
    "TCP": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "TCP 6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
    "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "a pair": lambda: socket.socketpair(),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "in an earlier thread": lambda: in_thread(earlier),
    "in a later thread": lambda: in_thread(later),
    "connect": lambda: call("connect", 0, b"x" * 16, 16),
    # Programs, processes, others.
    "a program": lambda: os.execv(sys.executable, ["x", "-c", ""]),
    "an open program": lambda: os.execve(program, ["x"], {}),
    "a subprocess": lambda: subprocess.run([sys.executable, "-c", ""]),
    "spawn": lambda: os.posix_spawn(sys.executable, ["x", "-c", ""], {}),
    "fork": lambda: os.fork() or os._exit(0),
    "a shell": lambda: 1 // (libc.system(b"exit 5") == 5 << 8),
    "signals": lambda: os.kill(os.getppid(), 0),
    "signals to the group": lambda: os.kill(0, 0),
    "signals by others": lambda: fcntl.fcntl(pipe[0], fcntl.F_SETOWN, os.getppid()),
    "trace": lambda: call("ptrace", 0x4206, os.getppid(), 0, 0),
    "trace itself": lambda: call("ptrace", 0, 0, 0, 0),
    "their memory": lambda: call("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
    "their limits": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE),
    "their priority": lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 5),
    "their processors": lambda: os.sched_setaffinity(os.getppid(), {0}),
    "their handle": lambda: os.pidfd_open(os.getppid()),
    "leave the group": lambda: os.setpgid(0, os.getppid()),
    "leave the session": lambda: os.setsid(),
    # The kernel.
    "mount": lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
    "namespaces": lambda: call("unshare", 0x10000000),
    "chroot": lambda: os.chroot("/"),
    "bpf": lambda: c._call(321 if os.uname().machine == "x86_64" else 280, 0, None, 0),
    "keys": lambda: c._call(250 if os.uname().machine == "x86_64" else 219, 0, -1, 0, 0, 0),
    "io_uring": lambda: c._call(425, 1, b"\\0" * 120),
    "userfaultfd": lambda: c._call(323 if os.uname().machine == "x86_64" else 282, 1),
    "shared memory": lambda: call("shmget", 0, 4096, 0o1600),
    "queues": lambda: call("mq_open", b"/shimmy-test", 0o102, 0o600, None),
    "inotify": lambda: call("inotify_init1", 0),
    "splice": lambda: call("splice", pipe[0], None, pipe[1], None, 1, 2),
    "a new call": lambda: c._call(463, 0),
    # Undoing it.
    "outlive the parent": lambda: call("prctl", 1, 0, 0, 0, 0),
    "be dumped": lambda: call("prctl", 4, 1, 0, 0, 0),
    "terminals": lambda: fcntl.ioctl(0, 0x5412, b"x"),
    "shared memory of its own": lambda: mmap.mmap(-1, memory).close(),
    "a stack that grows": lambda: mmap.mmap(
        -1, 1 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100
    ).close(),
}
limited = {
    "too much memory": lambda: hold(memory * 2),
    "too much in pieces": lambda: [bytearray(1 << 20) for _ in range(memory >> 19)],
    "addresses without end": lambda: mmap.mmap(
        -1, 1 << 40, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ
    ).close(),
    "more memory": lambda: resource.setrlimit(resource.RLIMIT_DATA, (-1, -1)),
    "more time": lambda: resource.setrlimit(resource.RLIMIT_CPU, (100, 100)),
    "larger files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
    "grow what is open": lambda: os.write(before, b"x"),
    "many files": lambda: [os.open("/dev/null", os.O_RDONLY) for _ in range(100)],
}
confined = c.confine([inside], memory_bytes=memory, cpu_seconds=10)
if "seccomp" in confined:
    tries |= filtered
if "limits" in confined:
    tries |= limited
facts = {
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "cpu": resource.getrlimit(resource.RLIMIT_CPU),
    "status": Path("/proc/self/status").read_text(),
}
found = {}
for name, attempt in tries.items():
    try:
        attempt()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, str(error.errno))
    except Exception as error:
        found[name] = type(error).__name__
go.set()
print(json.dumps([confined, found, facts]))
"""

NEEDED = {
    "its file", "a library", "processors", "memory free", "itself", "a thread",
    "itself signalled", "some memory", "a pipe",
}  # fmt: skip
READING = {
    "read a file", "list a folder", "list its folder", "list the root", "read accounts",
    "a parent's environment", "by descriptors", "by the root",
}  # fmt: skip
WRITING = {
    "make a file", "write to its file", "append", "cut by opening", "cut", "make a folder", "make a pipe", "link", "symlink", "rename", "remove", "remove a folder",
    "a file without a name", "its memory as a file",
}  # fmt: skip
BY_LIMITS = {
    "too much memory": {"MemoryError"},
    "too much in pieces": {"MemoryError"},
    "addresses without end": {"ENOMEM"},
    "more memory": {"EPERM", "ValueError"},
    "more time": {"EPERM", "ValueError"},
    "larger files": {"EPERM", "ValueError"},
    "grow what is open": {"EFBIG"},
    "many files": {"EMFILE"},
}
MODES = ("all", "landlock", "seccomp", "thread")
MEMORY_ALONE = 128 << 20

Found = tuple[list[str], dict[str, str], dict[str, Any]]


@pytest.fixture(scope="module", params=MODES)
def attempts(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Found]:
    if not sys.platform.startswith("linux"):
        pytest.skip("nothing but Linux confines")
    folder = tmp_path_factory.mktemp("attempts")
    inside, outside = folder / "models" / "m.gguf", folder / "others" / "secret"
    for path in (inside, outside):
        path.parent.mkdir()
        path.write_text("words")
    (folder / "empty").mkdir()
    arguments = [*map(str, (inside, outside, folder)), request.param, str(MEMORY_ALONE)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", ATTEMPTS, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
        start_new_session=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: Found = tuple(json.loads(done.stdout))
    if "seccomp" in found[0]:
        assert outside.read_text() == "words"
        assert {path.name for path in folder.iterdir()} == {
            "models", "others", "empty", "before", "mine",
        }  # fmt: skip
    return request.param, found


def held(attempts: tuple[str, Found], mechanism: str) -> dict[str, str]:
    """What came of the attempts, where this is in force."""
    mode, (confined, found, _) = attempts
    if mode in {"landlock", "seccomp"} and mechanism not in {mode, "limits"}:
        pytest.skip(f"this time without {mechanism}")
    if mode == "thread" and mechanism == "landlock":
        pytest.skip("Landlock is not for a thread that was there before")
    if not any(name.split()[0] == mechanism for name in confined):
        pytest.skip(f"this system has no {mechanism} for us")
    return found


class TestConfinement:
    def test_what_is_needed(self, attempts) -> None:
        _, (_, found, _) = attempts
        assert {name: found[name] for name in NEEDED} == dict.fromkeys(NEEDED, "done")

    def test_reading(self, attempts) -> None:
        found = held(attempts, "landlock")
        assert {name: found[name] for name in READING} == dict.fromkeys(READING, "EACCES")

    def test_writing_by_landlock(self, attempts) -> None:
        found = held(attempts, "landlock")
        wrong = {
            name: found[name] for name in WRITING if found[name] not in {"EACCES", "EPERM", "EXDEV"}
        }
        # Before version 3 a file could be cut.
        assert not wrong.keys() - {"cut", "cut by opening"}

    def test_by_seccomp(self, attempts) -> None:
        """Everything but reading, and what only limits forbid; no other answer, so nothing happened."""
        found = held(attempts, "seccomp")
        mine = found.keys() - NEEDED - READING - BY_LIMITS.keys()
        assert len(mine) > 60
        # The shell, too, is not started: it cannot answer with its exit code.
        others = {"a new call": "ENOSYS", "a shell": "ZeroDivisionError"}
        assert {name: found[name] for name in mine} == dict.fromkeys(mine, "EPERM") | others

    def test_by_limits(self, attempts) -> None:
        found = held(attempts, "limits")
        for name, answers in BY_LIMITS.items():
            assert found[name] in answers, name

    def test_no_dumps_and_no_privileges(self, attempts) -> None:
        _, (confined, _, facts) = attempts
        assert "NoNewPrivs:\t1" in facts["status"]
        assert facts["core"] == [0, 0]
        assert facts["cpu"] == [10, 15]
        if "limits" in confined:
            (line,) = (one for one in facts["status"].splitlines() if one.startswith("CapEff"))
            assert int(line.split()[1], 16) & ~4 == 0

    def test_nothing_is_said_that_is_not(self, attempts) -> None:
        mode, (confined, _, _) = attempts
        names = [name.split()[0] for name in confined]
        assert names == [name for name in ("limits", "landlock", "seccomp") if name in names]
        if mode in {"landlock", "thread"}:
            assert {"landlock": "seccomp", "thread": "landlock"}[mode] not in names
        if mode == "seccomp":
            assert "landlock" not in names

    @pytest.mark.parametrize(
        ("change", "missing"),
        [
            ("c._call = lambda *_: (_ for _ in ()).throw(OSError(38, ''))", {"landlock", "seccomp"}),
            ("c._call = lambda *_: 0", {"landlock", "seccomp"}),
            ("import resource; resource.setrlimit = lambda *_: None", {"limits"}),
            ("c._memory_ends = lambda _: False", {"limits"}),
            ("c._libc().capset = lambda *_: -1", {"limits"}),
            ("c.struct.calcsize = lambda _: 4", {"seccomp"}),
            ("c._LINUX = False", {"limits", "landlock", "seccomp"}),
        ],
    )  # fmt: skip
    def test_a_system_that_lacks_it(self, change: str, missing: set[str], tiny: Path) -> None:
        script = f"""
from pathlib import Path
from shimmy_jupyter.engine import confine as c
{change}
print(*(name.split()[0] for name in c.confine([Path({str(tiny)!r})], memory_bytes=1 << 26, cpu_seconds=9)))
"""
        command = [sys.executable, "-P", "-c", script]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        assert not missing & {*done.stdout.split()}

    def test_a_file_that_cannot_be_let_in(self, tmp_path: Path) -> None:
        """Then Landlock would keep the model from being read: it is left out."""
        script = f"""
from pathlib import Path
from shimmy_jupyter.engine import confine as c
path = Path({str(tmp_path)!r})
allow = c._allow
def refuse(rules, at):
    if at == path:
        raise OSError(77, "")
    allow(rules, at)
c._allow = refuse
found = c.confine([path], memory_bytes=1 << 26, cpu_seconds=9)
path.iterdir()
print(*found)
"""
        command = [sys.executable, "-P", "-c", script]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        assert "landlock" not in done.stdout

    @pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
    def test_processor_time_ends(self, tiny: Path) -> None:
        script = f"""
from pathlib import Path
from shimmy_jupyter.engine.confine import confine
confine([Path({str(tiny)!r})], memory_bytes=1 << 26, cpu_seconds=1)
while True:
    pass
"""
        command = [sys.executable, "-P", "-c", script]
        done = subprocess.run(command, env=ENVIRONMENT, check=False)
        assert done.returncode == -signal.SIGXCPU


LIMITED = """
import mmap, resource
resource.setrlimit(resource.RLIMIT_DATA, (1 << 26, 1 << 26))
mmap.mmap(-1, 1 << 27, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
"""
SECCOMP = "import ctypes; assert ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) >= 0"


def test_what_the_system_offers_is_in_force(probe: Probe, tiny: Path) -> None:
    """Else the tests above would be skipped for a fault of ours."""
    if not sys.platform.startswith("linux"):
        pytest.skip("nothing but Linux confines")

    def works(script: str) -> bool:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0

    offered = set() if works(LIMITED) else {"limits"}
    if works(SECCOMP) and os.uname().machine in confining._MACHINES:
        offered.add("seccomp")
    with contextlib.suppress(OSError):
        version = confining._call(confining._CREATE_RULESET, None, 0, 1)
        offered.add(f"landlock {min(version, 6)}")
    assert {*probe(tiny).confined} == offered
    lacking = {"limits", "landlock", "seccomp"} - {name.split()[0] for name in offered}
    if lacking:
        pytest.skip(f"this system has no {', '.join(sorted(lacking))} for us")
