"""Long loops on the event loop: every item, in order, and others have their turns."""

from __future__ import annotations

import asyncio

import pytest

from shimmy_jupyter.offloop import in_turns


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 2600])
async def test_every_item_once_and_in_order(count: int) -> None:
    assert [item async for item in in_turns(range(count))] == list(range(count))


async def test_others_have_turns_between() -> None:
    had = 0

    async def other() -> None:
        nonlocal had
        while True:
            had += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    seen = [had async for _ in in_turns(range(2600))]
    beside.cancel()
    assert (seen[0], seen[-1]) == (0, 5)
    assert max(seen.count(turn) for turn in seen) == 500
