"""Threads for texts: a stack for each length, of a size that every system takes."""

from __future__ import annotations

import threading

import pytest

from shimmy_jupyter.engine.deep import MAX_TEXT_BYTES, in_deep_thread

MACOS_PAGE = 16 << 10
"""`pthread_attr_setstacksize` takes nothing else there."""


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 127, 128, 4095, 100_001, MAX_TEXT_BYTES])
async def test_whole_pages(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    set_size = threading.stack_size

    def stack_size(wanted: int = 0) -> int:
        asked.append(wanted)
        return set_size(wanted)

    monkeypatch.setattr(threading, "stack_size", stack_size)
    assert await in_deep_thread(lambda: "read", size) == "read"
    assert [wanted % MACOS_PAGE for wanted in asked] == [0, 0]
    assert asked[0] > 300 * size
    assert asked[1] == 0
