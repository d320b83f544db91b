"""Models that keep crashing: three crashes within ten minutes lock a file up, and for how long.

Cases: two crashes; three; the end of its time, to the second; crashes spread over more than the
time; a file that changes; a missing one; the pool's state and error, and its load when time is over.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from shimmy_jupyter.errors import EngineCrashed, ModelLoadFailed
from shimmy_jupyter.models.lifecycle import ModelPool
from shimmy_jupyter.models.quarantine import CRASHES, WINDOW, Quarantine
from shimmy_jupyter.models.sources import Found
from shimmy_jupyter.types import Failure

from ..offered import catalog, found


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a model")
    return path


def crash(quarantine: Quarantine, path: Path, times: int = CRASHES) -> None:
    for i in range(times):
        quarantine.record(path, f"reason {i}")


def test_two_crashes_are_forgiven(clock: Clock, file: Path) -> None:
    quarantine = Quarantine(clock)
    assert quarantine.reason(file) is None
    crash(quarantine, file, CRASHES - 1)
    assert quarantine.reason(file) is None


def test_three_lock_it_up_and_say_why(clock: Clock, file: Path) -> None:
    quarantine = Quarantine(clock)
    crash(quarantine, file)
    reason = quarantine.reason(file)
    assert reason is not None
    assert "3 times within 10 minutes" in reason
    assert "reason 2" in reason
    assert "in 10 minutes" in reason
    assert str(file.parent) not in reason
    assert quarantine.reason(file.with_name("other.gguf")) is None


def test_it_ends_after_its_time(clock: Clock, file: Path) -> None:
    quarantine = Quarantine(clock)
    crash(quarantine, file)
    clock.now += WINDOW - 1
    assert quarantine.reason(file) is not None
    clock.now += 1
    assert quarantine.reason(file) is None
    crash(quarantine, file, 1)
    assert quarantine.reason(file) is None


def test_crashes_far_apart_do_not_add_up(clock: Clock, file: Path) -> None:
    quarantine = Quarantine(clock)
    for _ in range(3 * CRASHES):
        quarantine.record(file, "again")
        assert quarantine.reason(file) is None
        clock.now += WINDOW / (CRASHES - 1)


@pytest.mark.parametrize("change", ["touched", "longer", "gone"])
def test_a_file_that_changes_is_free(change: str, clock: Clock, file: Path) -> None:
    quarantine = Quarantine(clock)
    crash(quarantine, file)
    facts = file.stat()
    if change == "touched":
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    elif change == "longer":
        file.write_bytes(b"another model")
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    else:
        file.unlink()
    assert quarantine.reason(file) is None


async def get(pool: ModelPool[Crashing]) -> Crashing:
    async with pool.use("m") as model:
        return model


class Crashing:
    """A resident whose engine has ended by the time it is asked again."""

    failure = Failure(EngineCrashed.code, "the engine's process crashed (SIGSEGV)")
    active = memory_bytes = mapped_bytes = context_size = 0

    async def close(self) -> None:
        pass


async def test_the_pool_says_so_until_it_is_over(clock: Clock, file: Path) -> None:
    loads = 0

    async def load(_: Found) -> Crashing:
        nonlocal loads
        loads += 1
        return Crashing()

    entry = found("m", file)
    pool = ModelPool(catalog(entry), load, clock=clock)
    for _ in range(CRASHES):
        await get(pool)
    with pytest.raises(ModelLoadFailed, match=r"m is quarantined: it crashed 3 times.*SIGSEGV"):
        await get(pool)
    (status,) = await pool.status()
    assert status.state == "quarantined"
    assert "SIGSEGV" in str(status.error)
    clock.now += WINDOW
    assert pool.status_of(entry).state == "available"
    await asyncio.gather(get(pool), get(pool))
    assert loads == CRASHES + 1
    await pool.close()


async def test_crashes_while_loading_count(clock: Clock, file: Path) -> None:
    async def load(_: Found) -> Crashing:
        raise EngineCrashed("the engine's process crashed (SIGILL)")

    pool = ModelPool(catalog(found("m", file)), load, clock=clock)
    for _ in range(CRASHES):
        with pytest.raises(ModelLoadFailed, match="m: the engine's process crashed"):
            await get(pool)
    with pytest.raises(ModelLoadFailed, match="quarantined"):
        await get(pool)
    await pool.close()
