"""What `shimmy/health` says, and that saying it does nothing.

Cases: all is well, before anything is loaded and after, and nothing was loaded, made or recorded; engine:
lost by its backend's word, its thread gone, at one step for too long (alone, and beside one that is
well), a child that has ended unnoticed; models: none, one that failed, a look at the disk that hangs;
ledger: off, a folder in the file's place, before and after a request, with `fail_closed`, put right
again, notes, records that wait; limits: a store that cannot be written, with and without limits; disk
low, on either of two folders, not there yet; memory low; a GPU: none, used, not used, not wanted, and what
the engine says; what does not answer in time, asked again only once it has; no path anywhere; llama_cpp
is not imported; a server with a wrong setting.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError

from shimmy_jupyter import health as module
from shimmy_jupyter.audit.ledger import Ledger
from shimmy_jupyter.core.limits import Limits, LimitTable
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import EngineLost
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.guard.spending import Spending
from shimmy_jupyter.health import LEAST_FREE, STALLED, Dependency, Surroundings, free_bytes, health
from shimmy_jupyter.models.lifecycle import ModelPool
from shimmy_jupyter.service import CompletionService
from shimmy_jupyter.types import Principal

from ..offered import catalog
from .conftest import MODEL, Fakes, chat
from .test_metrics import (
    CHAT,
    Gate,
    drained,
    guard,
    ledger,
    refused,
    request,
    rules,
    scrape,
    service,
    service_of,
)

__all__ = ["guard", "ledger", "rules", "scrape", "service"]  # fixtures

in_process = pytest.mark.parametrize("fakes", ["in process"], indirect=True)
behind_sockets = pytest.mark.parametrize("fakes", ["behind sockets"], indirect=True)
NAMES = ["engine", "models", "ledger", "limits", "disk", "memory", "gpu"]
GB = 10**9


def surroundings(folder: Path | None = None, **given: Any) -> Surroundings:
    """A machine with plenty of everything, and no GPU."""
    chosen = {"disk": lambda _: 90 * GB, "memory": lambda: 9 * GB, "gpu": lambda: None} | given
    return Surroundings(folder, GB, **chosen)


async def look(service: CompletionService, name: str, **given: Any) -> Dependency:
    found = await health(service, surroundings(**given))
    return next(one for one in found.dependencies if one.name == name)


async def fetched(jp_fetch: Any) -> tuple[int, dict[str, Any]]:
    try:
        response = await jp_fetch("shimmy", "health")
    except HTTPClientError as error:
        assert error.response is not None
        response = error.response
    return response.code, json.loads(response.body)


async def answered(service: CompletionService, prompt: str = "one two") -> None:
    async with await service.start(request(prompt)) as completion:
        await completion.text()
        await completion.finish()
    await drained(service.guard)


@in_process
class TestWell:
    async def test_before_and_after(
        self, service: Any, jp_serverapp: Any, jp_fetch: Any, fakes: Fakes, ledger: Ledger
    ) -> None:
        around = surroundings(ledger.path.parent)
        jp_serverapp.web_app.settings["shimmy_surroundings"] = around
        status, before = await fetched(jp_fetch)
        assert (status, before["status"], before["active"]) == (200, "ok", 0)
        assert [one["name"] for one in before["dependencies"]] == NAMES
        for one in before["dependencies"]:
            assert set(one) == {"name", "status", "detail", "action"}
            assert (one["status"], one["action"]) == ("ok", None), one
        assert not fakes.made
        assert not ledger.path.parent.exists()
        await jp_fetch(*CHAT, method="POST", body=chat())
        await drained(service.guard)
        size = ledger.size
        status, after = await fetched(jp_fetch)
        assert (status, after["status"]) == (200, "ok")
        assert after["dependencies"][0]["detail"] == "1 models loaded"
        assert ledger.size == size
        assert str(ledger.path.parent) not in json.dumps(after)

    async def test_what_the_server_itself_sees(self, service: Any, jp_fetch: Any) -> None:
        _, found = await fetched(jp_fetch)
        by_name = {one["name"]: one for one in found["dependencies"]}
        assert "are free where state is kept" in by_name["disk"]["detail"]
        assert "are available" in by_name["memory"]["detail"]
        assert "not known" not in json.dumps(found)

    @pytest.mark.parametrize("ledger", [None])
    async def test_without_a_ledger(self, service: Any) -> None:
        found = await look(service, "ledger")
        assert (found.status, found.detail) == ("ok", "off: requests are not recorded")
        assert (await look(service, "disk")).detail == "nothing is kept on one"


class TestEngine:
    async def test_lost_by_its_own_word(self, service: Any, jp_fetch: Any, fakes: Fakes) -> None:
        class Broken(FakeBackend):
            def apply(self, change: Any) -> None:
                raise EngineLost("out of memory")

        fakes.make = Broken
        await refused(jp_fetch, *CHAT, body=chat())
        found = await look(service, "engine")
        assert found.status == "degraded"
        assert "out of memory" in found.detail
        assert found.action == "the next request loads the model again"
        status, answer = await fetched(jp_fetch)
        assert (status, answer["status"]) == (200, "degraded")
        fakes.make = FakeBackend
        await answered(service)
        assert (await look(service, "engine")).status == "ok"

    @in_process
    async def test_its_thread_is_gone(self, service: Any, jp_fetch: Any, monkeypatch: Any) -> None:
        await answered(service)
        (model,) = service.pool.loaded()
        monkeypatch.setattr(model.engine._thread, "is_alive", lambda: False)
        found = await look(service, "engine")
        assert (found.status, found.action) == ("down", module._RESTART)
        assert (await fetched(jp_fetch))[0] == 503

    @in_process
    async def test_at_one_step_for_too_long(
        self, service: Any, jp_fetch: Any, fakes: Fakes, monkeypatch: Any
    ) -> None:
        gate = Gate(0)
        fakes.make = lambda: FakeBackend(gate=gate)
        async with await service.start(request()) as completion:
            await gate.reached(1)
            (model,) = service.pool.loaded()
            began, clock = model.engine.statistics.beat, model.engine._clock
            assert (await look(service, "engine")).status == "ok"
            monkeypatch.setattr(model.engine, "_clock", lambda: began + STALLED)
            assert (await look(service, "engine")).status == "ok"
            monkeypatch.setattr(model.engine, "_clock", lambda: began + STALLED + 1)
            found = await look(service, "engine")
            assert found.status == "down"
            assert "1 sequences has been at one step for 61 s" in found.detail
            assert (await fetched(jp_fetch))[0] == 503
            other = service_of(fakes, Guard())
            fakes.make = FakeBackend
            await answered(other)
            both = [model, *other.pool.loaded()]
            monkeypatch.setattr(service.pool, "loaded", lambda: both)
            assert (await look(service, "engine")).status == "degraded"
            monkeypatch.undo()
            monkeypatch.setattr(model.engine, "_clock", clock)
            gate.release(1000)
            await completion.text()
            await completion.finish()
        await other.close()

    @in_process
    async def test_idle_for_long(self, service: Any, monkeypatch: Any) -> None:
        """Nothing to do is nothing to worry about."""
        await answered(service)
        (model,) = service.pool.loaded()
        while model.engine.statistics.beat is not None:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(model.engine, "_clock", lambda: 1e9)
        assert (await look(service, "engine")).status == "ok"

    @behind_sockets
    async def test_its_process_has_ended_unnoticed(self, service: Any) -> None:
        await answered(service)
        (model,) = service.pool.loaded()
        process = model.engine.backend._child._process
        process.kill()
        process.wait(10)
        assert model.failure is None
        found = await look(service, "engine")
        assert (found.status, found.action) == (
            "degraded",
            "the next request loads the model again",
        )
        assert found.detail.startswith("the engine's process ")
        await answered(service)
        assert (await look(service, "engine")).status == "ok"

    @in_process
    async def test_being_unloaded(self, service: Any) -> None:
        await answered(service)
        loaded = service.pool.loaded()
        await service.pool.unload(MODEL)
        assert loaded[0].failure is not None
        service.pool.loaded = lambda: loaded
        assert (await look(service, "engine")).status == "ok"
        del service.pool.loaded


@in_process
class TestModels:
    async def test_none(self, fakes: Fakes) -> None:
        service = service_of(fakes, Guard())
        service.pool = ModelPool(catalog(), fakes.load)
        found = await look(service, "models")
        assert (found.status, found.action) == ("down", "set ShimmyModels.roots")

    async def test_one_that_failed(self, service: Any, jp_fetch: Any, fakes: Fakes) -> None:
        def missing() -> FakeBackend:
            raise ImportError("/opt/venv/libllama.so: cannot open shared object file")

        fakes.make = missing
        await refused(jp_fetch, *CHAT, body=chat())
        found = await look(service, "models")
        assert found.status == "degraded"
        assert found.detail.startswith(f"{MODEL}: ")
        assert "/opt" not in found.detail
        hidden = (await health(service, tell=lambda _: False)).to_json()["dependencies"][1]
        assert (hidden["name"], hidden["detail"]) == ("models", "1 that you may not use")

    async def test_a_look_at_the_disk_that_hangs(self, service: Any, monkeypatch: Any) -> None:
        hang = threading.Event()
        scanner = service.pool.catalog._scanner
        scan = scanner.scan
        monkeypatch.setattr(scanner, "scan", lambda stop: hang.wait() and scan(stop))
        found = await look(service, "models", patience=0.02)
        assert (found.status, found.detail) == (
            "degraded",
            "not known: it did not answer in time",
        )
        hang.set()
        assert (await look(service, "models")).status == "ok"


@in_process
class TestLedger:
    @pytest.mark.parametrize("when", ["before a request", "after one"])
    async def test_it_cannot_be_written(
        self, service: Any, jp_fetch: Any, ledger: Ledger, when: str
    ) -> None:
        ledger.path.mkdir(0o700, parents=True)
        if when == "after one":
            await jp_fetch(*CHAT, method="POST", body=chat())
            await drained(service.guard)
            assert ledger.failure
        found = await look(service, "ledger")
        assert found.status == "degraded"
        assert found.detail.startswith("REQUESTS ARE NOT RECORDED: ledger.sqlite ")
        assert str(ledger.path.parent) not in found.detail
        assert found.action
        assert (await fetched(jp_fetch))[0] == 200
        ledger.path.rmdir()
        await jp_fetch(*CHAT, method="POST", body=chat())
        await drained(service.guard)
        assert (found := await look(service, "ledger")).status == "ok", found

    async def test_its_folder_cannot_be_made(self, service: Any, ledger: Ledger) -> None:
        ledger.path.parent.write_text("a file")
        found = await look(service, "ledger")
        assert (found.status, "cannot be made" in found.detail) == ("degraded", True)
        ledger.path.parent.unlink()
        assert (found := await look(service, "ledger")).status == "ok", found

    @pytest.mark.parametrize("rules", [Rules(fail_closed=True)])
    async def test_nothing_is_answered_without_it(
        self, service: Any, jp_fetch: Any, ledger: Ledger
    ) -> None:
        ledger.path.mkdir(0o700, parents=True)
        error = await refused(jp_fetch, *CHAT, body=chat())
        assert error["code"] == "audit_unavailable"
        status, answer = await fetched(jp_fetch)
        assert (status, answer["status"]) == (503, "down")
        found = await look(service, "ledger")
        assert (found.status, found.detail[:19]) == ("down", "nothing is answered")
        # Put right, it is up again though nobody has sent it a request.
        ledger.path.rmdir()
        ledger.append([]).result()
        assert (found := await look(service, "ledger")).status == "ok", found

    @pytest.mark.parametrize("rules", [Rules(fail_closed=True)])
    async def test_it_tries_again_by_itself(self, service: Any, ledger: Ledger) -> None:
        await answered(service)
        ledger._writer.failure = "the disk was full"
        assert (await look(service, "ledger")).status == "down"
        assert (found := await look(service, "ledger")).status == "ok", found

    async def test_notes(self, service: Any, ledger: Ledger) -> None:
        ledger.append([]).result()
        ledger._writer.notes = ("others could open ledger.sqlite; now they cannot",)
        found = await look(service, "ledger")
        assert (found.status, found.detail) == ("degraded", ledger.notes[0])

    async def test_records_that_wait(self, service: Any, ledger: Ledger, monkeypatch: Any) -> None:
        monkeypatch.setattr(Ledger, "lag", 1000)
        found = await look(service, "ledger")
        assert (found.status, found.detail) == ("degraded", "1000 records wait to be written")


@in_process
class TestLimits:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        return tmp_path / "state" / "limits.sqlite"

    @pytest.fixture
    def guard(self, rules: Rules, store: Path) -> Guard:
        return Guard(rules, Spending(store))

    @pytest.mark.parametrize(
        "rules", [Rules(limits=[LimitTable(Limits(requests_per_minute=9))]), Rules()]
    )
    async def test_a_store_that_cannot_be_written(
        self, service: Any, jp_fetch: Any, store: Path
    ) -> None:
        assert (await look(service, "limits")).status == "ok"
        store.mkdir(parents=True)
        assert (await look(service, "limits")).status == "down"  # before anybody has asked
        error = await refused(jp_fetch, *CHAT, body=chat())
        assert error["code"] == "audit_unavailable"  # also without limits: theirs cannot be read
        found = await look(service, "limits")
        assert (found.status, found.detail[:19]) == ("down", "nothing is answered")
        assert str(store.parent) not in found.detail
        assert (await fetched(jp_fetch))[0] == 503
        store.rmdir()
        await look(service, "limits")
        if service.guard.rules.limits:
            await jp_fetch(*CHAT, method="POST", body=chat())
            assert (await look(service, "limits")).detail == "counted"


@in_process
class TestRoom:
    async def test_disk(self, service: Any, ledger: Ledger, tmp_path: Path) -> None:
        def disk(folder: Path) -> int:
            return free[folder.name]

        free = {"state": LEAST_FREE, "other": LEAST_FREE}
        assert (await look(service, "disk", folder=tmp_path / "other", disk=disk)).status == "ok"
        for low in free:
            free = {"state": LEAST_FREE, "other": LEAST_FREE} | {low: LEAST_FREE - 1}
            found = await look(service, "disk", folder=tmp_path / "other", disk=disk)
            assert found.status == "degraded", low
            assert "500.0 MB" in found.detail
            assert found.action

    def test_a_folder_that_is_not_there_yet(self, tmp_path: Path, fakes: Fakes) -> None:
        free = free_bytes(tmp_path / "not" / "yet")
        assert free == pytest.approx(free_bytes(tmp_path), rel=0.1)
        assert free > 0

    async def test_a_disk_that_is_gone(self, service: Any, tmp_path: Path) -> None:
        def gone(_folder: Path) -> int:
            raise OSError(5, "Input/output error", str(tmp_path))

        found = await look(service, "disk", disk=gone)
        assert found.status == "degraded"
        assert found.detail == "not known: Input/output error"

    async def test_memory(self, service: Any) -> None:
        assert (await look(service, "memory", memory=lambda: GB)).status == "ok"
        found = await look(service, "memory", memory=lambda: GB - 1)
        assert found.status == "degraded"
        assert "no further model is loaded" in found.detail
        assert found.action

    def test_what_is_to_stay_free_by_default(self, fakes: Fakes) -> None:
        assert Surroundings(None, 7).reserve() == 7
        assert 512 << 20 <= Surroundings().reserve() <= 4 << 30


@in_process
class TestGpu:
    async def said(self, service: Any, fakes: Fakes, **facts: Any) -> tuple[str, str]:
        class Told(FakeBackend):
            def load(self, spec: LoadSpec) -> Any:
                return replace(super().load(spec), **facts)

        fakes.make = Told
        await answered(service)
        found = await look(service, "gpu", gpu=lambda: "an NVIDIA GPU")
        return found.status, found.detail

    async def test_none(self, service: Any) -> None:
        assert (await look(service, "gpu")).detail == "there is none"

    async def test_nothing_is_loaded(self, service: Any) -> None:
        found = await look(service, "gpu", gpu=lambda: "an NVIDIA GPU")
        assert (found.status, "an NVIDIA GPU" in found.detail) == ("ok", True)

    async def test_used(self, service: Any, fakes: Fakes) -> None:
        said = await self.said(service, fakes, offloaded_layers=3)
        assert said == ("ok", "used by 1 of 1 models")

    async def test_not_used(self, service: Any, fakes: Fakes) -> None:
        status, detail = await self.said(service, fakes)
        assert status == "degraded"
        assert "an NVIDIA GPU, and NO MODEL USES IT" in detail

    async def test_not_wanted(self, service: Any, fakes: Fakes) -> None:
        fakes.spec = replace(fakes.spec, gpu_layers=0)
        status, detail = await self.said(service, fakes)
        assert (status, "ShimmyEngine.gpu_layers is 0" in detail) == ("ok", True)

    async def test_what_the_engine_says(self, service: Any, fakes: Fakes) -> None:
        said = await self.said(service, fakes, notes=("built without support for it",))
        assert said == ("degraded", "built without support for it")
        assert (await look(service, "engine")).status == "ok"

    @pytest.mark.parametrize(
        ("made", "said"),
        [("dev/nvidia0", "an NVIDIA GPU"), ("dev/kfd", "an AMD GPU"), ("dev/null", None)],
    )
    def test_which_there_is(
        self, tmp_path: Path, made: str, said: str | None, fakes: Fakes, monkeypatch: Any
    ) -> None:
        (tmp_path / "dev").mkdir()
        (tmp_path / made).touch()
        monkeypatch.setattr(module.sys, "platform", "linux")
        assert module.gpu_present(tmp_path) == said


@in_process
async def test_what_does_not_answer_is_asked_again_only_then(service: Any) -> None:
    hang, asked = threading.Event(), []

    def memory() -> int:
        asked.append(1)
        hang.wait()
        return 9 * GB

    around = surroundings(memory=memory, patience=0.02)
    for _ in range(3):
        found = await health(service, around)
        (said,) = [one for one in found.dependencies if one.name == "memory"]
        assert (said.status, said.detail) == ("degraded", "not known: it did not answer in time")
        assert found.ok
    assert len(asked) == 1
    hang.set()
    while not around._asked["memory"].done():
        await asyncio.sleep(0.001)
    assert (await health(service, around)).dependencies[5].status == "ok"
    assert (await health(service, around)).dependencies[5].status == "ok"
    assert len(asked) == 3


@in_process
async def test_without_the_engine(service: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    found = await look(service, "engine")
    assert (found.status, found.action) == ("down", "pip install llama-cpp-python")


def test_the_engine_is_not_imported_to_ask() -> None:
    code = (
        "import asyncio, sys\n"
        "from shimmy_jupyter.compose import build_service\n"
        "from shimmy_jupyter.config import Settings\n"
        "from shimmy_jupyter.health import health\n"
        "found = asyncio.run(health(build_service(Settings())))\n"
        "print([m for m in ('llama_cpp', 'numpy', 'pydantic') if m in sys.modules])\n"
        "print([d.name for d in found.dependencies])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", str(NAMES)]


@in_process
async def test_who_is_active(service: Any) -> None:
    job = service.library.jobs.start("verify", "x", Principal("me"), lambda _: asyncio.sleep(9))
    assert (await health(service, surroundings())).active == 1
    service.library.jobs.cancel(job.id, Principal("me"))
    await job.wait()
