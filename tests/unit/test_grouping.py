"""Which rows share a native call."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.grouping import calls
from shimmy_jupyter.core.messages import Row


def row(slot: int, tokens: int) -> Row:
    return Row(slot, 0, tuple(range(tokens)), sample=True)


def test_company_in_a_call() -> None:
    """Rows that decode share a call; prompts share one only while they stay small together."""

    def shared(*sizes: int) -> list[list[int]]:
        rows = tuple(row(slot, size) for slot, size in enumerate(sizes))
        return [[len(r.tokens) for r in call] for call in calls(rows)]

    assert shared() == []
    assert shared(1, 1, 1) == [[1, 1, 1]]
    assert shared(1, 20, 1, 30, 20) == [[1, 1], [20, 30], [20]]
    assert shared(63) == [[63]]
    assert shared(2, 62) == [[2], [62]]
    assert shared(100, 200) == [[100], [200]]


@given(st.lists(st.integers(1, 100), max_size=40))
def test_every_row_is_in_one_call_and_large_ones_are_alone(sizes: list[int]) -> None:
    rows = tuple(row(slot, size) for slot, size in enumerate(sizes))
    grouped = calls(rows)
    assert sorted(r.slot for call in grouped for r in call) == list(range(len(sizes)))
    for call in grouped:
        lengths = [len(r.tokens) for r in call]
        assert len(call) == 1 or sum(lengths) < 64 or set(lengths) == {1}
        assert not (1 in lengths and max(lengths) > 1)
