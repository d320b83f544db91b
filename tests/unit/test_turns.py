"""One at a time, principals in turn, bounded, and nothing left of those who give up."""

from __future__ import annotations

import asyncio

import pytest

from shimmy_jupyter.engine.turns import Turns
from shimmy_jupyter.errors import QueueFull


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Scene:
    def __init__(self, most: int = 12) -> None:
        self.turns = Turns(most)
        self.order: list[str] = []
        self.inside = 0
        self.go = asyncio.Semaphore(0)

    async def visit(self, name: str) -> None:
        async with self.turns.turn(name[0]):
            self.inside += 1
            assert self.inside == 1
            self.order.append(name)
            try:
                await self.go.acquire()
            finally:
                self.inside -= 1

    def start(self, names: str) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.visit(name)) for name in names.split()]

    async def finish(self, tasks: list[asyncio.Task[None]]) -> None:
        await settle()
        for _ in tasks:
            self.go.release()
            await settle()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_principals_take_turns() -> None:
    scene = Scene()
    await scene.finish(scene.start("a1 a2 a3 a4 b1 b2 c1"))
    assert scene.order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_one_leaves_places_for_others() -> None:
    scene = Scene(most=8)
    tasks = scene.start("a0 " + " ".join(f"a{i}" for i in range(1, 9)) + " b1")
    await settle()
    full = [t for t in tasks if t.done() and isinstance(t.exception(), QueueFull)]
    assert full == tasks[7:9]
    await scene.finish(tasks)
    assert "b1" in scene.order[:3]


async def test_full_is_full() -> None:
    scene = Scene(most=1)
    tasks = scene.start("a1 b1 c1")
    await settle()
    with pytest.raises(QueueFull):
        await tasks[2]
    await scene.finish(tasks)


@pytest.mark.parametrize("when", ["waiting", "its turn", "inside"])
async def test_giving_up(when: str) -> None:
    scene = Scene()
    first, second, third = scene.start("a1 a2 b1")
    await settle()
    if when == "waiting":
        second.cancel()
    elif when == "its turn":
        scene.go.release()
        await asyncio.sleep(0)
        second.cancel()
    else:
        first.cancel()
    await settle()
    await scene.finish([first, second, third])
    # A place that comes free is the next principal's, even of those who came later.
    assert set(scene.order[1:]) == ({"a2", "b1"} if when == "inside" else {"b1"})
    assert not scene.turns._waiting
    assert (scene.turns._count, scene.turns._taken) == (0, False)


@pytest.mark.parametrize("gone", [{"a2"}, {"a2", "b1"}, {"a2", "a3", "b1"}])
async def test_whoever_gives_up_just_when_it_is_their_turn_is_passed_over(gone: set[str]) -> None:
    scene = Scene()
    tasks = dict(zip(["a1", "a2", "a3", "b1"], scene.start("a1 a2 a3 b1"), strict=True))
    await settle()
    scene.go.release()  # a1 passes its turn on before they hear of being cancelled
    for name in gone:
        tasks[name].cancel()
    await scene.finish([task for name, task in tasks.items() if name not in gone])
    assert set(scene.order) == set(tasks) - gone
    assert all(tasks[name].cancelled() for name in gone)
    await scene.finish(scene.start("c1"))
    assert scene.order[-1] == "c1"


async def test_a_turn_is_kept_until_its_work_is_done_whoever_gives_up() -> None:
    turns, order = Turns(8), list[str]()
    done = asyncio.Event()

    async def slow() -> None:
        order.append("begun")
        await done.wait()
        order.append("done")
        raise ValueError("nobody is there to see it")

    async def quick() -> str:
        order.append("next")
        return "answer"

    first = asyncio.create_task(turns.keep("a", slow))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = asyncio.create_task(turns.keep("b", quick))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert order == ["begun"]
    done.set()
    assert await second == "answer"
    assert order == ["begun", "done", "next"]
