"""The sides: ours and the peers, each started in a process of its own with the same model.

Every side answers the same jobs (`load.py`) in the same words, so that all are counted alike. A peer
that is not installed raises `Missing`, which says so in a line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from child import HERE, Child

sys.path.insert(0, str(HERE.parent / "scripts"))

from kernel_session import running_server

OURS, RAW, HIGH, SERVER, XLLAMA, LLAMA = (
    "shimmy",
    "raw loop",
    "llama-cpp-python",
    "llama_cpp.server",
    "xllamacpp",
    "llama-server",
)
START_SECONDS = 120


class Missing(Exception):
    """A peer that is not installed. Says what is missing."""


@dataclass(frozen=True)
class Setup:
    """`threads` 0 is the side's own default. `cache`: what is kept of prompts may be used again."""

    model: Path
    threads: int = 0
    slots: int = 32
    kv_tokens: int = 16384
    context: int = 4608
    cache: bool = False


@dataclass
class Side:
    """A running side. `fields` are added to the body of every request."""

    name: str
    pid: int
    child: Child
    fields: dict[str, Any] = field(default_factory=dict)

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        answer = self.child.ask({**job, "fields": self.fields})
        for request in answer.get("requests", ()):
            if request["error"]:
                raise RuntimeError(f"{self.name}: {request['error']}")
        return answer

    def memory(self) -> float:
        """Resident MiB of its process and what that has started."""
        process = psutil.Process(self.pid)
        everything = [process, *process.children(recursive=True)]
        return sum(p.memory_info().rss for p in everything) / (1 << 20)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str | None]:
    """Of everything that is measured; None: not installed."""
    found: dict[str, str | None] = {}
    for name in ("shimmy-jupyter", "llama-cpp-python", "xllamacpp", "jupyter-server", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if executable := _llama_server():
        said = _printed([executable, "--version"])
        found[LLAMA] = next((line.split()[1] for line in said if line.startswith("version:")), None)
    return found


def _printed(command: list[str], *, failing: bool = False) -> list[str]:
    """Lines of what it says; none where it fails and was not to."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout.splitlines() if failing or not done.returncode else []


def _llama_server() -> str | None:
    """It is in no Python package, so LLAMA_SERVER says where it is, unless it is on the PATH."""
    return os.environ.get("LLAMA_SERVER") or shutil.which(LLAMA)


_WHAT_BUILDS_SAY = {
    "llama-cpp-python": "import llama_cpp; said = llama_cpp.llama_print_system_info().decode()",
    "xllamacpp": "import xllamacpp; said = xllamacpp.get_system_info()",
}
_VECTOR = ("AVX2", "AVX_VNNI", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "NEON", "SVE")


def instructions() -> dict[str, str]:
    """What each build was compiled to compute with. A wheel for everybody has less than one for this machine."""
    found: dict[str, str] = {}
    for name, source in _WHAT_BUILDS_SAY.items():
        command = [sys.executable, "-c", f"{source}; print('\\n', said)"]
        if said := _printed(command):
            found[name] = _vector(said[-1])
    if executable := _llama_server():
        # It says so in its log before it looks for the model.
        said = _printed([executable, "--verbosity", "5", "--model", os.devnull], failing=True)
        found[LLAMA] = _vector(next((line for line in said if "system_info" in line), ""))
    return found


def _vector(said: str) -> str:
    return ", ".join(one for one in _VECTOR if f" {one} = 1" in said)


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Missing(f"not installed: {', '.join(missing)}")


@contextlib.contextmanager
def _http(name: str, pid: int, server: dict[str, Any]) -> Iterator[Side]:
    child = Child("load.py")
    try:
        child.tell({"host": "127.0.0.1", "text": False, "fields": {}} | server)
        yield Side(name, pid, child)
    finally:
        child.close()


@contextlib.contextmanager
def ours(setup: Setup) -> Iterator[Side]:
    options = [
        f"--ShimmyEngine.threads={setup.threads}",
        f"--ShimmyEngine.max_sequences={setup.slots}",
        f"--ShimmyEngine.kv_tokens={setup.kv_tokens}",
        f"--ShimmyEngine.context_size={setup.context}",
    ]
    environment = {"SHIMMY_MODEL_PATHS": str(setup.model.parent.absolute())}
    with running_server(*options, environment=environment) as server:
        url = urlsplit(server.url)
        reach = {
            "port": url.port,
            "path": url.path + "shimmy/v1/completions",
            "authorization": f"token {server.token}",
            "fields": {"model": setup.model.stem, "stream_options": {"include_usage": True}},
        }
        with _http(OURS, server.pid, reach) as side:
            yield side


@contextlib.contextmanager
def _script(name: str, script: str, setup: Setup, threads: int) -> Iterator[Side]:
    options = {
        "model": str(setup.model),
        "threads": threads,
        "slots": setup.slots,
        "kv_tokens": setup.kv_tokens,
        "context": setup.context,
    }
    child = Child(script, json.dumps(options))
    try:
        child.read()
        yield Side(name, child.pid, child)
    finally:
        child.close()


def raw_loop(setup: Setup) -> AbstractContextManager[Side]:
    _need("llama_cpp")
    return _script(RAW, "raw_loop.py", setup, setup.threads or cores())


def high_level(setup: Setup) -> AbstractContextManager[Side]:
    _need("llama_cpp")
    return _script(HIGH, "run_high_level.py", setup, setup.threads)


@contextlib.contextmanager
def llama_cpp_server(setup: Setup) -> Iterator[Side]:
    needed = ("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context")
    _need(*needed, "pydantic_settings")
    key = secrets.token_hex(16)
    model = {
        "model": str(setup.model),
        "n_ctx": setup.context,
        # Not its defaults: all logits would need 2.8 GB, and the other sides have flash attention.
        "logits_all": False,
        "flash_attn": True,
        "verbose": False,
    }
    if setup.threads:
        model |= {"n_threads": setup.threads, "n_threads_batch": setup.threads}
    config = {
        "host": "127.0.0.1",
        "port": 0,
        "api_key": key,
        "interrupt_requests": False,
        "models": [model],
    }
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "config.json"), Path(folder, "log")
        file.write_text(json.dumps(config))
        with _process([sys.executable, "-m", "llama_cpp.server", "--config_file", file], log) as p:
            found = _wait_for(p, log, rb"running on http://127\.0\.0\.1:(\d+)")
            # Its schema has no prompts of token ids.
            reach = {"path": "/v1/completions", "text": True, "authorization": f"Bearer {key}"}
            with _http(SERVER, p.pid, {"port": int(found), **reach}) as side:
                yield side


@contextlib.contextmanager
def xllamacpp(setup: Setup) -> Iterator[Side]:
    _need("xllamacpp")
    key = secrets.token_hex(16)
    child = Child("run_xllamacpp.py")
    options = {
        "model": str(setup.model),
        "threads": setup.threads,
        "slots": setup.slots,
        "kv_tokens": setup.kv_tokens,
        "cache": setup.cache,
        "key": key,
    }
    try:
        port = urlsplit(child.ask(options)["address"]).port
        reach = {"port": port, "path": "/v1/completions", "authorization": f"Bearer {key}"}
        with _http(XLLAMA, child.pid, reach) as side:
            side.fields["cache_prompt"] = setup.cache
            yield side
    finally:
        child.close()


@contextlib.contextmanager
def llama_server(setup: Setup) -> Iterator[Side]:
    executable = _llama_server()
    if executable is None:
        raise Missing(
            "set LLAMA_SERVER to its executable, compiled as ours is to compare schedulers"
        )
    key = secrets.token_hex(16)
    command = [executable, "--model", setup.model, "--host", "127.0.0.1", "--port", "0", "--no-ui"]
    command += ["--parallel", setup.slots, "--ctx-size", setup.kv_tokens, "--kv-unified"]
    command += ["--threads-http", 128]  # else requests wait for one of these, not for the model
    if not setup.cache:
        command += ["--cache-ram", 0]
    if setup.threads:
        command += ["--threads", setup.threads, "--threads-batch", setup.threads]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        environment = os.environ | {"LLAMA_API_KEY": key}
        with _process([str(part) for part in command], log, environment) as p:
            found = _wait_for(p, log, rb"listening on http://127\.0\.0\.1:(\d+)")
            reach = {"path": "/v1/completions", "authorization": f"Bearer {key}"}
            with _http(LLAMA, p.pid, {"port": int(found), **reach}) as side:
                side.fields["cache_prompt"] = setup.cache
                yield side


@contextlib.contextmanager
def _process(
    command: list[Any], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], log: Path, pattern: bytes) -> bytes:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(pattern, log.read_bytes()):
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"it did not start:\n{log.read_text()[-2000:]}")


SIDES: dict[str, Callable[[Setup], AbstractContextManager[Side]]] = {
    OURS: ours,
    RAW: raw_loop,
    HIGH: high_level,
    SERVER: llama_cpp_server,
    XLLAMA: xllamacpp,
    LLAMA: llama_server,
}


@contextlib.contextmanager
def opened(
    wanted: dict[str, tuple[str, Setup]],
) -> Iterator[tuple[dict[str, Side], dict[str, str]]]:
    """By label, those of `(name, setup)` that can be started, warm; and why the others cannot."""
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        skipped: dict[str, str] = {}
        for label, (name, setup) in wanted.items():
            try:
                side = stack.enter_context(SIDES[name](setup))
            except Missing as reason:
                skipped[label] = str(reason)
                print(f"skipped: {label}: {reason}", flush=True)
                continue
            side.ask(job("burst", seed=f"{label} first", clients=1, max_tokens=2))
            sides[label] = side
        yield sides, skipped


def job(mode: str, *, seed: object, prompt_tokens: int = 32, **rest: Any) -> dict[str, Any]:
    return {"mode": mode, "seed": str(seed), "prompt_tokens": prompt_tokens, **rest}
