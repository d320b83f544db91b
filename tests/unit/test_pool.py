"""Which models are in memory, and when.

Cases: loaded once for many; waited for; who gives up; a failure, told to all and tried again; checked
before it is loaded, in this order; room made by unloading what was not used for longest; what is in use
is waited for, and whoever asks for it meanwhile has it loaded again; not even all would do; more than the
budget; changed while it was loaded; unloading by hand: idle, busy, loading, given up, not there; idle ones;
its state all the while; closing amid each of these; a catalogue that looks once for many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shimmy_jupyter.errors import (
    EngineLost,
    InvalidValue,
    ModelLoadFailed,
    ModelNotFound,
    NotEnoughMemory,
    ShuttingDown,
)
from shimmy_jupyter.models import attached, lifecycle
from shimmy_jupyter.models.catalog import PAUSE, Catalog
from shimmy_jupyter.models.jobs import Progress
from shimmy_jupyter.models.lifecycle import ModelPool
from shimmy_jupyter.models.sources import Found
from shimmy_jupyter.types import Failure

from ..offered import Listed, found

SIZE = 10


class Model:
    def __init__(self, name: str) -> None:
        self.name, self.active, self.closed = name, 0, False
        self.failure: Failure | None = None
        self.memory_bytes = self.mapped_bytes = SIZE
        self.context_size = 512

        self.adapters: list[str] = []

    async def use_adapter(self, path: str) -> None:
        self.adapters.append(path)

    async def close(self) -> None:
        assert not self.closed
        await asyncio.sleep(0)
        self.closed = True


def anybody(_: str) -> bool:
    return True


class Vet:
    """Counts, and says what it was told to. `free` is memory that models have not taken."""

    def __init__(self, free: int = 100) -> None:
        self.calls: list[tuple[str, str]] = []
        self.free = free
        self.wrong: dict[str, str] = {}
        self.changed = False

    def look(self, file: Found, report: Any, stopped: Any, held: int = 0) -> Any:
        self.calls.append(("look", file.id))
        if why := self.wrong.get(f"look {file.id}"):
            raise ModelLoadFailed(why)
        return Checked(file)

    def try_out(self, vetted: Any, report: Any, stopped: Any) -> None:
        report(Progress("probing"))
        self.calls.append(("try", vetted.found.id))
        if why := self.wrong.get(f"try {vetted.found.id}"):
            raise ModelLoadFailed(why)

    def shortfall(self, vetted: Any, mapped: int) -> int:
        self.calls.append(("room", vetted.found.id))
        return max(0, vetted.needed + mapped - self.free)

    def adapter(self, base: Any, file: Found, report: Any, stopped: Any) -> str:
        self.calls.append(("adapter", file.id))
        return "d" * 64

    def fit(self, facts: Any) -> Any:
        class Fit:
            message = "needs 10 GB, 5.0 GB are available"

        return Fit


class Checked:
    needed = SIZE
    facts = None

    def __init__(self, file: Found) -> None:
        self.found = file


class House:
    """A pool of models a, b and c, and what becomes of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        self.now = 0.0
        self.made: list[Model] = []
        self.doors: dict[str, asyncio.Event] = {}
        self.wrong: dict[str, Exception] = {}
        self.vet = Vet()
        self.unchanged = True
        monkeypatch.setattr(lifecycle, "unchanged", lambda _: self.unchanged)
        self.listed = Listed(*(found(id, Path(f"/m/{id}.gguf")) for id in "abc"))
        self.catalog = Catalog(self.listed, lambda: self.now)
        more = {"vetting": self.vet} | more
        self.pool: ModelPool[Model] = ModelPool(
            self.catalog, self.load, clock=lambda: self.now, **more
        )

    async def load(self, file: Found) -> Model:
        if door := self.doors.get(file.id):
            await door.wait()
        if error := self.wrong.get(file.id):
            raise error
        self.made.append(Model(file.id))
        return self.made[-1]

    async def use(self, id: str) -> Model:
        self.now += 1
        async with self.pool.use(id) as model:
            return model

    async def states(self) -> dict[str, str]:
        return {status.file.id: status.state for status in await self.pool.status()}

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            await asyncio.sleep(0)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(lifecycle, "_POLL", 0.0)
    return House(monkeypatch)


async def test_loaded_once_for_all_who_ask(house: House) -> None:
    models = await asyncio.gather(*(house.use("a") for _ in range(20)))
    assert len(set(map(id, models))) == len(house.made) == 1
    assert house.vet.calls == [("look", "a"), ("room", "a"), ("try", "a")]
    assert await house.states() == {"a": "loaded", "b": "available", "c": "available"}
    await house.pool.close()
    assert house.made[0].closed


async def test_who_gives_up_does_not_stop_it(house: House) -> None:
    door = house.doors["a"] = asyncio.Event()
    first, second = asyncio.create_task(house.use("a")), asyncio.create_task(house.use("a"))
    await house.until(lambda: house.pool.status_of(house.listed.models[0]).state == "loading")
    first.cancel()
    door.set()
    assert (await second).name == "a"
    assert len(house.made) == 1
    await house.pool.close()


async def test_the_last_who_waits_can_abandon_it(house: House) -> None:
    door = house.doors["a"] = asyncio.Event()

    async def abandoning() -> None:
        async with house.pool.use("a", abandon=True):
            pass

    task = asyncio.create_task(abandoning())
    await house.until(lambda: ("try", "a") in house.vet.calls)
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    door.set()
    await asyncio.wait([task])
    assert task.cancelled()
    # What nothing can interrupt has ended, and is of no use to anybody.
    assert [model.closed for model in house.made] in ([], [True])
    assert (await house.states())["a"] == "available"
    await house.pool.close()


@pytest.mark.parametrize("step", ["look", "try", "load"])
async def test_a_failure_is_told_and_tried_again(house: House, step: str) -> None:
    if step == "load":
        house.wrong["a"] = ModelLoadFailed("no")
    else:
        house.vet.wrong[f"{step} a"] = "no"
    for error in await asyncio.gather(house.use("a"), house.use("a"), return_exceptions=True):
        assert isinstance(error, ModelLoadFailed)
        assert error.message == "a: no"
    (status, *_) = await house.pool.status()
    assert (status.state, status.error) == ("failed", "no")
    house.wrong.clear()
    house.vet.wrong.clear()
    assert (await house.use("a")).name == "a"
    assert (await house.states())["a"] == "loaded"
    await house.pool.close()


async def test_a_failure_that_nobody_waits_for_is_no_warning(house: House) -> None:
    house.doors["a"] = asyncio.Event()
    house.wrong["a"] = ModelLoadFailed("no")
    task = asyncio.create_task(house.use("a"))
    await house.until(lambda: ("try", "a") in house.vet.calls)
    task.cancel()
    house.doors["a"].set()
    while (await house.states())["a"] != "failed":
        await asyncio.sleep(0)
    await house.pool.close()


async def test_the_one_not_used_for_longest_makes_room(house: House) -> None:
    house.vet.free = 2 * SIZE
    a, b = await house.use("a"), await house.use("b")
    await house.use("a")
    await house.use("c")
    assert (a.closed, b.closed) == (False, True)
    assert await house.states() == {"a": "loaded", "b": "available", "c": "loaded"}
    await house.pool.close()


async def test_what_is_in_use_is_waited_for(house: House) -> None:
    house.vet.free = SIZE
    a = await house.use("a")
    a.active = 1
    b = asyncio.create_task(house.use("b"))
    while (await house.states())["a"] != "unloading":
        await asyncio.sleep(0)
    # Who asks for it now does not get what is about to go.
    again = asyncio.create_task(house.use("a"))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not a.closed
    assert not b.done()
    a.active = 0
    assert (await b).name == "b"
    assert a.closed
    assert (await again) is not a
    assert [model.name for model in house.made] == ["a", "b", "a"]
    await house.pool.close()


async def test_a_request_that_has_not_begun_keeps_its_model(house: House) -> None:
    house.vet.free = SIZE
    async with house.pool.use("a") as a:
        b = asyncio.create_task(house.use("b"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not a.closed
    assert (await b).name == "b"
    assert a.closed
    await house.pool.close()


async def test_not_even_all_would_do(house: House) -> None:
    a = await house.use("a")
    house.vet.free = SIZE - 1
    with pytest.raises(ModelLoadFailed, match=r"^b: it needs 10 GB, 5\.0 GB are available$"):
        await house.use("b")
    assert not a.closed
    await house.pool.close()


async def test_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(monkeypatch, budget=2 * SIZE)
    a = await house.use("a")
    await house.use("b")
    await house.use("c")
    assert a.closed
    await house.pool.close()
    small = House(monkeypatch, budget=SIZE - 1)
    with pytest.raises(ModelLoadFailed, match=r"ShimmyModels\.memory_budget"):
        await small.use("a")
    await small.pool.close()


async def test_changed_while_it_was_loaded(house: House) -> None:
    house.unchanged = False
    with pytest.raises(ModelLoadFailed, match="changed while it was loaded"):
        await house.use("a")
    assert house.made[0].closed
    assert (await house.states())["a"] == "failed"
    await house.pool.close()


async def test_an_adapter_is_tried_out_while_others_wait_for_room(
    house: House, monkeypatch: Any
) -> None:
    """Who uses a model does not wait for the one that waits for it to be out of use."""
    monkeypatch.setattr(attached, "stamp_of", lambda _: 1)
    house.vet.free = SIZE
    both = attached.Attached(house.pool, house.vet)  # type: ignore[arg-type]
    async with house.pool.use("a") as a:
        b = asyncio.create_task(house.use("b"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert await both.use_adapter(a, "a", "c") == Path("/m/c.gguf")
    assert (await b).name == "b"
    assert ("adapter", "c") in house.vet.calls
    assert a.adapters == ["/m/c.gguf"]
    await house.pool.close()


async def test_an_adapter_that_changes_is_refused(house: House, monkeypatch: Any) -> None:
    stamps = [1]
    monkeypatch.setattr(attached, "stamp_of", lambda _: stamps[0])
    both = attached.Attached(house.pool, house.vet)  # type: ignore[arg-type]
    async with house.pool.use("a") as a:
        await both.use_adapter(a, "a", "b")
        await both.use_adapter(a, "a", "b")
        assert a.adapters == ["/m/b.gguf"]
        stamps[0] = 2
        with pytest.raises(ModelLoadFailed, match="b has changed since it was loaded: unload a"):
            await both.use_adapter(a, "a", "b")

        async def changing(path: str) -> None:
            stamps[0] += 1

        a.use_adapter = changing  # type: ignore[method-assign]
        for why in ("changed while it was loaded", "has changed since"):
            with pytest.raises(ModelLoadFailed, match=why):
                await both.use_adapter(a, "a", "c")
    with pytest.raises(EngineLost):
        await both.use_adapter(Model("gone"), "a", "b")
    await house.pool.close()


async def test_an_adapter_goes_on_loading_without_who_asked_first(
    house: House, monkeypatch: Any
) -> None:
    monkeypatch.setattr(attached, "stamp_of", lambda _: 1)
    both = attached.Attached(house.pool, house.vet)  # type: ignore[arg-type]
    asked, door = asyncio.Event(), asyncio.Event()

    async def slow(path: str) -> None:
        asked.set()
        await door.wait()
        a.adapters.append(path)

    async with house.pool.use("a") as a:
        monkeypatch.setattr(a, "use_adapter", slow)
        first = asyncio.create_task(both.use_adapter(a, "a", "b"))
        await asked.wait()
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        others = [asyncio.create_task(both.use_adapter(a, "a", "b")) for _ in range(2)]
        door.set()
        assert await asyncio.gather(*others) == [Path("/m/b.gguf")] * 2
        assert a.adapters == ["/m/b.gguf"]
    await house.pool.close()


async def test_an_adapter_that_failed_once_is_tried_again(house: House, monkeypatch: Any) -> None:
    monkeypatch.setattr(attached, "stamp_of", lambda _: 1)
    both = attached.Attached(house.pool, house.vet)  # type: ignore[arg-type]
    async with house.pool.use("a") as a:
        with monkeypatch.context() as once:

            async def full(path: str) -> None:
                raise NotEnoughMemory("no memory at the moment")

            once.setattr(a, "use_adapter", full)
            with pytest.raises(NotEnoughMemory, match="at the moment"):
                await both.use_adapter(a, "a", "b")
        assert await both.use_adapter(a, "a", "b") == Path("/m/b.gguf")
        assert a.adapters == ["/m/b.gguf"]
    await house.pool.close()


async def test_what_has_failed_is_not_waited_for(house: House) -> None:
    house.vet.free = SIZE
    async with house.pool.use("a") as a:
        b = asyncio.create_task(house.use("b"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        a.failure = Failure("engine_crashed", "killed")
        assert (await b).name == "b"
    assert a.closed
    await house.pool.close()


async def test_who_joins_a_load_that_is_abandoned_has_it_loaded_anew(house: House) -> None:
    door = house.doors["a"] = asyncio.Event()

    async def abandoning() -> None:
        async with house.pool.use("a", abandon=True):
            pass

    task = asyncio.create_task(abandoning())
    await house.until(lambda: ("try", "a") in house.vet.calls)
    for _ in range(20):
        await asyncio.sleep(0)
    for _ in range(3):  # however often
        task.cancel()
        await asyncio.sleep(0)
    joined = asyncio.create_task(house.use("a"))
    await asyncio.sleep(0)
    door.set()
    assert not (await joined).closed
    await asyncio.wait([task])
    assert task.cancelled()
    assert [model.closed for model in house.made] == [True, False]
    await house.pool.close()


async def test_what_is_leaving_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_POLL", 0.0)
    for more in ({"budget": SIZE}, {}):
        house = House(monkeypatch, **more)
        house.vet.free = SIZE
        a = await house.use("a")
        a.active = 1
        unload = asyncio.create_task(house.pool.unload("a"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        b = asyncio.create_task(house.use("b"))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not b.done()
        a.active = 0
        assert (await b).name == "b"
        assert a.closed
        assert await unload
        await house.pool.close()


async def test_a_reason_of_the_moment_does_not_stay(house: House) -> None:
    house.vet.free = SIZE - 1
    with pytest.raises(ModelLoadFailed):
        await house.use("a")
    assert (await house.states())["a"] == "available"
    house.vet.wrong["look a"] = "block_count 0"
    with pytest.raises(ModelLoadFailed):
        await house.use("a")
    assert (await house.states())["a"] == "failed"
    house.listed.models = (found("a", Path("/m/a.gguf"), created=7),)
    await house.catalog.look()
    assert (await house.states())["a"] == "available"
    await house.pool.close()


async def test_a_model_that_cannot_be_closed_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    house = House(monkeypatch, idle_unload=0.001)
    async with house.pool.use("a") as a, house.pool.use("b") as b:

        async def broken() -> None:
            raise RuntimeError("no")

        a.close = broken  # type: ignore[method-assign]
    while not b.closed:
        house.now += 1
        await asyncio.sleep(0.001)
    assert (await house.states())["a"] == "available"
    assert "could not be closed" in caplog.text
    await house.pool.close()


class TestUnload:
    async def test_twice(self, house: House) -> None:
        a = await house.use("a")
        a.active = 1
        first = asyncio.create_task(house.pool.unload("a"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        second = asyncio.create_task(house.pool.unload("a"))
        a.active = 0
        assert await first
        assert await second
        await house.pool.close()

    async def test_idle(self, house: House) -> None:
        a = await house.use("a")
        assert await house.pool.unload("a")
        assert a.closed
        assert (await house.states())["a"] == "available"
        assert not await house.pool.unload("a")
        with pytest.raises(ModelNotFound):
            await house.pool.unload("x")
        await house.pool.close()

    async def test_busy(self, house: House) -> None:
        a = await house.use("a")
        a.active = 1
        said: list[str] = []
        task = asyncio.create_task(house.pool.unload("a", lambda p: said.append(p.message)))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        again = asyncio.create_task(house.use("a"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(house.made) == 1
        a.active = 0
        assert await task
        assert a.closed
        assert (await again) is house.made[1]
        assert said == ["waiting until it is loaded", "waiting until nobody uses it"]
        await house.pool.close()

    async def test_given_up(self, house: House) -> None:
        a = await house.use("a")
        a.active = 1
        task = asyncio.create_task(house.pool.unload("a"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert (await house.states())["a"] == "loaded"
        assert await house.use("a") is a
        await house.pool.close()

    async def test_given_up_when_somebody_waits_for_it(self, house: House) -> None:
        a = await house.use("a")
        a.active = 1
        task = asyncio.create_task(house.pool.unload("a"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        again = asyncio.create_task(house.use("a"))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert not a.closed
        a.active = 0
        assert await again is not a
        assert a.closed
        await house.pool.close()

    async def test_loading(self, house: House) -> None:
        door = house.doors["a"] = asyncio.Event()
        use = asyncio.create_task(house.use("a"))
        await house.until(lambda: ("try", "a") in house.vet.calls)
        task = asyncio.create_task(house.pool.unload("a"))
        door.set()
        assert await task
        assert (await use).closed
        await house.pool.close()

    async def test_a_load_that_fails(self, house: House) -> None:
        door = house.doors["a"] = asyncio.Event()
        house.wrong["a"] = ModelLoadFailed("no")
        use = asyncio.create_task(house.use("a"))
        await house.until(lambda: ("try", "a") in house.vet.calls)
        task = asyncio.create_task(house.pool.unload("a"))
        await asyncio.sleep(0)
        door.set()
        assert not await task
        with pytest.raises(ModelLoadFailed):
            await use
        await house.pool.close()


async def test_idle_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(monkeypatch, idle_unload=0.001)
    a, b = await house.use("a"), await house.use("b")
    b.active = 1
    house.now += 1
    while not a.closed:
        await asyncio.sleep(0.001)
    assert not b.closed
    assert await house.states() == {"a": "available", "b": "loaded", "c": "available"}
    await house.pool.close()
    assert b.closed


class TestClosing:
    async def test_amid_a_load(self, house: House) -> None:
        house.doors["a"] = asyncio.Event()
        use = asyncio.create_task(house.use("a"))
        await house.until(lambda: ("try", "a") in house.vet.calls)
        for _ in range(20):
            await asyncio.sleep(0)
        closing = asyncio.create_task(house.pool.close())
        await asyncio.sleep(0)
        house.doors["a"].set()
        await closing
        await asyncio.wait([use])
        assert all(model.closed for model in house.made)
        with pytest.raises(ShuttingDown):
            await house.use("b")

    async def test_amid_making_room(self, house: House) -> None:
        house.vet.free = SIZE
        a = await house.use("a")
        a.active = 1
        b = asyncio.create_task(house.use("b"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        await house.pool.close()
        await asyncio.wait([b])
        assert [model.closed for model in house.made] == [True]

    async def test_nothing_is_loaded_after_it(self, house: House) -> None:
        a = await house.use("a")
        a.failure = Failure("engine_crashed", "killed")
        use = asyncio.create_task(house.use("a"))
        await asyncio.sleep(0)
        await house.pool.close()
        with pytest.raises(ShuttingDown):
            await use
        assert len(house.made) == 1

    async def test_who_waits_is_told(self, house: House) -> None:
        house.doors["a"] = asyncio.Event()
        use = asyncio.create_task(house.use("a"))
        await house.until(lambda: ("try", "a") in house.vet.calls)
        closing = asyncio.create_task(house.pool.close())
        house.doors["a"].set()
        with pytest.raises(ShuttingDown):
            await use
        await closing

    async def test_amid_unloading(self, house: House) -> None:
        a = await house.use("a")
        a.active = 1
        task = asyncio.create_task(house.pool.unload("a"))
        while (await house.states())["a"] != "unloading":
            await asyncio.sleep(0)
        await house.pool.close()
        await task
        assert a.closed


class TestCatalog:
    async def test_one_look_for_many(self, house: House) -> None:
        await asyncio.gather(*(house.catalog.models() for _ in range(10)))
        assert house.listed.looks == 1

    async def test_a_name_that_is_not_known_is_looked_for_but_not_all_the_time(
        self, house: House
    ) -> None:
        await house.catalog.find("a")
        house.now += PAUSE
        for _ in range(5):
            with pytest.raises(ModelNotFound, match=r"no model 'x'; there are: a, b, c"):
                await house.catalog.find("x", anybody)
        assert house.listed.looks == 2
        house.listed.models = (*house.listed.models, found("x", Path("/m/x.gguf")))
        house.now += PAUSE
        assert (await house.catalog.find("x")).id == "x"

    async def test_a_look_that_had_begun_is_not_the_answer(self, house: House) -> None:
        early = asyncio.create_task(house.catalog.models())
        await asyncio.sleep(0)
        assert house.catalog._looking is not None
        late = [asyncio.create_task(house.catalog.look()) for _ in range(5)]
        await asyncio.gather(early, *late)
        assert house.listed.looks == 2

    @pytest.mark.parametrize(
        ("id", "said"),
        [
            ("A", "did you mean 'a'"),
            ("a.gguf", "did you mean 'a'"),
            ("org/a", "did you mean 'a'"),
            ("something else", "there are: a, b, c"),
        ],
    )
    async def test_names_like_it(self, house: House, id: str, said: str) -> None:
        with pytest.raises(ModelNotFound) as caught:
            await house.catalog.find(id, anybody)
        assert said in caught.value.message

    async def test_a_look_that_fails_is_told(self) -> None:
        class Broken:
            def scan(self, stop: Any) -> Any:
                raise InvalidValue("broken")

        with pytest.raises(InvalidValue):
            await Catalog(Broken()).models()
