"""Which models leave memory.

Cases: idle for long enough, just not, busy; nothing needed; one that suffices; the least recently used
first; those nobody uses before those in use; none that need not; not even all; any mix (properties).
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from shimmy_jupyter.models.residency import Held, leaving, unused


def held(*given: tuple[int, float, bool]) -> list[Held[int]]:
    return [Held(i, size, used, busy) for i, (size, used, busy) in enumerate(given)]


ANY = st.lists(st.tuples(st.integers(1, 100), st.floats(0, 100), st.booleans()), max_size=8).map(
    lambda given: held(*given)
)


def test_unused_for_long() -> None:
    models = held((1, 0.0, False), (1, 0.1, False), (1, 0.0, True))
    assert unused(models, 10.0, 10.0) == [0]
    assert unused(models, 9.9, 10.0) == []


def test_nothing_leaves_that_need_not() -> None:
    assert leaving(held((5, 1.0, False)), 0) == []
    assert leaving(held((5, 1.0, False), (5, 2.0, False)), 5) == [0]
    # The older one alone would not do, and is not needed beside the newer one.
    assert leaving(held((1, 1.0, False), (9, 2.0, False)), 9) == [1]


def test_in_use_last() -> None:
    models = held((5, 1.0, True), (5, 9.0, False), (5, 2.0, True))
    assert leaving(models, 5) == [1]
    assert leaving(models, 6) == [1, 0]
    # Where one in use would do alone, one that nobody uses is not spared for it.
    assert leaving(held((3, 1.0, False), (9, 2.0, True)), 9) == [1]


def test_not_even_all() -> None:
    assert leaving(held((5, 1.0, False), (4, 2.0, True)), 10) is None
    assert leaving([], 1) is None


@given(ANY, st.integers(0, 400))
def test_enough_and_no_more(models: list[Held[int]], shortfall: int) -> None:
    chosen = leaving(models, shortfall)
    if chosen is None:
        assert sum(one.size_bytes for one in models) < shortfall
        return
    sizes = {one.key: one.size_bytes for one in models}
    freed = sum(sizes[key] for key in chosen)
    assert freed >= shortfall
    assert len(set(chosen)) == len(chosen)
    assert all(freed - sizes[key] < shortfall for key in chosen)


@given(ANY, st.integers(0, 400))
def test_nobody_is_disturbed_without_need(models: list[Held[int]], shortfall: int) -> None:
    chosen = leaving(models, shortfall)
    idle = sum(one.size_bytes for one in models if not one.busy)
    if chosen is not None and idle >= shortfall:
        assert not any(models[key].busy for key in chosen)
